"""Rows of several sources in one order that the seed decides."""

from collections.abc import Sequence

import torch
from torch import Tensor


def interleave(parts: Sequence[Tensor], seed: int) -> Tensor:
    """All rows, each part's in its own order, parts shuffled among each other. parts: [R_i, S]. Returns [sum R_i, S].

    One part alone stays as it is, so that a mixture of one source is that source."""
    labels = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(part) for part in parts]))
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    return torch.cat(list(parts))[torch.argsort(torch.argsort(shuffled, stable=True))]
