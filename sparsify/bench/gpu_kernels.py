"""`sparsify kernels check --gpu`: are the GPU kernels right, and how fast are they, on the GPU that is here?

Three parts: every back end that serves is compared with float64 over a sweep of shapes, types and layouts (and the CUDA
kernel in each of its tile shapes); then everything is timed by replaying CUDA graphs; then a table. A product is timed
over as many copies of the weights as exceed the second-level cache twice, so that weights come from memory, as they do
in a model. Baselines take turns, so that a slow spell of the machine hits them all; a time is the median.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor

from sparsify.bench.baselines import random_tensors
from sparsify.bench.shapes import Linear, parse_shape
from sparsify.errors import SparsifyError
from sparsify.files import atomic_write, read_json
from sparsify.formats import ModuleScheme, get_format
from sparsify.native.emulator import Sparse24
from sparsify.progress import describe, progress_bar
from sparsify.runtime.backends import BACKENDS, Backend, cuda, known_backends, measured_choice
from sparsify.runtime.op import sparse24_linear

LINEARS = (
    Linear("8B qkv", 6144, 4096),
    Linear("8B o", 4096, 4096),
    Linear("8B gate_up", 28672, 4096),
    Linear("8B down", 4096, 14336),
    Linear("70B down", 8192, 28672),
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096)
QUICK_LINEARS, QUICK_ROWS = LINEARS[1:4], (1, 16, 64, 512)
BITS: dict[str, tuple[Literal[4, 16], ...]] = {"torch24": (16,), "triton": (4, 16)}  # timed; 4 of all others
DENSE, MARLIN = "torch bf16", "vLLM Marlin"
DECODED = "decoded"  # the configuration of the CUDA back end that writes the weight out and multiplies densely
ON_CPU = ("cpu", "reference")

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
CHECK_SHARE = 0.25  # of the time limit, for the correctness of one back end
ROUNDS = 3
REPLAY_SECONDS = 0.006  # of one turn
GRAPH_SECONDS, GRAPH_CALLS = 0.004, 8  # of one graph, at most; and calls in one, if they fit
NOT_A_NUMBER = 1e30  # what such an error is reported as, because JSON knows no infinity
SLOW_SECONDS = 0.02  # a call that takes longer is timed alone
COPY_BYTES = 2**30


@dataclass(frozen=True)
class CheckOptions:
    """What to check. seconds: what is not measured by then is left out, and said so."""

    linears: Sequence[Linear] = LINEARS
    rows: Sequence[int] = ROWS
    group_size: int = 64
    quick: bool = False
    seconds: float = 180.0
    only: Sequence[str] = ()  # back ends; all that serve when empty


@dataclass
class Correctness:
    """One back end, in one configuration, over the sweep.

    worst: largest error as a share of what is allowed. rms: largest relative error of a whole product.
    """

    backend: str
    config: str = ""
    cases: int = 0
    worst: float = 0.0
    rms: float = 0.0
    failures: list[str] = field(default_factory=list)
    left_out: int = 0


@dataclass(frozen=True)
class Row:
    """Microseconds of every baseline on one linear with M rows, and of the CUDA kernel in each of its configurations."""

    linear: str
    n: int
    k: int
    m: int
    microseconds: dict[str, float]
    nbytes: dict[str, int]
    configs: dict[str, float]
    ratios: dict[str, dict[str, float]]  # back end of ours -> peer -> times faster
    bandwidth_share: dict[str, float]


@dataclass
class Timed:
    """What was measured of one linear with one number of rows, by baseline: microseconds and bytes; configs as in Row."""

    microseconds: dict[str, float] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)
    configs: dict[str, float] = field(default_factory=dict)


@dataclass
class GpuReport:
    """One run."""

    gpu: dict[str, Any]
    correctness: list[Correctness] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    copy_bandwidth: float | None = None
    group_size: int = 64
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        """Whether something was compared, and all of it was right."""
        return bool(self.correctness) and not any(check.failures for check in self.correctness)

    def to_json(self) -> dict[str, Any]:
        return {"right": self.right, **asdict(self)}


def check_here(
    gpu: bool,
    linears: Sequence[str] = (),
    rows: Sequence[int] = (),
    group_size: int = 64,
    quick: bool = False,
    seconds: float = 180.0,
    only: Sequence[str] = (),
    output: str | None = None,
    times: str | None = None,
) -> GpuReport:
    """`sparsify kernels check`: the kernels of the GPU or of the CPU. linears: texts `NxK`; times: see `merge_times`."""
    if unknown := [name for name in only if name not in known_backends()]:
        raise SparsifyError(f"unknown back end {unknown[0]!r}; known back ends: {', '.join(known_backends())}")
    if any(m < 1 for m in rows):
        raise SparsifyError("--rows takes positive numbers of tokens, as in --rows 1,8,32")
    options = CheckOptions(
        linears=[parse_shape(text) for text in linears] or (QUICK_LINEARS if quick else LINEARS),
        rows=rows or (QUICK_ROWS if quick else ROWS),
        group_size=group_size,
        quick=quick,
        seconds=seconds,
        only=only,
    )
    file = Path(output) if output else None
    with progress_bar("checking kernels", None):
        if not gpu:
            return check_cpu(options, file)
        if not torch.cuda.is_available():
            return without_gpu(options, file)
        report = check_gpu(options, file)
    if times:
        merge_times(report, Path(times))
    return report


def check_cpu(options: CheckOptions, output: Path | None = None) -> GpuReport:
    """Compare the back ends of the processor with float64. `sparsify bench kernels` measures them."""
    started = time.monotonic()
    report = GpuReport({}, group_size=options.group_size)
    device = torch.device("cpu")
    with torch.inference_mode():
        for backend in BACKENDS:
            if backend.name not in ON_CPU or (options.only and backend.name not in options.only):
                continue
            if reason := backend.reason_unavailable():
                report.notes.append(f"{backend.name}: {reason}")
            else:
                report.correctness += check_backend(backend, device, started + options.seconds, options.quick)
    report.seconds = time.monotonic() - started
    write(report, output)
    return report


def without_gpu(options: CheckOptions, output: Path | None = None) -> GpuReport:
    """What can be said without a GPU: whether the CUDA kernel is right where the emulator executes it."""
    started = time.monotonic()
    report = GpuReport({}, group_size=options.group_size)
    report.notes.append("torch sees no GPU here: nothing was run on one")
    try:
        kernel = Sparse24()
    except SparsifyError as error:
        report.notes.append(f"emulator: {error}")
    else:
        report.notes.append("the CUDA kernel is executed by the emulator (kernels/emulator), which checks every access")
        report.correctness += check_emulated(kernel, started + options.seconds, options.quick)
    report.seconds = time.monotonic() - started
    write(report, output)
    return report


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


def write(report: GpuReport, output: Path | None) -> None:
    if output is not None:
        output.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")


def check_gpu(options: CheckOptions | None = None, output: Path | None = None) -> GpuReport:
    """Check and measure on the current GPU. output: a JSON file, written after every part, so that nothing is lost."""
    options = options or CheckOptions()
    started = time.monotonic()
    device = current_gpu()
    report = GpuReport(describe_gpu(device), group_size=options.group_size)

    def save() -> None:
        report.seconds = time.monotonic() - started
        write(report, output)

    with torch.inference_mode():
        serving = []
        for backend in BACKENDS:
            if backend.name in ON_CPU or (options.only and backend.name not in options.only):
                continue
            begin = time.monotonic()
            if reason := backend.reason_unavailable():
                report.notes.append(f"{backend.name}: {reason}")
                continue
            report.notes.append(f"{backend.name}: ready after {time.monotonic() - begin:.1f} s")
            serving.append(backend)
        save()
        for backend in serving:
            until = time.monotonic() + options.seconds * CHECK_SHARE
            report.correctness += check_backend(backend, device, until, options.quick)
            report.correctness.append(check_streams_and_graphs(backend, device))
            save()
        try:
            report.copy_bandwidth = copy_bandwidth(device)
        except RuntimeError as error:  # after an illegal access nothing runs any more
            report.notes.append(f"nothing could be timed after this: {summary(error)}")
            save()
            return report
        deadline = started + options.seconds
        # a back end that tunes itself comes last, alone: its tuning may use up what is left of the time
        first = [backend for backend in serving if backend.name in STRICT]
        rest = [backend for backend in serving if backend.name not in STRICT]
        timed: dict[tuple[Linear, int], Timed] = {}
        for group, peers in ((first, True), (rest, False)):
            for linear in options.linears:
                describe(f"timing {linear.label}")
                with out_of_memory_noted(report, linear):
                    time_linear(timed, linear, group, peers, options, device, deadline, report)
            report.rows = make_rows(timed, report.copy_bandwidth)
            save()
    save()
    return report


# ------------------------------------------------------------------------------------------------------- correctness


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
                except Exception as error:  # a check goes on and tells
                    found[0].failures.append(f"{case}: {summary(error)}")
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
    except Exception as error:  # a check goes on and tells
        check.failures.append(f"{case}: {summary(error)}")
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
    except Exception as error:  # a check goes on and tells
        check.failures.append(summary(error))
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


def summary(error: Exception) -> str:
    """The first line of an error, shortened."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


# ------------------------------------------------------------------------------------------------------------ timing

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GpuBaseline:
    """A linear in some number of copies. calls: one per copy, x: [M, K] -> [M, N]; nbytes: of one copy's weights."""

    name: str
    calls: Sequence[Call]
    nbytes: int


def time_linear(
    timed: dict[tuple[Linear, int], Timed],
    linear: Linear,
    backends: Sequence[Backend],
    peers: bool,
    options: CheckOptions,
    device: torch.device,
    deadline: float,
    report: GpuReport,
) -> None:
    """Add the times of some baselines on one linear to `timed`."""
    cache = report.gpu["l2_bytes"]
    baselines = []
    for backend in backends:
        for bits in BITS.get(backend.name, (4,)):
            baselines += note_or(ours(backend, linear, bits, options.group_size, cache, device), report)
    if peers:
        baselines.append(dense(linear, cache, device))
        baselines += note_or(marlin(linear, options.group_size, cache, device), report)
    for m in options.rows:
        x = activations(m, linear.k, linear.n, torch.bfloat16, device, False, False)[0]
        found = timed.setdefault((linear, m), Timed())
        graphs = []
        for baseline in baselines:
            if time.monotonic() > deadline:
                note = f"out of time ({options.seconds:.0f} s): some {baseline.name} was left out; give --seconds more"
                if note not in report.notes:
                    report.notes.append(note)
                continue
            if baseline.name == "cuda":
                for name, index in cuda_configs().items():
                    with forced_config(index):
                        microseconds = time_calls([(baseline, x)], device, report, rounds=1)
                    if microseconds:
                        found.configs[name] = microseconds["cuda"]
            graphs.append((baseline, x))
            found.nbytes[baseline.name] = baseline.nbytes + (m * linear.k + m * linear.n) * 2
        found.microseconds.update(time_calls(graphs, device, report))


def note_or(made: GpuBaseline | str, report: GpuReport) -> list[GpuBaseline]:
    """A baseline as a list of one; or a note that says why there is none."""
    if isinstance(made, str):
        if made not in report.notes:
            report.notes.append(made)
        return []
    return [made]


def time_calls(
    baselines: Sequence[tuple[GpuBaseline, Tensor]], device: torch.device, report: GpuReport, rounds: int = ROUNDS
) -> dict[str, float]:
    """Microseconds per call by baseline: the median over the replays of all turns."""
    graphs = {}
    turns: dict[str, list[float]] = {}
    for baseline, x in baselines:
        try:
            alone = seconds_of_one(baseline.calls[0], x, device)
            if alone > SLOW_SECONDS:  # a graph saves nothing here
                turns[baseline.name] = [alone]
                continue
            # once over all copies, unless that takes long: then activations fill the cache and fewer copies do
            most = max(GRAPH_CALLS, len(baseline.calls))
            count = max(2, min(most, math.ceil(GRAPH_SECONDS / alone)))
            calls = [baseline.calls[i % len(baseline.calls)] for i in range(count)]
            graph = captured(partial(run_all, calls, x), device)
            one = replay_seconds(graph, 1, device)[0]
        except Exception as error:  # one that fails must not end the others
            report.notes.append(f"{baseline.name} with M {x.shape[0]}: {summary(error)}")
            continue
        graphs[baseline.name] = (graph, count, max(3, min(100, int(REPLAY_SECONDS / max(one, 1e-7)))))
        turns[baseline.name] = []
    for _ in range(rounds):
        for name, (graph, count, replays) in graphs.items():
            turns[name] += [seconds / count for seconds in replay_seconds(graph, replays, device)]
    return {name: round(median(found) * 1e6, 3) for name, found in turns.items()}


def run_all(calls: Sequence[Call], x: Tensor) -> None:
    """One product after the other."""
    for call in calls:
        call(x)


def seconds_of_one(call: Call, x: Tensor, device: torch.device) -> float:
    """Seconds of one call that is launched alone, after one that compiles and tunes."""
    call(x)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call(x)
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def captured(run: Callable[[], Any], device: torch.device) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `run`, run once before, so that everything is compiled and tuned."""
    run()
    torch.cuda.synchronize(device)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with torch.cuda.stream(stream):  # not torch.cuda.graph: it empties the allocator's cache every time
        graph.capture_begin()
        try:
            run()
        finally:
            graph.capture_end()
    torch.cuda.synchronize(device)
    return graph


def replay_seconds(graph: torch.cuda.CUDAGraph, replays: int, device: torch.device) -> list[float]:
    """Seconds of each of some replays, by the GPU's clock, after one that is not counted."""
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:], strict=False)]


def copies_of(nbytes: int, cache: int) -> int:
    """How many copies of the weights are cycled through: twice the cache, and at least two."""
    return max(2, min(64, -(-2 * cache // nbytes) + 1))


def ours(
    backend: Backend, linear: Linear, bits: Literal[4, 16], group_size: int, cache: int, device: torch.device
) -> GpuBaseline | str:
    """The op with one back end, in bfloat16. A text says why it does not serve this linear."""
    scheme = ModuleScheme(bits, linear.k if bits == 16 else group_size, "2:4", (linear.n, linear.k))
    if reason := backend.supports(scheme, device, torch.bfloat16):
        return f"{backend.name}: {reason}"
    tensors = random_tensors(scheme, device=device)
    nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
    prepared = [backend.prepare(tensors, scheme, torch.bfloat16)]
    prepared += [[t.clone() for t in prepared[0]] for _ in range(copies_of(nbytes, cache) - 1)]

    def call(weights: list[Tensor]) -> Call:
        return lambda x: sparse24_linear(x, weights, None, scheme, backend.name)

    return GpuBaseline(label(backend.name, bits), [call(weights) for weights in prepared], nbytes)


def label(backend: str, bits: int) -> str:
    """cuda, triton, triton 16-bit"""
    return backend if bits == 4 else f"{backend} {bits}-bit"


def dense(linear: Linear, cache: int, device: torch.device) -> GpuBaseline:
    """torch's own dense linear in bfloat16."""
    weight = torch.empty(linear.n, linear.k, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
    nbytes = weight.numel() * 2
    weights = [weight, *(weight.clone() for _ in range(copies_of(nbytes, cache) - 1))]

    def call(weight: Tensor) -> Call:
        return lambda x: torch.nn.functional.linear(x, weight)

    return GpuBaseline(DENSE, [call(weight) for weight in weights], nbytes)


def marlin(linear: Linear, group_size: int, cache: int, device: torch.device) -> GpuBaseline | str:
    """vLLM's dense 4-bit Marlin kernel, packed and called by vLLM's own functions; or why it cannot be had here."""
    try:
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.quantization.utils.marlin_utils import (
            apply_gptq_marlin_linear,
            marlin_make_empty,
            marlin_make_workspace_new,
            marlin_permute_scales,
        )
        from vllm.scalar_type import scalar_types
    except Exception as error:
        return f"{MARLIN}: not here ({summary(error)[:80]})"
    n, k = linear.n, linear.k
    try:
        words = torch.randint(
            -(2**31), 2**31, (k // 8, n), dtype=torch.int32, device=device
        )  # GPTQ's order: any word is valid
        scales = torch.empty(k // group_size, n, dtype=torch.bfloat16, device=device).uniform_(2.0**-8, 2.0**-7)
        packed = ops.gptq_marlin_repack(words, size_k=k, size_n=n, num_bits=4)
        placed = marlin_permute_scales(scales, size_k=k, size_n=n, group_size=group_size)
        nbytes = words.numel() * 4 + scales.numel() * 2
        copies = [(packed.clone(), placed.clone()) for _ in range(copies_of(nbytes, cache))]
        empty, workspace = marlin_make_empty(device), marlin_make_workspace_new(device)

        def product(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
            return apply_gptq_marlin_linear(
                input=x, weight=w, weight_scale=s, weight_zp=empty, workspace=workspace, wtype=scalar_types.uint4b8,
                output_size_per_partition=n, input_size_per_partition=k,
            )  # fmt: skip

        shifts = torch.arange(0, 32, 4, device=device)
        codes = (words[:, :64, None] >> shifts & 15).transpose(1, 2).reshape(k, 64).double() - 8
        exact_weight = (codes * scales[:, :64].double().repeat_interleave(group_size, 0)).T
        x = activations(3, k, n, torch.bfloat16, device, False, False)[0]
        found, (exact, _) = product(x, *copies[0])[:, :64].double(), float64_product(x, exact_weight, None)
        wrong = float(((found - exact).norm() / exact.norm()).item())
        if not wrong < 2e-2:
            return f"{MARLIN}: its product is wrong (relative error {wrong:.2g}), so this vLLM is called wrongly here"

        def call(w: Tensor, s: Tensor) -> Call:
            return lambda x: product(x, w, s)

        return GpuBaseline(MARLIN, [call(w, s) for w, s in copies], nbytes)
    except Exception as error:
        return f"{MARLIN}: this vLLM differs from the one this was written for ({summary(error)})"


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second when a large tensor is copied."""
    free, _ = torch.cuda.mem_get_info(device)
    source = torch.zeros(min(COPY_BYTES, free // 8), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    graph = captured(lambda: target.copy_(source), device)
    return 2 * source.numel() / median(replay_seconds(graph, 15, device))


@contextmanager
def out_of_memory_noted(report: GpuReport, linear: Linear) -> Iterator[None]:
    """A GPU with little memory measures what fits."""
    try:
        yield
    except torch.OutOfMemoryError:
        report.notes.append(f"{linear.label}: out of GPU memory, left out")
    torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------ result


def current_gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def make_rows(
    timed: Mapping[tuple[Linear, int], Timed],
    bandwidth: float | None,
) -> list[Row]:
    """Ratios and shares of what was timed."""
    rows = []
    for (linear, m), found in timed.items():
        times, nbytes = found.microseconds, found.nbytes
        peers = {name: t for name, t in times.items() if name not in known_backends()}
        mine = {name: t for name, t in times.items() if name in known_backends()}
        ratios = {name: {peer: p / t for peer, p in peers.items()} for name, t in mine.items()}
        shares = {name: nbytes[name] / (t * 1e-6) / bandwidth for name, t in times.items()} if bandwidth else {}
        rows.append(Row(linear.name, linear.n, linear.k, m, times, nbytes, found.configs, ratios, shares))
    return rows


def merge_times(report: GpuReport, file: Path) -> None:
    """Put the measured times into the file that `runtime/backends/measured_choice.py` reads, in place of older ones of the same
    product and beside all others."""
    names: dict[str, tuple[str, Literal[4, 16]]] = {
        label(name, bits): (name, bits) for name in known_backends() for bits in BITS.get(name, (4,))
    }
    everything = read_json(file) if file.exists() else {}
    kinds = everything.setdefault(report.gpu["name"], {})
    for row in report.rows:
        for shown, microseconds in row.microseconds.items():
            if shown in names:
                name, bits = names[shown]
                kind = kinds.setdefault(measured_choice.kind(ModuleScheme(bits, 64, "2:4", (row.n, row.k))), {})
                kind.setdefault(f"{row.n}x{row.k}", {}).setdefault(name, {})[str(row.m)] = microseconds
    atomic_write(file, json.dumps(everything, indent=1, sort_keys=True) + "\n")


def tables(report: GpuReport) -> list[Table | Text]:
    """The report for people."""
    shown: list[Table | Text] = []
    if gpu := report.gpu:
        shown.append(
            Text(
                f"{gpu['name']} (sm_{gpu['capability'].replace('.', '')}, {gpu['multiprocessors']} multiprocessors, "
                f"L2 {gpu['l2_bytes'] / 2**20:.0f} MiB), torch {gpu['torch']}, CUDA {gpu['cuda']}"
            )
        )
    shown += [Text(note) for note in report.notes]
    if report.correctness:
        view = Table(title="Compared with float64", title_justify="left")
        view.add_column("back end", no_wrap=True)
        view.add_column("configuration", no_wrap=True)
        for heading in ("products", "left out", "worst error / allowed", "relative error"):
            view.add_column(heading, justify="right")
        view.add_column("result")
        for check in report.correctness:
            if check.failures:
                verdict = Text(f"WRONG in {len(check.failures)}: {'; '.join(check.failures[:3])}", style="bold red")
            else:
                verdict = Text("right" if check.cases else "nothing compared", style="green" if check.cases else "dim")
            view.add_row(
                check.backend, Text(check.config), str(check.cases), str(check.left_out or ""),
                f"{check.worst:.3f}", f"{check.rms:.2e}", verdict,
            )  # fmt: skip
        shown.append(view)
    if report.rows:
        shown.append(times_table(report))
    return shown


def times_table(report: GpuReport) -> Table:
    """One row per linear and M: microseconds, ratios to the peers, share of the bandwidth, the best configuration."""
    names = list(dict.fromkeys(name for row in report.rows for name in row.microseconds))
    mine = [name for name in names if name in known_backends()]
    peers = [name for name in names if name not in mine]
    bandwidth = f"{report.copy_bandwidth / 1e9:.0f} GB/s" if report.copy_bandwidth else "unknown"
    view = Table(
        title=escape(
            f"4-bit 2:4, groups of {report.group_size}, bfloat16 activations: microseconds, and times faster than"
        ),
        caption=escape(
            f"weights from memory; CUDA graphs; share: bytes of weights and activations per second of the measured copy "
            f"bandwidth ({bandwidth}); best: the CUDA kernel's fastest configuration, where it beats its choice by 3%"
        ),
        title_justify="left",
        caption_justify="left",
    )
    view.add_column("linear, outputs x inputs", no_wrap=True)
    view.add_column("M", justify="right")
    for name in names:
        view.add_column(f"{name} us", justify="right")
    for name in mine:
        for peer in peers:
            view.add_column(f"{name} : {peer}", justify="right")
        view.add_column(f"{name} share", justify="right")
    view.add_column("best", no_wrap=True)
    last = ""
    for row in report.rows:
        shape = f"{row.linear} {row.n}x{row.k}"
        if last and shape != last:
            view.add_section()
        cells = [f"{row.microseconds[name]:.1f}" if name in row.microseconds else "-" for name in names]
        for name in mine:
            ratios = row.ratios.get(name, {})
            cells += [f"{ratios[peer]:.2f}x" if peer in ratios else "-" for peer in peers]
            cells.append(f"{100 * row.bandwidth_share[name]:.0f}%" if name in row.bandwidth_share else "-")
        view.add_row(shape if shape != last else "", str(row.m), *cells, Text(best_config(row)))
        last = shape
    return view


def best_config(row: Row) -> str:
    """The CUDA kernel's fastest configuration, where its own choice is more than 3% slower."""
    if not row.configs or "cuda" not in row.microseconds:
        return ""
    name = min(row.configs, key=lambda config: row.configs[config])
    gain = row.microseconds["cuda"] / row.configs[name]
    label = name if name == DECODED else str(list(row.configs).index(name))
    return f"{label}: {row.configs[name]:.1f} us" if gain > 1.03 else ""
