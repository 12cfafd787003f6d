"""CUDA kernels on a machine without a GPU: `kernels/cuda/*.cu` compiled by g++ against `kernels/emulator` and run.

The emulator executes every thread and every instruction of a warp exactly and refuses what a GPU would leave undefined: a
read before its copy was waited for, a race in shared memory, an access out of bounds (docs/kernels.md lists all). It is
for checks, not for use: thousands of times slower than a GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from sparsify.errors import MissingDependency, SparsifyError
from sparsify.files import cache_directory
from sparsify.native import build as cxx

FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-DSPARSIFY_EMULATOR", "-Wno-unknown-pragmas")
TYPES = {torch.bfloat16: 0, torch.float16: 1}  # as the C interface of sparse24.cu numbers them
GUARD = 256  # bytes before and behind every allocation that are nobody's; also the alignment, as cudaMalloc's


class EmulatorError(SparsifyError):
    """A kernel did what a GPU leaves undefined. The message says which thread of which block, what and where."""


class Counters(ctypes.Structure):
    """What the launches since `reset_counters` did; `emulator::Counters` in kernels/emulator/machine.h."""

    blocks: int
    barriers: int
    mma: int
    ldmatrix: int
    copies: int
    global_bytes_read: int
    global_bytes_written: int
    ldmatrix_conflicts: int
    load_conflicts: int
    store_conflicts: int
    copy_conflicts: int
    _fields_ = [(name, ctypes.c_uint64) for name in __annotations__]


def build(source: Path, *, flags: Sequence[str] = FLAGS, folder: Path | None = None) -> Path:
    """The shared library of a .cu for the emulator, compiled now unless `folder` (default: the cache) has it."""
    compiler = cxx.find_compiler()
    if compiler is None:
        raise MissingDependency("no C++ compiler found: install g++, or set CXX to the command of one")
    # The sources include "../emulator/cuda_emulator.h" and each other, also when they are copies somewhere else.
    folders = [cxx.kernels_directory() / name for name in ("emulator", "cuda")]
    key = hashlib.sha256(" ".join((compiler.version, *flags)).encode())
    for file in (source, *(header for headers in folders for header in sorted(headers.glob("*.h")))):
        key.update(file.name.encode() + b"\0" + file.read_bytes())
    folder = folder or cache_directory() / "emulated"
    library = folder / f"{source.stem}-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{source.stem}-") as scratch:
        aside = Path(scratch) / library.name
        includes = [f"-I{headers}" for headers in folders]
        command = [*compiler.command, *flags, *includes, "-x", "c++", str(source), "-o", str(aside)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=cxx.COMPILE_SECONDS)
        if run.returncode:
            lines = run.stderr.strip().splitlines()
            first = next((line for line in lines if "error" in line), f"exit status {run.returncode}")
            raise cxx.NativeBuildError(f"{compiler.command[0]} ({compiler.version}) refuses {source.name}: {first}")
        os.replace(aside, library)
    return library


class Emulated:
    """A library made by `build`. Its kernels see the tensors that `Memory` holds and nothing else."""

    def __init__(self, library: Path) -> None:
        self.c = ctypes.CDLL(str(library))
        self.c.emulator_error.restype = ctypes.c_char_p
        for function in (self.c.emulator_register, self.c.emulator_register_uninitialized):
            function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t), None
        self.c.emulator_unregister.argtypes = (ctypes.c_void_p,)

    def check(self) -> None:
        """Raise EmulatorError if a launch was ended, and make the library ready for the next."""
        if error := self.c.emulator_error():
            self.c.emulator_clear_error()
            raise EmulatorError(error.decode())

    def block_order(self, *, descending: bool) -> None:
        """Blocks run one after the other; a right kernel does not depend on their order."""
        self.c.emulator_block_order(int(descending))

    def counters(self) -> Counters:
        counters = Counters()
        self.c.emulator_counters(ctypes.byref(counters))
        return counters

    def reset_counters(self) -> None:
        self.c.emulator_reset_counters()


class Memory:
    """Global memory of an emulated GPU, for the length of a `with`. Allocations are apart, so that a step too far is seen."""

    def __init__(self, emulated: Emulated) -> None:
        self._emulated = emulated
        self._held: list[Tensor] = []

    def __enter__(self) -> Memory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tensor in self._held:
            self._emulated.c.emulator_unregister(tensor.data_ptr())
        self._held.clear()

    def put(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of `tensor` that kernels may read and write."""
        place = self._reserve(tensor.shape, tensor.dtype).copy_(tensor)
        self._emulated.c.emulator_register(place.data_ptr(), place.nbytes)
        return place

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory that a kernel must write before it reads it. Until then it holds NaN."""
        place = self._reserve(shape, dtype)
        self._emulated.c.emulator_register_uninitialized(place.data_ptr(), place.nbytes)
        return place

    def put_rows(self, matrix: Tensor, stride: int) -> Tensor:
        """The rows of `matrix` [M, K], `stride` elements apart; what lies between them is not the kernel's."""
        rows, columns = matrix.shape
        room = self._reserve(((rows - 1) * stride + columns,), matrix.dtype)
        self._held.pop()
        for row in room.as_strided((rows, columns), (stride, 1)).copy_(matrix):
            self._emulated.c.emulator_register(row.data_ptr(), row.nbytes)
            self._held.append(row)
        return room

    def _reserve(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        room = torch.full(((size + 4 * GUARD) // 2,), 0x7FA5, dtype=torch.int16).view(torch.uint8)
        start = -room.data_ptr() % GUARD + GUARD
        place = room[start : start + size].view(dtype).view(shape)
        self._held.append(place)
        return place


class Sparse24:
    """The C interface of kernels/cuda/sparse24.cu, in the emulator. Tensors are ordinary ones on the CPU."""

    def __init__(self, source: Path | None = None, *, flags: Sequence[str] = FLAGS, folder: Path | None = None) -> None:
        source = source or cxx.kernels_directory() / "cuda" / "sparse24.cu"
        self.emulated = Emulated(build(source, flags=flags, folder=folder))
        self.c = self.emulated.c
        integer, pointer, word = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
        self.c.sparse24_cuda_packed_bytes.argtypes = (integer,) * 3
        self.c.sparse24_cuda_packed_bytes.restype = integer
        self.c.sparse24_cuda_pack.argtypes = (integer, integer, integer, word, *(pointer,) * 5)
        self.c.sparse24_cuda_workspace_bytes.argtypes = (*(integer,) * 4, word, word)
        self.c.sparse24_cuda_workspace_bytes.restype = integer
        self.c.sparse24_cuda_linear.argtypes = (
            *(pointer, integer, word, integer, pointer, integer, integer, integer, word),  # x .. scale_type
            *(pointer, pointer, pointer, word, word, pointer),  # bias .. stream
        )
        self.c.sparse24_cuda_decode.argtypes = (pointer, integer, integer, integer, word, word, pointer, pointer)
        self.c.sparse24_cuda_rounds_weights.argtypes = (*(integer,) * 4, word, word, word)
        self.c.sparse24_cuda_config_name.restype = ctypes.c_char_p

    def configs(self) -> list[str]:
        """The names of the tile shapes."""
        count = self.c.sparse24_cuda_config_count()
        return [self.c.sparse24_cuda_config_name(config).decode() for config in range(count)]

    def pack(self, tensors: Mapping[str, Tensor], group_size: int) -> Tensor:
        """The kernel's own form of weight_packed [N, K/16], weight_meta [N, K/8] and weight_scale [N, K/G], as bytes."""
        codes, scale = tensors["weight_packed"], tensors["weight_scale"]
        n, k = codes.shape[0], codes.shape[1] * 16
        size = self.c.sparse24_cuda_packed_bytes(n, k, group_size)
        if size < 0:
            raise SparsifyError(f"the CUDA kernel does not serve a weight of [{n}, {k}] with groups of {group_size}")
        with Memory(self.emulated) as memory:
            packed = memory.empty(size, dtype=torch.uint8)
            inputs = [memory.put(tensors[name]) for name in ("weight_packed", "weight_meta", "weight_scale")]
            pointers = [tensor.data_ptr() for tensor in (*inputs, packed)]
            self._finish(self.c.sparse24_cuda_pack(n, k, group_size, TYPES[scale.dtype], *pointers, None))
            return packed.clone()

    def linear(
        self,
        x: Tensor,
        packed: Tensor,
        n: int,
        group_size: int,
        scale_type: torch.dtype,
        *,
        bias: Tensor | None = None,
        config: int = -1,
        multiprocessors: int = 1,
        stride: int | None = None,
    ) -> Tensor:
        """x: [M, K] of bf16 or fp16, packed by `pack` -> [M, N]. stride: of the rows of x in memory, K unless given."""
        m, k = x.shape
        with Memory(self.emulated) as memory:
            rows = memory.put_rows(x, stride or k)
            held = memory.put(packed)
            y = memory.empty(m, n, dtype=x.dtype)
            size = self.c.sparse24_cuda_workspace_bytes(m, n, k, group_size, multiprocessors, config)
            workspace = memory.empty(size, dtype=torch.uint8).data_ptr() if size else None
            shift = None if bias is None else memory.put(bias).data_ptr()
            status = self.c.sparse24_cuda_linear(
                *(rows.data_ptr(), stride or k, TYPES[x.dtype], m),
                *(held.data_ptr(), n, k, group_size, TYPES[scale_type]),
                *(shift, y.data_ptr(), workspace, config, multiprocessors, None),
            )
            self._finish(status)
            return y.clone()

    def splits(self, m: int, n: int, k: int, group_size: int, *, config: int = -1, multiprocessors: int = 1) -> bool:
        """Whether a product of m rows is divided along its inputs and summed afterwards."""
        return bool(self.c.sparse24_cuda_workspace_bytes(m, n, k, group_size, multiprocessors, config))

    def decode(
        self, packed: Tensor, n: int, k: int, group_size: int, scale_type: torch.dtype, dtype: torch.dtype
    ) -> Tensor:
        """The dense weight [N, K] of what `pack` made."""
        with Memory(self.emulated) as memory:
            held, weight = memory.put(packed), memory.empty(n, k, dtype=dtype)
            types = (TYPES[scale_type], TYPES[dtype])
            self._finish(
                self.c.sparse24_cuda_decode(held.data_ptr(), n, k, group_size, *types, weight.data_ptr(), None)
            )
            return weight.clone()

    def rounds_weights(
        self, m: int, n: int, k: int, group_size: int, dtype: torch.dtype, scale_type: torch.dtype, config: int = -1
    ) -> bool:
        """Whether `linear` multiplies with weights that are rounded to the type of x, as those of the dense export."""
        return bool(self.c.sparse24_cuda_rounds_weights(m, n, k, group_size, TYPES[dtype], TYPES[scale_type], config))

    def _finish(self, status: int) -> None:
        self.emulated.check()
        if status:
            raise SparsifyError(f"the kernel returned status {status}")
