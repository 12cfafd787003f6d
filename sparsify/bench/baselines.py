"""The linears that benchmarks compare: ours and PyTorch's on any device, vLLM's and llama.cpp's 4-bit ones for CPUs.

Each baseline is made of random valid weights, packed by the software that will run it, in as many copies as asked
for: copies that together exceed the last cache are what a model streams, layer after layer. A peer that cannot be had
raises whatever its software raises, or PeerMissing: the caller goes on without it and says why.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.bench import ggml
from sparsify.bench.missing import PeerMissing
from sparsify.bench.vllm_level import hold_vllm_down
from sparsify.errors import SparsifyError
from sparsify.formats import ModuleScheme, get_format
from sparsify.formats.scheme import scheme_problem
from sparsify.formats.sparse24 import checked_tensors, tensor_layout
from sparsify.processor import forced_level
from sparsify.runtime.backends import Backend, choose_backend
from sparsify.runtime.op import sparse24_linear

OURS, TORCH, TORCH_FP32, WNA16, W4A8 = "sparsify", "torch bf16", "torch fp32", "vLLM wna16", "vLLM w4a8"
Q4_1, Q4_0 = "llama.cpp Q4_1", "llama.cpp Q4_0"
PEERS = {
    "torch": TORCH, "torch-fp32": TORCH_FP32, "wna16": WNA16, "w4a8": W4A8, "llama.cpp": Q4_1, "llama.cpp-q4_0": Q4_0,
}  # fmt: skip
BITS = {"torch": 16, "torch-fp32": 32, "wna16": 4, "w4a8": 4, "llama.cpp": 5, "llama.cpp-q4_0": 4.5}  # per weight
CPU = torch.device("cpu")
CHECKED_OUTPUTS = 48
QUANTIZED_AT_ONCE = 2**24  # weights
# The 36 valid meta bytes: two nibbles, each two different positions in ascending order.
NIBBLES = [first | second << 2 for first in range(4) for second in range(first + 1, 4)]
META_BYTES = torch.tensor([low | high << 4 for high in NIBBLES for low in NIBBLES], dtype=torch.uint8)


@dataclass(frozen=True)
class Baseline:
    """A linear [N, K] in some number of copies.

    calls: one per copy, x: [M, K] -> [M, N].  nbytes: of one copy's weights, as small as they are stored anywhere.
    expected: the first outputs' dense weights [CHECKED_OUTPUTS, K] in float64, to see that the product is right.
    tolerance: of the product, relative to its size. detail: which kernel it is. rest: called after its turn, where its
    threads would go on looking for work.
    """

    name: str
    calls: Sequence[Callable[[Tensor], Tensor]]
    nbytes: int
    dtype: torch.dtype
    expected: Tensor
    tolerance: float
    detail: str = ""
    rest: Callable[[], None] | None = None


def random_tensors(
    scheme: ModuleScheme, seed: int = 0, device: torch.device = CPU, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Valid sparse24 tensors of `scheme` with random contents, made in their packed form: seconds for any size.

    dtype: of the scales or values.
    """
    if problem := scheme_problem(scheme):
        raise SparsifyError(f"a linear {scheme.shape[0]}x{scheme.shape[1]} cannot be measured: {problem}")
    generator = torch.Generator(device).manual_seed(seed)
    valid = META_BYTES.to(device)
    tensors = {}
    for suffix, (shape, kind) in tensor_layout(scheme, dtype).items():
        if suffix == "weight_meta":
            choice = torch.randint(len(valid), shape, generator=generator, dtype=torch.uint8, device=device)
            tensors[suffix] = valid[choice.int()]
        elif suffix == "weight_packed":
            tensors[suffix] = torch.randint(
                -(2**31), 2**31, shape, generator=generator, dtype=torch.int32, device=device
            )
        else:  # scales, values
            tensor = torch.empty(shape, dtype=kind, device=device).uniform_(0.5, 1.5, generator=generator)
            tensors[suffix] = tensor.mul_(2.0**-7)
    return tensors


def stored_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors, those in oneDNN's own layout too."""
    return sum(t.numel() * t.element_size() for t in tensors)


def scheme_bytes(scheme: ModuleScheme) -> int:
    """Bytes of a linear's tensors in the sparse24 format, with scales or values of 16 bits and without a bias."""
    layout = tensor_layout(scheme, torch.bfloat16).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout)


def first_outputs(tensors: dict[str, Tensor], scheme: ModuleScheme) -> Tensor:
    """The dense weights of the first few outputs, in float64: [<= CHECKED_OUTPUTS, K]."""
    rows = min(CHECKED_OUTPUTS, scheme.shape[0])
    part = ModuleScheme(scheme.bits, scheme.group_size, scheme.pattern, (rows, scheme.shape[1]))
    few = {suffix: tensor[:rows] for suffix, tensor in tensors.items()}
    return get_format("sparse24").decode("random", few, part).dense(torch.float32).double()


def ours(
    scheme: ModuleScheme,
    dtype: torch.dtype,
    copies: int,
    seed: int = 0,
    device: torch.device = CPU,
    backend: Backend | None = None,
) -> Baseline:
    """The op with a back end; without one, with that which would serve this linear here."""
    tensors = random_tensors(scheme, seed, device)
    checked_tensors("random", tensors, scheme)
    backend = backend or choose_backend(scheme, device, dtype)
    prepared = [backend.prepare(tensors, scheme, dtype)]
    for _ in range(copies - 1):  # a copy is made faster than prepared; on a CPU it may have a layout that has no clone
        on_gpu = device.type == "cuda"
        prepared.append([t.clone() for t in prepared[0]] if on_gpu else backend.prepare(tensors, scheme, dtype))

    def call(weights: list[Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: sparse24_linear(x, weights, None, scheme, backend.name)

    return Baseline(
        name=OURS,
        calls=[call(weights) for weights in prepared],
        # A back end that keeps more than the format needs must not look as if it streamed faster.
        nbytes=min(stored_bytes(list(tensors.values())), stored_bytes(prepared[0])),
        dtype=dtype,
        expected=first_outputs(tensors, scheme),
        tolerance=2e-2 if dtype == torch.bfloat16 else 5e-3,
        detail=backend.name,
    )


def peer(key: str, n: int, k: int, group_size: int, copies: int) -> Baseline:
    """The baseline of a key of PEERS, with weights [N, K]. group_size: inputs per scale, of vLLM's; others have their own."""
    if key in ("torch", "torch-fp32"):
        return torch_linear(n, k, copies, torch.float32 if key == "torch-fp32" else torch.bfloat16)
    if key in ("wna16", "w4a8"):
        return vllm_linear(n, k, group_size, copies, int8=key == "w4a8")
    return llama_linear(n, k, copies, kind="q4_0" if key == "llama.cpp-q4_0" else "q4_1")


def torch_linear(
    n: int, k: int, copies: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1, device: torch.device = CPU
) -> Baseline:
    """`torch.nn.functional.linear` on bfloat16 or float32 weights."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = [torch.empty(n, k, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)]
    weights += [weights[0].clone() for _ in range(copies - 1)]

    def call(weight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: functional.linear(x, weight)

    return Baseline(
        name=TORCH if dtype == torch.bfloat16 else TORCH_FP32,
        calls=[call(weight) for weight in weights],
        nbytes=stored_bytes(weights[:1]),
        dtype=dtype,
        expected=weights[0][:CHECKED_OUTPUTS].double(),
        tolerance=2e-2 if dtype == torch.bfloat16 else 1e-4,
        detail=f"{torch.backends.cpu.get_cpu_capability()} in torch" if device.type == "cpu" else "",
    )


def vllm_linear(n: int, k: int, group_size: int, copies: int, int8: bool = False, seed: int = 2) -> Baseline:
    """vLLM's own 4-bit linear for CPUs, prepared and called by vLLM's own class.

    int8: its default on processors with AMX, which rounds activations to 8 bits (VLLM_CPU_INT4_W4A8).
    """
    if find_spec("vllm") is None:
        raise PeerMissing("not installed", "vLLM is not installed")
    with _environment("VLLM_CPU_INT4_W4A8", "1" if int8 else "0"), _environment("VLLM_LOGGING_LEVEL", "WARNING"):
        hold_vllm_down()
        try:
            from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
            from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
            from vllm.scalar_type import scalar_types
        except ImportError as error:
            raise PeerMissing("vLLM lacks it", f"this vLLM has no such kernel: {error}") from None

        config = MPLinearLayerConfig(
            full_weight_shape=(k, n),
            partition_weight_shape=(k, n),
            weight_type=scalar_types.uint4b8,
            act_type=torch.bfloat16,
            group_size=group_size,
            zero_points=False,
        )
        # Linux ends a process that uses AMX without having asked for it, and this class does not ask.
        torch.cpu._init_amx()
        works, reason = CPUWNA16LinearKernel.can_implement(config)
        if not works:
            raise PeerMissing("refuses this shape", reason)
        scheme = ModuleScheme(4, group_size, "dense", (n, k))
        tensors = random_tensors(scheme, seed)
        kernel = CPUWNA16LinearKernel(config, "weight_packed", "weight_scale", "weight_zero_point")
        layer: Any = torch.nn.Module()
        layer.bias = None
        # pack-quantized, as vLLM loads it: [N, K/8] and [N, K/G]
        layer.weight_packed = _parameter(tensors["weight_packed"], input_dim=1, output_dim=0, packed_dim=1)
        layer.weight_scale = _parameter(tensors["weight_scale"], input_dim=1, output_dim=0)
        kernel.process_weights_after_loading(layer)
        if int8 and not layer.use_w4a8:
            raise PeerMissing("not on this processor", "vLLM does not use it on this processor")
        layers = [layer, *(deepcopy(layer) for _ in range(copies - 1))]

    def call(layer: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: kernel.apply_weights(layer, x)

    return Baseline(
        name=W4A8 if int8 else WNA16,
        calls=[call(layer) for layer in layers],
        nbytes=stored_bytes(list(tensors.values())),
        dtype=torch.bfloat16,
        expected=first_outputs(tensors, scheme),
        # It rounds weights to bfloat16 before it multiplies; 8-bit activations round far more.
        tolerance=0.1 if int8 else 3e-2,
        detail="8-bit activations" if int8 else layer.isa_hint,
    )


@functools.cache
def llama_library(threads: int, level: str | None, folder: str | None) -> tuple[ggml.Ggml, str]:
    """ggml with its library for CPUs of a level, and that library's name; PeerMissing says why not.

    level: None for the best that runs here. folder: None for the installed one.
    """
    base, variant = ggml.find(level, folder)
    return ggml.Ggml(base, variant.path, threads), variant.label


def llama_linear(n: int, k: int, copies: int, kind: str = "q4_1", seed: int = 3) -> Baseline:
    """ggml's product with weights in llama.cpp's Q4_1 or Q4_0 and float32 activations, which it rounds to 8 bits itself."""
    library, variant = llama_library(torch.get_num_threads(), forced_level(), os.environ.get(ggml.VARIABLE))
    packed = llama_blocks(library, kind, n, k, seed)
    weights = [ggml.Weight(library, kind, n, k, packed.data_ptr()) for _ in range(copies)]
    outputs: dict[int, Tensor] = {}  # one for each number of rows: what was planned for an array is used again

    def call(weight: ggml.Weight) -> Callable[[Tensor], Tensor]:
        def product(x: Tensor) -> Tensor:
            m = x.shape[0]
            if m not in outputs:
                outputs[m] = torch.empty(m, n)
            weight.multiply(x.data_ptr(), outputs[m].data_ptr(), m)
            return outputs[m]

        return product

    layout = weights[0].layout
    return Baseline(
        name=Q4_0 if kind == "q4_0" else Q4_1,
        calls=[call(weight) for weight in weights],
        nbytes=packed.numel(),
        dtype=torch.float32,
        expected=llama_dense(packed[:CHECKED_OUTPUTS], kind, k),
        tolerance=2e-2,
        detail=variant if layout == "CPU" else f"{variant}, {layout}",
        rest=library.rest,
    )


def llama_blocks(library: ggml.Ggml, kind: str, n: int, k: int, seed: int) -> Tensor:
    """Random weights [N, K] packed by ggml: uint8 [N, bytes of a row]."""
    if k % ggml.BLOCK:
        raise PeerMissing("inputs not x32", f"ggml's blocks are {ggml.BLOCK} weights, which do not divide {k} inputs")
    generator = torch.Generator().manual_seed(seed)
    packed = torch.empty(n, ggml.packed_bytes(kind, 1, k), dtype=torch.uint8)
    for part in packed.split(max(1, QUANTIZED_AT_ONCE // k)):
        dense = torch.empty(part.shape[0], k).normal_(0, 0.02, generator=generator)
        library.quantize(kind, dense.data_ptr(), part.data_ptr(), part.shape[0], k)
    return packed


def llama_dense(packed: Tensor, kind: str, k: int) -> Tensor:
    """What rows of Q4_1 or Q4_0 blocks stand for, in float64: [rows, K].

    A block holds 32 weights: a float16 scale, in Q4_1 a float16 minimum, and 16 bytes, whose low halves are the first 16.
    """
    blocks = packed.view(packed.shape[0], k // ggml.BLOCK, -1)
    halves = blocks[..., :-16].contiguous().view(torch.float16).double()
    codes = torch.cat([blocks[..., -16:] & 15, blocks[..., -16:] >> 4], dim=-1).double()
    scale = halves[..., :1]
    dense = scale * codes + halves[..., 1:] if kind == "q4_1" else scale * (codes - 8)
    return dense.view(packed.shape[0], k)


def _parameter(data: Tensor, **attributes: int) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(data.clone(), requires_grad=False)
    for name, value in attributes.items():
        setattr(parameter, name, value)
    return parameter


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def error_of(baseline: Baseline, x: Tensor) -> float:
    """Largest difference of the first outputs from the float64 product, relative to the largest output of their kind.

    x: [M, K] in the baseline's dtype.
    """
    rows = baseline.expected.shape[0]
    found = baseline.calls[0](x)[:, :rows].double()
    exact = x.double() @ baseline.expected.t()
    size = exact.abs().max().clamp(min=1e-30)
    return float(((found - exact).abs().max() / size).item())
