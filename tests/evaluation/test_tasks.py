"""Tasks: files that are refused by line, scores against lm-evaluation-harness's own command and against float64 by hand."""

import json
import random
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import sparsify.evaluation as evaluation
from sparsify.errors import CheckpointError, MissingDependency, NumericalError, SparsifyError
from sparsify.evaluation import evaluate, evaluate_all, read_tasks, tables, write_task_files
from sparsify.evaluation.task_score import Answers, mean_score, task_score

from .conftest import VOCABULARY, make_model, make_tokenizer

harness_installed = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (extra eval)")


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
        ('{"context": "q", "endings": "ab", "answer": 0}', "fewer than two `endings`"),
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
    with pytest.raises(
        SparsifyError,
        match=r"gsm8k needs data of the Hub: --preset openllm-v1 .*FOLDER/gsm8k/test.parquet \(openai/gsm8k, main, split",
    ):
        read_tasks("gsm8k")
    with pytest.raises(SparsifyError, match=r"give piqa.jsonl with one JSON object a line.*lm_eval --tasks piqa"):
        read_tasks("piqa")
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
def test_the_harness_gives_the_same_numbers_from_the_files_that_we_write(
    directories, folder, tmp_path, limit, monkeypatch
):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    mine = evaluate(directories / "compressed", tasks=folder, limit=limit, quiet=True)
    written = write_task_files(read_tasks(folder), tmp_path / "out")
    assert [file.name for file in written] == [
        f"sparsify_{name}.yaml" for name in ("arc_easy", "hellaswag", "openbookqa")
    ]
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


@harness_installed
def test_models_are_loaded_once_and_the_dense_one_scored_once(directories, folder, text_file, monkeypatch):
    import sparsify.evaluation.harness as harness

    loads, runs = [], []
    original, answer = evaluation.load_model, harness.answers_of
    monkeypatch.setattr(evaluation, "load_model", lambda spec, device: loads.append(spec) or original(spec))
    monkeypatch.setattr(harness, "answers_of", lambda task, model: runs.append(model.name) or answer(task, model))
    rows = evaluate_all(
        [directories / "dense", directories / "compressed"], directories / "dense", [text_file, "self"], 32, 4,
        tasks=folder / "hellaswag.jsonl", limit=6, labels=["first", "second"], quiet=True,
    )  # fmt: skip
    assert len(loads) == 2 and sorted(runs) == [str(directories / "compressed"), str(directories / "dense")]
    assert [list(row.texts) for row in rows] == [[text_file.name, "self"]] * 2
    same, other = (row.tasks["hellaswag"] for row in rows)
    assert (same.difference, same.flips, same.accuracy) == (0, 0, other.dense_accuracy)
    alone = evaluate(directories / "compressed", directories / "dense", text_file, 32, 4, quiet=True)
    assert rows[1].texts[text_file.name] == alone.first, "several texts change nothing on each of them"
    assert rows[1].texts["self"].kl != alone.kl and rows[1].kl == alone.kl
    parsed = json.loads(json.dumps([row.to_json() for row in rows], allow_nan=False))
    assert parsed[1]["tasks"]["hellaswag"]["items"] == 6 and parsed[1]["tasks_mean"]["accuracy"] == other.accuracy
    assert parsed[1]["text"] == text_file.name and set(parsed[1]["texts"]) == {text_file.name, "self"}
    assert {"lm_eval", "torch"} <= parsed[1]["versions"].keys()
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(*tables(rows))
    shown = console.export_text()
    assert shown.count("Accuracy on") == 2 and "hellaswag the first 6 of 30" in shown
    assert f"{other.accuracy:.1%} ± {other.accuracy_stderr * 100:.1f}" in shown


@harness_installed
def test_without_a_dense_model_there_is_nothing_to_compare_with(directories, folder):
    found = evaluate(directories / "compressed", tasks=folder, limit=4, quiet=True).tasks_mean
    assert found.dense_accuracy is found.above_chance is found.difference is found.flips is None


@harness_installed
def test_a_model_that_fails_beside_others_is_a_row_that_says_why(directories, folder, tmp_path):
    broken = make_model(0)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    make_tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(NumericalError, match="broken gives NaN or infinite logits on the tasks"):
        evaluate(tmp_path / "broken", tasks=folder, limit=3, quiet=True)
    rows = evaluate_all(
        [tmp_path / "broken", directories / "compressed"], directories / "dense", tasks=folder, limit=3, quiet=True
    )
    assert "NaN" in rows[0].tasks_failure.reason and not rows[0].tasks and rows[0].tasks_mean is None
    assert rows[1].failure is None and len(rows[1].tasks) == 3
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(*tables(rows))
    assert "NaN or infinite" in console.export_text()
    assert rows[0].to_json()["tasks_failure"]["reason"] == rows[0].tasks_failure.reason


@harness_installed
def test_what_does_not_fit_the_model(directories, tmp_path):
    """Positions for 128 tokens: a longer question loses its beginning and is counted, a longer answer is refused by line."""
    rng = random.Random(1)
    items = [{"question": words(rng, count), "choices": ["w3", "w4 w5"], "answer": 0} for count in (10, 200, 300)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, items)))
    found = evaluate(directories / "dense", tasks=tmp_path, quiet=True)
    assert found.tasks["long"].truncated == 2
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(*tables([found]))
    assert "lost their beginning: " in console.export_text()
    items[1]["choices"][1] = words(rng, 129)
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, items)))
    with pytest.raises(
        SparsifyError, match=r"long\.jsonl, line 2: an answer has 129 tokens, and .*dense has positions for 128"
    ):
        evaluate(directories / "dense", tasks=tmp_path, quiet=True)


@harness_installed
def test_a_tokenizer_that_does_not_belong_to_the_model(folder, tmp_path):
    make_model(0, vocabulary=50).save_pretrained(tmp_path / "m")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(
        SparsifyError, match=r"arc_easy\.jsonl, line \d+: the item holds the token .* embedding of the model has 50"
    ):
        evaluate(tmp_path / "m", tasks=folder, quiet=True)
    make_model(0).save_pretrained(tmp_path / "m")
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError, match="no token for the beginning or the end of a text"):
        evaluate(tmp_path / "m", tasks=folder, quiet=True)


def test_without_lm_eval_the_extra_is_named(directories, folder, monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "sparsify.evaluation.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(evaluation, "load_model", None)  # no weight is read
    with pytest.raises(MissingDependency, match=r"lm-evaluation-harness.*pip install 'sparsify-24\[eval\]'"):
        evaluate(directories / "dense", tasks=folder, quiet=True)


# ---------------------------------------------------------------------------------------------------------- arithmetic


def test_the_mean_over_tasks_and_what_is_above_chance(tmp_path):
    """By hand: 3 of 4 and 1 of 2 right with chance 1/2 and 1/4; the dense model 4 of 4 and 1 of 2."""
    lines = {"a": (4, ["x", "y"]), "b": (2, ["x", "y", "z", "w"])}
    for name, (count, choices) in lines.items():
        item = json.dumps({"question": "q", "choices": choices, "answer": 0})
        (tmp_path / f"{name}.jsonl").write_text("\n".join([item] * count))
    first, second = read_tasks(tmp_path)
    mine = Answers([0, 0, 0, 1], [True, True, True, False], [True] * 4)
    dense = Answers([0, 0, 0, 0], [True] * 4, [True, False, True, True])
    a = task_score(first, mine, dense)
    b_mine, b_dense = Answers([2, 0], [0, 1], [0, 0]), Answers([0, 3], [1, 0], [1, 1])
    b = task_score(second, b_mine, b_dense)
    assert (a.accuracy, a.dense_accuracy, a.chance, a.above_chance, a.flips) == (0.75, 1, 0.5, 0.5, 0.25)
    assert (a.unnormalised_accuracy, a.dense_unnormalised_accuracy) == (1, 0.75)
    assert a.difference == -0.25 and a.difference_stderr == pytest.approx(0.25)  # sqrt(0.75 / 3 / 4)
    assert (b.difference, b.flips, b.above_chance) == (0, 1, 1) and b.difference_stderr == pytest.approx(1)
    mean = mean_score([a, b], [mine, b_mine], [dense, b_dense])
    assert (a.recovery, b.recovery, mean.recovery) == (0.75, 1, pytest.approx(0.625 / 0.75))
    assert (mean.items, mean.accuracy, mean.dense_accuracy, mean.chance) == (6, 0.625, 0.75, 0.375)
    assert mean.above_chance == pytest.approx(0.25 / 0.375) and mean.difference == pytest.approx(-0.125)
    assert mean.difference_stderr == pytest.approx((0.25**2 + 1) ** 0.5 / 2) and mean.flips == 0.625
    assert task_score(first, mine, replace(dense, right=[False, True, False, True])).above_chance is None
    (alone,) = read_tasks(tmp_path / "a.jsonl", 1)
    single = task_score(alone, Answers([0], [True], [True]), Answers([1], [False], [True]))
    assert single.accuracy_stderr is None and single.difference_stderr is None and single.difference == 1


def test_two_texts_of_one_name_are_told_apart(directories, text_file, tmp_path):
    (tmp_path / text_file.name).write_text("w3 w4 " * 200)
    both = [text_file, tmp_path / text_file.name]
    found = evaluate(directories / "dense", None, both, 32, 4, quiet=True)
    assert list(found.texts) == [str(path) for path in both]
    assert len({score.perplexity for score in found.texts.values()}) == 2
    with pytest.raises(SparsifyError, match="is given twice as a text"):
        evaluate(directories / "dense", None, [text_file, f"file:{text_file}"], quiet=True)


def test_every_text_is_read_before_a_model_is_loaded(directories, text_file, monkeypatch):
    monkeypatch.setattr(evaluation, "load_model", None)
    with pytest.raises(SparsifyError, match=r"gone\.txt: cannot read the evaluation text"):
        evaluate(directories / "dense", directories / "dense", [text_file, "self", "gone.txt"], 32, 4, quiet=True)
