"""The CPU back end: our C++ kernels (`kernels/cpu/sparse24.cpp`), which read the compressed weights and nothing else.

At load time the tensors of a checkpoint are repacked into the order in which the kernels read them; the checkpoint's own
tensors are not needed afterwards. The op is registered from C++ (`kernels/cpu/sparse24_torch.cpp`), because a call
through Python would cost as much as a small product.
"""

import ctypes
import functools
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.formats import ModuleScheme
from sparsify.formats.sparse24 import layout_problem
from sparsify.native import build
from sparsify.processor import LEVELS, forced_level, lacking
from sparsify.runtime.devices import refuse_two_devices
from sparsify.runtime.zero_points import NO_ZERO_POINTS

INT8_VARIABLE = "SPARSIFY_CPU_INT8"  # set to 1: all but the fewest rows are multiplied in int8
INT8 = 256  # its bit in the option word
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
ALIGNMENT = 64


class Cpu:
    """2:4 linears with 4, 8 and 16 bits and dense ones with 4 and 8, on any CPU that has a C++ compiler or a ready build."""

    name = "cpu"

    def reason_unavailable(self) -> str | None:
        if os.environ.get(build.DISABLE) == "0":
            return f"native kernels are switched off by {build.DISABLE}=0"
        return None if _library() else "its kernels cannot be built here (the log says why; `sparsify doctor` shows it)"

    def describe(self) -> str:
        """The instruction set in use, and whether int8 compute is on."""
        return LEVELS[_level()] + (f", int8 compute for all but the fewest rows ({INT8_VARIABLE})" if _int8() else "")

    def supports(self, scheme: ModuleScheme, device: torch.device, dtype: torch.dtype) -> str | None:
        if not scheme.symmetric:
            return NO_ZERO_POINTS
        if device.type != "cpu":
            return f"it runs on CPUs, not on {device.type}"
        if dtype not in TYPES:
            return f"activations must be bfloat16, float16 or float32, not {dtype}"
        return None if _packed_bytes(scheme, 0) > 0 else "no kernel for this shape or scheme"

    def prepare(self, tensors: Mapping[str, Tensor], scheme: ModuleScheme, dtype: torch.dtype) -> list[Tensor]:
        """One tensor of bytes: the linear in panels of 16 outputs (kernels/cpu/sparse24_layout.h)."""
        if problem := layout_problem(tensors, scheme, "cpu"):
            raise SparsifyError(f"the CPU kernels cannot pack a linear of {scheme}: {problem}")
        stored = tensors["weight_values" if scheme.bits == 16 else "weight_scale"]
        kind = TYPES[stored.dtype]
        size = _packed_bytes(scheme, kind)
        # aligned to a cache line whatever allocator serves torch
        whole = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        packed = whole[-whole.data_ptr() % ALIGNMENT :][:size]
        given = {name: tensor.contiguous() for name, tensor in tensors.items()}
        addresses = [
            given[name].data_ptr() if name in given else None
            for name in ("weight_packed", "weight_meta", "weight_scale", "weight_values")
        ]
        library = _library()
        assert library is not None
        status = library.sparse24_pack(*_arguments(scheme, kind), *addresses, packed.data_ptr())
        if status:
            raise SparsifyError(f"the CPU kernels cannot pack a linear of {scheme} (status {status})")
        library.sparse24_set_options(packed.data_ptr(), _level() + 1 + INT8 * _int8())
        return [packed]

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, scheme: ModuleScheme) -> Tensor:
        return torch.ops.sparsify.sparse24_linear_cpu(x, prepared[0], bias, scheme.shape[0])


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The kernels, with the op registered and pointing at them; None after a line in the log that says what is missing."""
    library, op = build.load("cpu/sparse24"), build.load("cpu/sparse24_torch")
    if library is None or op is None:
        return None
    int64, int32, pointer = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
    scheme = [int64, int64, int32, int64, int32, int32]
    library.sparse24_packed_bytes.argtypes, library.sparse24_packed_bytes.restype = scheme, int64
    library.sparse24_pack.argtypes = [*scheme, *[pointer] * 5]
    library.sparse24_set_options.argtypes = [pointer, int32]
    op.sparse24_set_kernel.argtypes = [pointer]
    op.sparse24_set_kernel(ctypes.cast(library.sparse24_linear, pointer))
    torch.library.register_fake("sparsify::sparse24_linear_cpu", _fake_linear)
    return library


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    refuse_two_devices(x, weight, bias)
    return x.new_empty((*x.shape[:-1], out_features))


@functools.cache
def _level() -> int:
    """The number of the instruction set to use: the fastest, or the one that SPARSIFY_CPU_LEVEL names."""
    library = _library()
    assert library is not None
    forced = forced_level()
    if forced is None:
        return int(library.sparse24_level(-1))
    if library.sparse24_level(LEVELS.index(forced)) < 0:
        raise lacking(forced, LEVELS[library.sparse24_level(-1)])
    return LEVELS.index(forced)


def _int8() -> bool:
    """Whether rows may be multiplied in int8: opted in by the user, and a processor that has kernels for it.

    Activations get one scale per token and group; with AMX one per token, and weights one per output, so results differ from
    the exact ones by about 1% (kernels/cpu/sparse24_int8.h, sparse24_bytes.h). Up to 2 tokens at once (8 with AMX), where it
    is no faster, and 16-bit weights are multiplied as without it.
    """
    wanted = os.environ.get(INT8_VARIABLE, "0")
    if wanted not in ("0", "1"):
        raise SparsifyError(f"{INT8_VARIABLE}={wanted}: expected 0 or 1")
    return wanted == "1" and LEVELS[_level()] != "portable"


def _arguments(scheme: ModuleScheme, kind: int) -> tuple[int, ...]:
    n, k = scheme.shape
    return n, k, scheme.bits, scheme.group_size, int(scheme.pattern == "2:4"), kind


def _packed_bytes(scheme: ModuleScheme, kind: int) -> int:
    library = _library()
    return int(library.sparse24_packed_bytes(*_arguments(scheme, kind))) if library else -1
