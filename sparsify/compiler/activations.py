"""What the backward pass of a training needs of the forward pass, counted on tensors without numbers."""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsify.model.capture import capture_calls, without_numbers
from sparsify.model.footprint import kept_for_backward
from sparsify.model.linear_groups import kind_of

if TYPE_CHECKING:
    from sparsify.compiler.plan import Plan

FLOAT = 4  # bytes of a parameter, and of each of its gradient and its two moments
MASK = 1


def block_activations(
    plan: Plan, compressed: set[str], norms: bool, dtype: torch.dtype, shape: tuple[int, int]
) -> tuple[list[int], int]:
    """Bytes that stay of the forward pass of every block until its backward pass, and those of a hidden state, in training.

    compressed: names of linears that are trained; norms: whether norms and biases are; dtype: of products; shape: rows and
    tokens per row of a micro-batch
    """
    found: list[int] = []
    known: dict[Any, int] = {}
    wide = replace(plan.model, model=copy.deepcopy(plan.model.model).float())
    with suppress(Exception), without_numbers(wide) as hollow:
        hidden, calls = capture_calls(hollow, torch.zeros(shape, dtype=torch.long))
        for index, call in enumerate(calls):
            block = hollow.block(index)
            kind = kind_of(block)
            if kind not in known:
                place = hollow.blocks[index] + "."
                _stand_in(
                    block, {name.removeprefix(place) for name in compressed if name.startswith(place)}, norms, dtype
                )
                known[kind] = kept_for_backward(block, hidden, call, dtype)
            found.append(known[kind])
    tokens = math.prod(shape)
    width = min(planned.shape[1] for planned in plan.linears.values())
    if len(found) < len(plan.model.blocks):
        widest = max(planned.shape[1] for planned in plan.linears.values())
        found = [tokens * dtype.itemsize * (20 * width + 10 * widest)] * len(plan.model.blocks)
    return found, tokens * FLOAT * width


def _stand_in(block: nn.Module, compressed: set[str], norms: bool, dtype: torch.dtype) -> None:
    """Give a block without numbers the linears of training: weights that are there in the type of the products."""
    for name, module in block.named_modules():
        if name in compressed and isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().to(dtype))
    for parameter in block.parameters():
        parameter.requires_grad_(norms and parameter.dim() == 1)
    for name, module in block.named_modules():
        if name in compressed and isinstance(module, nn.Linear):
            module.weight.requires_grad_(True)
