"""Putting a basis into the weights of a model: what is computed stays the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsify.basis.structure import Channels, Heads, Norm, gain, offset_over_gain, set_gain


@torch.no_grad()
def set_weight(linear: Any, weight: Tensor, bias: Tensor | None = None) -> None:
    """Give a linear new values, rounded once to its type. weight, bias: float64"""
    linear.weight.copy_(weight)
    if bias is not None and linear.bias is not None:
        linear.bias.copy_(bias)


def _of(linear: Any) -> tuple[Tensor, Tensor | None]:
    bias = linear.bias
    return linear.weight.double(), None if bias is None else bias.double()


@torch.no_grad()
def fold_norm(block: nn.Module, norm: Norm, Q: Tensor) -> None:
    """Move the gain g of a norm into the linears that read it, and turn them: W diag(g) Q.

    An offset b stays with the norm, as Q'(b / g). CheckpointError where a gain is zero and an offset is not.
    """
    module = block.get_submodule(norm.name)
    g, b = gain(module, Q.shape[0])
    for name in norm.readers:
        linear: Any = block.get_submodule(name)
        linear.weight.copy_(linear.weight.double() * g.to(Q.device) @ Q)
    set_gain(module, Q.t() @ offset_over_gain(norm.name, g, b).to(Q.device))


@torch.no_grad()
def turn_embedding(table: Any, Q: Tensor) -> None:
    """E Q: for tables of tokens and positions, each row of which is added to the residual stream."""
    table.weight.copy_(table.weight.double() @ Q)


@torch.no_grad()
def turn_writer(linear: Any, Q: Tensor) -> None:
    """Q'W and Q'b: for what writes the residual stream."""
    weight, bias = _of(linear)
    set_weight(linear, Q.t() @ weight, None if bias is None else Q.t() @ bias)


@torch.no_grad()
def turn_heads(block: nn.Module, heads: Heads, Q: Tensor) -> None:
    """Q'V for each value head, and the columns of the output projection times Q. Q: float64 [value_heads, h, h]"""
    size = Q.shape[-1]
    values: Any = block.get_submodule(heads.values)
    output: Any = block.get_submodule(heads.output)
    weight, bias = _of(values)
    turned = torch.einsum("vij,vik->vjk", Q, weight.unflatten(0, (heads.value_heads, size))).flatten(0, 1)
    if bias is not None:
        bias = torch.einsum("vij,vi->vj", Q, bias.unflatten(0, (heads.value_heads, size))).flatten()
    set_weight(values, turned, bias)
    each = Q.repeat_interleave(heads.query_heads // heads.value_heads, 0)
    columns = output.weight.double().unflatten(1, (heads.query_heads, size))
    set_weight(output, torch.einsum("nqi,qij->nqj", columns, each).flatten(1))


@torch.no_grad()
def order_channels(block: nn.Module, channels: Channels, order: Tensor) -> None:
    """Rows before the activation and columns behind it, in a new order. order: int64 [K]"""
    count = order.numel()
    for name, parts in channels.before.items():
        linear = block.get_submodule(name)
        rows = torch.cat([order + part * count for part in range(parts)])
        weight, bias = _of(linear)
        set_weight(linear, weight[rows], None if bias is None else bias[rows])
    after = block.get_submodule(channels.after)
    set_weight(after, _of(after)[0][:, order])
