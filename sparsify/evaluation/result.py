"""What an evaluation found, as a dataclass, as JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparsify.failure import Failure, foot


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of one model. `kl`, `top1_agreement`, `stability` and `dense_perplexity` need the dense model.

    kl is KL(dense || model), mean nats per scored token. Perplexity on self-generated text says how well the model
    predicts what the dense model writes; it is no figure for a data set and `text_source` says so.
    failure: why the model has no figures; its perplexity is then NaN, in JSON null.
    """

    model: str
    format: str
    nbytes: int
    perplexity: float
    tokens: int
    text: str
    text_source: str  # "file" or "self"
    sequence_length: int
    chunks: int
    dense: str | None = None
    dense_nbytes: int | None = None
    dense_perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    stability: float | None = None
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    failure: Failure | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite perplexity becomes null, which JSON can say."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def number(value: float | None, digits: int = 2) -> str:
    """A figure for people: `12.34`, `1.2e+09` when it is absurd, a dash when there is none."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "–"
    if not math.isfinite(value):
        return "∞"
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.1e}"


def source_label(result: EvaluationResult) -> str:
    """Says in words what text was scored."""
    if result.text_source == "self":
        return "text sampled from the dense model itself"
    return result.text


def table(results: Sequence[EvaluationResult]) -> Table:
    """One row for the dense model when it was scored, then one per model."""
    first = results[0]
    view = Table(
        title=f"Accuracy on {escape(source_label(first))}",
        caption=escape(
            f"{first.tokens} tokens in {first.chunks} chunks of {first.sequence_length}, float32; "
            "KL(dense || model) in nats per token\n" + foot([result.failure for result in results if result.failure])
        ).rstrip(),
        title_justify="left",
        caption_justify="left",
    )
    view.add_column("model")
    view.add_column("format")
    for heading in ("perplexity", "vs dense", "KL", "top-1 agreement", "stability"):
        view.add_column(heading, justify="right")
    if first.dense is not None:
        view.add_row(
            Text(first.dense), "dense", number(first.dense_perplexity), "1.00x", "0", "100.0%", "100.0%", style="dim"
        )
    for result in results:
        if result.failure:
            view.add_row(Text(result.model), result.format, Text(result.failure.short, "yellow"))
            continue
        dense = result.dense_perplexity
        agreement = result.top1_agreement
        view.add_row(
            Text(result.model),
            result.format,
            number(result.perplexity),
            f"{number(result.perplexity / dense)}x" if dense else "–",
            number(result.kl, 4),
            "–" if agreement is None else f"{agreement:.1%}",
            "–" if result.stability is None else f"{result.stability:.1%}",
        )
    return view
