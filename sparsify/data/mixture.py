"""Rows of several sources in one order that the seed decides."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.recipe.sources import shares


def interleave(parts: Sequence[Tensor], seed: int) -> Tensor:
    """All rows, each part's in its own order, parts shuffled among each other. parts: [R_i, S]. Returns [sum R_i, S].

    One part alone stays as it is, so that a mixture of one source is that source."""
    return _shuffled(parts, torch.Generator().manual_seed(seed))


def _shuffled(parts: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    labels = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(part) for part in parts]))
    shuffled = labels[torch.randperm(len(labels), generator=generator)]
    return torch.cat(list(parts))[torch.argsort(torch.argsort(shuffled, stable=True))]


def draw(counts: Sequence[int], weights: Sequence[float], total: int, generator: torch.Generator) -> Tensor:
    """Numbers of `total` rows to train on, int64 [total]; the rows of the sources lie one source after another.

    Each source gives its share by weight, exact to one row, and all of its rows before any of them a second time; the order
    within a source is a new permutation each time, and the sources are shuffled among each other.

    counts: rows of each source, none 0"""
    parts, start = [], 0
    for count, share in zip(counts, shares(total, weights), strict=True):
        times = [torch.randperm(count, generator=generator) for _ in range(-(-share // count))]
        parts.append(start + torch.cat([torch.empty(0, dtype=torch.long), *times])[:share])
        start += count
    return parts[0] if len(parts) == 1 else _shuffled(parts, generator)
