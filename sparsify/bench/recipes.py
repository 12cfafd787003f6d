"""Recipes against each other: the same model, the same text, one table of accuracy and of what each of them costs.

Every recipe runs in a process of its own, one after the other, so that its memory is its own. A directory that is there
already, made by the same recipe, is not made again: an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparsify.errors import SparsifyError
from sparsify.evaluation import EvaluationResult, TaskScore, TextScore, check_inputs, evaluate_all
from sparsify.evaluation.result import number, share, task_caption
from sparsify.failure import Failure, failure_of, foot
from sparsify.files import as_written, read_json, write_json
from sparsify.lock import only_run
from sparsify.model.checkpoint import open_checkpoint
from sparsify.progress import say
from sparsify.recipe import Recipe, dump_recipe, load_recipe

RECORD = "recipes.json"


@dataclass(frozen=True)
class Contender:
    """A recipe by its label, with its changes, and where its result lies."""

    label: str
    source: str
    overrides: tuple[str, ...]
    recipe: Recipe
    output: Path


@dataclass(frozen=True)
class RecipeResult:
    """seconds, peak_memory_bytes: of the run that made the directory, by `command`; relative_*: to the first recipe's.
    scored: on all texts and tasks. failure: why there is no such directory; all figures are then 0, and nothing was scored."""

    label: str
    directory: str
    nbytes: int
    bits_per_weight: float
    seconds: float
    peak_memory_bytes: int
    scored: EvaluationResult | None
    failure: Failure | None = None
    command: str = ""
    relative_seconds: float | None = None
    relative_peak_memory: float | None = None

    @property
    def evaluation(self) -> dict[str, TextScore]:
        """Scores of all texts, by their name."""
        return self.scored.texts if self.scored else {}

    @property
    def tasks(self) -> dict[str, TaskScore]:
        """Scores of all tasks, by their name."""
        return self.scored.tasks if self.scored else {}

    @property
    def failures(self) -> list[Failure]:
        """Of the run, or of its evaluations."""
        return [self.failure] if self.failure else self.scored.failures if self.scored else []

    def to_json(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name != "scored"}
        mean = self.scored.tasks_mean if self.scored else None
        return {
            **own,
            "evaluation": {text: score.to_json() for text, score in self.evaluation.items()},
            "tasks": {task: asdict(score) for task, score in self.tasks.items()},
            "tasks_mean": mean and asdict(mean),
            "failure": self.failure and asdict(self.failure),
            "evaluation_failures": [asdict(failure) for failure in self.failures if failure is not self.failure],
        }


def contenders(specs: Sequence[str], overrides: Sequence[str], model: str | None, output: Path) -> list[Contender]:
    """specs: `RECIPE` or `LABEL=RECIPE,key=value,...`; overrides: for all recipes, left out where one has no such pass.

    Every recipe is checked before any of them runs.
    """
    found: list[Contender] = []
    for spec in specs:
        source, *own = spec.split(",")
        label, equals, rest = source.partition("=")
        label, source = (label, rest) if equals else (Path(source).stem, source)
        if any(other.label == label for other in found):
            raise SparsifyError(f"two recipes are called {label}; give one a name of its own: NAME={source}")
        if not label or "/" in label:
            raise SparsifyError(f"{spec}: a name is a word without slashes, as in NAME=RECIPE")
        passes = [step.kind for step in load_recipe(source, (), model).passes]
        fitting = [change for change in overrides if not _other_pass(change, passes)]
        changes = (*fitting, *own)
        found.append(Contender(label, source, changes, load_recipe(source, changes, model), output / label))
    return found


def _other_pass(change: str, passes: Sequence[str]) -> bool:
    """Whether an override is for a pass that a recipe does not have."""
    parts = change.partition("=")[0].split(".")
    if parts[0] in ("solver", "ignore", "overrides"):  # of prune and quantize
        return not {"prune", "quantize"} & set(passes)
    return parts[0] == "passes" and len(parts) > 1 and not parts[1].isdigit() and parts[1] not in passes


def compare_recipes(
    specs: Sequence[str],
    model: str | None,
    texts: Sequence[str] | None,
    output: Path,
    overrides: Sequence[str] = (),
    sequence_length: int | None = None,
    chunks: int | None = None,
    quiet: bool = False,
    tasks: str | None = None,
    limit: int | None = None,
) -> list[RecipeResult]:
    """Apply recipes to one model and score all results beside the dense model, each of which is loaded once.

    texts: files to score, or `self` for text that the dense model writes; None is `self`, or no text where there are tasks
    tasks, limit: multiple-choice tasks, as `evaluate_all` takes them
    output: a directory; each result lies in it under its label and stays there, and recipes.json holds all figures
    A recipe that fails is a row that says why; raises SparsifyError when all of them fail.
    """
    entries = contenders(specs, overrides, model, output)
    models = {entry.recipe.model for entry in entries}
    if None in models or len(models) != 1:
        raise SparsifyError("recipes are compared on one model; name it with --model")
    source = entries[0].recipe.model
    assert source is not None
    for entry in entries:
        for text in texts or ():
            if text != "self" and entry.recipe.learns_from(f"file:{text.removeprefix('file:')}"):
                raise SparsifyError(f"{entry.label} learns from {text}, which would flatter it; score another text")
    check_inputs(source, texts, sequence_length, chunks, tasks, limit)
    with only_run(output):
        failed = _make_all(entries, quiet)
        made = [entry for entry in entries if entry.label not in failed]
        labels = [entry.label for entry in made]
        scored = evaluate_all(
            [entry.output for entry in made], source, texts, sequence_length, chunks,
            tasks=tasks, limit=limit, labels=labels, quiet=quiet,
        )  # fmt: skip
        by_label = dict(zip(labels, scored, strict=True))
        results = _beside_the_first(
            [
                RecipeResult(entry.label, str(entry.output), 0, 0.0, 0.0, 0, None, failed[entry.label], _shown(entry))
                if entry.label in failed
                else _result(entry, by_label[entry.label])
                for entry in entries
            ]
        )
        write_json(output / RECORD, record(results))
        return results


def _make_all(entries: Sequence[Contender], quiet: bool) -> dict[str, Failure]:
    """Run all recipes; returns why some of them failed, by label, and raises when all of them did."""
    failed: dict[str, Failure] = {}
    for index, entry in enumerate(entries):
        say(f"recipe {index + 1}/{len(entries)} {entry.label}", quiet)
        try:
            _make(entry, quiet)
        except RecipeFailed as error:
            failed[entry.label] = failure_of(error, "sparsify")
            if len(failed) == len(entries):
                raise
            Console(stderr=True, quiet=quiet).print(f"{error}; the others go on", style="yellow", markup=False)
    return failed


def _beside_the_first(results: list[RecipeResult]) -> list[RecipeResult]:
    """The rows with time and memory relative to the first recipe, or the first that ran."""
    first = next(result for result in results if result.failure is None)
    return [
        result
        if result.failure
        else replace(
            result,
            relative_seconds=result.seconds / first.seconds if first.seconds else None,
            relative_peak_memory=result.peak_memory_bytes / first.peak_memory_bytes
            if first.peak_memory_bytes
            else None,
        )
        for result in results
    ]


def record(results: Sequence[RecipeResult]) -> dict[str, Any]:
    """What `--json` prints and recipes.json holds: a row per recipe."""
    scored = next((result.scored for result in results if result.scored), None)
    return {
        "recipes": [result.to_json() for result in results],
        "dense": scored.dense if scored else None,
        "versions": scored.versions if scored else {},
    }


class RecipeFailed(SparsifyError):
    """The process that ran a recipe ended with an error, which it has shown."""


def _make(entry: Contender, quiet: bool) -> None:
    """Run one recipe, unless its result is there, made from the same files."""
    assert entry.recipe.model is not None
    if entry.output.exists():
        made = entry.output / "recipe.yaml"
        if not made.is_file() or made.read_text(encoding="utf-8") != dump_recipe(entry.recipe):
            raise SparsifyError(f"{entry.output} was made by another recipe; remove it or choose another --output")
        with as_written(entry.output / "run.json"):
            source = read_json(entry.output / "run.json").get("source")
        if source != open_checkpoint(entry.recipe.model).fingerprint():
            raise SparsifyError(
                f"{entry.output} was made from other weights of {entry.recipe.model}; remove it or choose another --output"
            )
        return
    command = [sys.executable, "-m", "sparsify", *_arguments(entry), "--resume", *(["--quiet"] if quiet else [])]
    status, error = _run(command)
    if status:
        raise RecipeFailed(f"{entry.label}: {error or 'failed; its output stands above'}")


def _arguments(entry: Contender) -> list[str]:
    """Those of the command that makes a row."""
    changes = [argument for change in entry.overrides for argument in ("--set", change)]
    return ["apply", entry.source, "--model", str(entry.recipe.model), "--output", str(entry.output), *changes]


def _shown(entry: Contender) -> str:
    """The command that makes a row, for people."""
    return shlex.join(["sparsify", *_arguments(entry)])


def _run(command: Sequence[str]) -> tuple[int, str]:
    """Runs a command of sparsify; returns its exit status and its error message. On a terminal the bars of the command need
    that terminal, so its message is read only where stderr goes elsewhere."""
    if sys.stderr.isatty():
        return subprocess.run(command, stdout=subprocess.DEVNULL).returncode, ""
    error = ""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as run:
        assert run.stderr is not None
        for line in run.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            if line.startswith("error: "):
                error = line.removeprefix("error: ").strip()
    return run.returncode, error


def _result(entry: Contender, scored: EvaluationResult) -> RecipeResult:
    metrics, run = read_json(entry.output / "metrics.json"), read_json(entry.output / "run.json")
    with as_written(f"metrics.json or run.json of {entry.output}"):
        sizes = metrics["sizes"]
        return RecipeResult(
            entry.label, str(entry.output), sizes["compressed_bytes"], sizes["bits_per_weight"],
            run["seconds"], run["peak_memory_bytes"], scored, None, _shown(entry),
        )  # fmt: skip


def tables(results: Sequence[RecipeResult]) -> list[Table]:
    """A row per recipe, the dense model first: on texts, and on tasks where there are any."""
    scored = next(result.scored for result in results if result.scored)
    return [table(results), *([task_table(results)] if scored.tasks or scored.tasks_failure else [])]


def table(results: Sequence[RecipeResult]) -> Table:
    """Perplexity and KL on every text, and what each recipe costs, relative to the first one."""
    ran = [result for result in results if result.failure is None]
    texts = list(ran[0].evaluation)
    said = "time and memory relative to the first recipe" + ("" if ran[0] is results[0] else " that ran")
    if texts:
        first = ran[0].evaluation[texts[0]]
        counted = ", ".join(f"{name} ({ran[0].evaluation[name].tokens} tokens)" for name in texts)
        said = (
            f"perplexity and KL(dense || model) in nats per token on {counted}, first of them in chunks of "
            f"{first.sequence_length}; {said}"
        )
    view = Table(
        title="Recipes compared", title_justify="left", caption_justify="left",
        caption=escape(f"{said}\n" + foot([failure for result in results for failure in result.failures])).rstrip(),
    )  # fmt: skip
    view.add_column("recipe")
    for text in texts:
        view.add_column(f"perplexity, {text}" if len(texts) > 1 else "perplexity", justify="right")
        view.add_column("KL", justify="right")
    for heading in ("bits per weight", "time", "memory"):
        view.add_column(heading, justify="right")
    dense: list[str] = []
    for text in texts:
        dense += [number(first_of(ran, text).dense_perplexity), "0"]
    view.add_row("dense", *dense, "16", "", "", style="dim")
    for result in results:
        if result.failure:
            view.add_row(Text(result.label), Text(result.failure.short, "yellow"))
            continue
        scores: list[Text | str] = []
        for score in result.evaluation.values():
            perplexity = Text(score.failure.short, "yellow") if score.failure else number(score.perplexity)
            scores += [perplexity, number(score.kl, 4)]
        view.add_row(
            Text(result.label), *scores, f"{result.bits_per_weight:.2f}",
            cost(result.relative_seconds, f"{result.seconds:.0f} s"),
            cost(result.relative_peak_memory, f"{result.peak_memory_bytes / 1e9:.1f} GB"),
        )  # fmt: skip
    return view


def cost(relative: float | None, absolute: str) -> str:
    """`1.5x (12 s)`"""
    return absolute if relative is None else f"{relative:.2f}x ({absolute})"


def task_table(results: Sequence[RecipeResult]) -> Table:
    """Accuracy on every task, and of their mean what is left above chance and the difference to the dense model."""
    ran = [result.scored for result in results if result.scored]
    known = [result for result in ran if result.tasks]
    view = Table(
        title="Zero-shot tasks", title_justify="left", caption_justify="left", caption=escape(task_caption(ran))
    )  # fmt: skip
    view.add_column("recipe")
    for name in known[0].tasks if known else ():
        view.add_column(name, justify="right")
    for heading in ("mean", "above chance", "difference", "flips"):
        view.add_column(heading, justify="right")
    if known:
        means = [one for one in (*known[0].tasks.values(), known[0].tasks_mean) if one]
        view.add_row("dense", *(share(one.dense_accuracy) for one in means), "100.0%", "0", "0.0%", style="dim")
    for result in results:
        if result.failure or (result.scored and result.scored.tasks_failure):
            failure = result.failure or (result.scored and result.scored.tasks_failure)
            view.add_row(Text(result.label), Text(failure.short if failure else "", "yellow"))
            continue
        mean = result.scored.tasks_mean if result.scored else None
        assert mean is not None
        view.add_row(
            Text(result.label), *(share(score.accuracy, score.accuracy_stderr) for score in result.tasks.values()),
            share(mean.accuracy, mean.accuracy_stderr), share(mean.above_chance),
            share(mean.difference, mean.difference_stderr, "+"), share(mean.flips),
        )  # fmt: skip
    return view


def first_of(results: Sequence[RecipeResult], text: str) -> TextScore:
    """Scores on `text`; all of them say the same of the dense model."""
    return next(result.evaluation[text] for result in results if text in result.evaluation)
