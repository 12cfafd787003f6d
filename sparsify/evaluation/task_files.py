"""Multiple-choice tasks from files: one JSON object a line, read and checked before any model is loaded.

A line holds `question` and `choices`, or `context` and `endings`, and `answer`, counted from 0. A question is put as
lm-evaluation-harness puts that of its own task of this form: arc_easy, openbookqa or hellaswag. Nothing comes from a hub.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparsify.data.fitting import refuse_surrogates
from sparsify.errors import SparsifyError
from sparsify.evaluation.presets import PRESETS
from sparsify.files import atomic_write, encoding_problem, expanded, kind_problem, path_problem

SUFFIX = ".jsonl"
FORMS = (("question", "choices"), ("context", "endings"))
PREFIX = (
    "sparsify_"  # of the tasks in YAML files: without it lm-eval could mean its own task of that name, from the hub
)

# lm_eval/tasks/{arc/arc_easy,openbookqa/openbookqa,hellaswag/hellaswag}.yaml, `doc_to_text`. A template, or a field's name.
ARC_EASY = "Question: {{question}}\nAnswer:"
OPENBOOKQA = "question"
HELLASWAG = "context"


@dataclass(frozen=True)
class TaskFile:
    """The items of one task that are scored.

    items: mappings with the two fields of one of FORMS, and `answer`
    lines: the line of each item in the file
    size:  items in the file, of which the first len(items) are scored
    """

    name: str
    path: Path
    items: list[dict[str, Any]]
    lines: list[int]
    size: int

    @property
    def form(self) -> tuple[str, str]:
        """The fields of the question and of its answers."""
        return form_of(self.items[0])

    @property
    def count(self) -> int:
        """Items that are scored."""
        return len(self.items)

    @property
    def requests(self) -> int:
        """How many answers a model scores."""
        return sum(len(item[self.form[1]]) for item in self.items)

    @property
    def metric(self) -> str:
        """What an item's score is, as lm-evaluation-harness calls it."""
        return "acc_norm"

    @property
    def fewshot(self) -> int:
        """Solved examples in the prompt."""
        return 0

    @property
    def prompt(self) -> str:
        """`doc_to_text` of lm-evaluation-harness: a template, or the field that is the prompt as it stands."""
        if self.form == FORMS[1]:
            return HELLASWAG
        return OPENBOOKQA if self.name.lower().startswith("openbookqa") else ARC_EASY

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing: the mean of 1 / number of answers."""
        return sum(1 / len(item[self.form[1]]) for item in self.items) / len(self.items)

    def definition(self) -> dict[str, Any]:
        """The task for lm-evaluation-harness, but for its data; an answer follows the prompt after one space."""
        return {
            "task": PREFIX + self.name,
            "output_type": "multiple_choice",
            "test_split": "test",
            "num_fewshot": 0,
            "doc_to_text": self.prompt,
            "doc_to_choice": self.form[1],
            "doc_to_target": "answer",
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
            ],
            "metadata": {"version": 1.0},
        }


def read_tasks(place: str | Path, limit: int | None = None) -> list[TaskFile]:
    """Every task of a folder, by name, or the one of a file; raises SparsifyError that names the file and the line.

    limit: score only the first so many items of each; all of them are checked
    """
    if limit is not None and limit < 1:
        raise SparsifyError(f"--limit {limit} leaves no items; give at least 1")
    place = expanded(str(place).removeprefix("file:"))
    if problem := path_problem(place):
        raise SparsifyError(f"{str(place)[:100]!r} {problem}")
    if not place.exists() and place.name == str(place) and not place.suffix:
        raise SparsifyError(f"{place} is no folder or file of tasks; {_from_the_hub(place.name)}")
    if place.is_dir():
        files = sorted(place.glob(f"*{SUFFIX}"))
        if not files:
            raise SparsifyError(f"{place} holds no task files (*{SUFFIX}: one JSON object a line)")
    else:
        files = [place]
    return [_read(file, limit) for file in files]


def _from_the_hub(name: str) -> str:
    """What would do for a task that is named as lm-evaluation-harness names its own, whose data are on the Hub."""
    for preset, tasks in PRESETS.items():
        for task in tasks:
            if task.name == name:
                files = " and ".join(f"{name}/{split}.parquet ({task.hub_name(split)})" for split in task.splits)
                loaded = f"--preset {preset} loads them"
                return f"the task {name} needs data of the Hub: {loaded}, or with --tasks FOLDER reads FOLDER/{files}"
    return (
        f"give {name}{SUFFIX} with one JSON object a line. A task of lm-evaluation-harness needs data of the Hub: "
        f"`lm_eval --tasks {name}` scores it there"
    )


def write_task_files(tasks: list[TaskFile], folder: str | Path) -> list[Path]:
    """Write each task as a YAML file that `lm_eval --include_path FOLDER` finds. It reads the task's file where that lies now."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for task in tasks:
        name, *rest = task.definition().items()
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(task.path.resolve())}}}
        file = folder / f"{PREFIX}{task.name}.yaml"
        atomic_write(file, yaml.safe_dump(dict([name, *data.items(), *rest]), sort_keys=False, allow_unicode=True))
        written.append(file)
    return written


def harness_command(tasks: list[TaskFile], model: str, folder: str | Path, limit: int | None = None) -> str:
    """The command line of lm-evaluation-harness that scores the tasks of `write_task_files`, as text for a shell.

    It starts with `import sparsify`, so that transformers knows the formats that are ours.
    """
    program = "import sparsify; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    names = ",".join(PREFIX + task.name for task in tasks)
    words = [
        "python", "-c", program, "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--include_path", str(folder),
        "--tasks", names, *([] if limit is None else ["--limit", str(limit)]),
    ]  # fmt: skip
    return shlex.join(words)


def form_of(record: dict[str, Any]) -> tuple[str, str]:
    """Which of FORMS a line has."""
    return FORMS[0] if FORMS[0][0] in record else FORMS[1]


def _read(file: Path, limit: int | None) -> TaskFile:
    items: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in _lines(file):
        place = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or "nested too deeply"
            raise SparsifyError(f"{place} is not JSON ({reason}); a task file has one JSON object a line") from None
        if problem := _problem(record):
            raise SparsifyError(f"{place} {problem}")
        question, answers = form_of(record)
        if items and question not in items[0]:
            raise SparsifyError(
                f"{place} has `{question}` and line {lines[0]} has none; a task file has items of one form"
            )
        item = {name: record[name] for name in (question, answers, "answer")}
        refuse_surrogates(item, place)
        items.append(item)
        lines.append(number)
    if not items:
        raise SparsifyError(f"{file} is empty; a task file has one JSON object a line")
    return TaskFile(file.stem, file, items[:limit], lines[:limit], len(items))


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that hold something, with their numbers."""
    if problem := kind_problem(file):
        raise SparsifyError(f"{file} {problem}")
    try:
        with file.open(encoding="utf-8-sig") as opened:
            yield from ((number, line) for number, line in enumerate(opened, 1) if line.strip())
    except OSError as error:
        raise SparsifyError(f"{file}: cannot read the tasks ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise SparsifyError(f"{file}: the tasks are not UTF-8 ({encoding_problem(file)})") from None


def _problem(record: Any) -> str | None:
    """What is wrong with a line, after its place; None where nothing is."""
    if not isinstance(record, dict):
        return "is no JSON object; a task file has one a line"
    complete = [form for form in FORMS if all(name in record for name in form)]
    if not complete:
        return "has neither `question` and `choices` nor `context` and `endings`"
    if all(name in record for name in ("question", "context")):
        return "has a `question` and a `context`, of which one would be left out; put both into `question`"
    question, answers = complete[0]
    if not isinstance(record[question], str) or not record[question].strip():
        return f"has a `{question}` that is no text"
    given = record[answers]
    if not isinstance(given, list) or len(given) < 2:
        return f"has fewer than two `{answers}`; give a list of at least two texts"
    for number, one in enumerate(given):
        if not isinstance(one, str) or not one.strip():
            return f"has `{answers}` of which number {number}, counted from 0, is no text"
    answer = record.get("answer")
    if answer is None or answer == "":
        return "has no gold answer; give `answer`, the number of the right one counted from 0"
    if isinstance(answer, bool) or not isinstance(answer, int):
        return f"has the gold answer {answer!r}; `answer` is the number of the right one, counted from 0"
    if not 0 <= answer < len(given):
        return f"has the gold answer {answer}, out of range: its {len(given)} `{answers}` are counted from 0"
    return None
