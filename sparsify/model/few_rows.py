"""Products with few rows in float32 on a CPU: a kernel of ours, where PyTorch's libraries reach half of the peak.

They copy the weights into an order of their own at every call, which pays off for hundreds of rows; a step of generation
has as many rows as there are sequences. The kernel (`kernels/cpu/few_rows.cpp`) reads the weights where they lie. Its sums
depend neither on threads nor on the instruction set nor on what other rows there are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sparsify import processor
from sparsify.native import build

KERNEL = "cpu/few_rows"
LEAST, MOST = 16, 256  # rows: below, what is read decides; above, PyTorch is as fast
_SLOW = "AVX2"  # what PyTorch computes with where the kernel is always faster; with AVX-512 it is not
_int64 = ctypes.c_int64


def few_rows_product(X: Tensor, W: Tensor) -> Tensor:
    """X W' in float32. X: [M, K]; W: [N, K]. Returns [M, N]. Computed by the kernel where it serves them, else by PyTorch."""
    library = build.load(KERNEL) if _fits(X) and _fits(W) and LEAST <= X.shape[0] <= MOST else None
    if library is None:
        return X @ W.t()
    Y = torch.empty(X.shape[0], W.shape[0])
    status = library.sparsify_few_rows(
        _pointer(X), _int64(X.stride(0)), _int64(X.shape[0]), _pointer(W), _int64(W.stride(0)), _int64(W.shape[0]),
        _int64(X.shape[1]), _pointer(Y), _int64(Y.stride(0)), torch.get_num_threads(), processor.kernel_level(),
    )  # fmt: skip
    return Y if status == 0 else X @ W.t()


@contextmanager
def few_rows_linears(model: nn.Module) -> Iterator[None]:
    """Within it, the float32 linears of `model` take few rows by the kernel where PyTorch computes with AVX2 and nothing newer.

    That is for the processor and ATEN_CPU_CAPABILITY to say. Results differ from PyTorch's in the rounding of sums. For
    inference only: nothing is recorded for a backward pass.
    """
    changed = []
    if torch.backends.cpu.get_cpu_capability() == _SLOW:
        changed = [module for module in model.modules() if type(module) is nn.Linear and _fits(module.weight)]
    for module in changed:
        module.forward = _Forward(module)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for module in changed:
            del module.forward


class _Forward:
    """`forward` of a linear, by the kernel."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.module.weight, self.module.bias
        rows = x.reshape(-1, x.shape[-1])
        if not LEAST <= rows.shape[0] <= MOST:
            return linear(x, weight, bias)
        out = few_rows_product(rows, weight).reshape(*x.shape[:-1], weight.shape[0])
        return out if bias is None else out.add_(bias)


def _fits(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.stride(1) == 1


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
