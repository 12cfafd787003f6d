"""Presets: the files that they name, and their figures against lm-evaluation-harness's own `simple_evaluate` on the same files."""

import json
import random
import shutil
from importlib.util import find_spec

import pytest

import sparsify.evaluation as evaluation
from sparsify import cli
from sparsify.errors import SparsifyError
from sparsify.evaluation import evaluate
from sparsify.evaluation.presets import PRESETS

from .test_tasks import words

if find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed (extra eval)", allow_module_level=True)
from sparsify.evaluation.preset_data import read_preset

HUB = {
    "mmlu_anatomy": ("mmlu", "anatomy"), "mmlu_virology": ("mmlu", "virology"), "arc_challenge": ("arc_challenge", None),
    "hellaswag": ("hellaswag", None), "truthfulqa_mc2": ("truthfulqa_mc2", None), "winogrande": ("winogrande", None),
    "gsm8k": ("gsm8k", None),
}  # fmt: skip


def item(name, rng, number):
    """An item as it is on the Hub."""
    letters = {"label": ["A", "B", "C"], "text": [words(rng, rng.randrange(1, 4)) for _ in range(3)]}
    made = {
        "arc_challenge": {"question": words(rng, 4), "choices": letters, "answerKey": rng.choice("ABC")},
        "hellaswag": {
            "ctx_a": words(rng, 3), "ctx_b": words(rng, 2), "activity_label": "w3", "label": str(rng.randrange(4)),
            "endings": [words(rng, rng.randrange(1, 5)) for _ in range(4)],
        },
        "mmlu": {
            "question": words(rng, 3), "subject": ("anatomy", "virology")[number % 2],
            "choices": [words(rng, 1) for _ in range(4)], "answer": rng.randrange(4),
        },
        "truthfulqa_mc2": {
            "question": words(rng, 3), "mc1_targets": {"choices": ["w3", "w4"], "labels": [1, 0]},
            "mc2_targets": {"choices": [words(rng, 2) for _ in range(3)], "labels": [1, rng.randrange(2), 0]},
        },
        "winogrande": {
            "sentence": f"{words(rng, 2)} _ {words(rng, 2)}", "option1": "w3", "option2": "w4", "answer": rng.choice("12"),
        },
        "gsm8k": {"question": words(rng, 3), "answer": f"{words(rng, 2)} #### {rng.randrange(3)}"},
    }  # fmt: skip
    return made[name]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with everything that openllm-v1 reads: a few items of random words, half of the files as parquet."""
    import pyarrow
    import pyarrow.parquet

    place, rng = tmp_path_factory.mktemp("data"), random.Random(2)
    for number, task in enumerate(PRESETS["openllm-v1"]):
        (place / task.name).mkdir()
        for split in task.splits:
            rows = [item(task.name, rng, n) for n in range(8 if split == task.scored else 2 * task.fewshot + 2)]
            file = place / task.name / split
            if number % 2:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file.with_suffix(".parquet"))
            else:
                file.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


@pytest.fixture(scope="module")
def long(directories, tmp_path_factory):
    """The compressed model with positions for many examples; they are rotary, so that its weights are the same."""
    place = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(directories / "compressed", place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    return place


def test_the_harness_gives_the_same_numbers(long, data, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from sparsify.evaluation.harness import DEFINITIONS

    tasks = {task.name: task for task in read_preset("openllm-v1", data)}

    def loaded(path, name=None, **_):
        """What the Hub would give."""
        ours = next(
            one
            for one in PRESETS["openllm-v1"]
            if one.data == (path, name) or (one.name == "mmlu" and path == one.data[0])
        )
        parts = tasks[ours.name].parts
        given = next(found for made, found in parts if ours.name != "mmlu" or made["dataset_name"] == name)
        return {"validation": given.get("validation"), **given}

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.load_dataset", loaded)
    mine = evaluate(long, preset="openllm-v1", tasks=data, limit=3, quiet=True)
    assert list(mine.tasks) == list(tasks) and mine.preset == "openllm-v1"
    assert [score.fewshot for score in mine.tasks.values()] == [25, 10, 5, 0, 5, 5]
    folders = [str((DEFINITIONS / task.definition).parent) for task in PRESETS["openllm-v1"] if task.name != "mmlu"]
    manager = TaskManager(include_path=[*folders, str(DEFINITIONS / "mmlu" / "default")], include_defaults=False)
    for name, task in tasks.items():
        asked = [one for one, (ours, _) in HUB.items() if ours == name]
        theirs = simple_evaluate(
            "hf", f"pretrained={long},dtype=float32", asked, num_fewshot=task.fewshot,
            task_manager=manager, device="cpu", batch_size=8, limit=3, bootstrap_iters=0,
        )["results"]  # fmt: skip
        metric = f"{task.metric},{task.benchmark.filter}"
        expected = sum(theirs[one][metric] for one in asked) / len(asked)
        rounding = 1e-6 if name == "truthfulqa_mc2" else 1e-9  # shares of one are float32, summed in another order
        assert mine.tasks[name].accuracy == pytest.approx(expected, abs=rounding), name
        assert mine.tasks[name].items == 3 * len(asked)
    assert mine.tasks["truthfulqa_mc2"].right is None  # shares of one
    assert 0 < mine.tasks["truthfulqa_mc2"].accuracy < 1
    assert len({score.accuracy for score in mine.tasks.values()}) > 2, "six tasks with one number prove little"


def test_answers_longer_than_the_model(directories, data):
    with pytest.raises(
        SparsifyError, match="dense has positions for 128 tokens, and the task asks for answers of up to 256"
    ):
        evaluate(directories / "dense", preset="openllm-v1", tasks=data, limit=1, quiet=True)


def test_every_absent_file_is_named_before_a_model_is_loaded(directories, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "load_model", None)
    for task in PRESETS["openllm-v1"]:
        (tmp_path / task.name).symlink_to(data / task.name)
    (tmp_path / "gsm8k").unlink()
    (tmp_path / "gsm8k").mkdir()
    with pytest.raises(SparsifyError) as raised:
        evaluate(directories / "dense", preset="openllm-v1", tasks=tmp_path)
    lines = str(raised.value).splitlines()
    assert lines[0] == "openllm-v1 needs 2 files that are absent:" and lines[-1].endswith("nothing was computed")
    assert lines[1] == f"  {tmp_path}/gsm8k/test.parquet (or .jsonl): openai/gsm8k, main, split test"
    assert "openai/gsm8k, main, split train" in lines[2]
    assert cli.main(["eval", str(directories / "dense"), "--preset", "zero-shot-7", "--tasks", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert "boolq/validation.parquet (or .jsonl): aps/super_glue, boolq" in shown and "arc_easy/train" not in shown


def test_without_a_hub_the_files_are_named(directories, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the server")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.setattr(evaluation, "load_model", None)
    with pytest.raises(
        SparsifyError, match=r"cannot be loaded from the Hub \(Couldn't reach.*(?s:.*)FOLDER/rte/validation.parquet"
    ):
        evaluate(directories / "dense", preset="zero-shot-7")


def changed(data, tmp_path, name, split, rows):
    for task in PRESETS["openllm-v1"]:
        (tmp_path / task.name).mkdir()
        for file in (data / task.name).iterdir():
            if (task.name, file.stem) != (name, split):
                (tmp_path / task.name / file.name).symlink_to(file)
    (tmp_path / name / f"{split}.jsonl").write_text("\n".join(rows))


@pytest.mark.parametrize(
    ("name", "split", "rows", "message"),
    [
        ("arc_challenge", "test", ['{"question": "w3"}'], "arc_challenge/test has no column 'choices', 'answerKey'; it should be"),
        ("gsm8k", "test", [], "gsm8k/test has no items"),
        ("gsm8k", "train", ['{"question": "w3", "answer": "#### 1"}'], "gsm8k/train has 1 items, of which 5 are to be examples"),
        ("winogrande", "train", ["{"], r"train.jsonl:1: not a JSON record"),
        ("mmlu", "test", ['{"question": "a", "subject": "magic", "choices": ["a"], "answer": 0}'], "the subject 'magic', which mmlu"),
        ("mmlu", "dev", ['{"question": "a", "subject": "anatomy", "choices": ["a"], "answer": 0}'], "has 1 items of the subject"),
    ],
)  # fmt: skip
def test_a_file_that_is_something_else(data, tmp_path, name, split, rows, message):
    changed(data, tmp_path, name, split, rows)
    with pytest.raises(SparsifyError, match=message):
        read_preset("openllm-v1", tmp_path)


def test_other_bad_input(directories, data):
    with pytest.raises(SparsifyError, match="'openllm' is no preset; choose from: openllm-v1, zero-shot-7"):
        read_preset("openllm", data)
    with pytest.raises(SparsifyError, match="--limit 0"):
        read_preset("openllm-v1", data, 0)
    with pytest.raises(SparsifyError, match="'sglang' is no back end"):
        evaluate(directories / "dense", preset="openllm-v1", tasks=data, backend="sglang")
    with pytest.raises(SparsifyError, match="vllm scores tasks alone"):
        evaluate(directories / "dense", None, "x.txt", preset="openllm-v1", tasks=data, backend="vllm")
    with pytest.raises(SparsifyError, match="vllm scores tasks alone"):
        evaluate(directories / "dense", backend="vllm")


def test_shots_are_those_that_people_quote():
    shots = {task.name: task.fewshot for task in PRESETS["openllm-v1"]}
    assert shots == {
        "arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5,
    }  # fmt: skip
    assert {task.fewshot for task in PRESETS["zero-shot-7"]} == {0} and len(PRESETS["zero-shot-7"]) == 7
    for task in (one for preset in PRESETS.values() for one in preset):
        from sparsify.evaluation.harness import DEFINITIONS

        assert (DEFINITIONS / task.definition).exists(), "lm-eval has moved it"
