"""What the backward pass of a training needs of the forward pass, counted on tensors without numbers."""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from sparsify.model.capture import capture_calls, without_numbers
from sparsify.model.footprint import kept_for_backward
from sparsify.model.linear_groups import by_kind

if TYPE_CHECKING:
    from sparsify.compiler.plan import Plan

FLOAT = 4  # bytes of a parameter, and of each of its gradient and its two moments
MASK = 1 / 8  # bytes per weight of a mask that is kept as bits


def block_activations(
    plan: Plan, compressed: set[str], norms: bool, dtype: torch.dtype, shape: tuple[int, int]
) -> tuple[list[int], int]:
    """Bytes that stay of the forward pass of every block until its backward pass, and those of a hidden state, in training.

    compressed: names of linears that are trained; norms: whether norms and biases are; dtype: of products; shape: rows and
    tokens per row of a micro-batch
    """
    found: list[int] = []
    wide = replace(plan.model, model=copy.deepcopy(plan.model.model).float())
    with suppress(Exception), without_numbers(wide) as hollow:
        hidden, calls = capture_calls(hollow, torch.zeros(shape, dtype=torch.long))

        def look(index: int) -> int:
            block, place = hollow.block(index), hollow.blocks[index] + "."
            inside = {name.removeprefix(place) for name in compressed if name.startswith(place)}
            _stand_in(block, inside, norms, dtype)
            return kept_for_backward(block, hidden, calls[index], dtype)

        found = by_kind(hollow, look)
    tokens = math.prod(shape)
    width = min(planned.shape[1] for planned in plan.linears.values())
    if not found:
        widest = max(planned.shape[1] for planned in plan.linears.values())
        found = [tokens * dtype.itemsize * (20 * width + 10 * widest)] * len(plan.model.blocks)
    return found, tokens * FLOAT * width


def _stand_in(block: nn.Module, compressed: set[str], norms: bool, dtype: torch.dtype) -> None:
    """Give a block without numbers the linears of training: weights that are there in the type of the products."""
    for parameter in block.parameters():
        parameter.requires_grad_(norms and parameter.dim() == 1)
    for name, module in block.named_modules():
        if name in compressed and isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().to(dtype))  # which asks for a gradient
