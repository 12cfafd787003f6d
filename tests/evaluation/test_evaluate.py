"""`evaluate` on real checkpoint directories against an independent float64 computation over the same files."""

import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import sparsify.evaluation as evaluation
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.evaluation import evaluate, evaluate_all, tables

from .conftest import make_model, make_tokenizer

LENGTH, CHUNKS = 32, 6


def direct(directory, dense_directory, text_file):
    """Protocol by hand: everything at once, float64, one big tensor of logits."""
    words = [int(w[1:]) for w in text_file.read_text().split()]
    ids = torch.tensor(words[: LENGTH * CHUNKS]).reshape(CHUNKS, LENGTH)
    q, p = (
        torch.softmax(AutoModelForCausalLM.from_pretrained(d).double()(ids).logits[:, :-1], -1)
        for d in (directory, dense_directory)
    )
    target = torch.nn.functional.one_hot(ids[:, 1:], q.shape[-1]).double()
    return {
        "perplexity": torch.exp(-(q.log() * target).sum(-1).mean()).item(),
        "dense": torch.exp(-(p.log() * target).sum(-1).mean()).item(),
        "kl": (p * (p.log() - q.log())).sum(-1).mean().item(),
        "agreement": (q.argmax(-1) == p.argmax(-1)).double().mean().item(),
    }


def test_evaluate_matches_float64(directories, text_file):
    expected = direct(directories / "compressed", directories / "dense", text_file)
    result = evaluate(
        directories / "compressed", directories / "dense", f"file:{text_file}", LENGTH, CHUNKS, device="cpu", quiet=True
    )
    score = result.texts[text_file.name]
    assert score.tokens == CHUNKS * (LENGTH - 1) and score.chunks == CHUNKS
    assert result.perplexity == pytest.approx(expected["perplexity"], rel=1e-4)
    assert result.dense_perplexity == pytest.approx(expected["dense"], rel=1e-4)
    assert result.kl == pytest.approx(expected["kl"], rel=1e-3)
    assert result.top1_agreement == pytest.approx(expected["agreement"])
    assert 0 < expected["agreement"] < 1, "the test models must differ, or agreement proves nothing"
    assert score.text == text_file.name and score.text_source == "file" and result.format == "dense"


def test_without_dense_only_perplexity(directories, text_file):
    with_dense = evaluate(directories / "compressed", directories / "dense", text_file, LENGTH, CHUNKS, quiet=True)
    alone = evaluate(directories / "compressed", None, text_file, LENGTH, CHUNKS, quiet=True)
    assert alone.perplexity == with_dense.perplexity
    assert alone.kl is None and alone.top1_agreement is None and alone.dense_perplexity is None


def test_several_models_in_one_pass(directories, text_file):
    names = ["compressed", "dense"]
    many = evaluate_all(
        [directories / n for n in names], directories / "dense", text_file, LENGTH, CHUNKS, labels=names, quiet=True
    )
    assert [r.model for r in many] == names
    assert many[0].kl > 0 and many[1].kl == 0 and many[1].top1_agreement == 1
    assert many[1].perplexity == many[1].dense_perplexity


def test_dense_among_the_models_is_loaded_and_run_once(directories, text_file, monkeypatch):
    loads = []
    monkeypatch.setattr(
        evaluation,
        "load_model",
        lambda spec, device, original=evaluation.load_model: loads.append(spec) or original(spec),
    )
    rows = evaluate_all(
        [directories / "dense", directories / "compressed"],
        directories / "dense",
        text_file,
        LENGTH,
        CHUNKS,
        quiet=True,
    )
    assert len(loads) == 2
    assert (rows[0].kl, rows[0].top1_agreement, rows[0].perplexity) == (0, 1, rows[1].dense_perplexity)


def test_short_text_uses_the_chunks_there_are(directories, text_file):
    result = evaluate(directories / "dense", None, text_file, 100, 48, quiet=True)
    assert result.first.chunks == 7 and result.first.tokens == 7 * 99


def test_too_short_text_says_what_to_do(directories, text_file):
    with pytest.raises(SparsifyError, match=r"gives 700 tokens, fewer than one chunk of 1024.*longer text"):
        evaluate(directories / "dense", None, text_file, quiet=True)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot read the evaluation text"), (b"\xff\xfe\xfa", "not UTF-8")]
)
def test_unreadable_text(directories, tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SparsifyError, match=message):
        evaluate(directories / "dense", None, path, quiet=True)


def test_no_text_and_no_dense():
    with pytest.raises(SparsifyError, match="--text FILE, or --dense MODEL"):
        evaluate("anything")


def test_missing_model(text_file):
    with pytest.raises(CheckpointError, match="nowhere"):
        evaluate("./nowhere", None, text_file)


def test_missing_tokenizer(directories, text_file, tmp_path):
    make_model(0).save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="tokenizer"):
        evaluate(tmp_path / "bare", None, text_file)


def test_other_vocabulary(directories, text_file, tmp_path):
    make_model(0, vocabulary=110).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(SparsifyError, match="other has 110 token logits and the dense model 97"):
        evaluate(tmp_path / "other", directories / "dense", text_file, LENGTH, CHUNKS, quiet=True)


def test_json_and_table(directories, text_file):
    result = evaluate(directories / "compressed", directories / "dense", text_file, LENGTH, CHUNKS, quiet=True)
    parsed = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert parsed["kl"] == result.kl and parsed["chunks"] == CHUNKS
    assert parsed["texts"][text_file.name]["kl"] == result.kl and parsed["tasks"] == {}
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(*tables([result]))
    shown = console.export_text()
    assert text_file.name in shown and f"{result.perplexity:.2f}" in shown and f"{result.top1_agreement:.1%}" in shown


def test_infinite_perplexity_is_valid_json(directories, text_file):
    from dataclasses import replace

    result = evaluate(directories / "dense", None, text_file, LENGTH, CHUNKS, quiet=True)
    destroyed = replace(result, texts={"t": replace(result.first, perplexity=float("inf"))}).to_json()
    assert destroyed["perplexity"] is None and destroyed["texts"]["t"]["perplexity"] is None
