"""The running sums against a direct computation in float64, written from the definitions."""

import math

import pytest
import torch

import sparsify.evaluation.score as score_module
from sparsify.errors import NumericalError, SparsifyError
from sparsify.evaluation import Score, chunked, score_logits, score_models


def direct(logits, targets, reference):
    """Definitions in float64, one position at a time, without log_softmax or kl_div."""
    nll = kl = agreements = 0.0
    for q_logits, target, p_logits in zip(logits.double(), targets, reference.double(), strict=True):
        q = torch.exp(q_logits - q_logits.max())
        q /= q.sum()
        p = torch.exp(p_logits - p_logits.max())
        p /= p.sum()
        nll -= math.log(q[target])
        kl += sum(float(a) * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)
        agreements += int(q_logits.argmax() == p_logits.argmax())
    return nll, kl, agreements


def test_score_logits_matches_definitions(monkeypatch):
    monkeypatch.setattr(score_module, "ROWS", 7)  # several slices and a rest
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 31, generator=generator)
    reference = logits + torch.randn(40, 31, generator=generator)
    targets = torch.randint(0, 31, (40,), generator=generator)
    score = score_logits(logits, targets, reference)
    nll, kl, agreements = direct(logits, targets, reference)
    assert score.tokens == 40
    assert score.nll == pytest.approx(nll, rel=1e-6)
    assert score.kl == pytest.approx(kl, rel=1e-5)
    assert score.agreements == agreements
    assert 0 < agreements < 40


def test_stability_matches_its_definition():
    generator = torch.Generator().manual_seed(3)
    reference = 4 * torch.randn(60, 31, generator=generator)
    logits = reference + 2 * torch.randn(60, 31, generator=generator)
    targets = torch.where(torch.rand(60, generator=generator) < 0.6, reference.argmax(1), torch.randint(0, 31, (60,)))
    stable = total = 0.0
    for q, target, p in zip(logits.double(), targets.tolist(), reference.double(), strict=True):
        options = sorted(range(31), key=lambda token: -float(p[token]))[:4]
        said = [max(float(p[token] - p.exp().sum().log()), -20.0) for token in options]
        mean = sum(said) / 4
        weight = math.exp(math.sqrt(sum((x - mean) ** 2 for x in said) / 4))
        before, after = options[0] == target, max(options, key=lambda token: float(q[token])) == target
        stable, total = stable + weight * (before == after), total + weight
    score = score_logits(logits, targets, reference)
    assert score.stability == pytest.approx(stable / total, rel=1e-5) and 0.1 < score.stability < 0.95
    assert score_logits(reference, targets, reference).stability == 1
    forbidden = torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]])
    assert score_logits(forbidden, torch.tensor([0]), forbidden).stability == 1


def test_kl_direction():
    """KL(dense || model) is infinite-ish where the model forbids what the dense model says, not the other way round."""
    dense = torch.tensor([[0.0, 0.0, -1e4]])
    model = torch.tensor([[0.0, -50.0, -1e4]])
    target = torch.tensor([0])
    assert score_logits(model, target, dense).kl == pytest.approx(0.5 * 50 - math.log(2), rel=1e-4)
    assert score_logits(dense, target, model).kl == pytest.approx(math.log(2), rel=1e-4)


def test_identical_models_do_not_diverge():
    logits = torch.randn(20, 11, generator=torch.Generator().manual_seed(0))
    score = score_logits(logits, torch.zeros(20, dtype=torch.long), logits)
    assert score.kl == 0 and score.agreement == 1


def test_uniform_model_has_perplexity_of_vocabulary():
    score = score_logits(torch.zeros(5, 17), torch.arange(5))
    assert score.perplexity == pytest.approx(17)


def test_scores_add():
    total = Score(2, 1.0, 0.5, 1) + Score(2, 3.0, 0.5, 0)
    assert (total.perplexity, total.mean_kl, total.agreement) == (pytest.approx(math.e), 0.25, 0.25)


def test_destroyed_model_is_infinite_not_a_crash():
    assert Score(1, 1e6, 0.0, 0).perplexity == math.inf


def test_chunked_is_consecutive_and_drops_the_tail():
    chunks = chunked(torch.arange(23), 5, 48)
    assert torch.equal(chunks, torch.arange(20).reshape(4, 5))
    assert torch.equal(chunked(torch.arange(23), 5, 2), torch.arange(10).reshape(2, 5))
    assert chunked(torch.arange(3), 5, 2).shape == (0, 5)
    for length, count in ((1, 4), (5, 0)):
        with pytest.raises(SparsifyError, match="score"):
            chunked(torch.arange(23), length, count)


class Fixed(torch.nn.Module):
    """A causal model whose logits are a table over the current token."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, ids, use_cache):
        return type("Output", (), {"logits": self.table[ids]})()


def test_score_models_shifts_by_one():
    """A model that always predicts `token + 1` is perfect on a counting text and hopeless on a constant one."""
    table = torch.full((10, 10), -30.0)
    table[torch.arange(9), torch.arange(1, 10)] = 30.0
    [counting], none = score_models([("m", Fixed(table))], torch.arange(8).reshape(1, 8))
    assert none is None and counting.tokens == 7 and counting.perplexity == pytest.approx(1.0)
    [constant], _ = score_models([("m", Fixed(table))], torch.full((1, 8), 3))
    assert constant.perplexity == pytest.approx(math.exp(60), rel=1e-3)


def test_nan_logits_name_the_model():
    table = torch.zeros(4, 4)
    table[2, 1] = float("nan")
    with pytest.raises(NumericalError, match="broken gives NaN"):
        score_models([("broken", Fixed(table))], torch.tensor([[0, 2, 1]]))


def test_other_vocabulary_is_refused():
    with pytest.raises(SparsifyError, match="one vocabulary"):
        score_models([("m", Fixed(torch.zeros(5, 5)))], torch.tensor([[0, 1]]), ("d", Fixed(torch.zeros(6, 6))))
