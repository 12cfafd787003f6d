"""`sparsify bench kernels`: one linear at a time, ours against PyTorch's, vLLM's and llama.cpp's, beside what the machine
can do.

The baselines take turns (A B C A B C ...), so that a slow spell of the machine hits them all. One turn is a few bursts
of calls, of which the fastest counts; a baseline's time is the median over its turns. The machine's peaks are measured
before and after every round: each turn of ours is set beside the better of its two neighbours. A peer that cannot be
measured is named with the reason, and the others go on.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import cycle
from statistics import median
from typing import Any

import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor

from sparsify.bench import baselines
from sparsify.bench.baselines import OURS, PEERS, Baseline
from sparsify.bench.machine import describe_machine, installed_versions, recorded_environment
from sparsify.bench.missing import Absence, absence
from sparsify.bench.peaks import Glance, Meter, Peaks, cache_bytes
from sparsify.bench.result import duration, size
from sparsify.bench.shapes import Linear, distinct, model_shape, parse_shape
from sparsify.errors import NumericalError, SparsifyError
from sparsify.formats import ModuleScheme
from sparsify.processor import LEVELS, OTHER_VARIABLES, forced_level
from sparsify.progress import progress_bar
from sparsify.runtime.backends import BACKENDS

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
UNKNOWN_L3 = 64 * 2**20  # what --cold exceeds where the size of the last cache is not known
CHECKED_ROWS = 3
BURSTS = 3
LONG_CALL = 5.0  # seconds: a call that takes longer is timed once
MOST_SECONDS = 20.0  # of one baseline's turns with one number of rows; slow ones get fewer
Clock = Callable[[], float]


@dataclass(frozen=True)
class KernelOptions:
    """What to measure and how.

    rows: M, the tokens multiplied at once. bits, group_size (0: one scale per output), pattern, dtype: of our linear.
    peers: keys of `baselines.PEERS`. cold: every call uses another copy of the weights, which together exceed the
    last cache. rounds: turns per baseline; seconds: how long one burst of calls takes at least.
    """

    rows: Sequence[int] = ROWS
    bits: int = 4
    group_size: int = 64
    pattern: str = "2:4"
    dtype: str = "bfloat16"
    peers: Sequence[str] = ("torch", "torch-fp32", "wna16", "llama.cpp")
    cold: bool = False
    rounds: int = 5
    seconds: float = 0.02
    peaks: bool = True
    quiet: bool = False


@dataclass(frozen=True)
class Timing:
    """One baseline on one shape with one number of rows.

    seconds: median over turns of the fastest burst, per call. nbytes: of the weights of one call.
    bandwidth: nbytes per second; arithmetic: 2 N K M operations per second, as if the weights were dense.
    """

    baseline: str
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
    glances: peaks (of the cache's bandwidth for weights that fit in it) before, between and after the rounds;
    bandwidth_share, arithmetic_share: of the better of its two neighbours, median over our turns.
    """

    linear: Linear
    m: int
    ratios: dict[str, float]
    timings: list[Timing]
    exceeds_l3: bool | None
    bandwidth_share: float | None
    arithmetic_share: float | None
    glances: list[Glance]

    @property
    def ours(self) -> Timing:
        return self.timings[0]


@dataclass(frozen=True)
class KernelResult:
    """One run.

    peers: which kernel of each peer ran, by its name. absences: peers that could not be measured, everywhere or somewhere.
    level: instruction sets of our kernels; forced_level: what SPARSIFY_CPU_LEVEL says, if anything.
    """

    options: KernelOptions
    rows: list[KernelRow]
    peers: dict[str, str]
    absences: list[Absence]
    notes: list[str]
    peaks: Peaks | None
    l3_bytes: int | None
    threads: int
    machine: dict[str, Any]
    versions: dict[str, str]
    environment: dict[str, str]
    command: str
    date: str
    level: str
    forced_level: str | None
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
    started, date = time.perf_counter(), datetime.now(UTC)
    threads = torch.get_num_threads()
    l3 = cache_bytes(3)
    rows: list[KernelRow] = []
    peers: dict[str, str] = {}
    absences: list[Absence] = []
    notes: list[str] = []
    backends: list[str] = []
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar("bench kernels", len(linears) + options.peaks, quiet=options.quiet))
        meter = peaks = None
        if options.peaks:
            bar.describe("the machine's peaks")
            try:
                meter = stack.enter_context(Meter(threads))
                peaks = meter.peaks()
            except SparsifyError as error:
                notes.append(f"no peaks: {error}")
            bar.advance()
        for linear in linears:
            bar.describe(f"{linear.label}: packing")
            field_, absent = line_up(linear, options, l3)
            absences += absent
            backends += [c.detail for c in field_ if c.name == OURS and c.detail not in backends]
            peers.update({baseline.name: baseline.detail for baseline in field_[1:]})
            for m in options.rows:
                bar.describe(f"{linear.label}, M {m}")
                row, absent = measure_row(linear, m, field_, options, meter, l3)
                rows.append(row)
                absences += absent
            bar.advance()
    return KernelResult(
        options=options,
        rows=rows,
        peers=peers,
        absences=everywhere(absences, linears),
        notes=[*notes, *remarks(options)],
        peaks=peaks,
        l3_bytes=l3,
        threads=threads,
        machine=describe_machine(),
        versions=installed_versions(),
        environment=recorded_environment(os.environ),
        command=shlex.join([*(["sparsify"] if "sparsify" in sys.argv[0] else sys.argv[:1]), *sys.argv[1:]]),
        date=date.isoformat(timespec="seconds"),
        level=level_of(backends),
        forced_level=forced_level(),
        seconds=time.perf_counter() - started,
        backends=backends,
    )


def level_of(backends: Sequence[str]) -> str:
    """The instruction sets that the first of these back ends uses, "" where it has but one way to run."""
    describes = (getattr(backend, "describe", None) for backend in BACKENDS if backend.name in backends)
    return next((str(describe()) for describe in describes if describe), "")


def remarks(options: KernelOptions) -> list[str]:
    """What makes a comparison unequal."""
    forced = forced_level()
    if forced in (None, LEVELS[-1]):
        return []
    if any(peer.startswith("torch") for peer in options.peers) and not all(map(os.environ.get, OTHER_VARIABLES)):
        return [f"torch is not held to {forced}: {', '.join(OTHER_VARIABLES)} do that (see sparsify doctor)"]
    return []


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


def line_up(linear: Linear, options: KernelOptions, l3: int | None) -> tuple[list[Baseline], list[Absence]]:
    """Ours first, then the peers that can be had; and why others cannot."""
    n, k = linear.n, linear.k
    group = k if options.bits == 16 or not options.group_size else options.group_size
    scheme = ModuleScheme(options.bits, group, options.pattern, (n, k))

    def copies(bits_per_weight: float) -> int:
        # twice the cache: it keeps what was read last, however the copies are ordered
        wanted = 2 * (l3 or UNKNOWN_L3)
        return max(2, -int(-wanted // (n * k * bits_per_weight / 8)) + 1) if options.cold else 1

    bits = options.bits * (0.5 if options.pattern == "2:4" else 1) + (1 if options.pattern == "2:4" else 0)
    mine = baselines.ours(scheme, DTYPES[options.dtype], copies(bits))
    check_product(mine, linear)
    field_, absences = [mine], []
    for key in options.peers:
        try:
            peer = baselines.peer(key, n, k, group if options.bits != 16 else 64, copies(baselines.BITS[key]))
            check_product(peer, linear)
        except Exception as error:  # whatever another software raises: the comparison goes on without it
            absences.append(absence(PEERS[key], error, linear.label))
        else:
            field_.append(peer)
    return field_, absences


def everywhere(absences: Sequence[Absence], linears: Sequence[Linear]) -> list[Absence]:
    """Each absence once; one that is the same for all linears stands once for them together."""
    found: list[Absence] = []
    for one in absences:
        same = {other.where for other in absences if (other.peer, other.why) == (one.peer, one.why)}
        if same >= {linear.label for linear in linears}:
            one = replace(one, where="")
        if all((one.peer, one.why, one.where) != (other.peer, other.why, other.where) for other in found):
            found.append(one)
    return found


def check_product(baseline: Baseline, linear: Linear) -> None:
    """A fast wrong product is worth nothing: compare the first outputs with float64."""
    generator = torch.Generator().manual_seed(7)
    x = torch.empty(CHECKED_ROWS, linear.k).normal_(generator=generator).to(baseline.dtype)
    error = baselines.error_of(baseline, x)
    if not error <= baseline.tolerance:
        name = f"{baseline.name} ({baseline.detail})" if baseline.detail else baseline.name
        raise NumericalError(
            f"{name} multiplies {linear.label} wrongly: relative error {error:.2g}, expected at most "
            f"{baseline.tolerance:.2g}; its speed means nothing"
        )


def measure_row(
    linear: Linear,
    m: int,
    field_: Sequence[Baseline],
    options: KernelOptions,
    meter: Meter | None,
    l3: int | None,
) -> tuple[KernelRow, list[Absence]]:
    """One shape with M rows, and the peers that cannot multiply that many."""
    generator = torch.Generator().manual_seed(m)
    source = torch.empty(m, linear.k).normal_(generator=generator)
    inputs = {baseline.dtype: source.to(baseline.dtype) for baseline in field_}
    running, first, absences = first_calls(field_, inputs, f"{linear.label}, {m} rows")
    glances: list[Glance] = []
    kind = "float32" if options.dtype == "float32" else "bfloat16"
    from_memory = exceeds_cache(field_[0], l3) is not False

    def glance() -> None:
        if meter is not None:
            glances.append(meter.glance(kind, from_memory))

    turns = take_turns(running, inputs, options, first, glance)
    return make_row(linear, m, running, turns, glances, l3), absences


def first_calls(
    field_: Sequence[Baseline], inputs: Mapping[torch.dtype, Tensor], where: str, clock: Clock = time.perf_counter
) -> tuple[list[Baseline], list[float], list[Absence]]:
    """The baselines whose first call works, its seconds, and why others do not. It allocates and faults pages in."""
    running, seconds, absences = [], [], []
    for baseline in field_:
        begin = clock()
        try:
            baseline.calls[0](inputs[baseline.dtype])
        except Exception as error:
            if baseline.name == OURS:
                raise
            absences.append(absence(baseline.name, error, where))
            continue
        running.append(baseline)
        seconds.append(clock() - begin)
    return running, seconds, absences


def take_turns(
    field_: Sequence[Baseline],
    inputs: Mapping[torch.dtype, Tensor],
    options: KernelOptions,
    first: Sequence[float],
    between: Callable[[], None] = lambda: None,
    clock: Clock = time.perf_counter,
) -> list[list[float]]:
    """Seconds per call: one list per baseline with one value per turn, that of the turn's fastest burst.

    first: seconds of the first calls. between: called before, between and after the rounds.
    """
    copies = [cycle(baseline.calls) for baseline in field_]

    def burst(index: int, count: int) -> float:
        x, weights = inputs[field_[index].dtype], copies[index]
        begin = clock()
        for _ in range(count):
            next(weights)(x)
        return (clock() - begin) / count

    # The second call shows how many fit into a burst, and how many turns into the time that there is.
    turns: list[list[float]] = [[] for _ in field_]
    pace: list[tuple[int, int, int]] = []  # calls of a burst, bursts of a turn, turns
    for index, seconds in enumerate(first):
        if seconds > LONG_CALL:
            turns[index].append(seconds)
            pace.append((0, 0, 0))
            continue
        seconds = max(burst(index, 1), 1e-9)
        count = max(1, min(10_000, int(options.seconds / seconds)))
        turn = BURSTS * count * seconds
        pace.append((count, BURSTS, max(1, min(options.rounds, int(MOST_SECONDS / turn)))))
    for done in range(options.rounds):
        between()
        for index, (count, bursts, most) in enumerate(pace):
            if done < most:
                turns[index].append(min(burst(index, count) for _ in range(bursts)))
            if rest := field_[index].rest:
                rest()
    between()
    return turns


def exceeds_cache(baseline: Baseline, l3: int | None) -> bool | None:
    """Whether its copies together are larger than the last cache; None where its size is not known."""
    return None if l3 is None else baseline.nbytes * len(baseline.calls) > l3


def make_row(
    linear: Linear,
    m: int,
    field_: Sequence[Baseline],
    turns: Sequence[Sequence[float]],
    glances: Sequence[Glance],
    l3: int | None,
) -> KernelRow:
    """turns: what `take_turns` returned. glances: one more than rounds, or none."""
    timings = []
    for baseline, times in zip(field_, turns, strict=True):
        seconds = max(median(times), 1e-12)
        bandwidth, arithmetic = baseline.nbytes / seconds, 2 * linear.n * linear.k * m / seconds
        timings.append(
            Timing(baseline.name, baseline.detail, seconds, list(times), baseline.nbytes, bandwidth, arithmetic)
        )
    mine = timings[0]
    bandwidth_share = arithmetic_share = None
    if glances:
        beside = [(before, after) for before, after in zip(glances, glances[1:], strict=False)][: len(mine.turns)]
        read = [
            max(before.read, after.read) * seconds for (before, after), seconds in zip(beside, mine.turns, strict=True)
        ]
        multiplied = [
            max(before.arithmetic, after.arithmetic) * seconds
            for (before, after), seconds in zip(beside, mine.turns, strict=True)
        ]
        bandwidth_share = mine.nbytes / median(read)
        arithmetic_share = 2 * linear.n * linear.k * m / median(multiplied)
    ratios = {timing.baseline: timing.seconds / mine.seconds for timing in timings[1:]}
    exceeds = exceeds_cache(field_[0], l3)
    return KernelRow(linear, m, ratios, timings, exceeds, bandwidth_share, arithmetic_share, list(glances))


# ------------------------------------------------------------------------------------------------------------- table


def table(result: KernelResult) -> Table:
    """One row per shape and M: ratios first, then what of the machine's peaks was reached; one row per peer says what it is."""
    options = result.options
    names = list(dict.fromkeys(name for row in result.rows for name in row.ratios))
    kind = f"{options.pattern} {options.bits}-bit"
    if options.bits < 16:
        kind += f", {f'groups of {options.group_size}' if options.group_size else 'one scale per output'}"
    ours = f"back end {', '.join(result.backends)}{f': {result.level}' if result.level else ''}"
    view = Table(
        title=escape(f"Linears, {kind}, {options.dtype} ({ours}): times faster than"),
        caption=escape("\n".join(caption(result))),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    view.add_column("linear,\noutputs x inputs")
    view.add_column("weights\nfrom")
    view.add_column("M", justify="right")
    for name in names:
        view.add_column(name.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for heading in ("GB/s", "of\npeak", "GFLOP/s", "of\npeak", "time"):
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
    view.add_section()
    for name, what in peer_rows(result):
        view.add_row(Text(name), Text(what))
    return view


def peer_rows(result: KernelResult) -> list[tuple[str, str]]:
    """Each peer with the kernel that ran, or with the few words that say why it did not."""
    rows = [(name, detail) for name, detail in result.peers.items() if detail]
    for one in result.absences:
        rows.append((f"{one.peer}, {one.where}" if one.where else one.peer, one.why))
    return rows


def weights_from(row: KernelRow) -> str:
    """Where the weights of a call come from: memory, or a cache that flatters the figure."""
    nbytes = size(row.ours.nbytes)
    if row.exceeds_l3 is None:
        return f"{nbytes}, L3 unknown"
    return f"memory, {nbytes}" if row.exceeds_l3 else f"cache, {nbytes}"


def share(value: float | None) -> str:
    """`87%`, or a dash where it is not known."""
    return "-" if value is None else f"{100 * value:.0f}%"


def caption(result: KernelResult) -> list[str]:
    """The lines below the table: the machine, its peaks, what the columns mean, and which peers are absent."""
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
    if any(row.glances for row in result.rows):
        lines.append("of peak: of what the machine read or multiplied right before or after, whichever was more")
    absent = dict.fromkeys(f"{one.peer}: {one.reason}" for one in result.absences)
    return [*lines, *absent, *result.notes]
