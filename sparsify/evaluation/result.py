"""What an evaluation found, as dataclasses, as JSON and as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparsify.evaluation.task_score import TaskScore
from sparsify.evaluation.worst import WorstToken
from sparsify.failure import Failure, foot


@dataclass(frozen=True)
class TextScore:
    """Scores on one text. `kl`, what says how far models agree, `worst` and `dense_perplexity` need the dense model.

    kl is KL(dense || model), mean nats per scored token. Perplexity on self-generated text says how well the model
    predicts what the dense model writes; it is no figure for a data set and `text_source` says so.
    top5_agreement: share of the dense model's five likeliest next tokens that are among the model's five
    worst: the tokens of largest divergence, in context
    failure: why there are no figures; the perplexity is then NaN, in JSON null.
    """

    text: str
    text_source: str  # "file" or "self"
    sequence_length: int
    chunks: int
    tokens: int
    perplexity: float
    dense_perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    stability: float | None = None
    top5_agreement: float | None = None
    worst: list[WorstToken] = field(default_factory=list)
    failure: Failure | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite perplexity becomes null, which JSON can say."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of one model: on every text by its name, on every task by its name, and the mean over the tasks.

    tasks_failure: why there are no scores of tasks
    backend: what computed the tasks; preset: the set that they are of
    `perplexity`, `kl`, `top1_agreement` and `stability` are those of the first text, whose figures stand at the top of the JSON too.
    """

    model: str
    format: str
    nbytes: int
    texts: dict[str, TextScore] = field(default_factory=dict)
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    tasks_mean: TaskScore | None = None
    tasks_failure: Failure | None = None
    dense: str | None = None
    dense_nbytes: int | None = None
    seconds: float = 0.0
    backend: str = "transformers"
    preset: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def first(self) -> TextScore | None:
        """Scores on the first text; None where no text was scored."""
        return next(iter(self.texts.values()), None)

    @property
    def perplexity(self) -> float:
        return self.first.perplexity if self.first else math.nan

    @property
    def dense_perplexity(self) -> float | None:
        return self.first.dense_perplexity if self.first else None

    @property
    def kl(self) -> float | None:
        return self.first.kl if self.first else None

    @property
    def top1_agreement(self) -> float | None:
        return self.first.top1_agreement if self.first else None

    @property
    def stability(self) -> float | None:
        return self.first.stability if self.first else None

    @property
    def failures(self) -> list[Failure]:
        """Why figures are missing, each reason once."""
        found = [*(score.failure for score in self.texts.values()), self.tasks_failure]
        return list(dict.fromkeys(failure for failure in found if failure))

    @property
    def failure(self) -> Failure | None:
        """Why figures are missing; None where none is."""
        return next(iter(self.failures), None)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, the figures of the first text among those of the model; null where there are none."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in SCORES}
        first = self.first.to_json() if self.first else {one.name: None for one in fields(TextScore)}
        return {
            **own,
            **{name: value for name, value in first.items() if name != "worst"},
            "failure": self.failure and asdict(self.failure),
            "texts": {name: score.to_json() for name, score in self.texts.items()},
            "tasks": {name: asdict(score) for name, score in self.tasks.items()},
            "tasks_mean": self.tasks_mean and asdict(self.tasks_mean),
            "tasks_failure": self.tasks_failure and asdict(self.tasks_failure),
        }


SCORES = ("texts", "tasks", "tasks_mean", "tasks_failure")


def number(value: float | None, digits: int = 2) -> str:
    """A figure for people: `12.34`, `1.2e+09` when it is absurd, a dash when there is none."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "–"
    if not math.isfinite(value):
        return "∞"
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.1e}"


def share(value: float | None, error: float | None = None, sign: str = "") -> str:
    """A share as a percentage, with its standard error where there is one: `48.0% ± 2.1`."""
    if value is None:
        return "–"
    return f"{value:{sign}.1%}" + ("" if error is None else f" ± {error * 100:.1f}")


def between(value: float | None, interval: Sequence[float] | None, sign: str = "") -> str:
    """A share with its interval: `97.2% (94.1 to 100.3)`."""
    if value is None or interval is None:
        return share(value, None, sign)
    low, high = (f"{end * 100:{sign}.1f}" for end in interval)
    return f"{share(value, None, sign)} ({low} to {high})"


def source_label(score: TextScore) -> str:
    """Says in words what text was scored."""
    return "text sampled from the dense model itself" if score.text_source == "self" else score.text


def tables(results: Sequence[EvaluationResult]) -> list[Table]:
    """One table per text, and one of the tasks."""
    found = [text_table(results, name) for name in results[0].texts]
    if any(result.tasks or result.tasks_failure for result in results):
        found.append(task_table(results))
    return found


def text_table(results: Sequence[EvaluationResult], name: str) -> Table:
    """Scores on one text: one row for the dense model when it was scored, then one per model."""
    scores = [result.texts[name] for result in results]
    first = scores[0]
    view = Table(
        title=f"Accuracy on {escape(source_label(first))}",
        caption=escape(
            f"{first.tokens} tokens in {first.chunks} chunks of {first.sequence_length}, float32; "
            "KL(dense || model) in nats per token\n" + foot([score.failure for score in scores if score.failure])
        ).rstrip(),
        title_justify="left",
        caption_justify="left",
    )
    view.add_column("model")
    view.add_column("format")
    for heading in ("perplexity", "vs dense", "KL", "top-1 agreement", "top-5", "stability"):
        view.add_column(heading, justify="right")
    if results[0].dense is not None:
        dense = number(first.dense_perplexity)
        view.add_row(Text(results[0].dense), "dense", dense, "1.00x", "0", "100.0%", "100.0%", "100.0%", style="dim")
    for result, score in zip(results, scores, strict=True):
        if score.failure:
            view.add_row(Text(result.model), result.format, Text(score.failure.short, "yellow"))
            continue
        before = score.dense_perplexity
        view.add_row(
            Text(result.model),
            result.format,
            number(score.perplexity),
            f"{number(score.perplexity / before)}x" if before else "–",
            number(score.kl, 4),
            share(score.top1_agreement),
            share(score.top5_agreement),
            share(score.stability),
        )
    return view


def task_table(results: Sequence[EvaluationResult]) -> Table:
    """Accuracy on tasks: a row per model and task, and the mean over the tasks of each model."""
    view = Table(
        title=tasks_title(results), title_justify="left", caption_justify="left", caption=escape(task_caption(results))
    )
    view.add_column("model")
    view.add_column("task")
    compared = results[0].dense is not None
    for heading in (
        "accuracy",
        "chance",
        *(("dense", "recovery", "above chance", "difference", "flips") if compared else ()),
    ):
        view.add_column(heading, justify="right")
    for result in results:
        if result.tasks_failure:
            view.add_row(Text(result.model), "", Text(result.tasks_failure.short, "yellow"), end_section=True)
            continue
        rows = rows_of(result)
        for place, score in enumerate(rows):
            view.add_row(
                Text(result.model if place == 0 else ""),
                Text(f"{score.task}, {score.fewshot} shots" if result.preset and score.fewshot else score.task),
                share(score.accuracy, score.accuracy_stderr),
                share(score.chance),
                *(
                    share(score.dense_accuracy),
                    between(score.recovery, score.recovery_interval),
                    share(score.above_chance),
                    between(score.difference, score.difference_interval, "+"),
                    share(score.flips),
                )[: 5 * compared],
                end_section=place == len(rows) - 1,
            )
    return view


def rows_of(result: EvaluationResult) -> list[TaskScore]:
    """The scores of the tasks, and the mean of several."""
    several = [result.tasks_mean] if result.tasks_mean and len(result.tasks) > 1 else []
    return [*result.tasks.values(), *several]


def tasks_title(results: Sequence[EvaluationResult]) -> str:
    """What was scored, and how."""
    first = results[0]
    what = f"Tasks of {first.preset}" if first.preset else "Zero-shot tasks"
    return what if first.backend == "transformers" else f"{what}, in {first.backend}"


def task_caption(results: Sequence[EvaluationResult]) -> str:
    """What was scored, and what the columns of a table of tasks mean."""
    scored = next((result for result in results if result.tasks), None)
    failed = foot([result.tasks_failure for result in results if result.tasks_failure])
    if scored is None:
        return failed
    counts = ", ".join(f"{name} {items_of(score)}" for name, score in scored.tasks.items())
    lines = [f"items: {counts}", f"accuracy: {measure_of(scored)}, ± standard error"]
    if scored.dense is not None:
        lines.append(
            "recovery: accuracy as a part of the dense model's; above chance: share that is left of what it has; difference to dense; "
            "in brackets 95% of a bootstrap over the items, paired; flips: answers that changed"
        )
    cut = {
        f"{result.model}, {name}: {score.truncated}"
        for result in results
        for name, score in result.tasks.items()
        if score.truncated
    }
    if cut:
        lines.append(f"items longer than the model's context, which lost their beginning: {'; '.join(sorted(cut))}")
    return "\n".join([*lines, failed]).rstrip()


def measure_of(result: EvaluationResult) -> str:
    """What counts as right, in words."""
    if result.preset is None:
        return "by log-likelihood per character (acc_norm of lm-evaluation-harness)"
    metrics = ", ".join(f"{score.task} {score.metric}" for score in result.tasks.values())
    return f"of lm-evaluation-harness ({metrics})"


def items_of(score: TaskScore) -> str:
    """How many items of a task were scored: `500`, `the first 50 of 500`."""
    return (
        str(score.items) if score.items == score.items_in_file else f"the first {score.items} of {score.items_in_file}"
    )
