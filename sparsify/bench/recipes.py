"""Recipes against each other: the same model, the same text, one table of accuracy and of what each of them costs.

Every recipe runs in a process of its own, one after the other, so that its memory is its own. A directory that is there
already, made by the same recipe, is not made again: an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparsify.errors import SparsifyError
from sparsify.evaluation import EvaluationResult, evaluate_all
from sparsify.evaluation.result import number
from sparsify.failure import Failure, failure_of, foot
from sparsify.files import read_json
from sparsify.model.checkpoint import open_checkpoint
from sparsify.progress import say
from sparsify.recipe import Recipe, dump_recipe, load_recipe


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
    """seconds, peak_memory_bytes: of the run that made the directory. evaluation: of all texts, by their name.
    failure: why there is no such directory; all figures are then 0, and there is no evaluation."""

    label: str
    directory: str
    nbytes: int
    bits_per_weight: float
    seconds: float
    peak_memory_bytes: int
    evaluation: dict[str, EvaluationResult]
    failure: Failure | None = None

    @property
    def failures(self) -> list[Failure]:
        """Of the run, or of its evaluations."""
        found = [self.failure, *(score.failure for score in self.evaluation.values())]
        return [failure for failure in found if failure]

    def to_json(self) -> dict[str, Any]:
        evaluation = {text: result.to_json() for text, result in self.evaluation.items()}
        return {**vars(self), "evaluation": evaluation, "failure": self.failure and vars(self.failure)}


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
    texts: Sequence[str],
    output: Path,
    overrides: Sequence[str] = (),
    sequence_length: int | None = None,
    chunks: int | None = None,
    quiet: bool = False,
) -> list[RecipeResult]:
    """Apply recipes to one model and score all results beside the dense model.

    texts: files to score, or `self` for text that the dense model writes
    output: a directory; each result lies in it under its label and stays there
    A recipe that fails is a row that says why; raises SparsifyError when all of them fail.
    """
    entries = contenders(specs, overrides, model, output)
    models = {entry.recipe.model for entry in entries}
    if None in models or len(models) != 1:
        raise SparsifyError("recipes are compared on one model; name it with --model")
    for entry in entries:
        for text in texts:
            if text != "self" and entry.recipe.learns_from(f"file:{text.removeprefix('file:')}"):
                raise SparsifyError(f"{entry.label} learns from {text}, which would flatter it; score another text")
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
    made = [entry for entry in entries if entry.label not in failed]
    scored: dict[str, dict[str, EvaluationResult]] = {entry.label: {} for entry in made}
    for text in texts:
        name = "self" if text == "self" else Path(text.removeprefix("file:")).name
        results = evaluate_all(
            [entry.output for entry in made], entries[0].recipe.model, text,
            sequence_length, chunks, labels=[entry.label for entry in made], quiet=quiet,
        )  # fmt: skip
        for entry, result in zip(made, results, strict=True):
            scored[entry.label][name] = result
    return [
        RecipeResult(entry.label, str(entry.output), 0, 0.0, 0.0, 0, {}, failed[entry.label])
        if entry.label in failed
        else _result(entry, scored[entry.label])
        for entry in entries
    ]


class RecipeFailed(SparsifyError):
    """The process that ran a recipe ended with an error, which it has shown."""


def _make(entry: Contender, quiet: bool) -> None:
    """Run one recipe, unless its result is there, made from the same files."""
    assert entry.recipe.model is not None
    if entry.output.exists():
        made = entry.output / "recipe.yaml"
        if not made.is_file() or made.read_text(encoding="utf-8") != dump_recipe(entry.recipe):
            raise SparsifyError(f"{entry.output} was made by another recipe; remove it or choose another --output")
        if read_json(entry.output / "run.json").get("source") != open_checkpoint(entry.recipe.model).fingerprint():
            raise SparsifyError(
                f"{entry.output} was made from other weights of {entry.recipe.model}; remove it or choose another --output"
            )
        return
    changes = [argument for change in entry.overrides for argument in ("--set", change)]
    command = [
        sys.executable, "-m", "sparsify", "apply", entry.source, "--model", entry.recipe.model,
        "--output", str(entry.output), "--resume", *changes, *(["--quiet"] if quiet else []),
    ]  # fmt: skip
    status, error = _run(command)
    if status:
        raise RecipeFailed(f"{entry.label}: {error or 'failed; its output stands above'}")


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


def _result(entry: Contender, evaluation: dict[str, EvaluationResult]) -> RecipeResult:
    metrics, record = read_json(entry.output / "metrics.json"), read_json(entry.output / "run.json")
    sizes = metrics["sizes"]
    return RecipeResult(
        entry.label, str(entry.output), sizes["compressed_bytes"], sizes["bits_per_weight"],
        record["seconds"], record["peak_memory_bytes"], evaluation,
    )  # fmt: skip


def table(results: Sequence[RecipeResult]) -> Table:
    """The dense model first, then a row per recipe; times relative to the quickest."""
    ran = [result for result in results if result.failure is None]
    texts = list(ran[0].evaluation)
    quickest = min(result.seconds for result in ran) or 1.0
    first = ran[0].evaluation[texts[0]]
    view = Table(
        title="Recipes compared", title_justify="left", caption_justify="left",
        caption=escape(f"perplexity and KL(dense || model) in nats per token on {', '.join(texts)}: {first.tokens} tokens in "
        f"chunks of {first.sequence_length}; time relative to the quickest recipe\n"
        + foot([failure for result in results for failure in result.failures])).rstrip(),
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
            Text(result.label), *scores, f"{result.bits_per_weight:.2f}", f"{result.seconds / quickest:.1f}x",
            f"{result.peak_memory_bytes / 1e9:.1f} GB",
        )  # fmt: skip
    return view


def first_of(results: Sequence[RecipeResult], text: str) -> EvaluationResult:
    """An evaluation on `text`; all of them say the same of the dense model."""
    return next(result.evaluation[text] for result in results if text in result.evaluation)
