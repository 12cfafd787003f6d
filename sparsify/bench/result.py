"""What a benchmark found: ratios to the first model first, seconds second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparsify.bench.workload import LatencyWorkload, ThroughputWorkload
from sparsify.failure import Failure, foot


@dataclass(frozen=True)
class LatencyFigures:
    """Medians over all iterations of all rounds, in seconds.

    ttft is the time of a request that asks for one token. itl is what each further token costs:
    (request - ttft) / (output_len - 1). The raw times are kept.
    """

    ttft: float
    itl: float
    request: float
    decode_tokens_per_second: float
    first_token_seconds: list[float]
    request_seconds: list[float]


@dataclass(frozen=True)
class ThroughputFigures:
    """Medians over rounds."""

    output_tokens_per_second: float
    total_tokens_per_second: float
    requests_per_second: float
    elapsed_seconds: list[float]


@dataclass(frozen=True)
class SettingSpeed:
    """One model with one value of VLLM_CPU_OMP_THREADS_BIND. failure: why it has no figures."""

    threads: str
    latency: LatencyFigures | None
    throughput: ThroughputFigures | None
    failure: Failure | None = None

    def seconds(self) -> float:
        """What one request takes, or all of them: what decides which setting is best."""
        if self.latency:
            return self.latency.request
        return 1 / self.throughput.output_tokens_per_second if self.throughput else float("inf")


@dataclass(frozen=True)
class ModelSpeed:
    """One model. Every value of `ratios` is a factor over the first model, and more than 1 is better:
    how many times smaller, how many times faster. answers: greedy replies to the prompts of the run.
    threads: the thread setting of these figures; settings: those of all that were tried, when it was more than one.
    failure: why there are no figures. Without figures of the first model there are no ratios but that of the sizes."""

    model: str
    format: str
    nbytes: int
    latency: LatencyFigures | None
    throughput: ThroughputFigures | None
    ratios: dict[str, float]
    answers: list[str] = field(default_factory=list)
    threads: str = ""
    settings: list[SettingSpeed] = field(default_factory=list)
    failure: Failure | None = None


@dataclass(frozen=True)
class BenchResult:
    """One run of one or both benchmarks over several models."""

    models: list[ModelSpeed]
    latency: LatencyWorkload | None
    throughput: ThroughputWorkload | None
    repeats: int
    eager: bool
    commands: list[str]
    environment: dict[str, str]
    machine: dict[str, Any]
    versions: dict[str, str]
    seconds: float = 0.0
    prompts: list[str] = field(default_factory=list)
    greedy: bool = False

    @property
    def compares(self) -> bool:
        """Whether the first model, which the others are compared with, was measured."""
        return self.models[0].failure is None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def latency_figures(first: Sequence[float], full: Sequence[float], workload: LatencyWorkload) -> LatencyFigures:
    """first, full: seconds of every iteration with one output token, and with all of them."""
    ttft, request = median(first), median(full)
    # Noise on a busy machine can make one token seem to cost as much as all; a time is never zero.
    itl = max((request - ttft) / (workload.output_len - 1), 1e-9)
    return LatencyFigures(ttft, itl, request, workload.batch_size / itl, list(first), list(full))


def throughput_figures(elapsed: Sequence[float], total_tokens: int, workload: ThroughputWorkload) -> ThroughputFigures:
    """elapsed: seconds of every round for all prompts;  total_tokens: prompt and output tokens of one round."""
    seconds = median(elapsed)
    # Benchmarks ignore the end-of-sequence token, so every request yields exactly output_len tokens.
    output = workload.prompts * workload.output_len
    return ThroughputFigures(output / seconds, total_tokens / seconds, workload.prompts / seconds, list(elapsed))


def ratios(
    nbytes: tuple[int, int],
    latency: tuple[LatencyFigures, LatencyFigures] | None,
    throughput: tuple[ThroughputFigures, ThroughputFigures] | None,
) -> dict[str, float]:
    """Each pair is (this model, first model)."""
    found = {"size": nbytes[1] / nbytes[0]}
    if latency:
        mine, base = latency
        found |= {"decode": base.itl / mine.itl, "ttft": base.ttft / mine.ttft, "request": base.request / mine.request}
    if throughput:
        found["throughput"] = throughput[0].output_tokens_per_second / throughput[1].output_tokens_per_second
    return found


def size(nbytes: int) -> str:
    """Bytes for people, in decimal units as model hubs count them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}" if nbytes < 1000 * factor else f"{nbytes / factor:.0f} {unit}"
    return f"{nbytes} B"


def duration(seconds: float) -> str:
    """Seconds for people."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def table(result: BenchResult) -> Table:
    """Ratios to the first model in front, the absolute value below each. A model that could not run says why."""
    first = result.models[0]
    compared = (
        f"ratios to {escape(first.model)}" if result.compares else f"no ratios: {escape(first.model)} did not run"
    )
    view = Table(
        title=f"Speed in vLLM, {compared}",
        caption=escape(_caption(result)),
        title_justify="left",
        caption_justify="left",
    )
    view.add_column("model", overflow="fold")
    headings = ["smaller"]
    if result.latency:
        headings += ["decode", "first token", "per token"]
    if result.throughput:
        headings += ["throughput"]
    for heading in headings:
        view.add_column(heading, justify="right", no_wrap=True)
    for row in result.models:
        cells = [_cell(row.ratios["size"], size(row.nbytes))]
        if times := row.latency:
            cells.append(_cell(row.ratios.get("decode"), f"{times.decode_tokens_per_second:.1f} tok/s"))
            cells.append(_cell(row.ratios.get("ttft"), duration(times.ttft)))
            cells.append(_cell(row.ratios.get("decode"), duration(times.itl)))
        if rates := row.throughput:
            cells.append(_cell(row.ratios.get("throughput"), f"{rates.output_tokens_per_second:.1f} tok/s"))
        if row.failure:
            cells.append(Text(row.failure.short, "yellow"))
        kind = f"{row.format}, threads {row.threads}" if row.settings and not row.failure else row.format
        view.add_row(Text.assemble(row.model, "\n", (kind, "dim")), *cells)
    return view


def _cell(ratio: float | None, absolute: str) -> Text:
    if ratio is None:
        return Text(absolute)
    return Text.assemble((f"{ratio:.2f}x", "bold"), "\n", (absolute, "dim"))


def _caption(result: BenchResult) -> str:
    parts = []
    if work := result.latency:
        parts.append(f"latency: batch {work.batch_size}, {work.input_len} tokens in, {work.output_len} out")
    if load := result.throughput:
        parts.append(f"throughput: {load.prompts} prompts, {load.input_len} in, {load.output_len} out")
    if result.greedy:
        parts.append("greedy")
    if any(row.settings for row in result.models):
        parts.append("each model with the threads that suit it best")
    parts.append(f"{result.machine['cpu']}, {result.machine['cores']} cores; more than 1x is better")
    return "\n".join(filter(None, ["; ".join(parts), foot(failures(result))]))


def failures(result: BenchResult) -> list[Failure]:
    """Of models without figures, and of thread settings that a model could not run with."""
    tried = [setting.failure for row in result.models for setting in row.settings]
    return [failure for failure in (*(row.failure for row in result.models), *tried) if failure]
