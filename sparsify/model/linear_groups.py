"""Linears that read the same tensor: they share one Hessian and are solved as one stacked matrix."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.model.capture import BlockCall, fake_calls, run_block, without_numbers
from sparsify.model.decoder import ROUTER, BlockModel

PROBE_TOKENS = 16
NOT_CALLED = "not called in a forward pass"


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a block that read the same tensor, in call order. names are relative to the block; K is shared."""

    names: tuple[str, ...]
    in_features: int


@torch.no_grad()
def find_groups(block: nn.Module, x: Tensor, call: BlockCall) -> tuple[list[LinearGroup], dict[str, str]]:
    """Group the plain linears of a loaded block by the tensor they read, from one probe forward.

    x: [B, T, d], a small hidden state. Returns the groups in call order, and for each linear that the walk cannot
    handle the reason why.
    """
    linears: dict[nn.Module, str] = {m: name for name, m in block.named_modules() if type(m) is nn.Linear}
    seen: dict[str, list[Tensor]] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.setdefault(linears[module], []).append(args[0])  # keeps the tensor alive, so its address stays unique

    hooks = [m.register_forward_pre_hook(note) for m in linears]
    try:
        run_block(block, x, call)
    finally:
        for hook in hooks:
            hook.remove()
    skipped = {name: NOT_CALLED for name in linears.values() if name not in seen}
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, inputs in seen.items():
        t = inputs[0]
        if ROUTER.search(name):
            skipped[name] = "routes tokens to experts"
        elif len(inputs) > 1:
            skipped[name] = f"called {len(inputs)} times in one forward pass"
        elif t.numel() != x.shape[0] * x.shape[1] * t.shape[-1]:
            skipped[name] = "does not read every token"
        else:
            groups.setdefault((t.data_ptr(), t.shape, t.stride()), []).append(name)
    return [LinearGroup(tuple(names), key[1][-1]) for key, names in groups.items()], skipped


@torch.no_grad()
def skipped_by_shape(model: BlockModel) -> dict[str, str]:
    """The linears that `find_groups` will skip, by full name, and why: found on tensors of shapes only, without a weight.

    A block is left out that cannot run so, because its code looks at numbers; so is what such numbers decide.
    """
    found: dict[str, str] = {}
    with without_numbers(model) as hollow:
        entering = fake_calls(hollow)
        for index, block in enumerate(hollow.blocks if entering is not None else ()):
            assert entering is not None
            with suppress(Exception):  # whatever the model's own code raises on tensors without numbers
                skipped = find_groups(hollow.block(index), entering[0], entering[1][index])[1]
                found |= {f"{block}.{name}": why for name, why in skipped.items() if why != NOT_CALLED}
    return found
