"""The whole story on the embedded model: compile, serve, compare. `sparsify demo` and `make demo` run this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table

from sparsify.bench import BenchOptions, BenchResult, LatencyWorkload, ThroughputWorkload, measure, require_vllm
from sparsify.compiler.run import apply
from sparsify.errors import SparsifyError
from sparsify.evaluation import EvaluationResult, evaluate_all
from sparsify.files import write_json
from sparsify.formats.export import export
from sparsify.recipe import load_recipe
from sparsify.report import report_on

MODEL = "embedded:smollm2-135m-instruct"
RECIPE = "quickstart"
LABELS = ("dense", "pack-quantized", "sparse24")
PROMPTS = ("What is the capital of France?", "Write one sentence about the sea.")
REPORT = "report.html"
RESULT = "demo.json"


@dataclass(frozen=True)
class Demo:
    """What the demo made and measured; the models are in the order of LABELS."""

    output: Path
    evaluations: list[EvaluationResult]
    speed: BenchResult

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "report": str(self.output / REPORT),
            "evaluation": [result.to_json() for result in self.evaluations],
            "bench": self.speed.to_json(),
        }

    def table(self) -> RenderableType:
        """One row a model; ratios are to dense."""
        table = Table(title="SmolLM2-135M-Instruct in vLLM on this machine")
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
            assert speed.latency is not None and speed.throughput is not None
            ratios = speed.ratios
            table.add_row(
                evaluation.model,
                f"{speed.nbytes / 1e6:.0f} MB ({ratios['size']:.2f}x)",
                f"{evaluation.perplexity:.2f}",
                f"{evaluation.kl:.3f}" if evaluation.kl is not None else "",
                f"{evaluation.top1_agreement:.0%}" if evaluation.top1_agreement is not None else "",
                f"{speed.latency.decode_tokens_per_second:.1f} ({ratios['decode']:.2f}x)",
                f"{speed.throughput.output_tokens_per_second:.1f} ({ratios['throughput']:.2f}x)",
                f"{speed.latency.request:.2f} s ({ratios['request']:.2f}x)",
            )
        table.caption = (
            "Perplexity on text that the dense model wrote. Quickstart calibrates little and trains nothing.\n"
            "Ratios to dense, more is better. sparse24 and pack-quantized hold the same weights."
        )
        answers = [
            Panel(answer.strip() or "(nothing)", title=f"sparse24: {prompt}", title_align="left")
            for prompt, answer in zip(PROMPTS, self.speed.models[-1].answers, strict=False)
        ]
        return Group(
            table, *answers, f"report: {self.output / REPORT}", f"serve it: sparsify serve {self.output / 'sparse24'}"
        )


def run_demo(output: str | Path, quiet: bool = False) -> Demo:
    """Make `output` with the three models, `report.html` and `demo.json`. Steps that an earlier call finished are kept."""
    output = Path(output)
    require_vllm()
    say = Console(stderr=True, quiet=quiet).print
    dense, sparse, packed = output / "dense", output / "sparse24", output / "pack-quantized"
    recipe = load_recipe(RECIPE, model=MODEL)

    say("[bold]1/4[/bold] the dense model, unpacked")
    _once(dense, lambda: export(MODEL, "dense", dense, quiet=quiet))
    say(f"[bold]2/4[/bold] compile: sparsify apply {RECIPE} --model {MODEL}")
    _once(sparse, lambda: apply(recipe, MODEL, sparse, resume=True, quiet=quiet))
    # vLLM's own kernel for CPUs knows 4 bits only, so its 8-bit head becomes a 16-bit one there
    _once(packed, lambda: export(sparse, "pack-quantized", packed, quiet=quiet, dense_head=True))
    models = (dense, packed, sparse)

    say("[bold]3/4[/bold] accuracy: text written by the dense model, scored by all three")
    evaluations = evaluate_all(models, dense=dense, labels=LABELS, quiet=quiet)
    say("[bold]4/4[/bold] speed and answers in vLLM, one model after another (vLLM takes a while to start)")
    speed = measure(
        models,
        LatencyWorkload(input_len=64, output_len=48, iterations=3, warmup=1),
        ThroughputWorkload(input_len=64, output_len=48, prompts=16, warmup=2),
        BenchOptions(
            eager=True,
            threads="all",
            one_process=True,
            quiet=quiet,
            engine_args=("--dtype", "bfloat16"),
            prompts=PROMPTS,
        ),
        LABELS,
    )
    demo = Demo(output, evaluations, speed)
    write_json(output / RESULT, demo.to_json())
    report_on(sparse, output / REPORT, [result.to_json() for result in evaluations], speed.to_json(), dense=dense)
    return demo


def _once(directory: Path, make: Callable[[], object]) -> None:
    """Make a directory unless an earlier, interrupted demo finished it: it appears only when it is whole."""
    if not directory.exists():
        make()
    elif not (directory / "config.json").is_file():
        raise SparsifyError(f"{directory} exists and is no checkpoint; choose another --output or remove it")
