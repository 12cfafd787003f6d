"""Tasks: files that are refused by line, scores against lm-evaluation-harness's own command and against float64 by hand."""

import json
import random
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import sparsify.evaluation as evaluation
from sparsify.errors import CheckpointError, MissingDependency, NumericalError, SparsifyError
from sparsify.evaluation import evaluate, evaluate_all, read_tasks, tables, write_task_files
from sparsify.evaluation.task_score import Answers, mean_score, task_score

from .conftest import VOCABULARY, make_model, make_tokenizer

harness_installed = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra eval)"
)


def words(rng, count):
    return " ".join(f"w{rng.randrange(3, VOCABULARY)}" for _ in range(count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tasks of the three prompts; numbers and lengths of answers differ."""
    place, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)

    def write(name, count, question, answers):
        with (place / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                given = [words(rng, rng.randrange(1, 6)) for _ in range(rng.randrange(2, 6))]
                item = {question: words(rng, rng.randrange(2, 9)), answers: given, "answer": rng.randrange(len(given))}
                file.write(json.dumps({**item, "id": "extra"}) + "\n")

    write("arc_easy", 40, "question", "choices")
    write("hellaswag", 30, "context", "endings")
    write("openbookqa", 25, "question", "choices")
    return place


# ------------------------------------------------------------------------------------------------------------ the files


def test_a_folder_is_read_by_name_and_limited(folder):
    tasks = read_tasks(folder, 10)
    assert [(task.name, len(task.items), task.size) for task in tasks] == [
        ("arc_easy", 10, 40), ("hellaswag", 10, 30), ("openbookqa", 10, 25),
    ]  # fmt: skip
    assert [task.prompt for task in tasks] == ["Question: {{question}}\nAnswer:", "context", "question"]
    first = json.loads((folder / "hellaswag.jsonl").read_text().splitlines()[0])
    assert tasks[1].items[0] == {name: first[name] for name in ("context", "endings", "answer")}
    (alone,) = read_tasks(f"file:{folder / 'arc_easy.jsonl'}")
    assert len(alone.items) == alone.size == 40
    assert alone.chance == pytest.approx(sum(1 / len(item["choices"]) for item in alone.items) / 40)


GOOD = '{"question": "q", "choices": ["a", "b"], "answer": 1}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "choices": ["a", "b"]}', "has no gold answer"),
        ('{"question": "q", "choices": ["a", "b"], "answer": null}', "has no gold answer"),
        ('{"question": "q", "choices": ["a", "b"], "answer": ""}', "has no gold answer"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "gold answer 2, out of range: its 2 `choices`"),
        ('{"question": "q", "choices": ["a", "b"], "answer": -1}', "gold answer -1, out of range"),
        ('{"question": "q", "choices": ["a", "b"], "answer": "B"}', "gold answer 'B'; `answer` is the number"),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', "gold answer True; `answer` is the number"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "fewer than two `choices`"),
        ('{"context": "q", "endings": "ab", "answer": 0}', "neither `question`|fewer than two `endings`"),
        ('{"question": "q", "endings": ["a", "b"], "answer": 0}', "neither `question` and `choices` nor `context` and `endings`"),
        ('{"question": "q", "context": "c", "choices": ["a", "b"], "answer": 0}', "put both into `question`"),
        ('{"question": " ", "choices": ["a", "b"], "answer": 0}', "`question` that is no text"),
        ('{"question": "q", "choices": ["a", ""], "answer": 0}', "number 1, counted from 0, is no text"),
        ('{"question": "q", "choices": ["a", 3], "answer": 0}', "number 1, counted from 0, is no text"),
        ('{"context": "q", "endings": ["a", "b"], "answer": 0}', "has `context` and line 1 has none"),
        ('{"question": "\\ud800", "choices": ["a", "b"], "answer": 0}', "half of a surrogate pair"),
        ("[1, 2]", "is no JSON object"),
        ("{'question': 1}", "is not JSON"),
        ("[" * 100000, "is not JSON"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "quiz.jsonl"
    file.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(SparsifyError, match=rf"quiz.jsonl, line 3:? .*({message})"):
        read_tasks(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("quiz.jsonl", b"\n \n", "quiz.jsonl is empty"),
        ("quiz.jsonl", b"\xff\xfe{", "quiz.jsonl: the tasks are not UTF-8"),
        ("quiz.txt", b"", "holds no task files"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SparsifyError, match=message):
        read_tasks(tmp_path)


def test_other_bad_input(folder, tmp_path, directories):
    with pytest.raises(SparsifyError, match=r"gone\.jsonl: cannot read the tasks"):
        read_tasks(tmp_path / "gone.jsonl")
    with pytest.raises(SparsifyError, match="--limit 0 leaves no items"):
        read_tasks(folder, 0)
    with pytest.raises(SparsifyError, match="give --tasks FOLDER with it"):
        evaluate(directories / "dense", None, "x.txt", limit=3)


def test_tasks_are_checked_before_a_model_is_loaded(tmp_path, directories, monkeypatch):
    (tmp_path / "quiz.jsonl").write_text('{"question": "q", "choices": ["a", "b"]}\n')
    monkeypatch.setattr(evaluation, "load_model", None)
    with pytest.raises(SparsifyError, match=r"quiz\.jsonl, line 1 has no gold answer"):
        evaluate(directories / "dense", tasks=tmp_path)


# ----------------------------------------------------------------------------------------------------------- the scores


def by_hand(directory, task):
    """acc and acc_norm of every item: one answer at a time, float64. A word is a token, and unknown words are one."""
    model = AutoModelForCausalLM.from_pretrained(directory).double()
    tokenizer = make_tokenizer()
    found = []
    for item in task.items:
        question, answers = task.form
        prompt = f"Question: {item[question]}\nAnswer:" if task.name == "arc_easy" else item[question]
        before = tokenizer(prompt)["input_ids"]
        sums = []
        for answer in item[answers]:
            after = tokenizer(answer)["input_ids"]
            log_p = torch.log_softmax(model(torch.tensor([before + after])).logits[0], -1)
            sums.append(sum(log_p[len(before) - 1 + i, token].item() for i, token in enumerate(after)))
        per_character = [total / len(answer) for total, answer in zip(sums, item[answers], strict=True)]
        found.append((sums.index(max(sums)) == item["answer"], per_character.index(max(per_character)), item["answer"]))
    return found


@harness_installed
def test_scores_match_float64(directories, folder):
    result = evaluate(directories / "compressed", directories / "dense", tasks=folder, quiet=True)
    assert list(result.tasks) == ["arc_easy", "hellaswag", "openbookqa"] and not result.texts
    for task in read_tasks(folder):
        mine, dense = by_hand(directories / "compressed", task), by_hand(directories / "dense", task)
        found, count = result.tasks[task.name], len(task.items)
        right = [chosen == gold for _, chosen, gold in mine]
        differences = torch.tensor(
            [a - (chosen == gold) for a, (_, chosen, gold) in zip(right, dense, strict=True)], dtype=torch.float64
        )
        accuracy, dense_accuracy = sum(right) / count, sum(chosen == gold for _, chosen, gold in dense) / count
        assert (found.items, found.items_in_file, found.truncated) == (count, count, 0)
        assert found.accuracy == pytest.approx(accuracy) and found.dense_accuracy == pytest.approx(dense_accuracy)
        assert found.unnormalised_accuracy == pytest.approx(sum(summed for summed, _, _ in mine) / count)
        assert found.dense_unnormalised_accuracy == pytest.approx(sum(summed for summed, _, _ in dense) / count)
        assert found.accuracy_stderr == pytest.approx((accuracy * (1 - accuracy) / (count - 1)) ** 0.5)
        assert found.difference == pytest.approx(differences.mean().item())
        assert found.difference_stderr == pytest.approx(differences.std().item() / count**0.5)
        changed = [a[1] != b[1] for a, b in zip(mine, dense, strict=True)]
        assert found.flips == pytest.approx(sum(changed) / count) and any(changed), "the models must differ"
        share = (accuracy - task.chance) / (dense_accuracy - task.chance)
        assert found.above_chance == (pytest.approx(share) if dense_accuracy > task.chance else None)
    unequal = [one for one in result.tasks.values() if one.accuracy != one.unnormalised_accuracy]
    assert unequal, "lengths of answers must matter somewhere"


@harness_installed
@pytest.mark.parametrize("limit", [None, 12])
def test_the_harness_gives_the_same_numbers_from_the_files_that_we_write(directories, folder, tmp_path, limit, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    mine = evaluate(directories / "compressed", tasks=folder, limit=limit, quiet=True)
    written = write_task_files(read_tasks(folder), tmp_path / "out")
    assert [file.name for file in written] == [f"sparsify_{name}.yaml" for name in ("arc_easy", "hellaswag", "openbookqa")]
    theirs = simple_evaluate(
        "hf",
        f"pretrained={directories / 'compressed'},dtype=float32",
        [f"sparsify_{name}" for name in mine.tasks],
        task_manager=TaskManager(include_path=str(tmp_path / "out"), include_defaults=False),
        device="cpu",
        limit=limit,
    )
    for name, score in mine.tasks.items():
        found = theirs["results"][f"sparsify_{name}"]
        assert found["acc_norm,none"] == score.accuracy and found["acc,none"] == score.unnormalised_accuracy
        assert found["acc_norm_stderr,none"] == pytest.approx(score.accuracy_stderr)
        assert found["acc_stderr,none"] == pytest.approx(score.unnormalised_accuracy_stderr)
        assert theirs["n-samples"][f"sparsify_{name}"]["effective"] == score.items == (limit or score.items_in_file)
    assert len({score.accuracy for score in mine.tasks.values()}) > 1, "three tasks with one number prove little"
