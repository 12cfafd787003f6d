"""One self-contained page that shows what was done to a model and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsify.files import atomic_write
from sparsify.report.figures import size_parts
from sparsify.report.page import render_page

__all__ = ["render_page", "size_parts", "write_report"]


def write_report(
    path: str | Path,
    metrics: Mapping[str, Any],
    evaluation: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    bench: Mapping[str, Any] | None = None,
) -> Path:
    """Writes report.html.

    metrics:    metrics.json of `sparsify apply`
    evaluation: EvaluationResult.to_json(), or several; None takes metrics["evaluation"]
    bench:      BenchResult.to_json()
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, render_page(metrics, evaluation, bench))
    return path
