"""Are the kernels right? Every back end compared with float64 over a sweep of shapes, types and layouts.

The CUDA kernel is also forced into each of its tile shapes, and without a GPU executed by the emulator.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from sparsify.bench.baselines import random_tensors
from sparsify.bench.cuda_graphs import captured
from sparsify.bench.gpu_report import DECODED, Correctness
from sparsify.failure import first_line
from sparsify.formats import ModuleScheme, get_format
from sparsify.native.emulator import Sparse24
from sparsify.progress import describe
from sparsify.runtime.backends import Backend, cuda
from sparsify.runtime.op import sparse24_linear

# The sweep of shapes: the smallest, ragged multiples of 64, one scale per output, and those of models. (N, K, group size)
CHECKED = (
    (64, 64, 64),
    (192, 320, 32),
    (128, 448, 448),
    (320, 1088, 64),
    (1024, 1024, 128),
    (4096, 4096, 64),
    (1024, 14336, 128),
    (6144, 4096, 4096),
)
QUICK_CHECKED = CHECKED[1:5]
EMULATED, EMULATED_ROWS = ((64, 192, 64), (128, 320, 320), (64, 128, 32)), (1, 11)
CHECKED_ROWS = (1, 2, 3, 7, 8, 9, 16, 17, 31, 33, 64, 65, 100, 128, 130, 257, 1000)
FEW_ROWS = (1, 16, 65)  # of back ends that tune themselves for every shape
STRICT = ("cuda",)  # say for every product whether they round anything but its result
UNITS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # the largest relative error of one rounding
NOT_A_NUMBER = 1e30  # what such an error is reported as, because JSON knows no infinity


def check_backend(backend: Backend, device: torch.device, until: float, quick: bool) -> list[Correctness]:
    """Compare a back end with float64, the CUDA kernel also in each of its tile shapes.

    until: on the monotonic clock; cases after that are counted as left out.
    """
    configs = {"": None, **cuda_configs()} if backend.name == "cuda" else {"": None}
    found = [Correctness(backend.name, name) for name in configs]
    exhaustive = backend.name in STRICT or device.type == "cpu"
    rows = CHECKED_ROWS if exhaustive and not quick else FEW_ROWS
    bits = 16 if backend.name == "torch24" else 4
    for n, k, group in QUICK_CHECKED if quick or not exhaustive else CHECKED:
        scheme = ModuleScheme(bits, k if bits == 16 else group, "2:4", (n, k))
        for dtype in UNITS:
            if backend.supports(scheme, device, dtype):
                continue
            for scale_dtype in UNITS if bits == 4 else (dtype,):
                if scale_dtype != dtype and (n, k, group) != CHECKED[1]:
                    continue  # a type of scales that differs from that of the activations: once is enough
                tensors = random_tensors(scheme, device=device, dtype=scale_dtype)
                case = f"[{n}, {k}] group {scheme.group_size} {dtype} scales {scale_dtype}".replace("torch.", "")
                describe(f"{backend.name} {case}")
                try:
                    weight = get_format("sparse24").decode("random", tensors, scheme).dense(torch.float32).double()
                    prepared = backend.prepare(tensors, scheme, dtype)
                except Exception as error:  # the check goes on and reports it
                    found[0].failures.append(f"{case}: {first_line(error)}")
                    continue
                for index, m in enumerate(rows):
                    if time.monotonic() > until:
                        for check in found:
                            check.left_out += 1
                        continue
                    x, bias = activations(m, k, n, dtype, device, apart=index % 3 == 1, bias=index % 2 == 1)
                    exact, magnitude = float64_product(x, weight, bias)
                    for config, check in zip(configs.values(), found, strict=True):
                        strict = backend.name in STRICT and not cuda.rounds_weights(
                            m, scheme, dtype, scale_dtype, -1 if config is None else config, device
                        )
                        product = partial(sparse24_linear, x, prepared, bias, scheme, backend.name)
                        with forced_config(config):
                            one_case(check, product, exact, magnitude, k, f"{case} M {m}", strict)
    return found


def cuda_configs() -> dict[str, int]:
    """What the op can be forced to by name: the kernel's tile shapes, and decoding."""
    return {**{name: index for index, name in enumerate(cuda.configs())}, DECODED: cuda.DECODE}


def one_case(
    check: Correctness, product: Callable[[], Tensor], exact: Tensor, magnitude: Tensor, k: int, case: str, strict: bool
) -> None:
    """Add one product to what is known about a back end. exact, magnitude: what `float64_product` returned."""
    check.cases += 1
    try:
        y = product()
        share, rms = errors(y, exact, magnitude, k, strict)
    except Exception as error:  # the check goes on and reports it
        check.failures.append(f"{case}: {first_line(error)}")
        return
    check.worst, check.rms = max(check.worst, min(share, NOT_A_NUMBER)), max(check.rms, min(rms, NOT_A_NUMBER))
    unit = UNITS[y.dtype]
    if not (share <= 1 and rms <= (0.9 if strict else 1.3) * unit):  # one rounding: 0.4 in the mean
        check.failures.append(f"{case}: error {share:.3g} times the allowed, {rms / unit:.3g} roundings in the mean")


def activations(
    m: int, k: int, n: int, dtype: torch.dtype, device: torch.device, apart: bool, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Random x: [M, K], with rows that lie apart when asked for, and a bias [N] or None."""
    generator = torch.Generator(device).manual_seed(1000 * m + k)
    whole = torch.empty(m, k + 64 if apart else k, device=device).normal_(generator=generator).to(dtype)
    offset = torch.empty(n, device=device).normal_(generator=generator).to(dtype) if bias else None
    return whole[:, :k], offset


def float64_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x W' + b, and the same of absolute values: [M, N] in float64. weight: [N, K] in float64."""
    wide = x.double()
    exact, magnitude = wide @ weight.T, wide.abs() @ weight.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    return exact, magnitude


def errors(y: Tensor, exact: Tensor, magnitude: Tensor, k: int, strict: bool) -> tuple[float, float]:
    """The largest error as a share of the allowed one, and the relative error of the whole product.

    Allowed is one rounding of the result and, unless `strict`, one of each weight; and what float32 sums of K products
    lose, whose errors grow like the root of K. Not a number counts as infinite.
    """
    unit = UNITS[y.dtype]
    slack = 4 * math.sqrt(k) * 2.0**-24 * magnitude + 1e-7
    allowed = 1.01 * unit * exact.abs() + slack + (0 if strict else 0.5 * unit * magnitude)
    difference = (y.double() - exact).abs()
    share = torch.nan_to_num(difference / allowed, nan=math.inf, posinf=math.inf).max().item()
    rms = (difference.square().sum() / exact.square().sum().clamp(min=1e-30)).sqrt().item()
    return float(share), float(rms) if math.isfinite(rms) else math.inf


def check_streams_and_graphs(backend: Backend, device: torch.device) -> Correctness:
    """Two streams at once give what one gives, and so does a replayed CUDA graph with other activations in its input."""
    check = Correctness(backend.name, "streams and graphs")
    bits = 16 if backend.name == "torch24" else 4
    n, k = 1024, 4096
    scheme = ModuleScheme(bits, k if bits == 16 else 64, "2:4", (n, k))
    if reason := backend.supports(scheme, device, torch.bfloat16):
        check.failures.append(reason)
        return check
    try:
        prepared = backend.prepare(random_tensors(scheme, device=device), scheme, torch.bfloat16)
        for m in (1, 24):
            inputs = [activations(m, k, n, torch.bfloat16, device, False, False)[0] * (i + 1) for i in range(16)]
            alone = [sparse24_linear(x, prepared, None, scheme, backend.name) for x in inputs]
            torch.cuda.synchronize(device)
            streams = [torch.cuda.Stream(device) for _ in range(2)]
            together = []
            for i, x in enumerate(inputs):
                with torch.cuda.stream(streams[i % 2]):
                    together.append(sparse24_linear(x, prepared, None, scheme, backend.name))
            torch.cuda.synchronize(device)
            check.cases += 1
            if not all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)):
                check.failures.append(f"M {m}: two streams disturb each other")
            x, y = inputs[0].clone(), torch.empty_like(alone[0])

            def product(x: Tensor = x, y: Tensor = y) -> None:
                y.copy_(sparse24_linear(x, prepared, None, scheme, backend.name))

            graph = captured(product, device)
            for given, expected in zip(inputs[:4], alone, strict=False):
                x.copy_(given)
                graph.replay()
                check.cases += 1
                if not torch.equal(y, expected):
                    check.failures.append(f"M {m}: a replayed graph gives another result")
            del graph
    except Exception as error:  # the check goes on and reports it
        check.failures.append(first_line(error))
    return check


@contextmanager
def forced_config(config: int | None) -> Iterator[None]:
    """The CUDA back end with one of its configurations; None: as it chooses."""
    if config is None:
        yield
        return
    cuda.force_config(config)
    try:
        yield
    finally:
        cuda.force_config(-1)


def check_emulated(kernel: Sparse24, until: float, quick: bool) -> list[Correctness]:
    """Compare the CUDA kernel in each of its tile shapes with float64, where the emulator executes it."""
    found = [Correctness("emulated cuda", name) for name in kernel.configs()]
    device = torch.device("cpu")
    for n, k, group in EMULATED[:1] if quick else EMULATED:
        scheme = ModuleScheme(4, group, "2:4", (n, k))
        for dtype in UNITS:
            tensors = random_tensors(scheme, dtype=dtype)
            weight = get_format("sparse24").decode("random", tensors, scheme).dense(torch.float32).double()
            packed = kernel.pack(tensors, group)
            for m in EMULATED_ROWS:
                x, bias = activations(m, k, n, dtype, device, apart=False, bias=m > 1)
                exact, magnitude = float64_product(x, weight, bias)
                case = f"[{n}, {k}] group {group} {dtype} M {m}".replace("torch.", "")
                describe(f"emulated cuda {case}")
                for config, check in enumerate(found):
                    if time.monotonic() > until:
                        check.left_out += 1
                        continue
                    product = partial(kernel.linear, x, packed, n, group, dtype, bias=bias, config=config)
                    strict = not cuda.kernel_rounds_weights(kernel.c, m, scheme, dtype, dtype, config)
                    one_case(check, product, exact, magnitude, k, case, strict)
    return found
