"""The CUDA back end: our `mma.sp` kernel for NVIDIA GPUs from Ampere on (`kernels/cuda/sparse24.cu`).

At load time the tensors of a checkpoint are repacked, on the GPU, into the order in which the kernel reads them. The op
is registered from C++ (`kernels/cuda/sparse24_torch.cpp`), because a call through Python would cost more than a small
product. Compiled by nvcc on first use for the GPUs at hand, or ahead of time (`sparsify kernels build --arch 80,90`).
"""

import ctypes
import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.formats import ModuleScheme
from sparsify.formats.sparse24 import layout_problem
from sparsify.native import build, build_cuda
from sparsify.runtime.devices import refuse_two_devices
from sparsify.runtime.zero_points import NO_ZERO_POINTS

KERNEL, OP = "cuda/sparse24", "cuda/sparse24_torch"
TYPES = {torch.bfloat16: 0, torch.float16: 1}
MULTIPLE = 64  # of outputs and of inputs
GROUP_SIZES = (32, 64, 128)  # or one scale per output
DECODE = -2  # the configuration that decodes the weight and multiplies densely
# From how many rows on that is faster, by the major compute capability; none elsewhere. Hopper's dense products run on
# instructions (wgmma) that outrun mma.sp. Measured on an H100: at 256 rows the tile shapes win on every shape, at 384 and 512
# decoding wins up to 6144 x 4096 and the tile shapes above, by as much, from 768 on decoding wins on all. `sparsify kernels
# check --gpu` times both.
DENSE_ROWS = {9: 384}

logger = logging.getLogger(__name__)


class Cuda:
    """4-bit 2:4 linears with bfloat16 or float16 activations on 2:4 tensor cores."""

    name = "cuda"

    def reason_unavailable(self) -> str | None:
        if os.environ.get(build.DISABLE) == "0":
            return f"native kernels are switched off by {build.DISABLE}=0"
        if not _gpus():
            return "it needs an NVIDIA GPU that torch can use, from Ampere (sm_80) on"
        return None if _library() else "its kernel cannot be had here (the log says why)"

    def describe(self) -> str:
        """The architectures that the kernel was loaded for."""
        return ", ".join(f"sm_{arch}" for arch in build_cuda.archs_at_hand())

    def supports(self, scheme: ModuleScheme, device: torch.device, dtype: torch.dtype) -> str | None:
        if not scheme.symmetric:
            return NO_ZERO_POINTS
        if problem := _device_problem(device):
            return problem
        if scheme.bits != 4 or scheme.pattern != "2:4":
            return f"it multiplies 4-bit 2:4 weights, not {scheme.bits}-bit {scheme.pattern} ones"
        if dtype not in TYPES:
            return f"activations must be bfloat16 or float16, not {dtype}"
        n, k = scheme.shape
        if n % MULTIPLE or k % MULTIPLE:
            return f"outputs and inputs must be multiples of {MULTIPLE}, not {n} and {k}"
        if scheme.group_size not in (*GROUP_SIZES, k):
            return f"no kernel for groups of {scheme.group_size}"
        if _library() is None:
            return "its kernel cannot be had here (the log says why)"
        return None if packed_bytes(scheme) > 0 else "no kernel for this shape"

    def prepare(self, tensors: Mapping[str, Tensor], scheme: ModuleScheme, dtype: torch.dtype) -> list[Tensor]:
        """The linear in the kernel's order, uint8 [packed bytes]; and an empty tensor of the type of its scales.

        The op needs that type beside the bytes, and torch.compile reads it from a tensor without looking at contents.
        """
        library = _required()
        if problem := layout_problem(tensors, scheme, tensors["weight_scale"].device.type):
            raise SparsifyError(f"the CUDA kernel cannot pack a linear of {scheme}: {problem}")
        given = [tensors[name].contiguous() for name in ("weight_packed", "weight_meta", "weight_scale")]
        scale = given[2]
        packed = torch.empty(packed_bytes(scheme), dtype=torch.uint8, device=scale.device)
        n, k = scheme.shape
        with _on(scale.device) as stream:
            status = library.sparse24_cuda_pack(
                n, k, scheme.group_size, TYPES[scale.dtype], *(t.data_ptr() for t in given), packed.data_ptr(), stream
            )
        if status:
            raise SparsifyError(f"the CUDA kernel cannot pack a linear of {scheme} (status {status})")
        return [packed, torch.empty(0, dtype=scale.dtype, device=scale.device)]

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, scheme: ModuleScheme) -> Tensor:
        packed, scale = prepared
        n = scheme.shape[0]
        return torch.ops.sparsify.sparse24_linear_cuda(x, packed, bias, n, scheme.group_size, TYPES[scale.dtype])


def _device_problem(device: torch.device) -> str | None:
    if _STAND_IN.get() is not None:
        return None if device.type == "cpu" else "the emulated kernel runs on the processor"
    if device.type != "cuda":
        return f"it runs on NVIDIA GPUs, not on {device.type}"
    major, minor = _capability(device)
    return None if major >= 8 else f"2:4 tensor cores begin with sm_80 (Ampere), and this GPU is sm_{major}{minor}"


def packed_bytes(scheme: ModuleScheme) -> int:
    """Size of a linear in the kernel's order; negative when the kernel does not serve it."""
    n, k = scheme.shape
    return int(_required().sparse24_cuda_packed_bytes(n, k, scheme.group_size))


def configs() -> list[str]:
    """Names of the kernel's tile shapes."""
    library = _required()
    return [library.sparse24_cuda_config_name(i).decode() for i in range(library.sparse24_cuda_config_count())]


def dense_rows(device: torch.device) -> int:
    """From how many rows on the op decodes the weight and multiplies densely on a device; 0: never."""
    return DENSE_ROWS.get(_capability(device)[0], 0) if device.type == "cuda" else 0


def force_config(config: int) -> None:
    """Make the op use one tile shape, or DECODE, for checks and measurements; -1 takes what is best again."""
    _required()
    _op().sparse24_set_cuda_config(config)


def rounds_weights(
    m: int, scheme: ModuleScheme, dtype: torch.dtype, scale_dtype: torch.dtype, config: int, device: torch.device
) -> bool:
    """Whether a product of M rows in a configuration rounds each weight, code x scale, to the type of the activations."""
    if config == DECODE or (config == -1 and 0 < dense_rows(device) <= m):
        return True
    return kernel_rounds_weights(_required(), m, scheme, dtype, scale_dtype, config)


def kernel_rounds_weights(
    library: ctypes.CDLL, m: int, scheme: ModuleScheme, dtype: torch.dtype, scale_dtype: torch.dtype, config: int
) -> bool:
    """What the kernel itself says about that."""
    n, k = scheme.shape
    asked = library.sparse24_cuda_rounds_weights
    asked.argtypes = [*[ctypes.c_int64] * 4, *[ctypes.c_int] * 3]
    return bool(asked(m, n, k, scheme.group_size, TYPES[dtype], TYPES[scale_dtype], config))


def _gpus() -> list[torch.device]:
    """Every NVIDIA GPU that torch can use and that has 2:4 tensor cores."""
    if torch.version.hip or not torch.cuda.is_available():
        return []
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [device for device in devices if _capability(device) >= (8, 0)]


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _devices() -> list[tuple[int, int]]:
    """Multiprocessors and `dense_rows` of every device, in torch's order."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [(torch.cuda.get_device_properties(d).multi_processor_count, dense_rows(d)) for d in devices]


@contextmanager
def _on(device: torch.device) -> Iterator[int]:
    """Make a device current; gives the address of its current stream."""
    if device.type == "cpu":  # the emulator
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def _current_stream_function() -> int:
    """The address of torch's own function that says which stream is current, part of its stable C interface."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cuda.so", "libtorch.so", "libtorch_python.so"):
        try:
            function = ctypes.CDLL(str(folder / name)).aoti_torch_get_current_cuda_stream
        except (OSError, AttributeError):
            continue
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None
        return address
    raise SparsifyError(f"torch {torch.__version__} does not tell its current CUDA stream: update torch")


def _op() -> ctypes.CDLL:
    return build.open_library(OP)


def _required() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise SparsifyError("the CUDA kernel cannot be had here (the log says why)")
    return library


# The kernel compiled for the processor, while `emulated` is entered.
_STAND_IN: ContextVar[ctypes.CDLL | None] = ContextVar("stand_in", default=None)


@contextmanager
def emulated(library: ctypes.CDLL, sm_count: int, dense_rows: int = 0) -> Iterator[None]:
    """Run the op through a library of the same C interface that runs on the processor, with tensors on the CPU."""
    real = _loaded() if _gpus() else None
    connect(library, _op(), None, [(sm_count, dense_rows)])
    token = _STAND_IN.set(library)
    try:
        yield
    finally:
        _STAND_IN.reset(token)
        if real is not None:
            connect(real, _op(), _current_stream_function(), _devices())


def _library() -> ctypes.CDLL | None:
    return _STAND_IN.get() or _loaded()


@functools.cache
def _loaded() -> ctypes.CDLL | None:
    """The kernels, with the op registered and pointing at them; None after a line in the log that says what is missing."""
    try:
        library, op = build_cuda.open_library(KERNEL, build_cuda.archs_at_hand()), _op()
        connect(library, op, _current_stream_function(), _devices())
    except SparsifyError as error:
        logger.warning("kernel %s: %s", KERNEL, error)
        return None
    return library


def connect(
    library: ctypes.CDLL, op: ctypes.CDLL, current_stream: int | None, devices: Sequence[tuple[int, int]]
) -> None:
    """Declare the C interface of the kernels and hand it to the op.

    current_stream: None where the kernels run on the processor, which tensors must then be on. devices: what `_devices`
    returned.
    """
    int64, int32, pointer = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
    library.sparse24_cuda_packed_bytes.argtypes = [int64] * 3
    library.sparse24_cuda_packed_bytes.restype = int64
    library.sparse24_cuda_pack.argtypes = [*[int64] * 3, int32, *[pointer] * 5]
    library.sparse24_cuda_config_name.argtypes = [int32]
    library.sparse24_cuda_config_name.restype = ctypes.c_char_p
    op.sparse24_set_cuda_kernels.argtypes = [*[pointer] * 5, *[ctypes.POINTER(int32)] * 2, int32]
    op.sparse24_set_cuda_kernels.restype = None
    op.sparse24_set_cuda_config.restype = None
    names = ("packed_bytes", "workspace_bytes", "linear", "decode")
    functions = [ctypes.cast(getattr(library, f"sparse24_cuda_{name}"), pointer) for name in names]
    counts, rows = ((int32 * len(devices))(*column) for column in zip(*devices, strict=True))
    op.sparse24_set_cuda_kernels(*functions, current_stream, counts, rows, len(devices))
    _register_fake()


@functools.cache
def _register_fake() -> None:
    torch.library.register_fake("sparsify::sparse24_linear_cuda", _fake_linear)


def _fake_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, group_size: int, scale_type: int
) -> Tensor:
    refuse_two_devices(x, packed, bias)
    return x.new_empty((*x.shape[:-1], out_features))
