"""The losses of distillation against the same formulas in float64, written out and differentiated by autograd."""

import math

import pytest
import torch

import sparsify.training.losses as losses
from sparsify.training.losses import Given, LogitLoss, Projected, TopK, full_loss, head_loss, squarehead

R, D, V = 11, 8, 40


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch):
    monkeypatch.setattr(losses, "ENTRIES", 4 * V)  # chunks of 4 rows, the last of 3


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def reference(s, t, labels, logits, cross_entropy, temperature, reverse_kl=0.0):
    """s, t: float64 [R, V]. Token by token, without any trick."""
    kl = ce = reverse = torch.zeros((), dtype=torch.float64)
    for row in range(len(s)):
        if labels[row] == -100:
            continue
        p, q = (torch.exp(x[row] / temperature) / torch.exp(x[row] / temperature).sum() for x in (t, s))
        kl = kl + temperature**2 * (p * (p / q).log()).sum()
        reverse = reverse + temperature**2 * (q * (q / p).log()).sum()
        ce = ce - (torch.exp(s[row]) / torch.exp(s[row]).sum())[labels[row]].log()
    return logits * kl + cross_entropy * ce + reverse_kl * reverse, kl, ce, reverse


@pytest.mark.parametrize(
    ("logits", "cross_entropy", "temperature", "reverse"),
    [
        (1, 0, 1, 0), (0.5, 2, 1, 0), (1, 0, 3, 0), (0.7, 0.3, 0.5, 0), (0, 1, 1, 0),
        (0, 0, 1, 1), (0.5, 0, 1, 0.5), (0.7, 0.3, 2, 1.5), (0, 0.2, 0.5, 1),
    ],
)  # fmt: skip
def test_next_token_losses_and_their_gradients(draw, logits, cross_entropy, temperature, reverse):
    hidden, head, teacher = draw(R, D).requires_grad_(), draw(V, D).requires_grad_(), draw(R, V)
    labels = torch.randint(0, V, (R,), generator=torch.Generator().manual_seed(1))
    labels[[2, 7]] = -100
    weights = LogitLoss(logits, cross_entropy, temperature, reverse)
    target = Given(teacher) if logits or reverse else None
    total, kl, ce, reverse_kl = head_loss(hidden, head, target, labels, weights, torch.float32)
    (3 * total).backward()
    exact_hidden, exact_head = (x.detach().double().requires_grad_() for x in (hidden, head))
    expected, exact_kl, exact_ce, exact_reverse = reference(
        exact_hidden @ exact_head.t(), teacher.double(), labels, logits, cross_entropy, temperature, reverse
    )
    (3 * expected).backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert ce.item() == pytest.approx(exact_ce.item(), rel=1e-5)
    assert kl.item() == pytest.approx(exact_kl.item() if target is not None else 0, rel=1e-5)
    assert reverse_kl.item() == pytest.approx(exact_reverse.item() if reverse else 0, rel=1e-5)
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.grad.double(), exact_head.grad, rtol=1e-4, atol=1e-5)

    whole = (hidden.detach() @ head.detach().t()).requires_grad_()
    again, *_ = full_loss(whole, target, labels, weights)
    again.backward()
    assert again.item() == pytest.approx(total.item(), rel=1e-5)
    torch.testing.assert_close((whole.grad @ head.detach()) * 3, hidden.grad, rtol=1e-4, atol=1e-5)


def test_scoring_leaves_the_logits_of_both_models_as_they_were(draw):
    student, teacher = draw(R, V), draw(R, V)
    copies = student.clone(), teacher.clone()
    full_loss(student, Given(teacher), torch.zeros(R, dtype=torch.long), LogitLoss(1, 1))
    assert torch.equal(student, copies[0]) and torch.equal(teacher, copies[1])


def test_a_frozen_head_gets_no_gradient_and_projected_logits_are_given_ones(draw):
    hidden, head, taught, other = draw(R, D).requires_grad_(), draw(V, D), draw(R, D), draw(V, D)
    labels = torch.zeros(R, dtype=torch.long)
    one = head_loss(hidden, head, Projected(taught, other), labels, LogitLoss(1, 0), torch.float32)[0]
    two = head_loss(hidden, head, Given(taught @ other.t()), labels, LogitLoss(1, 0), torch.float32)[0]
    assert one.item() == pytest.approx(two.item(), rel=1e-6)
    one.backward()
    assert head.grad is None and hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("reverse", [0, 0.8])
def test_the_largest_logits_and_one_sum_bound_the_divergence_from_below(draw, reverse):
    k = 5
    s, t = draw(R, V).requires_grad_(), 3 * draw(R, V)
    labels = torch.zeros(R, dtype=torch.long)
    labels[3] = -100
    values, indices = t.topk(k, dim=1)
    top = TopK(values, indices.int(), t.logsumexp(1))
    total, kl, _, reverse_kl = full_loss(s, top, labels, LogitLoss(1, 0.5, reverse_kl=reverse))
    total.backward()

    exact = s.detach().double().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(R):
        if labels[row] == -100:
            continue
        p, q = (torch.softmax(x[row].double(), 0) for x in (t, exact))
        known = indices[row]
        p_rest, q_rest = 1 - p[known].sum(), 1 - q[known].sum()
        expected = expected + (p[known] * (p[known] / q[known]).log()).sum() + p_rest * (p_rest / q_rest).log()
        backward = (q[known] * (q[known] / p[known]).log()).sum() + q_rest * (q_rest / p_rest).log()
        expected = expected + reverse * backward - 0.5 * q[labels[row]].log()
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(s.grad.double(), exact.grad, rtol=1e-3, atol=1e-4)
    _, whole, _, whole_reverse = full_loss(s.detach(), Given(t), labels, LogitLoss(1, 0, reverse_kl=reverse))
    assert 0 < kl.item() < whole.item() and (not reverse or 0 < reverse_kl.item() < whole_reverse.item())
    everything = TopK(*t.topk(V, dim=1), t.logsumexp(1))
    assert full_loss(s.detach(), everything, labels, LogitLoss(1, 0))[1].item() == pytest.approx(whole.item(), rel=1e-3)
    with pytest.raises(ValueError, match="temperature 1"):
        full_loss(s.detach(), top, labels, LogitLoss(1, 0, 2.0))


def test_squarehead_is_the_relative_error_of_each_layer_averaged(draw):
    student, teacher = [draw(2, 5, D) for _ in range(3)], [draw(2, 5, D) * 10**i for i in range(3)]
    keep = torch.ones(2, 5, dtype=torch.bool)
    keep[1, 3:] = False
    for mask in (None, keep):
        chosen = keep if mask is not None else torch.ones_like(keep)
        expected = 0.0
        for f_s, f_t in zip(student, teacher, strict=True):
            over, under = 0.0, 0.0
            for b, i in chosen.nonzero().tolist():
                over += sum((a - c) ** 2 for a, c in zip(f_s[b, i].tolist(), f_t[b, i].tolist(), strict=True))
                under += sum(c**2 for c in f_t[b, i].tolist())
            expected += over / under / 3
        assert squarehead(student, teacher, mask).item() == pytest.approx(expected, rel=1e-5)
    assert squarehead(teacher, teacher).item() == 0
    f_s = student[0].clone().requires_grad_()
    squarehead([f_s], teacher[:1], keep).backward()
    assert (f_s.grad[1, 3:] == 0).all() and (f_s.grad[0] != 0).all()


def test_a_wrong_teacher_of_the_wrong_depth_is_no_silent_truncation(draw):
    with pytest.raises(ValueError):
        squarehead([draw(1, 2, D)] * 2, [draw(1, 2, D)] * 3)


def test_extreme_logits_stay_finite(draw):
    s, t = (1e4 * draw(R, V) for _ in range(2))
    s.requires_grad_()
    total, *_ = full_loss(s, Given(t), torch.zeros(R, dtype=torch.long), LogitLoss(1, 1, reverse_kl=1))
    total.backward()
    assert math.isfinite(total.item()) and torch.isfinite(s.grad).all()
