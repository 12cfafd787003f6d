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
from sparsify.report.compare import called
from sparsify.report.figure_files import write_figures
from sparsify.report.figures import size_parts
from sparsify.report.guidellm import read_guidellm
from sparsify.report.page import load_context, page_context, render_page, rendered, several_context

__all__ = [
    "is_load_run", "load_runs", "render_page", "report_on", "report_on_load", "report_on_several", "size_parts", "write_report",
]  # fmt: skip

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
    figures: str | Path | None = None,
) -> Path:
    """Writes report.html from what was measured.

    metrics:    metrics.json of `sparsify apply`
    evaluation: EvaluationResult.to_json(), or several; None takes metrics["evaluation"]
    bench:      BenchResult.to_json()
    run:        run.json of `sparsify apply`: seconds, memory, versions
    search:     search.json of `sparsify search`
    runs:       of servers under load, as `load_runs` reads them
    figures:    a folder for every picture as SVG, CSV and, where a program for it is installed, PNG
    """
    path = Path(path)
    given = {"run.json": run, "the evaluation": evaluation, "the benchmark": bench, "search.json": search}
    drawn = ["metrics.json", *(name for name, record in given.items() if record), *(found["file"] for found in runs)]
    with _drawing(drawn):
        context = page_context({**_facts(run or {}), **metrics}, evaluation, bench, search, runs)
        page = rendered("page.html.j2", context)
    return _written(path, page, context, figures)


def report_on_load(
    directories: Sequence[str | Path],
    path: str | Path | None = None,
    guidellm: Sequence[str | Path] = (),
    figures: str | Path | None = None,
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
        context = load_context(runs)
        page = rendered("serving.html.j2", context)
    return _written(Path(path) if path is not None else default, page, context, figures)


def report_on_several(
    directories: Sequence[str | Path],
    path: str | Path,
    evaluations: Sequence[Mapping[str, Any]] = (),
    bench: Sequence[Mapping[str, Any]] = (),
    searches: Sequence[Mapping[str, Any]] = (),
    runs: Sequence[str | Path] = (),
    guidellm: Sequence[str | Path] = (),
    figures: str | Path | None = None,
) -> Path:
    """Writes one page about several checkpoints: accuracy against size and against speed, and what was done to each.

    directories: that `sparsify apply` made; evaluations, bench, searches: the records of `report_on`, any number of each, which are
    matched by the name of the directory
    """
    for one in bench:
        _refuse_load(one)
    for one in searches:
        _refuse_other_search(one)
    checkpoints = []
    for directory, name in zip(directories, _names(directories), strict=True):
        metrics = read_json(Path(directory) / "metrics.json")
        run = read_json(Path(directory) / "run.json") if (Path(directory) / "run.json").is_file() else {}
        if not isinstance(metrics, Mapping) or not isinstance(run, Mapping):
            raise CheckpointError(
                f"{directory}: metrics.json and run.json must hold JSON objects; apply the recipe again"
            )
        checkpoints.append((name, {**_facts(run), **metrics}))
    drawn = load_runs(runs, guidellm)
    records = [
        *(f"{one}/metrics.json" for one in directories),
        *(run["file"] for run in drawn),
        "an evaluation or benchmark",
    ]
    with _drawing(records):
        context = several_context(checkpoints, evaluations, bench, searches, drawn)
        page = rendered("several.html.j2", context)
    return _written(Path(path), page, context, figures)


def _names(directories: Sequence[str | Path]) -> list[str]:
    """The last part of each path, or all of it where two have one name."""
    last = [called(Path(directory).resolve()) for directory in directories]
    return [name if last.count(name) == 1 else str(one) for name, one in zip(last, directories, strict=True)]


def _refuse_load(bench: Any) -> None:
    if isinstance(bench, Mapping) and bench.get("benchmark") == "serve":
        raise CheckpointError(
            "--bench takes the JSON of `bench latency` or `throughput`; give the directory of a `bench serve` run"
        )


def _refuse_other_search(search: Any) -> None:
    asked = {"units", "recipe_as_given", "found", "held_out"}
    if search is not None and not (isinstance(search, Mapping) and asked <= set(search)):
        raise CheckpointError("--search takes the search.json that `sparsify search` wrote; this file is another")


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


def _written(path: Path, page: str, context: Mapping[str, Any], figures: str | Path | None) -> Path:
    """Write the page, and its pictures as files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, page)
    if figures is not None:
        write_figures(context, figures)
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
    figures: str | Path | None = None,
) -> Path:
    """Writes the report of a directory that `sparsify apply` made, by default as report.html in it.

    dense: the dense model, to split both sizes into linears, embeddings and the rest; by default the base model of the
    run when it is at hand
    search: search.json of `sparsify search`, whose measurements are drawn
    runs: directories of `sparsify bench serve`; guidellm: files of GuideLLM; both are drawn as latency under load
    figures: a folder for every picture as a file
    """
    _refuse_load(bench)
    _refuse_other_search(search)
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
    return write_report(path or directory / "report.html", metrics, evaluation, bench, run, search, drawn, figures)


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
