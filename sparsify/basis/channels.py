"""An order of the channels of a feed-forward: which four of them share a group of 2:4."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify.basis.objective import two_smallest

ROUNDS = 2
ROWS = 512  # outputs on which an order is chosen; all of them count the same
AT_ONCE = 1 << 26  # numbers of one piece of the profits, which bounds memory


def channel_order(W: Tensor, inverse_diagonal: Tensor, generator: torch.Generator) -> Tensor:
    """The order of the inputs of W [N, K], int64 [K], under which 2:4 drops the least. inverse_diagonal: [K] of H^-1.

    Four slots of K / 4 channels each, first dealt by what a channel is worth; then, slot by slot, channels are assigned anew
    to the groups of the other three, each time optimally (the Hungarian method).
    """
    from scipy.optimize import linear_sum_assignment

    costs = W.square() / inverse_diagonal
    if costs.shape[0] > ROWS:
        costs = costs[torch.randperm(costs.shape[0], generator=generator)[:ROWS]]
    slots = list(costs.sum(0).argsort(descending=True, stable=True).chunk(4))
    for _ in range(ROUNDS):
        for slot in range(4):
            others = torch.stack([slots[i] for i in range(4) if i != slot], 1)
            rows, columns = linear_sum_assignment(_kept(costs, others, slots[slot]).numpy(), maximize=True)
            slots[slot] = slots[slot][torch.from_numpy(columns)]
    order = torch.stack(slots, 1).flatten()
    same = torch.arange(W.shape[1])
    return order if two_smallest(costs[:, order]) < two_smallest(costs) else same


def _kept(costs: Tensor, others: Tensor, candidates: Tensor) -> Tensor:
    """What 2:4 keeps of group g when channel c joins its three others, less what is the same for all c: [groups, channels].

    costs: [N, K]; others: [groups, 3]; candidates: [channels]
    """
    second = costs[:, others].sort(-1, descending=True).values[..., 1]
    joining = costs[:, candidates]
    kept = torch.empty(others.shape[0], candidates.shape[0])
    step = max(1, AT_ONCE // joining.numel())
    for first in range(0, others.shape[0], step):
        part = slice(first, first + step)
        kept[part] = (joining.unsqueeze(1) - second[:, part].unsqueeze(2)).clamp(min=0).sum(0)
    return kept
