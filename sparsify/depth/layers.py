"""What is left of a model as layers that any software runs.

A layer runs its attention, then its feed-forward. Where a feed-forward and the next layer's attention are gone, the attention
before and the feed-forward after follow each other directly, so together they are one ordinary layer: exactly, since x is
passed on unchanged between them. The sequence A0 F0 A1 F1 A2 F2 without F0 and A1 becomes (A0 F1) (A2 F2), one layer less.

Only where two attentions or two feed-forwards are neighbours does a layer lack one half. The standard architectures have no
layer of one sublayer, so it keeps its place with zero weights: its sum is zero, and the result is exact everywhere. Work is
saved there by a runtime that skips linears whose weights are all zero, as this project's sparse24 runtime does for vLLM and
transformers; elsewhere only the cost of the merged layers is saved. Removal in pairs leaves no such layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsify.model.sublayers import ATTENTION, FEED_FORWARD, Sublayer


@dataclass(frozen=True)
class Layer:
    """A layer of the shortened model: the old layers that its two sublayers come from; None: there is none."""

    attention: int | None
    feed_forward: int | None

    @property
    def absent(self) -> str | None:
        """The kind of sublayer that has zero weights, if one has."""
        return ATTENTION if self.attention is None else FEED_FORWARD if self.feed_forward is None else None

    def source(self, kind: str) -> int:
        """The old layer whose tensors, and settings, the sublayer of a kind has; those of an absent one are then zeroed."""
        own, other = self.attention, self.feed_forward
        if kind == FEED_FORWARD:
            own, other = other, own
        found = own if own is not None else other
        assert found is not None
        return found

    @property
    def last(self) -> int:
        """The old layer after which the hidden state is where this layer leaves it."""
        return max(block for block in (self.attention, self.feed_forward) if block is not None)


def as_layers(kept: Sequence[Sublayer]) -> list[Layer]:
    """The fewest layers that run these sublayers in this order."""
    layers: list[Layer] = []
    for sublayer in kept:
        if sublayer.kind == ATTENTION:
            layers.append(Layer(sublayer.block, None))
        elif layers and layers[-1].feed_forward is None:
            layers[-1] = Layer(layers[-1].attention, sublayer.block)
        else:
            layers.append(Layer(None, sublayer.block))
    return layers
