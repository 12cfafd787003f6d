"""A compressed linear that can be trained: its zeros stay zeros, and what it multiplies with is what will be exported.

Rounding has no useful gradient, so it is passed straight through (arXiv 1308.3432); the scale learns as in LSQ
(arXiv 1902.08153, equation 3): a weight inside the grid's range pulls it by its rounding error, a clipped one by its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.model.linear import CODE_RANGE, LinearWeights


class _OnGrid(torch.autograd.Function):
    """W, scale -> scale * clamp(round(W / scale)) inside the mask. W: [N, K]; scale: [N, K/G]; mask: bool [N, K] or None."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, scale: Tensor, mask: Tensor | None, low: int, high: int) -> Tensor:
        ctx.save_for_backward(W, scale, mask)
        ctx.range = (low, high)
        groups = _groups(W, scale)
        rounded = (groups / scale[:, :, None]).round_().clamp_(low, high).mul_(scale[:, :, None]).view_as(W)
        return rounded if mask is None else rounded.mul_(mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        W, scale, mask = ctx.saved_tensors
        low, high = ctx.range
        gradient = gradients[0] if mask is None else gradients[0] * mask
        ratio = _groups(W, scale) / scale[:, :, None]
        code = ratio.round().clamp_(low, high)
        inside = (ratio >= low - 0.5) & (ratio <= high + 0.5)
        of_group = gradient.reshape(ratio.shape)
        d_scale = (torch.where(inside, code - ratio, code) * of_group).sum(2)
        return (of_group * inside).view_as(W), d_scale, None, None, None


class _Stored(torch.autograd.Function):
    """x rounded to the type it will be stored in; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


def _groups(W: Tensor, scale: Tensor) -> Tensor:
    """[N, K] as [N, K/G, G], the weights of each scale together."""
    n, k = W.shape
    return W.reshape(n, scale.shape[1], k // scale.shape[1])


class TrainableLinear(nn.Module):
    """y = x What' + bias, where What is what `export` would write at this moment.

    weight: parameter [N, K] float32, the weights before rounding; what lies outside the mask has no effect
    scale:  parameter [N, K/G] float32, or None for 16-bit weights
    mask:   bool buffer [N, K], True where a weight is kept, never changed; None for the pattern "dense"
    """

    def __init__(self, linear: LinearWeights):
        super().__init__()
        self.bits, self.pattern, self.group_size, self.store = (
            linear.bits, linear.pattern, linear.group_size, linear.dtype
        )  # fmt: skip
        self.weight = nn.Parameter(linear.dense(torch.float32))
        self.scale = None if linear.scale is None else nn.Parameter(linear.scale.float())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.float())
        self.register_buffer("mask", None if linear.pattern == "dense" else kept_positions(linear), persistent=True)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def effective(self) -> Tensor:
        """The weight that the exported linear will have, [N, K] float32, differentiable in weight and scale."""
        mask: Tensor | None = self.mask  # type: ignore[assignment]
        if self.scale is None:
            kept = self.weight if mask is None else self.weight * mask
            return _Stored.apply(kept, self.store)  # type: ignore[no-any-return]
        scale = _Stored.apply(self._positive_scale(), self.store)
        return _OnGrid.apply(self.weight, scale, mask, *CODE_RANGE[self.bits])  # type: ignore[no-any-return]

    def _positive_scale(self) -> Tensor:
        assert self.scale is not None
        return self.scale.clamp(min=torch.finfo(self.store).tiny)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.effective().to(x.dtype), bias)

    @torch.no_grad()
    def export(self) -> LinearWeights:
        """The linear as formats write it; `export().dense(torch.float32)` equals `effective()` to the bit."""
        mask: Tensor | None = self.mask  # type: ignore[assignment]
        bias = None if self.bias is None else self.bias.to(self.store)
        common: dict[str, Any] = {
            "bits": self.bits,
            "pattern": self.pattern,
            "group_size": self.group_size,
            "bias": bias,
        }
        if self.scale is None:
            return LinearWeights(**common, values=self.effective().to(self.store))
        scale = self._positive_scale().to(self.store)
        codes = _groups(self.weight, scale).div(scale.float()[:, :, None]).round_().clamp_(*CODE_RANGE[self.bits])
        codes = codes.view_as(self.weight)
        return LinearWeights(**common, codes=(codes if mask is None else codes * mask).to(torch.int8), scale=scale)


def kept_positions(linear: LinearWeights) -> Tensor:
    """The mask of a 2:4 linear: bool [N, K], exactly two of every four inputs.

    Where fewer than two weights of a group are non-zero (a kept weight that rounded to zero) the first free positions
    are taken, so that training may use all that the format stores.
    """
    stored = linear.values if linear.codes is None else linear.codes
    assert stored is not None
    quads = (stored != 0).reshape(-1, 4)
    first_two = quads.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :2]
    return torch.zeros_like(quads).scatter_(1, first_two, True).reshape(stored.shape)


def make_trainable(module: nn.Module, linears: Mapping[str, LinearWeights]) -> dict[str, TrainableLinear]:
    """Put a TrainableLinear in place of each named submodule; the rest of `module` is left as it is. Returns them by name."""
    placed = {}
    for name, weights in linears.items():
        old = module.get_submodule(name)
        placed[name] = TrainableLinear(weights).to(next(old.parameters()).device)
        module.set_submodule(name, placed[name])
    return placed
