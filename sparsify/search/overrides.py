"""A selection as the overrides of a recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sparsify.recipe import Recipe
from sparsify.search.choices import Choice, Unit, override_for


def recipe_with(recipe: Recipe, units: Sequence[Unit], choices: Sequence[Choice], blocks: Sequence[str]) -> Recipe:
    """The recipe that gives each unit its choice: one override for all units of a kind and choice, in the order of the model.

    blocks: full names of the decoder blocks
    """
    together: dict[tuple[str, Choice], list[Unit]] = {}
    kinds: dict[str, int] = {}
    for unit, choice in zip(units, choices, strict=True):
        kind = unit.kind(blocks[unit.block])
        kinds[kind] = kinds.get(kind, 0) + 1
        together.setdefault((kind, choice), []).append(unit)
    added = []
    for (kind, choice), members in together.items():
        every = len(members) == kinds[kind] == len(blocks)
        override = override_for(recipe, choice, _pattern([unit.modules for unit in members], members, blocks, every))
        if override is not None:
            added.append(override)
    return recipe.model_copy(update={"overrides": [*recipe.overrides, *added]})


def _pattern(modules: Sequence[Sequence[str]], units: Sequence[Unit], blocks: Sequence[str], every: bool) -> str:
    """The linears of units of one kind as a regular expression over full names. every: all blocks have such a unit."""
    first = blocks[units[0].block]
    parent, _, _ = first.rpartition(".")
    inside = [module.removeprefix(first + ".") for module in modules[0]]
    numbers = [blocks[unit.block].rpartition(".")[2] for unit in units]
    block = r"\d+" if every else numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
    stems = {name.rpartition(".")[0] for name in inside}
    if len(inside) == 1:
        linear = _escaped(inside[0])
    else:
        (stem,) = stems
        leaves = "|".join(_escaped(name.rpartition(".")[2]) for name in inside)
        linear = f"{_escaped(stem + '.') if stem else ''}({leaves})"
    return f"re:^{_escaped(parent + '.')}{block}[.]{linear}$"


def _escaped(name: str) -> str:
    """A name as a regular expression that reads well in YAML."""
    return re.escape(name).replace("\\.", "[.]").replace("\\_", "_").replace("\\-", "-")
