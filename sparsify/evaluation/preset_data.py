"""The data of a preset: from the Hub, or from files that are named before anything is computed where they are absent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsify.data.files import file_records
from sparsify.errors import MissingDependency, SparsifyError
from sparsify.evaluation.harness import definition_of, subjects_of
from sparsify.evaluation.presets import PRESETS, Benchmark, PresetTask
from sparsify.files import expanded, kind_problem, path_problem
from sparsify.progress import stage, without_bars

try:
    import datasets
except ImportError as error:
    raise MissingDependency(
        f"presets are read with datasets, which cannot be imported ({error}): pip install 'sparsify-24[eval]'"
    ) from error

SUFFIXES = (".parquet", ".jsonl")


def read_preset(name: str, folder: str | Path | None, limit: int | None = None) -> list[PresetTask]:
    """The tasks of a preset with their data, checked. SparsifyError names every file that is absent, before anything is computed.

    folder: holds TASK/SPLIT.parquet or .jsonl with the columns of the dataset on the Hub; None: from the Hub
    limit:  the first so many items of each task, and of each subject of MMLU
    """
    if name not in PRESETS:
        raise SparsifyError(f"{name!r} is no preset; choose from: {', '.join(PRESETS)}")
    if limit is not None and limit < 1:
        raise SparsifyError(f"--limit {limit} leaves no items; give at least 1")
    wanted = [(task, split) for task in PRESETS[name] for split in task.splits]
    if folder is None:
        given = _from_hub(name, wanted)
    else:
        place = expanded(str(folder).removeprefix("file:"))
        if problem := path_problem(place):
            raise SparsifyError(f"{str(place)[:100]!r} {problem}")
        files = {(task.name, split): _file(place, task, split) for task, split in wanted}
        absent = [(task, split) for task, split in wanted if files[task.name, split] is None]
        if absent:
            raise SparsifyError(f"{_listed(name, absent, place)}; nothing was computed")
        given = {key: _read(file) for key, file in files.items() if file is not None}
    for task, split in wanted:
        _check(task, split, given[task.name, split])
    return [_task(task, {split: given[task.name, split] for split in task.splits}, limit) for task in PRESETS[name]]


def _file(folder: Path, task: Benchmark, split: str) -> Path | None:
    """The file of a split, in one of the two forms; None where neither is there."""
    return next((file for suffix in SUFFIXES if (file := folder / task.name / f"{split}{suffix}").exists()), None)


def _listed(name: str, absent: Sequence[tuple[Benchmark, str]], place: Path | str) -> str:
    """What is not there, and what it is on the Hub, a line each."""
    lines = [f"  {place}/{task.name}/{split}.parquet (or .jsonl): {task.hub_name(split)}" for task, split in absent]
    return (
        f"{name} needs {len(lines)} files that are absent:\n"
        + "\n".join(lines)
        + "\nwith the columns that they have on the Hub"
    )


def _read(file: Path) -> Any:
    """One split as a `datasets.Dataset`."""
    if problem := kind_problem(file):
        raise SparsifyError(f"{file} {problem}")
    with without_bars():
        return datasets.Dataset.from_list([dict(record) for _, record in file_records(file, whole=True)])


def _from_hub(name: str, wanted: Sequence[tuple[Benchmark, str]]) -> dict[tuple[str, str], Any]:
    found = {}
    for task, split in wanted:
        try:
            with stage(f"loading {task.hub_name(split)}"), without_bars():
                found[task.name, split] = datasets.load_dataset(task.data[0], task.data[1], split=split)
        except Exception as error:  # whatever a network and somebody's server can raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise SparsifyError(
                f"{task.hub_name(split)} cannot be loaded from the Hub ({reason}). Without it give --tasks FOLDER; "
                f"{_listed(name, wanted, 'FOLDER')}"
            ) from None
    return found


def _check(task: Benchmark, split: str, data: Any) -> None:
    place = f"{task.name}/{split}"
    if not len(data):
        raise SparsifyError(f"{place} has no items; it should be {task.hub_name(split)}")
    if missing := [column for column in task.columns if column not in data.column_names]:
        raise SparsifyError(
            f"{place} has no column {', '.join(map(repr, missing))}; it should be {task.hub_name(split)}, as it is on the Hub"
        )
    if split == task.examples and task.definition.endswith(".yaml") and len(data) < task.fewshot:
        raise SparsifyError(f"{place} has {len(data)} items, of which {task.fewshot} are to be examples in the prompt")


def _task(task: Benchmark, data: dict[str, Any], limit: int | None) -> PresetTask:
    if task.definition.endswith(".yaml"):
        parts = [(definition_of(task, task.definition), data)]
    else:
        parts = []
        subjects = {split: list(one["subject"]) for split, one in data.items()}
        known = subjects_of(task)
        if unknown := set(subjects[task.scored]) - known.keys():
            raise SparsifyError(
                f"{task.name}/{task.scored} has the subject {sorted(unknown)[0]!r}, which {task.name} does not know"
            )
        for subject, file in known.items():
            chosen = {
                split: one.select([number for number, named in enumerate(subjects[split]) if named == subject])
                for split, one in data.items()
            }
            if not len(chosen[task.scored]):
                continue
            if len(chosen[task.examples]) < task.fewshot:
                raise SparsifyError(
                    f"{task.name}/{task.examples} has {len(chosen[task.examples])} items of the subject {subject!r}, of which "
                    f"{task.fewshot} are to be examples in the prompt"
                )
            parts.append((definition_of(task, file), chosen))
    return PresetTask(task, parts, limit, _chance(task, data[task.scored]))


def _chance(task: Benchmark, data: Any) -> float:
    """Expected score of guessing."""
    if task.name == "gsm8k":
        return 0.0
    if task.name == "truthfulqa_mc2":  # the mass on what is true, with all answers as likely
        return sum(sum(one["labels"]) / len(one["labels"]) for one in data["mc2_targets"]) / len(data)
    if "choices" in task.columns:
        given = data["choices"]
        return sum(1 / len(one["text"] if isinstance(one, dict) else one) for one in given) / len(data)
    return 1 / len(data["endings"][0]) if "endings" in task.columns else 0.5
