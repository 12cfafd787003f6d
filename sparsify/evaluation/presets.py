"""Sets of tasks that users quote: lm-evaluation-harness's definitions, examples in the prompt, and the files that they read.

`openllm-v1` is the Open LLM Leaderboard of 2023, `zero-shot-7` the seven tasks of Wanda (arXiv 2306.11695, section 4). Prompts,
scoring and drawing of examples are the harness's own; only the data may come from files instead of the Hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.errors import SparsifyError
from sparsify.files import expanded, kind_problem, path_problem

SUFFIXES = (".parquet", ".jsonl")


@dataclass(frozen=True)
class Benchmark:
    """One task of a preset.

    definition: its YAML file below lm_eval/tasks; where it is a folder, those of all its subjects (MMLU)
    metric:     what counts, and the harness's filter where it is not `none`
    data:       dataset on the Hub, its subset, and of it the split that is scored and the one that examples are drawn from
    columns:    of the data that the prompts need
    """

    name: str
    definition: str
    fewshot: int
    metric: str
    data: tuple[str, str | None]
    scored: str
    examples: str
    columns: tuple[str, ...]
    filter: str = "none"

    @property
    def splits(self) -> list[str]:
        """What it reads."""
        return [self.scored, *([self.examples] if self.fewshot else [])]

    def hub_name(self, split: str) -> str:
        """`allenai/ai2_arc, ARC-Challenge, split test`"""
        name, subset = self.data
        return f"{name}{f', {subset}' if subset else ''}, split {split}"


ARC = ("question", "choices", "answerKey")
HELLASWAG = ("ctx_a", "ctx_b", "activity_label", "endings", "label")
WINOGRANDE = ("sentence", "option1", "option2", "answer")


def _arc(challenge: bool, fewshot: int, metric: str) -> Benchmark:
    name, subset = ("arc_challenge", "ARC-Challenge") if challenge else ("arc_easy", "ARC-Easy")
    return Benchmark(name, f"arc/{name}.yaml", fewshot, metric, ("allenai/ai2_arc", subset), "test", "train", ARC)


def _hellaswag(fewshot: int, metric: str) -> Benchmark:
    data = ("Rowan/hellaswag", None)
    return Benchmark("hellaswag", "hellaswag/hellaswag.yaml", fewshot, metric, data, "validation", "train", HELLASWAG)


def _winogrande(fewshot: int) -> Benchmark:
    data = ("allenai/winogrande", "winogrande_xl")
    return Benchmark("winogrande", "winogrande/default.yaml", fewshot, "acc", data, "validation", "train", WINOGRANDE)


PRESETS = {
    "openllm-v1": (
        _arc(True, 25, "acc_norm"),
        _hellaswag(10, "acc_norm"),
        Benchmark(
            "mmlu", "mmlu/default", 5, "acc", ("cais/mmlu", "all"), "test", "dev",
            ("question", "subject", "choices", "answer"),
        ),
        Benchmark(
            "truthfulqa_mc2", "truthfulqa/truthfulqa_mc2.yaml", 0, "acc", ("truthfulqa/truthful_qa", "multiple_choice"),
            "validation", "validation", ("question", "mc2_targets"),
        ),
        _winogrande(5),
        Benchmark(
            "gsm8k", "gsm8k/gsm8k.yaml", 5, "exact_match", ("openai/gsm8k", "main"), "test", "train",
            ("question", "answer"), "strict-match",
        ),
    ),
    "zero-shot-7": (
        Benchmark(
            "boolq", "super_glue/boolq/default.yaml", 0, "acc", ("aps/super_glue", "boolq"), "validation", "train",
            ("question", "passage", "label"),
        ),
        Benchmark(
            "rte", "glue/rte/default.yaml", 0, "acc", ("nyu-mll/glue", "rte"), "validation", "train",
            ("sentence1", "sentence2", "label"),
        ),
        _hellaswag(0, "acc"),
        _winogrande(0),
        _arc(False, 0, "acc"),
        _arc(True, 0, "acc"),
        Benchmark(
            "openbookqa", "openbookqa/openbookqa.yaml", 0, "acc", ("allenai/openbookqa", "main"), "test", "train",
            ("question_stem", "choices", "answerKey"),
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class PresetTask:
    """A task of a preset with its data. parts: the definition and the splits of each subject, of which most tasks have one"""

    benchmark: Benchmark
    parts: Sequence[tuple[dict[str, Any], dict[str, Any]]]
    limit: int | None
    chance: float

    @property
    def name(self) -> str:
        return self.benchmark.name

    @property
    def metric(self) -> str:
        return self.benchmark.metric

    @property
    def fewshot(self) -> int:
        return self.benchmark.fewshot

    @property
    def prompt(self) -> str:
        """The definition that has it."""
        return f"lm_eval/tasks/{self.benchmark.definition}"

    @property
    def size(self) -> int:
        return sum(len(data[self.benchmark.scored]) for _, data in self.parts)

    @property
    def count(self) -> int:
        return sum(self.taken(len(data[self.benchmark.scored])) for _, data in self.parts)

    @property
    def requests(self) -> int:
        """About how many answers a model scores, for a bar."""
        return self.count * (round(1 / self.chance) if self.chance else 1)

    def taken(self, items: int) -> int:
        """How many of the items of a subject are scored."""
        return items if self.limit is None else min(items, self.limit)


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
    from datasets import Dataset

    from sparsify.progress import without_bars

    if problem := kind_problem(file):
        raise SparsifyError(f"{file} {problem}")
    try:
        with without_bars():
            if file.suffix == ".parquet":
                import pyarrow.parquet

                return Dataset(pyarrow.parquet.read_table(file))
            import json

            with file.open(encoding="utf-8-sig") as lines:
                return Dataset.from_list([json.loads(line) for line in lines if line.strip()])
    except Exception as error:  # of pyarrow, json, the file system
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise SparsifyError(f"{file} cannot be read as {file.suffix[1:]} ({reason})") from None


def _from_hub(name: str, wanted: Sequence[tuple[Benchmark, str]]) -> dict[tuple[str, str], Any]:
    import datasets

    from sparsify.progress import stage, without_bars

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
    from sparsify.evaluation.harness import definition_of, subjects_of

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
