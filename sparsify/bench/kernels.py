"""`sparsify bench kernels`: one linear at a time, ours against PyTorch's and vLLM's, beside what the machine can do.

The contestants take turns (A B C A B C ...), so that a slow spell of the machine hits them all. One turn is a few bursts
of calls, of which the fastest counts; a contestant's time is the median over its turns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from statistics import median
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparsify.bench import contestants
from sparsify.bench.contestants import OURS, PEERS, Contestant
from sparsify.bench.machine import describe_machine, installed_versions, recorded_environment
from sparsify.bench.peaks import Peaks, cache_bytes, measure_peaks
from sparsify.bench.result import duration, size
from sparsify.bench.shapes import Linear, distinct, model_shape, parse_shape
from sparsify.errors import NumericalError, SparsifyError
from sparsify.formats import ModuleScheme
from sparsify.progress import progress_bar

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
UNKNOWN_L3 = 64 * 2**20  # what --cold exceeds where the size of the last cache is not known
CHECKED_ROWS = 3
BURSTS = 3
Clock = Callable[[], float]


@dataclass(frozen=True)
class KernelOptions:
    """What to measure and how.

    rows: M, the tokens multiplied at once. bits, group_size (0: one scale per output), pattern, dtype: of our linear.
    peers: keys of `contestants.PEERS`. cold: every call uses another copy of the weights, which together exceed the
    last cache. rounds: turns per contestant; seconds: how long one burst of calls takes at least.
    """

    rows: Sequence[int] = ROWS
    bits: int = 4
    group_size: int = 64
    pattern: str = "2:4"
    dtype: str = "bfloat16"
    peers: Sequence[str] = ("torch", "wna16")
    cold: bool = False
    rounds: int = 5
    seconds: float = 0.02
    peaks: bool = True
    quiet: bool = False


@dataclass(frozen=True)
class Timing:
    """One contestant on one shape with one number of rows.

    seconds: median over turns of the fastest burst, per call. nbytes: of the weights of one call.
    bandwidth: nbytes per second; arithmetic: 2 N K M operations per second, as if the weights were dense.
    """

    contestant: str
    detail: str
    seconds: float
    turns: list[float]
    nbytes: int
    bandwidth: float
    arithmetic: float


@dataclass(frozen=True)
class KernelRow:
    """Everything about one shape and one number of rows.

    ratios: how many times faster than each peer. exceeds_l3: whether the weights come from memory: they are larger than
    the last cache, or so are the copies that were cycled through; None where its size is not known.
    bandwidth_share, arithmetic_share: of the machine's peaks (of the cache's bandwidth for weights that fit in it).
    """

    linear: Linear
    m: int
    ratios: dict[str, float]
    timings: list[Timing]
    exceeds_l3: bool | None
    bandwidth_share: float | None
    arithmetic_share: float | None

    @property
    def ours(self) -> Timing:
        return self.timings[0]


@dataclass(frozen=True)
class KernelResult:
    """One run."""

    options: KernelOptions
    rows: list[KernelRow]
    notes: list[str]
    peaks: Peaks | None
    l3_bytes: int | None
    threads: int
    machine: dict[str, Any]
    versions: dict[str, str]
    environment: dict[str, str]
    seconds: float = 0.0
    backends: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def linears_of(models: Sequence[str], shapes: Sequence[str]) -> list[Linear]:
    """The distinct linears of models (built-in names or checkpoints) and of `NxK` texts."""
    if not models and not shapes:
        raise SparsifyError("nothing to measure: name a model (a directory, or a built-in shape) or give --shape NxK")
    return distinct([*(part for model in models for part in model_shape(model).merged()), *map(parse_shape, shapes)])


def bench_kernels(linears: Sequence[Linear], options: KernelOptions | None = None) -> KernelResult:
    """Measure every linear with every number of rows."""
    options = options or KernelOptions()
    check(options)
    started = time.perf_counter()
    threads = torch.get_num_threads()
    l3 = cache_bytes(3)
    rows: list[KernelRow] = []
    notes: list[str] = []
    backends: list[str] = []
    with progress_bar("bench kernels", total=len(linears) + options.peaks, quiet=options.quiet) as bar:
        peaks = None
        if options.peaks:
            bar.describe("the machine's peaks")
            try:
                peaks = measure_peaks(threads)
            except SparsifyError as error:
                notes.append(f"no peaks: {error}")
            bar.advance()
        for linear in linears:
            bar.describe(f"{linear.label}: packing")
            field_, remarks = line_up(linear, options, l3)
            notes += [remark for remark in remarks if remark not in notes]
            backends += [c.detail for c in field_ if c.name == OURS and c.detail not in backends]
            for contestant in field_:
                check_product(contestant, linear)
            for m in options.rows:
                bar.describe(f"{linear.label}, M {m}")
                times = take_turns(field_, m, linear.k, options)
                rows.append(make_row(linear, m, field_, times, options, peaks, l3))
            bar.advance()
    return KernelResult(
        options=options,
        rows=rows,
        notes=notes,
        peaks=peaks,
        l3_bytes=l3,
        threads=threads,
        machine=describe_machine(),
        versions=installed_versions(),
        environment=recorded_environment(os.environ),
        seconds=time.perf_counter() - started,
        backends=backends,
    )


def check(options: KernelOptions) -> None:
    """Refuse what cannot be measured before anything is made."""
    if not options.rows or any(m < 1 for m in options.rows):
        raise SparsifyError("--rows takes positive numbers of tokens, as in --rows 1,8,32")
    if options.dtype not in DTYPES:
        raise SparsifyError(f"--dtype {options.dtype} is unknown; choose from {', '.join(DTYPES)}")
    if unknown := [peer for peer in options.peers if peer not in PEERS]:
        raise SparsifyError(f"--against {unknown[0]} is unknown; choose from {', '.join(PEERS)}")
    if options.rounds < 1:
        raise SparsifyError("--rounds takes a positive number")


def line_up(linear: Linear, options: KernelOptions, l3: int | None) -> tuple[list[Contestant], list[str]]:
    """Ours first, then the peers that can be had; and why others cannot."""
    n, k = linear.n, linear.k
    group = k if options.bits == 16 or not options.group_size else options.group_size
    scheme = ModuleScheme(options.bits, group, options.pattern, (n, k))

    def copies(bits_per_weight: float) -> int:
        # twice the cache: it keeps what was read last, however the copies are ordered
        wanted = 2 * (l3 or UNKNOWN_L3)
        return max(2, -int(-wanted // (n * k * bits_per_weight / 8)) + 1) if options.cold else 1

    bits = options.bits * (0.5 if options.pattern == "2:4" else 1) + (1 if options.pattern == "2:4" else 0)
    field_ = [contestants.ours(scheme, DTYPES[options.dtype], copies(bits))]
    remarks = []
    if "torch" in options.peers:
        field_.append(contestants.torch_linear(n, k, copies(16)))
    for peer in ("wna16", "w4a8"):
        if peer in options.peers:
            found = contestants.vllm_linear(n, k, group if options.bits != 16 else 64, copies(4), peer == "w4a8")
            if isinstance(found, str):
                remarks.append(found)
            else:
                field_.append(found)
    return field_, remarks


def check_product(contestant: Contestant, linear: Linear) -> None:
    """A fast wrong product is worth nothing: compare the first outputs with float64."""
    generator = torch.Generator().manual_seed(7)
    x = torch.empty(CHECKED_ROWS, linear.k).normal_(generator=generator).to(contestant.dtype)
    error = contestants.error_of(contestant, x)
    if not error <= contestant.tolerance:
        name = f"{contestant.name} ({contestant.detail})" if contestant.detail else contestant.name
        raise NumericalError(
            f"{name} multiplies {linear.label} wrongly: relative error {error:.2g}, expected at most "
            f"{contestant.tolerance:.2g}; its speed means nothing"
        )


def take_turns(
    field_: Sequence[Contestant], m: int, k: int, options: KernelOptions, clock: Clock = time.perf_counter
) -> list[list[float]]:
    """Seconds per call: one list per contestant with one value per turn, that of the turn's fastest burst."""
    generator = torch.Generator().manual_seed(m)
    source = torch.empty(m, k).normal_(generator=generator)
    inputs = [source.to(contestant.dtype) for contestant in field_]
    copies = [cycle(contestant.calls) for contestant in field_]

    def burst(index: int, count: int) -> float:
        x, weights = inputs[index], copies[index]
        begin = clock()
        for _ in range(count):
            next(weights)(x)
        return (clock() - begin) / count

    # The first calls allocate and fault pages in; the second tells how many fit into a burst.
    counts = []
    for index in range(len(field_)):
        burst(index, 1)
        counts.append(max(1, min(10_000, int(options.seconds / max(burst(index, 1), 1e-9)))))
    turns: list[list[float]] = [[] for _ in field_]
    for _ in range(options.rounds):
        for index, count in enumerate(counts):
            turns[index].append(min(burst(index, count) for _ in range(BURSTS)))
    return turns


def make_row(
    linear: Linear,
    m: int,
    field_: Sequence[Contestant],
    turns: Sequence[Sequence[float]],
    options: KernelOptions,
    peaks: Peaks | None,
    l3: int | None,
) -> KernelRow:
    """turns: what `take_turns` returned."""
    timings = []
    for contestant, times in zip(field_, turns, strict=True):
        seconds = max(median(times), 1e-12)
        bandwidth, arithmetic = contestant.nbytes / seconds, 2 * linear.n * linear.k * m / seconds
        timings.append(
            Timing(contestant.name, contestant.detail, seconds, list(times), contestant.nbytes, bandwidth, arithmetic)
        )
    mine = timings[0]
    exceeds = None if l3 is None else field_[0].nbytes * len(field_[0].calls) > l3
    bandwidth_share = arithmetic_share = None
    if peaks:
        reading = peaks.read if exceeds or peaks.read_l3 is None else peaks.read_l3
        bandwidth_share = mine.bandwidth / reading
        arithmetic_share = mine.arithmetic / (peaks.float32 if options.dtype == "float32" else peaks.bfloat16)
    ratios = {timing.contestant: timing.seconds / mine.seconds for timing in timings[1:]}
    return KernelRow(linear, m, ratios, timings, exceeds, bandwidth_share, arithmetic_share)


# ------------------------------------------------------------------------------------------------------------- table


def table(result: KernelResult) -> Table:
    """One row per shape and M: ratios first, then what of the machine's peaks was reached."""
    options = result.options
    names = list(dict.fromkeys(name for row in result.rows for name in row.ratios))
    kind = f"{options.pattern} {options.bits}-bit"
    if options.bits < 16:
        kind += f", {f'groups of {options.group_size}' if options.group_size else 'one scale per output'}"
    view = Table(
        title=escape(f"Linears, {kind}, {options.dtype} (back end {', '.join(result.backends)}): times faster than"),
        caption=escape("\n".join(caption(result))),
        title_justify="left",
        caption_justify="left",
    )
    view.add_column("linear, outputs x inputs", no_wrap=True)
    view.add_column("weights from", no_wrap=True)
    view.add_column("M", justify="right")
    for name in names:
        view.add_column(name, justify="right", no_wrap=True)
    for heading in ("GB/s", "of peak", "GFLOP/s", "of peak", "time"):
        view.add_column(heading, justify="right", no_wrap=True)
    last = None
    for row in result.rows:
        if last is not None and row.linear != last:
            view.add_section()
        # Text, not str: rich reads brackets as markup
        head = Text(row.linear.label) if row.linear != last else Text("")
        place = Text(weights_from(row)) if row.linear != last else Text("")
        last = row.linear
        ratios = [Text(f"{row.ratios[name]:.2f}x" if name in row.ratios else "-", style="bold") for name in names]
        view.add_row(
            head, place, str(row.m), *ratios,
            f"{row.ours.bandwidth / 1e9:.1f}", share(row.bandwidth_share),
            f"{row.ours.arithmetic / 1e9:.0f}", share(row.arithmetic_share), duration(row.ours.seconds),
        )  # fmt: skip
    return view


def weights_from(row: KernelRow) -> str:
    """Where the weights of a call come from: memory, or a cache that flatters the figure."""
    nbytes = size(row.ours.nbytes)
    if row.exceeds_l3 is None:
        return f"{nbytes}, L3 unknown"
    return f"memory, {nbytes}" if row.exceeds_l3 else f"cache, {nbytes}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def caption(result: KernelResult) -> list[str]:
    lines = []
    if peaks := result.peaks:
        l3 = f", {peaks.read_l3 / 1e9:.1f} from L3" if peaks.read_l3 else ""
        lines.append(
            f"measured peaks of {peaks.threads} threads: {peaks.read / 1e9:.1f} GB/s from memory{l3}; "
            f"{peaks.bfloat16 / 1e9:.0f} GFLOP/s bf16 ({peaks.bfloat16_level}), "
            f"{peaks.float32 / 1e9:.0f} fp32 ({peaks.float32_level})"
        )
    l3_text = f"L3 {size(result.l3_bytes)}" if result.l3_bytes else "L3 of unknown size"
    lines.append(f"{result.machine['cpu']}, {result.threads} threads, {l3_text}")
    if result.options.cold:
        lines.append("cold: every call uses another copy of the weights; all copies are twice as large as L3")
    elif any(row.exceeds_l3 is False for row in result.rows):
        lines.append(
            "weights that fit in L3 stay there between calls, which no model lets them: measure those with --cold"
        )
    lines.append("GB/s: weight bytes over time; GFLOP/s: 2 N K M over time, as if the weights were dense")
    return [*lines, *result.notes]
