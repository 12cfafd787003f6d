"""What the passes ask of one linear: the passes themselves, changed by the overrides that name it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from sparsify.recipe.patterns import ignored_by, last_components
from sparsify.recipe.schema import Override, Prune, PruneChange, Quantize, QuantizeChange, Recipe
from sparsify.recipe.wording import closest

Step = TypeVar("Step", Prune, Quantize)
MANY = 12  # kinds of linears that an error lists


@dataclass(frozen=True)
class LinearSettings:
    """prune, quantize: None leaves that half out; dense: why, where both are left out."""

    prune: Prune | None
    quantize: Quantize | None
    dense: str | None = None


def settings_of(recipe: Recipe, module: str) -> LinearSettings:
    """What becomes of the linear `module`. Overrides apply in order: null leaves a half out, a later change begins again at
    the pass."""
    if ignored_by(module, recipe.ignore):
        return LinearSettings(None, None, "the recipe ignores it")
    prune, quantize = recipe.prune, recipe.quantize
    for override in overrides_of(recipe, module):
        prune = _changed(prune, recipe.prune, override.prune)
        quantize = _changed(quantize, recipe.quantize, override.quantize)
    return LinearSettings(prune, quantize, None if prune or quantize else "an override leaves it dense")


def overrides_of(recipe: Recipe, module: str) -> list[Override]:
    """The overrides that name `module`, in order."""
    return [override for override in recipe.overrides if ignored_by(module, [override.match])]


def _changed(now: Step | None, step: Step | None, change: PruneChange | QuantizeChange | None) -> Step | None:
    """What `change` leaves of `now`, the settings so far. step: those of the pass."""
    if change is None:
        return None
    values = change.changes()
    base = step if now is None and values else now
    return base.model_copy(update=values) if base is not None and values else base


def override_problem(recipe: Recipe, modules: Iterable[str], model: str, head: str = "lm_head") -> str | None:
    """Why an override does nothing to the linears of a model, or None. modules: all of them by name; head: the output head."""
    names = list(modules)
    for index, override in enumerate(recipe.overrides):
        pattern, where = override.match, f"overrides.{index}"
        matched = [name for name in names if ignored_by(name, [pattern])]
        if not matched:
            if ignored_by(head, [pattern]):
                return (
                    f"{where}: '{pattern}' names the output head, which export.head sets, and no linear of the blocks"
                )
            return f"{where}: '{pattern}' matches no linear of {model}{_nearby(pattern, names)}"
        ignored = {ignored_by(name, recipe.ignore) for name in matched}
        if None not in ignored:
            return f"{where}: '{pattern}' matches only linears that {', '.join(map(str, ignored))} under ignore leaves dense"
    return None


def _nearby(pattern: str, names: list[str]) -> str:
    """What the writer of `pattern` may have meant, and what linears there are."""
    kinds = list(dict.fromkeys(last_components(name, 2) for name in names))
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    word = pattern.removeprefix("re:").strip("*.^$")
    parts = word.count(".") + 1
    known = leaves if parts == 1 else kinds if parts == 2 else names
    listed = ", ".join(kinds[:MANY]) + (", ..." if len(kinds) > MANY else "")
    return f"{closest(word, known) or ';'} its linears are {listed}"
