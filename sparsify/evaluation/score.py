"""One pass over token chunks that yields perplexity, divergence and agreement together.

All models see the same chunk one after another and only the logits of that chunk are alive, so the peak is the
weights plus (models + 1) x S x V floats, however long the text is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from sparsify.data.fitting import context_of
from sparsify.errors import NumericalError, SparsifyError
from sparsify.evaluation.worst import WorstTokens
from sparsify.model.finite import all_finite

# Positions whose log-probabilities are alive at once: 256 x 128k x 4 bytes = 128 MiB for the widest vocabularies.
ROWS = 256
OPTIONS = 4  # the dense model's likeliest next tokens, between which stability is asked
TOP = 5  # likeliest next tokens of both models, of which the common ones are counted
UNLIKELY = -20.0  # log-probabilities below count as this, or one forbidden token would outweigh a whole text


@dataclass(frozen=True)
class Score:
    """Sums over every scored position, so that scores of several texts can be added."""

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    stable: float = 0.0
    confidence: float = 0.0
    common: float = 0.0

    def __add__(self, other: Score) -> Score:
        return Score(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def perplexity(self) -> float:
        """exp of the mean next-token negative log-likelihood."""
        try:
            return math.exp(self.nll / self.tokens)
        except OverflowError:  # a mean above 709 nats: the model is destroyed, and that is a result
            return math.inf

    @property
    def mean_kl(self) -> float:
        return self.kl / self.tokens

    @property
    def agreement(self) -> float:
        return self.agreements / self.tokens

    @property
    def top_agreement(self) -> float:
        """Share of the dense model's `TOP` likeliest next tokens that are among the model's."""
        return self.common / self.tokens

    @property
    def stability(self) -> float:
        return self.stable / self.confidence


def chunked(ids: Tensor, sequence_length: int, chunks: int) -> Tensor:
    """Cuts one long text into consecutive chunks and drops the tail.

    ids: [T];  returns [min(chunks, T // S), S]
    """
    if sequence_length < 2:
        raise SparsifyError(f"sequence length {sequence_length} scores nothing: give at least 2")
    if chunks < 1:
        raise SparsifyError(f"{chunks} chunks score nothing: give at least 1")
    count = min(chunks, ids.shape[0] // sequence_length)
    return ids[: count * sequence_length].reshape(count, sequence_length)


def stability(log_p: Tensor, log_q: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """LLM-Streamline's stability (arXiv 2403.19135, section 3.3), with a next token for a question of several options.

    A model is stable on a question when it answers as rightly or wrongly as before it was compressed; a question counts
    exp(s), with s the deviation of the original model's scores of the options, so that one which it hardly cared about counts
    little. Options here are the original model's likeliest next tokens, their scores the log-probabilities.

    log_p: [S, V] of the original model; log_q: [S, V] of the compressed one; targets: [S]. Returns the weight of each position
    and whether the model is stable there, [S] each. The metric is the mean of the second, weighted by the first.
    """
    options = log_p.topk(min(OPTIONS, log_p.shape[1]), dim=-1)
    before = options.indices[:, 0] == targets
    after = options.indices.gather(1, log_q.gather(1, options.indices).argmax(1, keepdim=True))[:, 0] == targets
    return options.values.double().clamp(min=UNLIKELY).std(1, correction=0).exp(), before == after


def top_agreement(log_p: Tensor, log_q: Tensor, top: int = TOP) -> Tensor:
    """The share of the `top` likeliest tokens of one model that are among those of another: [S], from [S, V] each."""
    top = min(top, log_p.shape[1])
    mine, its = log_q.topk(top, dim=-1).indices, log_p.topk(top, dim=-1).indices
    return (mine[:, :, None] == its[:, None, :]).sum((1, 2)) / top


def score_logits(
    logits: Tensor,
    targets: Tensor,
    reference: Tensor | None = None,
    worst: WorstTokens | None = None,
    chunk: int = 0,
) -> Score:
    """logits: [S, V] before each target;  targets: [S];  reference: [S, V] logits of the dense model or None.

    KL is KL(reference || model) in nats: what is lost when the model codes text drawn from the reference.
    Softmax runs in float32 as the models do; sums over positions in float64.
    worst: is shown the divergence at every position of the chunk of this number
    """
    total = Score()
    for start in range(0, targets.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        log_q = torch.log_softmax(logits[rows].float(), dim=-1)
        nll = -log_q.gather(-1, targets[rows, None]).double().sum().item()
        kl, agreements, stable, confidence, common = 0.0, 0, 0.0, 0.0, 0.0
        if reference is not None:
            log_p = torch.log_softmax(reference[rows].float(), dim=-1)
            # kl_div gives p * (log p - log q) and 0 where p is 0, also when log p is -inf.
            divergences = nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            kl = divergences.double().sum().item()
            agreements = int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
            weights, same = stability(log_p, log_q, targets[rows])
            stable, confidence = weights[same].sum().item(), weights.sum().item()
            common = top_agreement(log_p, log_q).double().sum().item()
            if worst is not None:
                worst.look(chunk, start, divergences, log_p, log_q)
        total += Score(log_q.shape[0], nll, kl, agreements, stable, confidence, common)
    return total


@torch.inference_mode()
def score_models(
    models: Sequence[tuple[str, nn.Module]],
    chunks: Tensor,
    dense: tuple[str, nn.Module] | None = None,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
    worst: Sequence[WorstTokens | None] | None = None,
) -> tuple[list[Score | Exception], Score | None]:
    """Scores named causal language models, and the dense one, on the same chunks.

    chunks: [C, S] token ids; the first token of a chunk is context, the other S - 1 are scored.
    worst:  for each model, what gathers the positions at which it is farthest from the dense one
    Returns one Score per model, and the dense model's own (None without it). A model that fails has its error instead of a
    score; the error is raised when no other model is left, and when it is the dense model's.
    """
    scores = [Score() for _ in models]
    failed: dict[int, Exception] = {}
    dense_score = None if dense is None else Score()
    for number, chunk in enumerate(progress(chunks)):
        ids = chunk[None]
        targets = chunk[1:]
        reference = None
        if dense is not None and dense_score is not None:
            reference = _logits(*dense, ids)
            dense_score += score_logits(reference, targets.to(reference.device))
        for i, (name, model) in enumerate(models):
            if i in failed:
                continue
            # The dense model may be among the models, as the first row of a table: one forward serves both.
            same = reference is not None and dense is not None and model is dense[1]
            try:
                logits = reference if same and reference is not None else _logits(name, model, ids)
                if reference is not None and logits.shape != reference.shape:
                    raise SparsifyError(
                        f"{name} has {logits.shape[-1]} token logits and the dense model {reference.shape[-1]}: "
                        "divergence needs two models of one vocabulary; give the model it was compressed from"
                    )
                expected = None if reference is None else reference.to(logits.device)
                scores[i] += score_logits(
                    logits, targets.to(logits.device), expected, worst[i] if worst else None, number
                )
                del logits
            except Exception as error:
                failed[i] = error
                if len(failed) == len(models):
                    raise
    return [failed.get(i, score) for i, score in enumerate(scores)], dense_score


def _logits(name: str, model: nn.Module, ids: Tensor) -> Tensor:
    """ids: [1, S];  returns the logits that predict ids[0, 1:]: [S - 1, V]."""
    device = next(model.parameters()).device
    # use_cache=False: nothing is decoded, and a cache would hold every layer's keys and values.
    try:
        logits = model(ids.to(device), use_cache=False).logits[0, :-1]
    except (IndexError, RuntimeError) as error:
        limit = context_of(model.config) if hasattr(model, "config") else None
        if limit is None or ids.shape[1] <= limit:
            raise
        raise SparsifyError(
            f"{name} has positions for {limit} tokens, and the text is read {ids.shape[1]} at a time: "
            f"give --sequence-length {limit} or less"
        ) from error
    if not all_finite(logits):
        raise NumericalError(
            f"{name} gives NaN or infinite logits on the evaluation text: its weights are damaged or overflow; "
            "check them with `sparsify inspect`"
        )
    return logits
