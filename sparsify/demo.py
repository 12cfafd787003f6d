"""Compress the embedded model, serve it, compare it with the dense one. `sparsify demo` and `make demo` run this."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sparsify.bench import (
    BenchOptions,
    BenchResult,
    LatencyWorkload,
    ModelSpeed,
    ThroughputWorkload,
    measure,
    require_vllm,
)
from sparsify.bench.peaks import arithmetic_peak
from sparsify.bench.result import failures
from sparsify.compiler.apply import apply
from sparsify.compiler.convert import export
from sparsify.compiler.operations import SOLVER, in_words
from sparsify.compiler.planning import make_plan
from sparsify.compute import choose
from sparsify.errors import SparsifyError
from sparsify.evaluation import EvaluationResult, evaluate_all
from sparsify.evaluation.result import number
from sparsify.failure import foot
from sparsify.files import write_json
from sparsify.lock import only_run
from sparsify.recipe import Recipe, load_recipe
from sparsify.report import report_on

MODEL = "embedded:smollm2-135m-instruct"
RECIPE = "quickstart"
LABELS = ("dense", "pack-quantized", "sparse24")
PROMPTS = ("What is the capital of France?", "Write one sentence about the sea.")
CHUNKS, CHUNK = 16, 256  # of text that the dense model writes to be scored on, token by token
REPORT = "report.html"
RESULT = "demo.json"
ATTAINABLE = 0.8  # of the arithmetic peak: what good kernels reach
PEAK_SECONDS = 0.5  # that the peak is looked for


@dataclass(frozen=True)
class CompileCost:
    """The compile step against what the machine could do.

    operations: by part, counted from the plan;  dtype: of the model's own products; the solver's are in float32
    peaks: operations per second of `threads` threads by type, measured right after the step; empty where the probe could
    not be built
    """

    seconds: float
    operations: dict[str, int]
    dtype: str
    threads: int
    peaks: dict[str, float]

    @property
    def by_type(self) -> dict[str, int]:
        """Operations by the type that they are computed in."""
        solver = sum(count for part, count in self.operations.items() if part in SOLVER)
        total = sum(self.operations.values())
        if self.dtype == "float32":
            return {"float32": total}
        return {self.dtype: total - solver, "float32": solver}

    @property
    def ratio(self) -> float | None:
        """Seconds taken to those of the same operations at 80% of the peaks."""
        if not self.peaks:
            return None
        return self.seconds * ATTAINABLE / sum(count / self.peaks[kind] for kind, count in self.by_type.items())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total_operations": sum(self.operations.values()), "ratio": self.ratio}

    def sentence(self) -> str:
        work = " and ".join(f"{in_words(count)} in {kind}" for kind, count in self.by_type.items())
        cost = f"compile: {self.seconds:.0f} s for {work}"
        if self.ratio is None:
            return f"{cost}; the machine's peak could not be measured"
        rates = " and ".join(f"{rate / 1e9:.0f}" for rate in self.peaks.values())
        return (
            f"{cost}, {self.ratio:.2f} times as long as at {ATTAINABLE:.0%} of the {rates} GFLOP/s on {self.threads} threads "
            "measured just now"
        )


@dataclass(frozen=True)
class Demo:
    """What the demo made and measured; the models are in the order of LABELS.

    dtype: in which vLLM computed, the same for all.  compile: None where an earlier run had finished or begun that step.
    steps: seconds by name
    """

    output: Path
    evaluations: list[EvaluationResult]
    speed: BenchResult
    dtype: str
    compile: CompileCost | None
    steps: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "report": str(self.output / REPORT),
            "evaluation": [result.to_json() for result in self.evaluations],
            "bench": self.speed.to_json(),
            "dtype": self.dtype,
            "compile": None if self.compile is None else self.compile.to_json(),
            "steps": self.steps,
        }

    def table(self) -> RenderableType:
        """One row a model; ratios are to dense."""
        table = Table(title=f"SmolLM2-135M-Instruct in vLLM ({self.dtype}) on this machine")
        for column in (
            "model",
            "size",
            "perplexity",
            "KL to dense",
            "same top token",
            "tokens/s, 1 seq",
            "tokens/s, many",
            "request",
        ):
            table.add_column(column, justify="left" if column == "model" else "right")
        for evaluation, speed in zip(self.evaluations, self.speed.models, strict=True):
            size = f"{speed.nbytes / 1e6:.0f} MB ({speed.ratios['size']:.2f}x)"
            table.add_row(evaluation.model, size, *_accuracy_cells(evaluation), *_speed_cells(speed))
        failed = [result.failure for result in self.evaluations if result.failure] + failures(self.speed)
        ratios = "Ratios to dense, more is better." if self.speed.compares else "No ratios: dense did not run."
        table.caption = escape(
            "Perplexity on text that the dense model wrote. Quickstart calibrates little and trains nothing.\n"
            f"{ratios} sparse24 and pack-quantized hold the same weights.\n{foot(failed)}"
        ).rstrip()
        answers = [
            Panel(Text(answer.strip() or "(nothing)"), title=f"sparse24: {prompt}", title_align="left")
            for prompt, answer in zip(PROMPTS, self.speed.models[-1].answers, strict=False)
        ]
        took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.steps.items())
        return Group(
            table,
            *answers,
            f"took {_minutes(sum(self.steps.values()))}: {took}",
            *([] if self.compile is None else [self.compile.sentence()]),
            f"report: {self.output / REPORT}",
            f"serve it: sparsify serve {self.output / 'sparse24'}",
        )


def _accuracy_cells(result: EvaluationResult) -> list[str | Text]:
    if result.failure:
        return [Text(result.failure.short, "yellow"), "", ""]
    return [
        number(result.perplexity),
        f"{result.kl:.3f}" if result.kl is not None else "",
        f"{result.top1_agreement:.0%}" if result.top1_agreement is not None else "",
    ]


def _speed_cells(row: ModelSpeed) -> list[str | Text]:
    if row.latency is None or row.throughput is None:
        return [Text(row.failure.short if row.failure else "not measured", "yellow"), "", ""]

    def cell(text: str, ratio: str) -> str:
        return f"{text} ({row.ratios[ratio]:.2f}x)" if ratio in row.ratios else text

    return [
        cell(f"{row.latency.decode_tokens_per_second:.1f}", "decode"),
        cell(f"{row.throughput.output_tokens_per_second:.1f}", "throughput"),
        cell(f"{row.latency.request:.2f} s", "request"),
    ]


def run_demo(output: str | Path, quiet: bool = False) -> Demo:
    """Make `output` with the three models, `report.html` and `demo.json`. Steps that an earlier call finished are kept.

    A model that vLLM cannot run here is a row that says why; raises SparsifyError when it runs none.
    """
    output = Path(output)
    require_vllm()
    say = Console(stderr=True, quiet=quiet, soft_wrap=True).print
    with only_run(output):
        dense, sparse, packed = output / "dense", output / "sparse24", output / "pack-quantized"
        recipe = load_recipe(RECIPE, model=MODEL)
        steps: dict[str, float] = {}

        say("[bold]1/4[/bold] the dense model, unpacked")
        with _timed(steps, "unpack"):
            _once(dense, lambda: export(MODEL, "dense", dense, quiet=quiet))
        say(f"[bold]2/4[/bold] compile: sparsify apply {RECIPE} --model {MODEL}")
        cost: CompileCost | None = None
        with _timed(steps, "compile"):
            if not _made(sparse):
                cost = compile_with_cost(recipe, sparse, quiet)
        if cost is not None:
            say(cost.sentence(), highlight=False)
        with _timed(steps, "export"):
            # vLLM's own kernel for CPUs knows 4 bits only, so its 8-bit head becomes a 16-bit one there
            _once(packed, lambda: export(sparse, "pack-quantized", packed, head_bits=16, quiet=quiet))
        models = (dense, packed, sparse)

        say("[bold]3/4[/bold] accuracy: text written by the dense model, scored by all three")
        with _timed(steps, "accuracy"):
            evaluations = evaluate_all(
                models, dense=dense, sequence_length=CHUNK, chunks=CHUNKS, labels=LABELS, quiet=quiet
            )
        dtype = choose(measure=True).name
        say(
            f"[bold]4/4[/bold] speed and answers in vLLM ({dtype}), one model after another (vLLM takes a while to start)"
        )
        with _timed(steps, "speed"):
            speed = measure(
                models,
                LatencyWorkload(input_len=64, output_len=48, iterations=3, warmup=1),
                ThroughputWorkload(input_len=64, output_len=48, prompts=16, warmup=2),
                BenchOptions(
                    eager=True,
                    threads="all",
                    one_process=True,
                    quiet=quiet,
                    engine_args=("--dtype", dtype),
                    prompts=PROMPTS,
                ),
                LABELS,
            )
        demo = Demo(output, evaluations, speed, dtype, cost, {name: round(took, 1) for name, took in steps.items()})
        write_json(output / RESULT, demo.to_json())
        report_on(sparse, output / REPORT, [result.to_json() for result in evaluations], speed.to_json(), dense=dense)
        return demo


def compile_with_cost(recipe: Recipe, output: Path, quiet: bool = False) -> CompileCost | None:
    """`sparsify apply`, timed. Returns None where it went on with an interrupted run, whose time is not this one's."""
    plan = make_plan(recipe, MODEL)
    operations = plan.estimate().operations
    started = time.perf_counter()
    applied = apply(recipe, MODEL, output, resume=True, quiet=quiet)
    seconds = time.perf_counter() - started
    if applied.record["resumed_after_blocks"]:
        return None
    dtype = str(plan.model.dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    kinds = dict.fromkeys((dtype, "float32"))
    try:
        peaks = {kind: arithmetic_peak(kind, threads, PEAK_SECONDS) for kind in kinds}
    except SparsifyError:
        peaks = {}
    return CompileCost(seconds, operations, dtype, threads, peaks)


@contextmanager
def _timed(steps: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    steps[name] = time.perf_counter() - started


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def _once(directory: Path, make: Callable[[], object]) -> None:
    """Make a directory unless an earlier, interrupted demo finished it."""
    if not _made(directory):
        make()


def _made(directory: Path) -> bool:
    """Whether an earlier demo finished a directory: it appears only when it is whole."""
    if directory.exists() and not (directory / "config.json").is_file():
        raise SparsifyError(f"{directory} exists and is no checkpoint; choose another --output or remove it")
    return directory.exists()
