"""Rows of calibration text that even out how many tokens each expert of a mixture is given: chosen by the dense model's routers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.distributed import device
from sparsify.model.decoder import BlockModel
from sparsify.model.experts import experts_of
from sparsify.model.sequential import Walk


def chosen_rows(counts: Tensor, samples: int) -> list[int]:
    """So many rows, in their order, whose summed counts have a small variance: one after the other is taken that keeps the sum of
    squares lowest.

    counts: integers [rows, experts of all layers], the tokens of each row that each expert is given
    """
    counts = counts.double()
    squares = counts.square().sum(1)
    total, left = torch.zeros_like(counts[0]), torch.ones(len(counts), dtype=torch.bool)
    for _ in range(samples):
        costs = (2 * counts @ total + squares).masked_fill(~left, torch.inf)
        row = int(costs.argmin())
        left[row] = False
        total += counts[row]
    return (~left).nonzero().flatten().tolist()


def routed(model: BlockModel, tokens: Tensor, place: str | None, room: int | None, spill: Path | None) -> Tensor:
    """How many tokens of each row the dense model gives to each expert, int64 [rows, experts of all layers].

    model: its experts taken apart; tokens: int64 [rows, length]; place, room, spill: as of `Walk`
    """
    with _counting(model, tokens.shape[1]) as counts:
        walk = Walk(model, tokens, False, spill, device(), place=place, room=room, keeps_outside=False)
        for index in range(len(model.blocks)):
            walk.replay(index, {})
    return torch.cat([torch.cat(of_layer) for of_layer in counts.values()], 1)


@contextmanager
def _counting(model: BlockModel, length: int) -> Iterator[dict[str, list[Tensor]]]:
    """Gives the counts of every layer, [rows of a micro-batch, experts] each time that its experts are called in a walk."""
    mixtures = experts_of(model.model)
    counts: dict[str, list[Tensor]] = {path: [] for path in mixtures}

    def note(path: str, experts: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[1].to("cpu").reshape(-1, length * args[1].shape[-1])
            numbers = torch.arange(len(rows))[:, None] * experts + rows
            counts[path].append(numbers.flatten().bincount(minlength=len(rows) * experts).view(len(rows), experts))

        return hook

    hooks = [experts.register_forward_pre_hook(note(path, experts.count)) for path, experts in mixtures.items()]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
