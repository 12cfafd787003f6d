"""Losses of distillation: hidden states, next-token distributions and the text, without a [tokens, vocabulary] matrix.

SquareHead and the sum of the three: Kurtic et al. 2023, "Sparse Fine-tuning for Inference Acceleration of Large Language
Models" (arXiv 2310.06927, section 3). Divergence at a temperature: Hinton et al. 2015 (arXiv 1503.02531, section 2).
The reverse divergence, KL(student || teacher), and why: Gu et al. 2023, "MiniLLM" (arXiv 2306.08543, section 2.1); a
weighted sum of both on the given text: Wu et al. 2024 (arXiv 2404.02657, section 4, there with adaptive weights).

Logits are the largest tensor of a training step: 4096 tokens x 49152 entries are 800 MB in float32, several times over. So
they are made, scored and turned into a gradient a few rows at a time, in the forward pass, and never kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

ENTRIES = 1 << 23  # logits alive at once, of each model: 32 MiB in float32
IGNORED = -100  # a label that does not count, as everywhere in transformers


def squarehead(student: Sequence[Tensor], teacher: Sequence[Tensor], keep: Tensor | None = None) -> Tensor:
    """Mean over layers of ||f_s - f_t||^2 / ||f_t||^2.

    student, teacher: hidden states after each block, [B, T, d]; keep: bool [B, T], the tokens that count (None: all)
    """
    losses = []
    for f_s, f_t in zip(student, teacher, strict=True):
        target = f_t.float() if keep is None else f_t.float() * keep[..., None]
        found = f_s.float() if keep is None else f_s.float() * keep[..., None]
        losses.append(
            (found - target).square().sum() / target.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        )
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class Distribution:
    """The teacher's next-token distribution for a few tokens.

    probabilities: [C, V] over the whole vocabulary, or [C, k] over `indices`; sums to 1 with `rest`
    entropy_term:  [C], sum of p log p over what is listed (and over the rest, taken as one token)
    log_probabilities: like probabilities, where they were asked for
    indices, rest: int64 [C, k] and [C], for a distribution of which only the largest entries are known
    """

    probabilities: Tensor
    entropy_term: Tensor
    log_probabilities: Tensor | None = None
    indices: Tensor | None = None
    rest: Tensor | None = None


class Target(Protocol):
    """What a teacher says about a micro-batch, a few rows at a time. logs: with log_probabilities"""

    def rows(self, rows: slice, temperature: float, logs: bool = False) -> Distribution: ...


@dataclass(frozen=True)
class Projected:
    """Logits that are made when they are needed. hidden: [R, d]; head: [V, d]"""

    hidden: Tensor
    head: Tensor

    def logits(self, rows: slice) -> Tensor:
        """A copy, float32 [C, V]."""
        return (self.hidden[rows] @ self.head.t()).float()

    def rows(self, rows: slice, temperature: float, logs: bool = False) -> Distribution:
        return distribution(self.logits(rows), temperature, logs)


@dataclass(frozen=True)
class Given:
    """Logits that are there. given: [R, V]"""

    given: Tensor

    def logits(self, rows: slice) -> Tensor:
        """A copy, float32 [C, V]."""
        return self.given[rows].to(torch.float32, copy=True)

    def rows(self, rows: slice, temperature: float, logs: bool = False) -> Distribution:
        return distribution(self.logits(rows), temperature, logs)


@dataclass(frozen=True)
class TopK:
    """The k largest logits of each token and the log of the sum of all exponentials.

    values: [R, k]; indices: int32 or int64 [R, k]; log_sum: float32 [R]
    """

    values: Tensor
    indices: Tensor
    log_sum: Tensor

    def rows(self, rows: slice, temperature: float, logs: bool = False) -> Distribution:
        if temperature != 1:
            raise ValueError("the sum of the exponentials is known at temperature 1 only")
        log_p = self.values[rows].float() - self.log_sum[rows, None]
        p = log_p.exp()
        rest = (1 - p.sum(1)).clamp(min=torch.finfo(torch.float32).eps)
        return Distribution(p, (p * log_p).sum(1) + rest * rest.log(), log_p, self.indices[rows].long(), rest)


def distribution(logits: Tensor, temperature: float = 1.0, logs: bool = False) -> Distribution:
    """softmax(logits / temperature). logits: [C, V] float32, overwritten; logs: with log_probabilities"""
    if temperature != 1:
        logits.div_(temperature)
    log_p = logits.sub_(logits.logsumexp(1, keepdim=True))
    p = log_p.exp()
    if logs:
        return Distribution(p, (log_p * p).sum(1), log_p)
    return Distribution(p, log_p.mul_(p).sum(1))


@dataclass(frozen=True)
class LogitLoss:
    """How the next-token losses are weighed in the sum that is trained on.

    kl: of KL(teacher || student); reverse_kl: of KL(student || teacher); temperature: of both
    """

    kl: float
    cross_entropy: float
    temperature: float = 1.0
    reverse_kl: float = 0.0

    @property
    def divergence(self) -> bool:
        """Whether the teacher's distribution counts."""
        return bool(self.kl or self.reverse_kl)


@dataclass(frozen=True)
class Scores:
    """Losses summed over tokens: both divergences times temperature^2, and the cross entropy. 0 where one was not asked for."""

    kl: Tensor
    reverse_kl: Tensor
    cross_entropy: Tensor

    def __add__(self, other: Scores) -> Scores:
        return Scores(self.kl + other.kl, self.reverse_kl + other.reverse_kl, self.cross_entropy + other.cross_entropy)

    def total(self, loss: LogitLoss) -> Tensor:
        """The weighted sum."""
        sum = loss.kl * self.kl + loss.cross_entropy * self.cross_entropy
        return sum + loss.reverse_kl * self.reverse_kl if loss.reverse_kl else sum


def score_chunk(logits: Tensor, target: Distribution | None, labels: Tensor, loss: LogitLoss) -> tuple[Scores, Tensor]:
    """Losses of a few tokens and the gradient of their weighted sum in the logits, float32 [C, V].

    logits: [C, V] float32, the student's, overwritten; target: with log_probabilities for the reverse divergence;
    labels: int64 [C], IGNORED where no loss counts
    """
    counts = labels != IGNORED
    text = labels.clamp(min=0)[:, None]
    temperature, text_weight = loss.temperature, loss.cross_entropy
    log_sum = logits.logsumexp(1, keepdim=True)
    cross_entropy = ((log_sum - logits.gather(1, text))[:, 0] * counts).sum()
    none = torch.zeros_like(cross_entropy)
    if target is None or not loss.divergence:
        d = logits.sub_(log_sum).exp_().mul_(text_weight)
        d.scatter_add_(1, text, torch.full_like(log_sum, -text_weight))
        return Scores(none, none, cross_entropy), d.mul_(counts[:, None])
    at_one = None
    if temperature != 1:
        at_one = (logits - log_sum).exp_() if text_weight else None
        logits.div_(temperature)
        log_sum = logits.logsumexp(1, keepdim=True)
    log_q = logits.sub_(log_sum)
    reverse = _reverse(log_q, target) if loss.reverse_kl else None
    if target.indices is None:
        cross = (target.probabilities * log_q).sum(1)
        q = log_q.exp_()
        difference = target.probabilities
    else:
        # The teacher's tail is compared with the student's as one token; inside it the student keeps its own proportions.
        assert target.rest is not None
        listed, tail = _listed(log_q, target.indices)
        cross = (target.probabilities * listed).sum(1) + target.rest * tail.log()
        q = log_q.exp_()
        difference = q * (target.rest / tail)[:, None]
        difference.scatter_(1, target.indices, target.probabilities)
    kl = ((target.entropy_term - cross) * counts).sum() * temperature**2
    weight = loss.kl * temperature
    if at_one is None:
        d = q.mul_(weight + text_weight).sub_(difference, alpha=weight)
    else:
        d = q.sub_(difference).mul_(weight).add_(at_one, alpha=text_weight)
    if text_weight:
        d.scatter_add_(1, text, torch.full_like(log_sum, -text_weight))
    if reverse is not None:
        d.add_(reverse[1], alpha=loss.reverse_kl * temperature)
        none = (reverse[0] * counts).sum() * temperature**2
    return Scores(kl, none, cross_entropy), d.mul_(counts[:, None])


def _listed(log_q: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """log q of the listed tokens [C, k], and the sum of q over all others [C]."""
    listed = log_q.gather(1, indices)
    return listed, (1 - listed.exp().sum(1)).clamp(min=torch.finfo(torch.float32).eps)


def _reverse(log_q: Tensor, target: Distribution) -> tuple[Tensor, Tensor]:
    """KL(q || p) of each token [C] and its gradient in the logits that q is the softmax of, q * (log q/p - KL) [C, V].

    Where p is known for the largest entries alone, all others are one token of both.
    """
    assert target.log_probabilities is not None
    q = log_q.exp()
    if target.indices is None:
        ratio = log_q - target.log_probabilities
        divergence = (q * ratio).sum(1)
    else:
        assert target.rest is not None
        listed, tail = _listed(log_q, target.indices)
        ratio_listed, ratio_rest = listed - target.log_probabilities, tail.log() - target.rest.log()
        divergence = (listed.exp() * ratio_listed).sum(1) + tail * ratio_rest
        ratio = ratio_rest[:, None].expand_as(q).scatter(1, target.indices, ratio_listed)
    return divergence, q.mul_(ratio - divergence[:, None])


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, ENTRIES // vocabulary)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class _HeadLoss(torch.autograd.Function):
    """The next-token losses of hidden states: logits are hidden @ head', chunk by chunk, and their gradient with them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        target: Target | None,
        labels: Tensor,
        loss: LogitLoss,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        W = head.to(dtype)
        d_hidden = torch.empty_like(hidden)
        d_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        scores = _nothing(hidden.device)
        for rows in _chunks(hidden.shape[0], head.shape[0]):
            h = hidden[rows].to(dtype)
            logits = (h @ W.t()).float()
            expected = None if target is None else target.rows(rows, loss.temperature, loss.reverse_kl > 0)
            more, d = score_chunk(logits, expected, labels[rows], loss)
            scores += more
            d = d.to(dtype)
            d_hidden[rows] = d @ W
            if d_head is not None:
                d_head.add_(d.t() @ h)
        ctx.save_for_backward(d_hidden, d_head)
        ctx.head_dtype = head.dtype
        parts = (scores.kl, scores.cross_entropy, scores.reverse_kl)
        ctx.mark_non_differentiable(*parts)
        return scores.total(loss), *parts

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        d_head = None if d_head is None else (d_head * gradients[0]).to(ctx.head_dtype)
        return d_hidden * gradients[0], d_head, None, None, None, None


class _FullLoss(torch.autograd.Function):
    """The same for a model whose logits are more than hidden @ head', such as capped ones: they are all there at once."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Target | None, labels: Tensor, loss: LogitLoss
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d_logits = torch.empty_like(logits)
        scores = _nothing(logits.device)
        for rows in _chunks(*logits.shape):
            expected = None if target is None else target.rows(rows, loss.temperature, loss.reverse_kl > 0)
            copied = logits[rows].to(torch.float32, copy=True)
            more, d_logits[rows] = score_chunk(copied, expected, labels[rows], loss)
            scores += more
        ctx.save_for_backward(d_logits)
        parts = (scores.kl, scores.cross_entropy, scores.reverse_kl)
        ctx.mark_non_differentiable(*parts)
        return scores.total(loss), *parts

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * gradients[0], None, None, None


def _nothing(device: torch.device) -> Scores:
    zero = torch.zeros((), device=device)
    return Scores(zero, zero, zero)


def head_loss(
    hidden: Tensor, head: Tensor, target: Target | None, labels: Tensor, loss: LogitLoss, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over tokens: what is trained on, KL * temperature^2, cross entropy, reverse KL * temperature^2; only the first
    carries a gradient.

    hidden: [R, d] of the student; head: [V, d]; labels: int64 [R], the next token, IGNORED where nothing counts;
    dtype: of the products with the head
    """
    return _HeadLoss.apply(hidden, head, target, labels, loss, dtype)


def full_loss(
    logits: Tensor, target: Target | None, labels: Tensor, loss: LogitLoss
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`head_loss` for logits that are there. logits: [R, V]"""
    return _FullLoss.apply(logits, target, labels, loss)
