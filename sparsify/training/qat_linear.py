"""A compressed linear that can be trained: its zeros stay zeros, and what it multiplies with is what will be exported.

Rounding has no useful gradient, so it is passed straight through (arXiv 1308.3432); the scale learns as in LSQ
(arXiv 1902.08153, equation 3): a weight inside the grid's range pulls it by its rounding error, a clipped one by its code.
Zero points stay as they are; codes below are counted from them. Masks are kept as bits (`formats.packing.pack_bits`), an eighth of
a byte per weight, and unpacked where they are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.formats.packing import pack_bits, unpack_bits
from sparsify.model.experts import experts_of
from sparsify.model.linear import CODE_RANGE, LinearWeights
from sparsify.training import native_grid

PIECE = 1 << 16  # weights rounded at once on a CPU, so that what lies between two operations stays in the cache


def _bounds(zero: Tensor | None, rows: slice, low: int, high: int) -> tuple[Any, Any]:
    """The codes' range less the zero point, [rows, K/G, 1]; low and high themselves without zero points."""
    return (low, high) if zero is None else (low - zero[rows, :, None].float(), high - zero[rows, :, None].float())


def round_to_grid(
    W: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    low: int,
    high: int,
    zero: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """scale * clamp(round(W / scale)) inside the mask, in `dtype`.

    W: [N, K] float32; scale: [N, K/G] float32; mask: uint8 [N, ceil(K/8)], a bit per weight, or None; low, high: of codes;
    zero: int8 [N, K/G] or None
    """
    if native_grid.available(W, dtype):
        return native_grid.round_to_grid(W, scale, mask, low, high, zero, dtype)
    rounded = torch.empty_like(W)
    for rows in _pieces(W):
        steps = scale[rows, :, None]
        torch.div(_groups(W[rows], scale), steps, out=_groups(rounded[rows], scale))
        _groups(rounded[rows], scale).round_().clamp_(*_bounds(zero, rows, low, high)).mul_(steps)
        if mask is not None:
            rounded[rows].mul_(unpack_bits(mask[rows], W.shape[1]))
    return rounded.to(dtype)


def grid_gradient(
    gradient: Tensor,
    W: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    low: int,
    high: int,
    zero: Tensor | None = None,
    through: bool = False,
) -> tuple[Tensor, Tensor]:
    """From the gradient of `round_to_grid`'s result those of W: [N, K] and of scale: [N, K/G], float32.

    gradient: [N, K], float32 or bfloat16; through: W's passes straight through the mask too
    """
    if native_grid.available(W, gradient.dtype):
        return native_grid.grid_gradient(gradient, W, scale, mask, low, high, zero, through)
    gradient = gradient.float()
    d_weight, d_scale = torch.empty_like(W), torch.empty_like(scale)
    for rows in _pieces(W):
        ratio = _groups(W[rows], scale) / scale[rows, :, None]
        code = ratio.round().clamp_(*_bounds(zero, rows, low, high))
        error = ratio.neg_().add_(code)
        inside = error.abs() <= 0.5
        of_group = gradient[rows] if mask is None else gradient[rows] * unpack_bits(mask[rows], W.shape[1])
        of_group = _groups(of_group, scale)
        of_weight = _groups(gradient[rows], scale) if through else of_group
        torch.mul(of_weight, inside, out=_groups(d_weight[rows], scale))
        torch.sum(torch.where(inside, error, code).mul_(of_group), 2, out=d_scale[rows])
    return d_weight, d_scale


def _pieces(W: Tensor) -> Iterator[slice]:
    """Rows to work on together; all of them where there is no cache to stay in."""
    n, k = W.shape
    step = max(1, PIECE // k) if W.device.type == "cpu" else max(n, 1)
    return (slice(start, start + step) for start in range(0, n, step))


class _OnGrid(torch.autograd.Function):
    """`round_to_grid`, which autograd differentiates by `grid_gradient`."""

    @staticmethod
    def forward(
        ctx: Any, W: Tensor, scale: Tensor, mask: Tensor | None, low: int, high: int, zero: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(W, scale, mask, zero)
        ctx.range = (low, high)
        return round_to_grid(W, scale, mask, low, high, zero)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        W, scale, mask, zero = ctx.saved_tensors
        low, high = ctx.range
        return *grid_gradient(gradients[0], W, scale, mask, low, high, zero), None, None, None, None


def on_grid(W: Tensor, scale: Tensor, mask: Tensor | None, low: int, high: int, zero: Tensor | None = None) -> Tensor:
    """`round_to_grid`, differentiable in W and scale."""
    return _OnGrid.apply(W, scale, mask, low, high, zero)


class _Masked(torch.autograd.Function):
    """W inside a mask of bits; autograd keeps the bits alone for the gradient."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return W * unpack_bits(mask, W.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return gradients[0] * unpack_bits(mask, gradients[0].shape[1]), None


def masked(W: Tensor, mask: Tensor | None) -> Tensor:
    """W with zeros outside the mask, differentiable in W. W: [N, K]; mask: uint8 [N, ceil(K/8)], a bit per weight, or None"""
    return W if mask is None else _Masked.apply(W, mask)


class _Stored(torch.autograd.Function):
    """x rounded to the type it will be stored in; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


class Stored(nn.Module):
    """A parametrization: the model sees the parameter as its checkpoint will hold it, training moves the exact one."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return _Stored.apply(x, self.dtype)


def _groups(W: Tensor, scale: Tensor) -> Tensor:
    """[N, K] as [N, K/G, G], the weights of each scale together."""
    n, k = W.shape
    return W.reshape(n, scale.shape[1], k // scale.shape[1])


class TrainableLinear(nn.Module):
    """y = x What' + bias, where What is what `export` would write at this moment.

    weight: parameter [N, K] float32, the weights before rounding; what lies outside the mask has no effect
    scale:  parameter [N, K/G] float32, or None for 16-bit weights
    mask_bits: uint8 buffer [N, ceil(K/8)], a bit for each weight, set where it is kept; None for the pattern "dense". Changed by
            `learned_masks` alone
    zero_point: int8 buffer [N, K/G], never changed; None for a symmetric grid
    """

    mask_bits: Tensor | None

    def __init__(self, linear: LinearWeights):
        super().__init__()
        self.bits, self.pattern, self.group_size, self.store = (
            linear.bits, linear.pattern, linear.group_size, linear.dtype
        )  # fmt: skip
        self.weight = nn.Parameter(linear.dense(torch.float32))
        self.scale = None if linear.scale is None else nn.Parameter(linear.scale.float())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.float())
        self.register_buffer("mask_bits", mask_bits(linear), persistent=True)
        self.register_buffer("zero_point", linear.zero_point, persistent=True)
        self.quantize_in_loop = True  # False: the forward pass uses the weights before rounding; `export` rounds them
        self.moving: str | None = None  # while the mask is learned "ast" or "cast", see `learned_masks`
        self.watches_inputs = False  # whether `input_norms` is summed up
        self._squares: Tensor | None = None
        self._held: Tensor | None = None
        self._collected: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def mask(self) -> Tensor | None:
        """bool [N, K], True where a weight is kept, made anew from its bits; None for the pattern "dense"."""
        return None if self.mask_bits is None else unpack_bits(self.mask_bits, self.in_features)

    @property
    def kept(self) -> Tensor:
        """The mask of a 2:4 linear."""
        mask = self.mask
        assert mask is not None
        return mask

    def keep(self, mask: Tensor) -> None:
        """Change the mask of a 2:4 linear. mask: bool [N, K]"""
        assert self.mask_bits is not None
        self.mask_bits.copy_(pack_bits(mask))

    def effective(self) -> Tensor:
        """The weight that the exported linear will have, [N, K] float32, differentiable in weight and scale."""
        return self._rounded(self.mask_bits)

    def _rounded(self, mask: Tensor | None) -> Tensor:
        if self.scale is None:
            return _Stored.apply(masked(self.weight, mask), self.store)
        scale = _Stored.apply(self._positive_scale(), self.store)
        return on_grid(self.weight, scale, mask, *CODE_RANGE[self.bits], self._zero_point)

    def in_loop(self) -> Tensor:
        """The weight that the forward pass multiplies with, [N, K] float32: `effective()`, or before rounding if so asked; with
        the dropped weights while these are pulled to zero ("cast")."""
        mask = self._mask_in_loop
        if self.quantize_in_loop or self.scale is None:
            return self._rounded(mask)
        return masked(self.weight, mask)

    def input_norms(self) -> Tensor:
        """The norm of each input over all tokens since `watches_inputs` was set, float32 [K]."""
        assert self._squares is not None, "no input was seen"
        squares, self._squares = self._squares, None
        return squares.sqrt()

    @property
    def holds(self) -> bool:
        return self._held is not None

    @torch.no_grad()
    def hold(self, dtype: torch.dtype, exported: bool = False) -> None:
        """Compute the weight once, in `dtype`, for all micro-batches of a step. `release` ends it.

        exported: as it will be written, whether or not rounding is in the loop
        """
        if self.scale is not None and (exported or self.quantize_in_loop):
            mask = self.mask_bits if exported else self._mask_in_loop
            scale, zero = self._stored_scale(), self._zero_point
            held = round_to_grid(self.weight, scale, mask, *CODE_RANGE[self.bits], zero, dtype)
        else:
            held = (self.effective() if exported else self.in_loop()).to(dtype, copy=True)
        self._held = held.requires_grad_(self.weight.requires_grad)
        if self._held.requires_grad:
            self._held.register_post_accumulate_grad_hook(self._collect)

    @torch.no_grad()
    def _collect(self, held: Tensor) -> None:
        """Sum the micro-batches' gradients in float32: bfloat16 would swallow the small ones. A single one stays as it is."""
        gradient, held.grad = held.grad, None
        assert gradient is not None
        self._collected = gradient if self._collected is None else self._collected.float().add_(gradient)

    @torch.no_grad()
    def release(self) -> None:
        """Pass what was collected since `hold` on to the gradients of weight and scale."""
        gradient, self._collected, self._held = self._collected, None, None
        if gradient is None:
            return
        mask, through = self._mask_in_loop, self.moving is not None
        if self.scale is None or not self.quantize_in_loop:
            gradient = gradient.float()
            self.weight.grad = gradient if through else masked(gradient, mask)
            return
        d_weight, d_scale = grid_gradient(
            gradient, self.weight, self._stored_scale(), mask, *CODE_RANGE[self.bits], self._zero_point, through
        )
        self.weight.grad = d_weight
        if self.scale.requires_grad:
            self.scale.grad = d_scale * (self.scale >= torch.finfo(self.store).tiny)  # clamped ones stand still

    @property
    def _zero_point(self) -> Tensor | None:
        return self.zero_point  # type: ignore[return-value]

    @property
    def _mask_in_loop(self) -> Tensor | None:
        """Bits; None while dropped weights still count."""
        return None if self.moving == "cast" else self.mask_bits

    def _stored_scale(self) -> Tensor:
        return self._positive_scale().to(self.store).float()

    def _positive_scale(self) -> Tensor:
        assert self.scale is not None
        return self.scale.clamp(min=torch.finfo(self.store).tiny)

    def forward(self, x: Tensor) -> Tensor:
        if self.watches_inputs and torch.is_grad_enabled():
            squares = x.detach().float().square().flatten(0, -2).sum(0)
            self._squares = squares if self._squares is None else self._squares + squares
        weight = self.in_loop() if self._held is None else self._held
        dtype = x.dtype if self._held is None else weight.dtype
        bias = None if self.bias is None else _Stored.apply(self.bias, self.store).to(dtype)
        return nn.functional.linear(x.to(dtype), weight.to(dtype), bias)

    @torch.no_grad()
    def export(self) -> LinearWeights:
        """The linear as formats write it; `export().dense(torch.float32)` equals `effective()` to the bit."""
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
        codes = codes_of(self.weight, scale, self.mask, self.bits, self._zero_point)
        return LinearWeights(**common, codes=codes, scale=scale, zero_point=self._zero_point)


def codes_of(W: Tensor, scale: Tensor, mask: Tensor | None, bits: int, zero: Tensor | None = None) -> Tensor:
    """The codes that W rounds to, int8 [N, K], the zero point (0 without one) outside the mask.

    W: [N, K] float32; scale: [N, K/G]; mask: bool [N, K] or None; zero: int8 [N, K/G] or None
    """
    bounds = _bounds(zero, slice(None), *CODE_RANGE[bits])
    codes = _groups(W, scale).div(scale.float()[:, :, None]).round_().clamp_(*bounds).view_as(W)
    codes = codes if mask is None else codes * mask
    if zero is not None:
        codes = (_groups(codes, scale) + zero[:, :, None]).view_as(W)
    return codes.to(torch.int8)


def kept_positions(linear: LinearWeights) -> Tensor:
    """The mask of a 2:4 linear: bool [N, K], exactly two of every four inputs.

    Where fewer than two weights of a group are non-zero (a kept weight that rounded to zero) the first free positions
    are taken, so that training may use all that the format stores.
    """
    quads = (linear.unscaled() != 0).reshape(-1, 4)
    first_two = quads.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :2]
    return torch.zeros_like(quads).scatter_(1, first_two, True).reshape(linear.shape)


def mask_bits(linear: LinearWeights) -> Tensor | None:
    """`kept_positions` as bits, uint8 [N, ceil(K/8)]; None for the pattern "dense"."""
    return None if linear.pattern == "dense" else pack_bits(kept_positions(linear))


def make_trainable(module: nn.Module, linears: Mapping[str, LinearWeights]) -> dict[str, TrainableLinear]:
    """Put a TrainableLinear in place of each named submodule; the rest of `module` is left as it is. Returns them by name."""
    placed = {}
    for name, weights in linears.items():
        old = module.get_submodule(name)
        placed[name] = TrainableLinear(weights).to(next(old.parameters()).device)
        module.set_submodule(name, placed[name])
    for experts in experts_of(module).values():
        experts.every = True
    return placed
