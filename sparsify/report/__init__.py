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
from sparsify.report.guidellm import read_guidellm
from sparsify.report.page import render_load_page, render_page

__all__ = ["is_load_run", "render_page", "report_on", "report_on_load", "size_parts", "write_report"]

LOAD_RUN = "serve.json"  # in the directory of a run of `sparsify bench serve`

Evaluations = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None


def write_report(
    path: str | Path,
    metrics: Mapping[str, Any],
    evaluation: Evaluations = None,
    bench: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    search: Mapping[str, Any] | None = None,
    runs: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes report.html from what was measured.

    metrics:    metrics.json of `sparsify apply`
    evaluation: EvaluationResult.to_json(), or several; None takes metrics["evaluation"]
    bench:      BenchResult.to_json()
    run:        run.json of `sparsify apply`: seconds, memory, versions
    search:     search.json of `sparsify search`
    runs:       of servers under load, as `load_runs` reads them
    """
    path = Path(path)
    given = {"run.json": run, "the evaluation": evaluation, "the benchmark": bench, "search.json": search}
    drawn = ["metrics.json", *(name for name, record in given.items() if record), *(found["file"] for found in runs)]
    with _drawing(drawn):
        page = render_page({**_facts(run or {}), **metrics}, evaluation, bench, search, runs).encode()
    return _written(path, page)


def report_on_load(
    directories: Sequence[str | Path], path: str | Path | None = None, guidellm: Sequence[str | Path] = ()
) -> Path:
    """Writes the report of servers under load alone, by default as report.html in the first run's directory.

    directories: of `sparsify bench serve`; guidellm: files of GuideLLM, whose page is FILE.html where there is no directory
    """
    if not directories and not guidellm:
        raise CheckpointError(
            "nothing to draw: give a checkpoint directory, a run of `sparsify bench serve`, or --guidellm FILE"
        )
    runs = load_runs(directories, guidellm)
    default = Path(directories[0]) / "report.html" if directories else Path(guidellm[0]).with_suffix(".html")
    with _drawing([run["file"] for run in runs]):
        page = render_load_page(runs).encode()
    return _written(Path(path) if path is not None else default, page)


def is_load_run(directory: str | Path) -> bool:
    """Whether `sparsify bench serve` wrote a directory."""
    return (Path(directory) / LOAD_RUN).is_file()


def load_runs(directories: Sequence[str | Path], guidellm: Sequence[str | Path] = ()) -> list[dict[str, Any]]:
    """The runs of servers under load, each with its `name` and the `file` that it was read from."""
    runs = []
    for directory in directories:
        file = Path(directory) / LOAD_RUN
        found = read_json(file)
        if not (isinstance(found, Mapping) and found.get("benchmark") == "serve"):
            raise CheckpointError(
                f"{file} is not what `sparsify bench serve` writes; give the directory of its --output"
            )
        runs.append({**found, "name": Path(directory).resolve().name, "file": str(file)})
    for given in guidellm:
        runs.append({**read_guidellm(given), "name": Path(given).name, "file": str(given)})
    return runs


def _written(path: Path, page: bytes) -> Path:
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
    runs: Sequence[str | Path] = (),
    guidellm: Sequence[str | Path] = (),
) -> Path:
    """Writes the report of a directory that `sparsify apply` made, by default as report.html in it.

    dense: the dense model, to split both sizes into linears, embeddings and the rest; by default the base model of the
    run when it is at hand
    search: search.json of `sparsify search`, whose measurements are drawn
    runs: directories of `sparsify bench serve`; guidellm: files of GuideLLM; both are drawn as latency under load
    """
    if isinstance(bench, Mapping) and bench.get("benchmark") == "serve":
        raise CheckpointError(
            "--bench takes the JSON of `bench latency` or `throughput`; give the directory of a `bench serve` run"
        )
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
    drawn = load_runs(runs, guidellm)
    return write_report(path or directory / "report.html", metrics, evaluation, bench, run, search, drawn)


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
