"""Losses of distillation: hidden states, next-token distributions and the text, without a [tokens, vocabulary] matrix.

SquareHead and the sum of the three: Kurtic et al. 2023, "Sparse Fine-tuning for Inference Acceleration of Large Language
Models" (arXiv 2310.06927, section 3). Divergence at a temperature: Hinton et al. 2015 (arXiv 1503.02531, section 2).

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
    indices, rest: int64 [C, k] and [C], for a distribution of which only the largest entries are known
    """

    probabilities: Tensor
    entropy_term: Tensor
    indices: Tensor | None = None
    rest: Tensor | None = None


class Target(Protocol):
    """What a teacher says about a micro-batch, a few rows at a time."""

    def rows(self, rows: slice, temperature: float) -> Distribution: ...


@dataclass(frozen=True)
class Projected:
    """Logits that are made when they are needed. hidden: [R, d]; head: [V, d]"""

    hidden: Tensor
    head: Tensor

    def logits(self, rows: slice) -> Tensor:
        """A copy, float32 [C, V]."""
        return (self.hidden[rows] @ self.head.t()).float()

    def rows(self, rows: slice, temperature: float) -> Distribution:
        return distribution(self.logits(rows), temperature)


@dataclass(frozen=True)
class Given:
    """Logits that are there. given: [R, V]"""

    given: Tensor

    def logits(self, rows: slice) -> Tensor:
        """A copy, float32 [C, V]."""
        return self.given[rows].to(torch.float32, copy=True)

    def rows(self, rows: slice, temperature: float) -> Distribution:
        return distribution(self.logits(rows), temperature)


@dataclass(frozen=True)
class TopK:
    """The k largest logits of each token and the log of the sum of all exponentials.

    values: [R, k]; indices: int32 or int64 [R, k]; log_sum: float32 [R]
    """

    values: Tensor
    indices: Tensor
    log_sum: Tensor

    def rows(self, rows: slice, temperature: float) -> Distribution:
        if temperature != 1:
            raise ValueError("the sum of the exponentials is known at temperature 1 only")
        log_p = self.values[rows].float() - self.log_sum[rows, None]
        p = log_p.exp()
        rest = (1 - p.sum(1)).clamp(min=torch.finfo(torch.float32).eps)
        return Distribution(p, (p * log_p).sum(1) + rest * rest.log(), self.indices[rows].long(), rest)


def distribution(logits: Tensor, temperature: float = 1.0) -> Distribution:
    """softmax(logits / temperature). logits: [C, V] float32, overwritten."""
    if temperature != 1:
        logits.div_(temperature)
    log_p = logits.sub_(logits.logsumexp(1, keepdim=True))
    p = log_p.exp()
    return Distribution(p, log_p.mul_(p).sum(1))


def score_chunk(
    logits: Tensor,
    target: Distribution | None,
    labels: Tensor,
    logit_weight: float,
    text_weight: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of a few tokens and the gradient of their weighted sum in the logits.

    logits: [C, V] float32, the student's, overwritten; labels: int64 [C], IGNORED where neither loss counts
    Returns KL(teacher || student) * temperature^2 summed over tokens, cross entropy summed, and d: [C, V] float32.
    """
    counts = labels != IGNORED
    text = labels.clamp(min=0)[:, None]
    log_sum = logits.logsumexp(1, keepdim=True)
    cross_entropy = ((log_sum - logits.gather(1, text))[:, 0] * counts).sum()
    if target is None or not logit_weight:
        d = logits.sub_(log_sum).exp_().mul_(text_weight)
        d.scatter_add_(1, text, torch.full_like(log_sum, -text_weight))
        return torch.zeros_like(cross_entropy), cross_entropy, d.mul_(counts[:, None])
    at_one = None
    if temperature != 1:
        at_one = (logits - log_sum).exp_() if text_weight else None
        logits.div_(temperature)
        log_sum = logits.logsumexp(1, keepdim=True)
    log_q = logits.sub_(log_sum)
    if target.indices is None:
        cross = (target.probabilities * log_q).sum(1)
        q = log_q.exp_()
        difference = target.probabilities
    else:
        # The teacher's tail is compared with the student's as one token; inside it the student keeps its own proportions.
        assert target.rest is not None
        listed = log_q.gather(1, target.indices)
        tail = (1 - listed.exp().sum(1)).clamp(min=torch.finfo(torch.float32).eps)
        cross = (target.probabilities * listed).sum(1) + target.rest * tail.log()
        q = log_q.exp_()
        difference = q * (target.rest / tail)[:, None]
        difference.scatter_(1, target.indices, target.probabilities)
    kl = ((target.entropy_term - cross) * counts).sum() * temperature**2
    weight = logit_weight * temperature
    if at_one is None:
        d = q.mul_(weight + text_weight).sub_(difference, alpha=weight)
    else:
        d = q.sub_(difference).mul_(weight).add_(at_one, alpha=text_weight)
    if text_weight:
        d.scatter_add_(1, text, torch.full_like(log_sum, -text_weight))
    return kl, cross_entropy, d.mul_(counts[:, None])


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    step = max(1, ENTRIES // vocabulary)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@dataclass(frozen=True)
class LogitLoss:
    """How the next-token losses are weighed; `total` of them goes into the sum that is trained on."""

    logits: float
    cross_entropy: float
    temperature: float = 1.0


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
    ) -> tuple[Tensor, Tensor, Tensor]:
        W = head.to(dtype)
        d_hidden = torch.empty_like(hidden)
        d_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        kl = cross_entropy = torch.zeros((), device=hidden.device)
        for rows in _chunks(hidden.shape[0], head.shape[0]):
            h = hidden[rows].to(dtype)
            logits = (h @ W.t()).float()
            expected = None if target is None else target.rows(rows, loss.temperature)
            more_kl, more_ce, d = score_chunk(
                logits, expected, labels[rows], loss.logits, loss.cross_entropy, loss.temperature
            )
            kl, cross_entropy = kl + more_kl, cross_entropy + more_ce
            d = d.to(dtype)
            d_hidden[rows] = d @ W
            if d_head is not None:
                d_head.add_(d.t() @ h)
        ctx.save_for_backward(d_hidden, d_head)
        ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(kl, cross_entropy)
        return loss.logits * kl + loss.cross_entropy * cross_entropy, kl, cross_entropy

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        d_logits = torch.empty_like(logits)
        kl = cross_entropy = torch.zeros((), device=logits.device)
        for rows in _chunks(*logits.shape):
            expected = None if target is None else target.rows(rows, loss.temperature)
            more_kl, more_ce, d_logits[rows] = score_chunk(
                logits[rows].to(torch.float32, copy=True),
                expected,
                labels[rows],
                loss.logits,
                loss.cross_entropy,
                loss.temperature,
            )
            kl, cross_entropy = kl + more_kl, cross_entropy + more_ce
        ctx.save_for_backward(d_logits)
        ctx.mark_non_differentiable(kl, cross_entropy)
        return loss.logits * kl + loss.cross_entropy * cross_entropy, kl, cross_entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * gradients[0], None, None, None


def head_loss(
    hidden: Tensor, head: Tensor, target: Target | None, labels: Tensor, loss: LogitLoss, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over tokens: what is trained on, KL * temperature^2, cross entropy; the last two carry no gradient.

    hidden: [R, d] of the student; head: [V, d]; labels: int64 [R], the next token, IGNORED where nothing counts;
    dtype: of the products with the head
    """
    return _HeadLoss.apply(hidden, head, target, labels, loss, dtype)


def full_loss(logits: Tensor, target: Target | None, labels: Tensor, loss: LogitLoss) -> tuple[Tensor, Tensor, Tensor]:
    """`head_loss` for logits that are there. logits: [R, V]"""
    return _FullLoss.apply(logits, target, labels, loss)
