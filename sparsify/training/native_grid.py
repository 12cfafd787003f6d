"""Rounding to a grid and the gradient that passes through it, in C++: `kernels/cpu/grid_rounding.cpp`.

Each function takes what its PyTorch counterpart in `qat_linear.py` takes. The kernels give the same bits with any number of
threads and at every level of SPARSIFY_CPU_LEVEL.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparsify.native import build
from sparsify.native.arguments import loaded, pointer
from sparsify.processor import kernel_level

SOURCE = "cpu/grid_rounding"
TYPES = (torch.float32, torch.bfloat16)  # of rounded weights and their gradients
_int64, _float = ctypes.c_int64, ctypes.c_float


def available(W: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels can be had and take a weight that is rounded to, or has its gradient in, `dtype`."""
    return W.device.type == "cpu" and dtype in TYPES and build.load(SOURCE) is not None


def round_to_grid(
    W: Tensor, scale: Tensor, mask: Tensor | None, low: int, high: int, zero: Tensor | None, dtype: torch.dtype
) -> Tensor:
    rounded = torch.empty(W.shape, dtype=dtype)
    W, scale, mask, zero = (t if t is None else t.contiguous() for t in (W, scale, mask, zero))  # type: ignore[assignment]
    loaded(SOURCE).sparsify_round_to_grid(
        *_weight(W, scale, mask, zero), _float(low), _float(high), pointer(rounded), int(dtype == torch.bfloat16),
        torch.get_num_threads(), kernel_level(),
    )  # fmt: skip
    return rounded


def grid_gradient(
    gradient: Tensor, W: Tensor, scale: Tensor, mask: Tensor | None, low: int, high: int, zero: Tensor | None, through: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gradient, W, scale, mask, zero = (t if t is None else t.contiguous() for t in (gradient, W, scale, mask, zero))  # type: ignore[assignment]
    d_weight, d_scale = torch.empty(W.shape), torch.empty(scale.shape)
    loaded(SOURCE).sparsify_grid_gradient(
        pointer(gradient), int(gradient.dtype == torch.bfloat16), *_weight(W, scale, mask, zero), _float(low), _float(high),
        int(through), pointer(d_weight), pointer(d_scale), torch.get_num_threads(), kernel_level(),
    )  # fmt: skip
    return d_weight, d_scale


def _weight(W: Tensor, scale: Tensor, mask: Tensor | None, zero: Tensor | None) -> tuple[ctypes._SimpleCData, ...]:  # type: ignore[type-arg]
    n, k = W.shape
    assert W.dtype == scale.dtype == torch.float32 and (mask is None or mask.dtype == torch.uint8)
    assert mask is None or mask.shape == (n, -(-k // 8))
    assert zero is None or zero.dtype == torch.int8
    return (
        pointer(W), pointer(scale), pointer(mask), pointer(zero), _int64(n), _int64(k), _int64(k // scale.shape[1])
    )  # fmt: skip
