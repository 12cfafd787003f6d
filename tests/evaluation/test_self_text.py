"""Without a text, the dense model writes its own."""

import math

import pytest
import torch

from sparsify.data.calibration import calibration_tokens
from sparsify.evaluation import evaluate
from sparsify.evaluation.text import self_chunks
from sparsify.recipe.schema import Calibration

from .conftest import make_model, make_tokenizer


def test_self_text_is_labelled_and_repeatable(directories):
    first, second = (
        evaluate(directories / "compressed", directories / "dense", None, 24, 4, device="cpu", quiet=True)
        for _ in range(2)
    )
    score = first.texts["self"]
    assert (score.text, score.text_source, score.chunks, score.tokens) == ("self", "self", 4, 4 * 23)
    assert (first.perplexity, first.kl, first.top1_agreement) == (second.perplexity, second.kl, second.top1_agreement)
    assert first.kl > 0


def test_dense_model_finds_its_own_text_likely(directories):
    """What a model samples has, under that model, the perplexity of its entropy: less than of any other model."""
    result = evaluate(directories / "compressed", directories / "dense", "self", 64, 8, device="cpu", quiet=True)
    assert result.dense_perplexity < result.perplexity < math.inf


def test_never_the_calibration_text():
    model, tokenizer = make_model(0), make_tokenizer()
    calibration = calibration_tokens(
        Calibration(source="self", samples=4, sequence_length=24), tokenizer, lambda: model, quiet=True
    )
    evaluation = self_chunks(model, tokenizer, 24, 4, quiet=True)
    assert evaluation.shape == calibration.shape == (4, 24)
    assert not any(torch.equal(a, b) for a in calibration for b in evaluation)


def test_cache_is_used(tmp_path, monkeypatch):
    model, tokenizer = make_model(0), make_tokenizer()
    first = self_chunks(model, tokenizer, 24, 2, tmp_path, lambda: "a", quiet=True)
    monkeypatch.setattr("sparsify.data.self_generated.sample.sample_rows", lambda *a, **k: pytest.fail("sampled again"))
    assert torch.equal(self_chunks(model, tokenizer, 24, 2, tmp_path, lambda: "a", quiet=True), first)
