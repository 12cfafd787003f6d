"""What a linear can become, which linears choose together, and the bytes of each choice."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from sparsify.compiler.estimate import stored_bytes
from sparsify.compiler.merged import merged_units
from sparsify.compiler.plan import Plan
from sparsify.compiler.planning import keep_zeros, scheme_of
from sparsify.errors import RecipeError
from sparsify.recipe import Override, QuantizeChange, Recipe, settings_of
from sparsify.recipe.per_linear import overrides_of
from sparsify.recipe.schema.oneshot import GroupSize
from sparsify.solver.solve import Scheme


@dataclass(frozen=True)
class Choice:
    """2:4 or dense, with 16, 8 or 4 bits. group_size: inputs per scale, None for that of the recipe."""

    pruned: bool
    bits: int
    group_size: GroupSize | None = None

    @property
    def name(self) -> str:
        """`2:4-4`, `dense-16`, `2:4-4-channel`: on the command line and in JSON."""
        group = "" if self.group_size is None else f"-{self.group_size}"
        return f"{'2:4' if self.pruned else 'dense'}-{self.bits}{group}"

    def describe(self) -> str:
        """`2:4, 4 bits`; `2:4, 4 bits, one scale per channel`"""
        group = "" if self.group_size is None else f", {group_in_words(self.group_size)}"
        return f"{'2:4' if self.pruned else 'dense'}, {self.bits} bits{group}"


CHOICES = tuple(Choice(pruned, bits) for pruned in (False, True) for bits in (16, 8, 4))
DENSE = CHOICES[0]
GROUP_SIZES: dict[str, GroupSize] = {str(size): size for size in get_args(GroupSize)}


def group_in_words(size: GroupSize) -> str:
    """`groups of 64`, `one scale per channel`"""
    return "one scale per channel" if size == "channel" else f"groups of {size}"


def choice_named(name: str) -> Choice:
    """The choice of a name; RecipeError for an unknown one."""
    found = re.fullmatch(rf"(.+?-\d+)(?:-({'|'.join(GROUP_SIZES)}))?", name)
    for choice in CHOICES:
        if found and choice.name == found[1] and (found[2] is None or choice.bits < 16):
            return replace(choice, group_size=GROUP_SIZES[found[2]] if found[2] else None)
    raise RecipeError(
        f"choice '{name[:100]}' is unknown; choose from {', '.join(choice.name for choice in CHOICES)}; 8 and 4 bits may name "
        f"their group size, as in 2:4-4-channel ({', '.join(GROUP_SIZES)})"
    )


def choices_of(recipe: Recipe) -> list[Choice]:
    """The choices that overrides of this recipe can express: 2:4 needs its prune pass, 8 and 4 bits its quantize pass."""
    return [
        choice
        for choice in CHOICES
        if (recipe.prune is not None or not choice.pruned) and (recipe.quantize is not None or choice.bits == 16)
    ]


def own_choice(recipe: Recipe) -> Choice:
    """What the passes of the recipe make of a linear that no override names."""
    return Choice(recipe.prune is not None, 16 if recipe.quantize is None else recipe.quantize.bits)


def override_for(recipe: Recipe, choice: Choice, match: str) -> Override | None:
    """The override that gives the linears that `match` names this choice; None where the passes do so by themselves."""
    changes: dict[str, Any] = {}
    if recipe.prune is not None and not choice.pruned:
        changes["prune"] = None
    if recipe.quantize is not None and choice.bits == 16:
        changes["quantize"] = None
    elif recipe.quantize is not None:
        wanted = {"bits": choice.bits, "group_size": choice.group_size or recipe.quantize.group_size}
        if other := {name: value for name, value in wanted.items() if value != getattr(recipe.quantize, name)}:
            changes["quantize"] = QuantizeChange.model_validate(other)
    return Override(match=match, **changes) if changes else None


@dataclass(frozen=True)
class Unit:
    """Linears that choose together, because vLLM loads them as one; most units are one linear.

    modules: their full names; schemes: what each choice makes of them, None for a linear that it leaves dense;
    nbytes: of all of them together in the export format, by choice. Choices that come to the same thing stand once.
    """

    block: int
    modules: tuple[str, ...]
    weights: int
    schemes: Mapping[Choice, tuple[Scheme | None, ...]]
    nbytes: Mapping[Choice, int]

    @property
    def name(self) -> str:
        """`model.layers.0.self_attn.q_proj+k_proj+v_proj`"""
        return "+".join([self.modules[0], *(module.rpartition(".")[2] for module in self.modules[1:])])

    @property
    def choices(self) -> list[Choice]:
        return [*self.schemes]

    def kind(self, block: str) -> str:
        """Its name inside of a block: `self_attn.q_proj+k_proj+v_proj`. block: the full name of that block."""
        return self.name.removeprefix(block + ".")


def units_of(plan: Plan, choices: list[Choice]) -> list[Unit]:
    """The units of a plan whose linears are free to choose, in the order of the model.

    A linear that an override of the recipe names keeps what that says, and what is ignored or cannot be compressed stays dense.
    """
    free = [
        module
        for module, planned in plan.linears.items()
        if planned.scheme is not None and not overrides_of(plan.recipe, module)
    ]
    schemes = {choice: _schemes(plan, choice) for choice in choices}
    units = []
    for modules in merged_units(plan.linears):
        if not set(modules) <= set(free):
            continue
        kinds: dict[tuple[Scheme | None, ...], Choice] = {}
        for choice in choices:
            kinds.setdefault(tuple(schemes[choice][module] for module in modules), choice)
        by_choice = {choice: scheme for scheme, choice in kinds.items()}
        planned = [plan.linears[module] for module in modules]
        units.append(
            Unit(
                planned[0].block,
                modules,
                sum(p.weights for p in planned),
                by_choice,
                {choice: _nbytes(plan, modules, found) for choice, found in by_choice.items()},
            )
        )
    if not units:
        raise RecipeError(
            "the recipe leaves no linear to choose for: each is ignored, named by one of its overrides, or cannot be compressed"
        )
    return units


def _schemes(plan: Plan, choice: Choice) -> dict[str, Scheme | None]:
    """What a choice makes of every linear of the plan, by module."""
    override = override_for(plan.recipe, choice, "*")
    added = [override] if override is not None else []
    recipe = plan.recipe.model_copy(update={"overrides": [*plan.recipe.overrides, *added]})
    linears = {}
    for module, planned in plan.linears.items():
        scheme = scheme_of(recipe, settings_of(recipe, module), plan.store)
        reason = None if scheme is None else scheme.reason_dense(planned.shape[1])
        asked = None if reason or planned.reason else scheme
        linears[module] = replace(planned, scheme=asked, asked=asked)
    return {module: planned.scheme for module, planned in keep_zeros(replace(plan, linears=linears)).linears.items()}


def _nbytes(plan: Plan, modules: tuple[str, ...], schemes: tuple[Scheme | None, ...]) -> int:
    return sum(linear_bytes(plan, module, scheme) for module, scheme in zip(modules, schemes, strict=True))


def linear_bytes(plan: Plan, module: str, scheme: Scheme | None) -> int:
    """Bytes of one linear, without its bias, in the export format."""
    planned = plan.linears[module]
    if scheme is None:
        return planned.weights * plan.stored_dtype(planned.source).itemsize
    return stored_bytes(scheme, planned.shape, plan)
