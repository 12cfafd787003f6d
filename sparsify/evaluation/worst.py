"""The tokens of a text at which a model is farthest from the dense one, in context, with what both expected there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

KEPT = 20  # tokens of a text
GUESSES = 5  # likeliest next tokens of each model
BEFORE, AFTER = 24, 8  # tokens of context

Guesses = list[tuple[int, float]]  # token and probability, the likeliest first


@dataclass(frozen=True)
class Position:
    """One scored position. chunk: number of the chunk; position: of the token in it that both models were to predict, from 1."""

    kl: float
    chunk: int
    position: int
    dense: Guesses
    model: Guesses


@dataclass(frozen=True)
class Guess:
    """A token as text, and how probable a model thought it."""

    token: str
    probability: float


@dataclass(frozen=True)
class WorstToken:
    """A position in context. kl: KL(dense || model) in nats, None where it is infinite; token: what stands in the text, between
    `before` and `after`; dense, model: what each thought likeliest, best first"""

    kl: float | None
    chunk: int
    position: int
    before: str
    token: str
    after: str
    dense: list[Guess]
    model: list[Guess]


class WorstTokens:
    """Gathers the positions of largest divergence while a text is scored."""

    def __init__(self, count: int = KEPT) -> None:
        self.count = count
        self.found: list[Position] = []

    def look(self, chunk: int, start: int, kl: Tensor, log_p: Tensor, log_q: Tensor) -> None:
        """kl: [R] of consecutive positions, which predict the tokens start + 1, ... of the chunk; log_p, log_q: [R, V]"""
        values, rows = kl.topk(min(self.count, len(kl)))
        least = self.found[-1].kl if len(self.found) == self.count else 0.0
        for value, row in zip(values.tolist(), rows.tolist(), strict=True):
            if value > least:
                place = start + row + 1
                self.found.append(Position(value, chunk, place, _likeliest(log_p[row]), _likeliest(log_q[row])))
        self.found = sorted(self.found, key=lambda one: (-one.kl, one.chunk, one.position))[: self.count]

    def in_context(self, chunks: Tensor, tokenizer: Any) -> list[WorstToken]:
        """What was found, as text. chunks: [C, S] that were scored"""

        def text(ids: Any) -> str:
            return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

        def guesses(given: Guesses) -> list[Guess]:
            return [Guess(text([token]), probability) for token, probability in given]

        rows = chunks.tolist()
        return [
            WorstToken(
                kl=one.kl if math.isfinite(one.kl) else None,
                chunk=one.chunk,
                position=one.position,
                before=text(rows[one.chunk][max(one.position - BEFORE, 0) : one.position]),
                token=text([rows[one.chunk][one.position]]),
                after=text(rows[one.chunk][one.position + 1 : one.position + 1 + AFTER]),
                dense=guesses(one.dense),
                model=guesses(one.model),
            )
            for one in self.found
        ]


def _likeliest(log_p: Tensor) -> Guesses:
    """log_p: [V]"""
    best = log_p.topk(min(GUESSES, len(log_p)))
    return list(zip(best.indices.tolist(), best.values.exp().tolist(), strict=True))
