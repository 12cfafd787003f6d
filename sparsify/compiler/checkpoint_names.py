"""Names of tensors and modules in the model and in its checkpoint, which are not always the same, and how each is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from sparsify.compiler.plan import Plan
from sparsify.model.linear import LinearWeights

OUTSIDE = "outside"  # the part that holds what lies outside of the blocks


def part_name(index: int) -> str:
    return f"block-{index:04d}"


def stored(plan: Plan, tensor: Tensor) -> Tensor:
    return tensor.to(plan.store) if tensor.is_floating_point() else tensor


def in_store(plan: Plan, linear: LinearWeights) -> LinearWeights:
    """A linear that is only trained is stored like any other tensor; what is compressed already stays to the bit."""
    if linear.bits < 16 or linear.pattern != "dense":
        return linear
    assert linear.values is not None
    bias = None if linear.bias is None else stored(plan, linear.bias)
    return replace(linear, values=stored(plan, linear.values), bias=bias)


def exported_name(plan: Plan, module: str) -> str:
    """The name of a linear in the checkpoint, which is not always its name in transformers."""
    return plan.linears[module].source.removesuffix(".weight")


def by_module(plan: Plan, stored: dict[str, LinearWeights]) -> dict[str, LinearWeights]:
    modules = {exported_name(plan, module): module for module in plan.linears}
    return {modules[name]: linear for name, linear in stored.items()}


def block_tensors(
    plan: Plan, index: int, new: dict[str, LinearWeights], others: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, LinearWeights], dict[str, Tensor]]:
    """A finished block under its names in the checkpoint: compressed linears, and every other tensor as it was unless
    `others` has it, by its name in the model."""
    linears = {exported_name(plan, module): linear for module, linear in new.items()}
    replaced = {plan.linears[module].source for module in new}
    changed = {plan.model.source_of(name): tensor for name, tensor in (others or {}).items()}
    names = [name for name in plan.model.source_names(index) if name not in replaced]
    tensors = {name: changed[name] if name in changed else plan.checkpoint.tensor(name) for name in names}
    return linears, {name: stored(plan, tensor) for name, tensor in tensors.items()}


def block_parameters(plan: Plan, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a finished block that are parameters of the model as they are, by their names there."""
    named = {source: target for source, (target, same) in plan.model.sources.items() if same}
    parameters = {f"{plan.model.blocks[index]}.{name}" for name, _ in plan.model.block(index).named_parameters()}
    return {named[name]: tensor for name, tensor in tensors.items() if named.get(name) in parameters}
