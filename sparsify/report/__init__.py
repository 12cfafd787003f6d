"""One self-contained page that shows what was done to a model and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from sparsify.errors import CheckpointError
from sparsify.files import atomic_write, read_json
from sparsify.formats.foreign import open_dense
from sparsify.model.checkpoint import open_checkpoint
from sparsify.report.figures import size_parts
from sparsify.report.page import render_page

__all__ = ["render_page", "report_on", "size_parts", "write_report"]

Evaluations = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None


def write_report(
    path: str | Path,
    metrics: Mapping[str, Any],
    evaluation: Evaluations = None,
    bench: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    search: Mapping[str, Any] | None = None,
) -> Path:
    """Writes report.html from what was measured.

    metrics:    metrics.json of `sparsify apply`
    evaluation: EvaluationResult.to_json(), or several; None takes metrics["evaluation"]
    bench:      BenchResult.to_json()
    run:        run.json of `sparsify apply`: seconds, memory, versions
    search:     search.json of `sparsify search`
    """
    path = Path(path)
    given = {"run.json": run, "the evaluation": evaluation, "the benchmark": bench, "search.json": search}
    with _drawing(["metrics.json", *(name for name, record in given.items() if record)]):
        page = render_page({**_facts(run or {}), **metrics}, evaluation, bench, search).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, page)
    return path


def report_on(
    directory: str | Path,
    path: str | Path | None = None,
    evaluation: Evaluations = None,
    bench: Mapping[str, Any] | None = None,
    dense: str | Path | None = None,
    search: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the report of a directory that `sparsify apply` made, by default as report.html in it.

    dense: the dense model, to split both sizes into linears, embeddings and the rest; by default the base model of the
    run when it is at hand
    search: search.json of `sparsify search`, whose measurements are drawn
    """
    asked = {"units", "recipe_as_given", "found", "held_out"}
    if search is not None and not (isinstance(search, Mapping) and asked <= set(search)):
        raise CheckpointError("--search takes the search.json that `sparsify search` wrote; this file is another")
    directory = Path(directory)
    metrics = read_json(directory / "metrics.json")
    run = read_json(directory / "run.json") if (directory / "run.json").is_file() else None
    with _drawing([str(directory / "metrics.json")]):
        modules = [layer["module"] for layer in metrics["layers"]]
        head = (metrics.get("head") or {}).get("module")
        base, sizes = str(metrics["base_model"]), {**metrics["sizes"]}
        parts = {"compressed": size_parts(open_checkpoint(directory), modules, head)}
    try:
        parts["dense"] = size_parts(open_dense(dense or base), modules, head)
    except CheckpointError:
        if dense is not None:
            raise  # asked for by name; the base model of an old run may well be gone
    if "dense" in parts:
        metrics["sizes"] = {**sizes, "parts": parts}
    return write_report(path or directory / "report.html", metrics, evaluation, bench, run, search)


@contextmanager
def _drawing(records: Sequence[str]) -> Iterator[None]:
    """Turn what is raised over a record that is not as sparsify writes it into one sentence."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, TemplateError) as error:
        files = " or ".join(records)
        raise CheckpointError(
            f"the report cannot be drawn, since {files} is not as sparsify writes it ({type(error).__name__}: {str(error)[:200]}); "
            "run the command that wrote it again"
        ) from error


def _facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json adds to metrics.json."""
    facts: dict[str, Any] = {name: run[name] for name in ("seconds", "peak_memory_bytes") if run.get(name)}
    versions = {name: run[name] for name in ("sparsify", "torch") if run.get(name)}
    return {**facts, "versions": versions} if versions else facts
