"""Names of tensors and modules in the model and in its checkpoint, which are not always the same, and how each is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sparsify.compiler.plan import Plan
from sparsify.errors import CheckpointError, NumericalError
from sparsify.model.checkpoint import DTYPES
from sparsify.model.finite import all_finite
from sparsify.model.linear import CODE_RANGE, LinearWeights

RANGE = {dtype: math.frexp(torch.finfo(dtype).max)[1] for dtype in DTYPES.values() if dtype.is_floating_point}
"""The power of 2 that the values of a floating type stay below."""
OUTSIDE = "outside"  # the part that holds what lies outside of the blocks


def part_name(index: int) -> str:
    return f"block-{index:04d}"


def stored(plan: Plan, name: str, tensor: Tensor) -> Tensor:
    """A tensor that is not compressed in the type that it has in the output. name: its own in the checkpoint.

    Raises NumericalError for NaN or Inf in it, and for a value that leaves the range of that type.
    """
    if not tensor.is_floating_point():
        return tensor
    kept = tensor.to(plan.stored_dtype(name))
    if not all_finite(kept):
        raise NumericalError(_why_not_finite(name, tensor, kept.dtype))
    return kept


def refuse_unstorable(plan: Plan) -> None:
    """Before anything is written: NumericalError names the first tensor that the output could not hold as a finite number.

    Reads what is cast to a type of smaller range, and what keeps a wider type than the model; in all else nothing can
    overflow, and NaN and Inf are named when it is compressed or written. So is a float32 value in the last 0.4% of its
    range, which bfloat16 has not: no model has one, and looking for it would read every float32 model twice.
    """
    schemes = {plan.linears[module].source: scheme for module, scheme in plan.schemes.items()}
    if plan.head is not None:
        schemes.setdefault(plan.head.head.source, plan.head.scheme)
    for name in plan.checkpoint.names():
        dtype = plan.checkpoint.dtype(name)
        if name not in plan.model.sources or not dtype.is_floating_point:
            continue
        scheme = schemes.get(name)
        target = plan.store if scheme is not None else plan.stored_dtype(name)
        narrowed = RANGE[target] < RANGE[dtype]
        if not narrowed and (scheme is not None or target.itemsize <= 2):
            continue
        tensor = plan.checkpoint.tensor(name)
        if scheme is not None and scheme.quantize and all_finite(tensor):
            tensor = tensor / CODE_RANGE[scheme.bits][1]  # a scale is stored, not the weight
        if not all_finite(tensor.to(target)):
            raise NumericalError(_why_not_finite(name, tensor, target))


def _why_not_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> str:
    if not all_finite(tensor):
        return f"{name}: the tensor holds NaN or Inf; the model itself is damaged, get it again"
    kind = str(dtype).removeprefix("torch.")
    hint = "set export.dtype to bfloat16" if dtype == torch.float16 else "no 16-bit type holds it"
    return (
        f"{name}: its largest value {tensor.abs().max().item():g} leaves the range of {kind}, which ends at "
        f"{torch.finfo(dtype).max:g}; {hint}"
    )


def in_store(plan: Plan, module: str, linear: LinearWeights) -> LinearWeights:
    """A linear that is only trained is stored like any other tensor; what is compressed already stays to the bit."""
    if linear.bits < 16 or linear.pattern != "dense":
        return linear
    assert linear.values is not None
    bias = None if linear.bias is None else stored(plan, f"{module}.bias", linear.bias)
    return replace(linear, values=stored(plan, f"{module}.weight", linear.values), bias=bias)


def exported_name(plan: Plan, module: str) -> str:
    """The name of a linear in the checkpoint, which is not always its name in transformers. CheckpointError for none of the
    model's, which can only come from a record."""
    if module not in plan.linears:
        raise CheckpointError(
            f"a record of the run names {module}, which is no linear of the model; remove the directory that the run was "
            "interrupted in, and start again"
        )
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
    return linears, {name: stored(plan, name, tensor) for name, tensor in tensors.items()}


def block_parameters(plan: Plan, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a finished block that are parameters of the model as they are, by their names there."""
    named = {source: target for source, (target, same) in plan.model.sources.items() if same}
    parameters = {f"{plan.model.blocks[index]}.{name}" for name, _ in plan.model.block(index).named_parameters()}
    return {named[name]: tensor for name, tensor in tensors.items() if named.get(name) in parameters}
