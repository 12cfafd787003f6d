"""FinerCut: remove sublayers one by one, each time the one without which the model's output changes least.

Zhang et al. 2024, "FinerCut: Finer-grained Interpretable Layer Pruning for Large Language Models" (arXiv 2405.18218): every
attention and every feed-forward sublayer is a candidate. The output of the dense model on a few sequences is the target; in
each step every candidate is left out in turn, together with what is gone already, and the one of least distance goes for good.

What lies before a candidate is the same for all, so its hidden states are computed once and kept: a candidate costs what is
downstream of it, and a step recomputes only what is downstream of the last removal.

Units may be pairs: two neighbours in the order attention, feed-forward, attention, ... What is left then still alternates,
so it is whole layers (see `layers.py`), at some loss of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.depth.angular import angular_distance
from sparsify.model.in_memory import Resident
from sparsify.model.sublayers import Sublayer

ROWS = {"cpu": 16, "cuda": 1024}  # positions compared at once: as many as a processor's caches hold, or as fill a GPU


def euclidean_distance(reference: Tensor, logits: Tensor) -> Tensor:
    """|reference - logits|_2 of every position. reference, logits: [S, V] float32. Returns [S]."""
    return (reference - logits).norm(dim=-1)


def jensen_shannon(reference: Tensor, logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of the two distributions of every position. reference, logits: [S, V]. Returns [S]."""
    p, q = (torch.log_softmax(x, -1) for x in (reference, logits))
    middle = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1))


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || model) in nats of every position. reference, logits: [S, V]. Returns [S]."""
    p, q = (torch.log_softmax(x, -1) for x in (reference, logits))
    return (p.exp() * (p - q)).sum(-1)


Distance = Callable[[Tensor, Tensor], Tensor]
METRICS: dict[str, Distance] = {
    "angular": angular_distance,
    "euclidean": euclidean_distance,
    "jensen-shannon": jensen_shannon,
}


@dataclass(frozen=True)
class Removal:
    """One step: what went (one sublayer, or a pair), and the distance of the output from that of the whole model after it."""

    sublayers: tuple[Sublayer, ...]
    distance: float


class Greedy:
    """The state of the search: what is still there, and the hidden states that enter each sublayer of it.

    model: loaded, with the sequences to judge by; protected: sublayers that stay; units: 1, or 2 for pairs
    """

    def __init__(
        self,
        model: Resident,
        sublayers: Sequence[Sublayer],
        protected: Sequence[Sublayer],
        metric: Distance,
        units: int = 1,
    ):
        self.model, self.metric, self.units = model, metric, units
        self.kept = list(sublayers)
        self.protected = frozenset(protected)
        self.entering: list[list[Tensor]] = [[hidden] for hidden in model.entering]
        for batch in model.batches:
            self._extend(batch)
        self.whole = [states[-1] for states in self.entering]

    def _extend(self, batch: int) -> None:
        """Take the hidden states of a micro-batch on to the end: entry p enters sublayer p, the last leaves the model."""
        states = self.entering[batch]
        for sublayer in self.kept[len(states) - 1 :]:
            states.append(self.model.run([sublayer], states[-1], batch))

    def candidates(self) -> list[int]:
        """Positions in `kept` of the first sublayer of each unit that may go."""
        fits = range(len(self.kept) - self.units + 1)
        return [p for p in fits if not any(s in self.protected for s in self.kept[p : p + self.units])]

    def scores(self) -> dict[int, float]:
        """Mean distance over all positions, by candidate."""
        sums = dict.fromkeys(self.candidates(), 0.0)
        for batch in self.model.batches:
            reference = self.model.logits(self.whole[batch], batch)
            for position in sums:
                rest = self.kept[position + self.units :]
                hidden = self.model.run(rest, self.entering[batch][position], batch)
                sums[position] += total_distance(self.metric, reference, self.model.logits(hidden, batch))
        return {position: total / self._positions() for position, total in sums.items()}

    def remove(self, position: int, distance: float) -> Removal:
        """Take a unit out for good. Hidden states up to it stay as they are."""
        gone = tuple(self.kept[position : position + self.units])
        del self.kept[position : position + self.units]
        for batch in self.model.batches:
            del self.entering[batch][position + 1 :]
            self._extend(batch)
        return Removal(gone, distance)

    def divergence(self) -> float:
        """KL(whole model || what is left), mean over positions."""
        return self._mean(kl_divergence)

    def divergence_without(self, position: int) -> float:
        """The same as if a unit were gone."""
        rest = self.kept[position + self.units :]
        total = 0.0
        for batch in self.model.batches:
            hidden = self.model.run(rest, self.entering[batch][position], batch)
            total += total_distance(
                kl_divergence, self.model.logits(self.whole[batch], batch), self.model.logits(hidden, batch)
            )
        return total / self._positions()

    def _mean(self, metric: Distance) -> float:
        total = 0.0
        for batch in self.model.batches:
            reference, left = (self.model.logits(h, batch) for h in (self.whole[batch], self.entering[batch][-1]))
            total += total_distance(metric, reference, left)
        return total / self._positions()

    def _positions(self) -> int:
        return sum(tokens.numel() for tokens in self.model.tokens)


def total_distance(metric: Distance, reference: Tensor, logits: Tensor) -> float:
    """Sum of a distance over positions, a few at a time. reference, logits: [S, V]"""
    rows = ROWS.get(logits.device.type, ROWS["cuda"])
    parts = zip(reference.split(rows), logits.split(rows), strict=True)
    return sum(float(metric(one.float(), other.float()).double().sum()) for one, other in parts)


def finercut(
    search: Greedy,
    enough: Callable[[Sequence[Sublayer]], bool],
    bound: float | None = None,
    advance: Callable[[list[Removal]], None] = lambda removals: None,
    known: Sequence[Removal] = (),
) -> tuple[list[Removal], float | None]:
    """Remove until `enough(kept)`, or until nothing may go; with a bound on the divergence, stop before passing it.

    known: the first removals of an earlier search of the same model by the same measure on the same text. Greedy removals do
    not depend on how many follow, so these are not searched again.
    advance: is told all removals after each one

    Returns the removals in order and, when a bound stopped them, the divergence that the next one would have had.
    """
    removals: list[Removal] = []
    while not enough(search.kept):
        if len(removals) < len(known):
            position, distance = search.kept.index(known[len(removals)].sublayers[0]), known[len(removals)].distance
        else:
            scores = search.scores()
            if not scores:
                break
            position = min(scores, key=lambda candidate: (scores[candidate], candidate))
            distance = scores[position]
        if bound is not None and (next_divergence := search.divergence_without(position)) > bound:
            return removals, next_divergence
        removals.append(search.remove(position, distance))
        advance(removals)
    return removals, None
