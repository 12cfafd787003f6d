"""One compressed linear, independent of any file format: what passes produce, formats write and kernels read."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import CheckpointError
from sparsify.model.finite import all_finite

PATTERNS = ("2:4", "dense")
CODE_RANGE = {4: (-8, 7), 8: (-128, 127)}


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes x W' + b of its weight [N, K] and bias, of a class derived from torch's linear too (Falcon)."""
    kind: Any = type(module)
    return kind is nn.Linear or (issubclass(kind, nn.Linear) and _multiplies(kind))


@functools.cache
def _multiplies(kind: Any) -> bool:
    """Whether a class derived from `nn.Linear` computes what that does, tried on numbers. Those of torch are parts of others."""
    if kind.__module__.startswith("torch."):
        return False
    x = torch.linspace(-1, 1, 6).view(2, 3)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # its first weights are drawn
        try:
            tried = kind(3, 4)
            found = tried(x)
        except Exception:  # a class of whatever code
            return False
        expected = nn.functional.linear(x, tried.weight, tried.bias)
    return isinstance(found, Tensor) and found.shape == expected.shape and bool(torch.allclose(found, expected))


def is_two_four(weight: Tensor) -> bool:
    """Whether every 4 consecutive inputs of `weight: [N, K]` hold at most two non-zero values."""
    if weight.shape[1] % 4:
        return False
    return bool((weight.reshape(weight.shape[0], -1, 4) != 0).sum(2).le(2).all())


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype, zero_point: Tensor | None = None) -> Tensor:
    """w[n, k] = scale[n, g] * (codes[n, k] - zero_point[n, g]) with g = k // G, computed in float32 and rounded once.

    codes: int8 [N, K]; scale: [N, K/G]; zero_point: int8 [N, K/G], None for a symmetric grid. Returns [N, K] in `dtype`.
    """
    n, k = codes.shape
    grouped = codes.reshape(n, scale.shape[1], k // scale.shape[1]).float()
    if zero_point is not None:
        grouped -= zero_point[:, :, None]
    return (grouped * scale.float()[:, :, None]).reshape(n, k).to(dtype)


@dataclass(frozen=True)
class LinearWeights:
    """The weights of one linear with N outputs and K inputs.

    bits:       4 or 8 (codes and scale) or 16 (values)
    pattern:    "2:4" or "dense"
    group_size: dense inputs per scale; K for one scale per output channel, and K when bits is 16
    codes:      int8 [N, K], the zero point (0 without one) where pruned
    scale:      bfloat16 or float16 [N, K / group_size]
    values:     bfloat16 or float16 [N, K], zeros in place
    bias:       [N] or None
    zero_point: int8 [N, K / group_size], the code of zero, in the range of the codes; None when it is 0 everywhere (symmetric)
    """

    bits: int
    pattern: str
    group_size: int
    codes: Tensor | None = None
    scale: Tensor | None = None
    values: Tensor | None = None
    bias: Tensor | None = None
    zero_point: Tensor | None = None

    @property
    def symmetric(self) -> bool:
        return self.zero_point is None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        stored = self.values if self.codes is None else self.codes
        assert stored is not None
        return (stored.shape[0], stored.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the scales, or of the values when there are no scales."""
        stored = self.values if self.scale is None else self.scale
        assert stored is not None
        return stored.dtype

    def unscaled(self) -> Tensor:
        """What the scales multiply, [N, K], 0 exactly where the weight is: codes less their zero points, or the values."""
        if self.codes is None:
            assert self.values is not None
            return self.values
        if self.zero_point is None:
            return self.codes
        return self.codes.to(torch.int16) - self.zero_point.repeat_interleave(self.group_size, 1)

    def is_zero(self) -> bool:
        """Whether every weight is zero, and the bias too: the linear of a sublayer that was removed."""
        return not any(tensor.any() for tensor in (self.unscaled(), self.bias) if tensor is not None)

    def of(self, outputs: slice) -> "LinearWeights":
        """Some of the outputs, as a copy."""
        kept = (self.codes, self.scale, self.values, self.bias, self.zero_point)
        codes, scale, values, bias, zero_point = (None if t is None else t[outputs].clone() for t in kept)
        return replace(self, codes=codes, scale=scale, values=values, bias=bias, zero_point=zero_point)

    def zeroed(self) -> "LinearWeights":
        """The same scheme with all weights zero, and the bias too."""
        kept = (self.codes, self.values, self.bias, self.zero_point)
        codes, values, bias, zero_point = (None if t is None else torch.zeros_like(t) for t in kept)
        return replace(self, codes=codes, values=values, bias=bias, zero_point=zero_point)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a dense matrix [N, K] with zeros in place; `dtype` defaults to that of the scales."""
        dtype = dtype or self.dtype
        if self.codes is None:
            assert self.values is not None
            return self.values.to(dtype)
        assert self.scale is not None
        return dequantize(self.codes, self.scale, dtype, self.zero_point)

    def to(self, device: str) -> "LinearWeights":
        """The same on another device."""
        tensors: dict[str, Any] = {key: value for key, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{key: tensor.to(device) for key, tensor in tensors.items()})

    def validate(self, name: str) -> "LinearWeights":
        """Check types, shapes, the range of codes and zero points, finite scales and the 2:4 pattern; raises CheckpointError
        naming `name`."""
        if self.pattern not in PATTERNS:
            raise CheckpointError(f"{name}: pattern {self.pattern!r} is unknown; known are {', '.join(PATTERNS)}")
        if self.bits == 16:
            problem = self._values_problem()
        elif self.bits in CODE_RANGE:
            problem = self._codes_problem()
        else:
            problem = f"{self.bits} bits are not supported, only 4, 8 and 16"
        if problem is None and self.pattern == "2:4" and not is_two_four(self.unscaled()):
            problem = "some group of 4 consecutive inputs holds more than two non-zero weights"
        if problem is None and self.bias is not None and tuple(self.bias.shape) != (self.shape[0],):
            problem = f"bias has shape {list(self.bias.shape)}, expected [{self.shape[0]}]"
        if problem:
            raise CheckpointError(f"{name}: {problem}; the tensor is damaged or was not written by sparsify")
        return self

    def _values_problem(self) -> str | None:
        if self.values is None or any(t is not None for t in (self.codes, self.scale, self.zero_point)):
            return "a 16-bit linear holds values and neither codes nor scales"
        if self.values.dim() != 2 or not self.values.is_floating_point():
            return f"values must be a floating matrix, found {self.values.dtype} {list(self.values.shape)}"
        if not all_finite(self.values):
            return "values hold NaN or Inf"
        return None

    def _codes_problem(self) -> str | None:
        if self.codes is None or self.scale is None or self.values is not None:
            return f"a {self.bits}-bit linear holds codes and scales and no values"
        if self.codes.dtype != torch.int8 or self.codes.dim() != 2:
            return f"codes must be an int8 matrix, found {self.codes.dtype} {list(self.codes.shape)}"
        n, k = self.codes.shape
        if self.group_size <= 0 or k % self.group_size:
            return f"group size {self.group_size} does not divide {k} inputs"
        if tuple(self.scale.shape) != (n, k // self.group_size):
            return f"scale has shape {list(self.scale.shape)}, expected {[n, k // self.group_size]}"
        if not all_finite(self.scale):
            return "scales hold NaN or Inf"
        low, high = CODE_RANGE[self.bits]
        if self.codes.numel() and (self.codes.min() < low or self.codes.max() > high):
            return f"codes leave the range [{low}, {high}] of {self.bits} bits"
        return None if self.zero_point is None else self._zero_point_problem(self.zero_point)

    def _zero_point_problem(self, zero_point: Tensor) -> str | None:
        assert self.scale is not None
        if zero_point.dtype != torch.int8 or zero_point.shape != self.scale.shape:
            found = f"{zero_point.dtype} {list(zero_point.shape)}"
            return f"zero points must be one int8 for each scale {list(self.scale.shape)}, found {found}"
        low, high = CODE_RANGE[self.bits]
        if zero_point.numel() and (zero_point.min() < low or zero_point.max() > high):
            return f"zero points leave the range [{low}, {high}] of {self.bits} bits"
        return None
