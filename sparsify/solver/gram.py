"""X'X and A'B of calibration inputs, in float32: the largest product of a walk, and one that bf16 makes exact.

The product of two bf16 numbers fits a float32, so the sums can be as good as with float32 inputs at the speed of bf16
units. On CPUs a kernel of ours (`kernels/cpu/gram.cpp`) does that, and float32 inputs as well, for X'X on one triangle
only. Its result does not depend on the number of threads nor on how tokens are cut into micro-batches, nor on the
instruction set once the order of summation is the same (`summation_order`). PyTorch does it everywhere else.

NaN and Inf in the inputs appear in the result, where whoever factors it finds them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from sparsify import processor
from sparsify.errors import NumericalError, SparsifyError
from sparsify.native import build

FORCE = "SPARSIFY_GRAM"
LEVELS = processor.LEVELS  # as kernels/cpu/gram.cpp counts them
ORDERS = ("float32", "avx512bf16", "amx", "torch")
"""Names of the orders in which products are added up, on which the bits of a result depend.

float32:    token after token, by fused multiply-adds; the order of most levels, and of all of them for float32 inputs
avx512bf16: two tokens at a time as vdpbf16ps adds them; denormals are zero
amx:        32 tokens at a time as tdpbf16ps adds them; denormals are zero
torch:      PyTorch's, where the kernel cannot be had; its bits depend on the number of threads and on micro-batches

The kernel counts the first three as this does, and gives the bits of each of them at every level.
"""

_TYPES = (torch.bfloat16, torch.float32)  # that the kernel reads; float16 becomes float32 before
_wanted: ContextVar[str | None] = ContextVar("summation_order", default=None)


def native_order(dtype: torch.dtype) -> str:
    """The order in which this machine adds up CPU inputs of a type unless told otherwise: that of its fastest level.

    Loads the kernel, which is built where that was never done before. SPARSIFY_GRAM and SPARSIFY_CPU_LEVEL rule it.
    """
    library = _library() if dtype in _TYPES else None
    if library is None:
        return "torch"
    return ORDERS[library.sparsify_gram_order(_level(library))] if dtype == torch.bfloat16 else "float32"


@contextlib.contextmanager
def summation_order(name: str) -> Iterator[None]:
    """Within it, gram() and cross() of bfloat16 inputs on a CPU give the bits of that order, whatever the level.

    Inputs that are not all bfloat16 have one order only, float32. SparsifyError for an unknown name and, from gram() and
    cross(), where the order needs the kernel and it cannot be had. Holds for the thread that enters it.
    """
    if name not in ORDERS:
        raise SparsifyError(f"unknown order of summation {name!r}; known are {', '.join(ORDERS)}")
    token = _wanted.set(name)
    try:
        yield
    finally:
        _wanted.reset(token)


def gram(inputs: Sequence[Tensor], out: Tensor | None = None, *, whole: bool = True) -> Tensor:
    """Sum of x'x over micro-batches x: [tokens, K]. Returns float32 [K, K], added to `out` if given (symmetric, in place).

    whole: fill both triangles; else, where more follows, only the lower one counts until `mirror` was called"""
    k = _columns(inputs)
    device = inputs[0].device
    _check_out(out, (k, k), device)
    if (kernel := _kernel(inputs)) is not None:
        H = torch.zeros(k, k) if out is None else out
        kernel.gram(inputs, H)
        if whole:
            kernel.mirror(H)
        return H
    H = torch.zeros(k, k, dtype=torch.float32, device=device) if out is None else out
    with _exact_bf16_products(inputs):
        for x in inputs:
            _add_product(H, x, x)
    return H


def mirror(H: Tensor) -> Tensor:
    """H [K, K] itself, symmetric: its lower triangle, as `gram` leaves it, fills the upper one too."""
    if (kernel := _kernel([H])) is not None:  # PyTorch sums the whole
        kernel.mirror(H)
    return H


def cross(left: Sequence[Tensor], right: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """Sum of a'b over micro-batches a: [tokens, K1] and b: [tokens, K2]. Returns float32 [K1, K2], added to `out` if given."""
    shape = (_columns(left), _columns(right))
    if [x.shape[0] for x in left] != [x.shape[0] for x in right]:
        raise ValueError("cross: the micro-batches of both sides must hold the same tokens")
    device = left[0].device
    _check_out(out, shape, device)
    if (kernel := _kernel([*left, *right])) is not None:
        C = torch.zeros(shape) if out is None else out
        kernel.cross(left, right, C)
        return C
    C = torch.zeros(shape, dtype=torch.float32, device=device) if out is None else out
    with _exact_bf16_products([*left, *right]):
        for a, b in zip(left, right, strict=True):
            _add_product(C, a, b)
    return C


def _columns(inputs: Sequence[Tensor]) -> int:
    if not inputs:
        raise ValueError("gram: no micro-batches")
    k = inputs[0].shape[-1]
    if any(x.ndim != 2 or x.shape[1] != k for x in inputs):
        raise ValueError(f"gram: micro-batches must be [tokens, {k}], not {[list(x.shape) for x in inputs]}")
    return k


def _check_out(out: Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
    if out is not None and (
        out.shape != shape or out.dtype != torch.float32 or out.device != device or not out.is_contiguous()
    ):
        raise ValueError(f"gram: `out` must be contiguous float32 {list(shape)} on {device}")


# ------------------------------------------------------------------------------------------------------- PyTorch


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a'b with float32 sums. total: [K1, K2]; a: [T, K1]; b: [T, K2]."""
    if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
        total.add_(torch.mm(a.t(), b, out_dtype=torch.float32))
    else:
        total.addmm_(a.float().t(), b.float())


@contextlib.contextmanager
def _exact_bf16_products(inputs: Sequence[Tensor]) -> Iterator[None]:
    """Let oneDNN multiply float32 tensors as bf16, which is exact when all of them were bf16 before. CPUs only."""
    settings = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9
    if settings is None or any(x.dtype != torch.bfloat16 or x.is_cuda for x in inputs):
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


# -------------------------------------------------------------------------------------------------------- kernel


def _kernel(inputs: Sequence[Tensor]) -> _Kernel | None:
    """The native kernel, where it serves these inputs."""
    if any(x.dtype not in (*_TYPES, torch.float16) or x.device.type != "cpu" for x in inputs):
        return None
    wanted = _wanted.get()
    library = _library() if wanted != "torch" else None
    if library is None:
        if wanted not in (None, "torch"):
            raise SparsifyError(
                f"sums in the order {wanted!r} need the native kernel, which is switched off or cannot be had here "
                "(`sparsify doctor` shows it); PyTorch's would differ in their last bits"
            )
        return None
    level = _level(library)
    if any(x.dtype != torch.bfloat16 for x in inputs):
        order = ORDERS.index("float32")
    else:
        order = ORDERS.index(wanted) if wanted else library.sparsify_gram_order(level)
    return _Kernel(library, level, order)


def _library() -> ctypes.CDLL | None:
    """The native kernel; None where it cannot be had, or where SPARSIFY_GRAM=torch says to go without."""
    forced = os.environ.get(FORCE, "")
    if forced not in ("", "torch", *LEVELS):
        raise SparsifyError(f"{FORCE}={forced} is unknown; choose from torch, {', '.join(LEVELS)}")
    if forced == "torch":
        return None
    library = build.load("cpu/gram")
    if library is None and forced:
        raise SparsifyError(f"{FORCE}={forced} needs the native kernel, which cannot be had here; the log says why")
    return library


def _level(library: ctypes.CDLL) -> int:
    """The level that computes: the one that SPARSIFY_GRAM names, else the fastest up to that of SPARSIFY_CPU_LEVEL."""
    forced = os.environ.get(FORCE)
    if not forced:
        cap = processor.level() if processor.forced_level() else LEVELS[-1]
        return int(library.sparsify_gram_fastest(LEVELS.index(cap)))
    if library.sparsify_gram_level(LEVELS.index(forced)) < 0:
        raise SparsifyError(f"{FORCE}={forced}: this processor does not have it; unset {FORCE} to let sparsify choose")
    return LEVELS.index(forced)


class _Kernel:
    """The C interface of kernels/cpu/gram.cpp."""

    PROBLEMS = {1: "bad arguments", 2: "an instruction set that this processor lacks", 3: "not enough memory"}

    def __init__(self, library: ctypes.CDLL, level: int, order: int):
        self.library = library
        self.level = level
        self.order = order

    def gram(self, inputs: Sequence[Tensor], H: Tensor) -> None:
        x = _Blocks(inputs)
        self._check(self.library.sparsify_gram(
            x.pointers, x.rows, x.strides, x.count, _int64(H.shape[0]), x.wide, ctypes.c_void_p(H.data_ptr()),
            _int64(H.stride(0)), torch.get_num_threads(), self.level, self.order,
        ))  # fmt: skip

    def mirror(self, H: Tensor) -> None:
        sizes = (_int64(H.shape[0]), _int64(H.stride(0)))
        self._check(self.library.sparsify_gram_mirror(ctypes.c_void_p(H.data_ptr()), *sizes, torch.get_num_threads()))

    def cross(self, left: Sequence[Tensor], right: Sequence[Tensor], C: Tensor) -> None:
        a, b = _Blocks(left), _Blocks(right)
        self._check(self.library.sparsify_gram_cross(
            a.pointers, a.strides, _int64(C.shape[0]), a.wide, b.pointers, b.strides, _int64(C.shape[1]), b.wide,
            a.rows, a.count, ctypes.c_void_p(C.data_ptr()), _int64(C.stride(0)),
            torch.get_num_threads(), self.level, self.order,
        ))  # fmt: skip

    def _check(self, status: int) -> None:
        if status:
            raise NumericalError(f"the kernel that accumulates Hessians failed: {self.PROBLEMS.get(status, status)}")


_int64 = ctypes.c_int64


class _Blocks:
    """Micro-batches as the kernel takes them: pointers, row counts and row strides. Keeps what it points at alive.

    wide: whether they are float32; bfloat16 and float16 ones among others are widened, which is exact.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self.wide = int(any(x.dtype != torch.bfloat16 for x in tensors))
        typed = [x.float() for x in tensors] if self.wide else tensors
        self.tensors = [x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in typed]
        n = len(tensors)
        self.count = _int64(n)
        self.pointers = (ctypes.c_void_p * n)(*(x.data_ptr() for x in self.tensors))
        self.rows = (_int64 * n)(*(x.shape[0] for x in self.tensors))
        self.strides = (_int64 * n)(*(x.stride(0) for x in self.tensors))
