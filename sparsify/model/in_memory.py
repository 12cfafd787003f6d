"""A whole model in memory, run sublayer by sublayer on a few rows of tokens: what comparing many variants of it needs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from sparsify.model.capture import capture_calls, leaving, run_block, values_returned
from sparsify.model.decoder import BlockModel
from sparsify.model.sublayers import KINDS, Structure, Sublayer, find_structure, run_without

LOGIT_TOKENS = (
    1024  # tokens whose logits are alive at once; on a GPU eight times as many, or launches would take the time
)
PROBE_TOKENS = 16


class Resident:
    """All blocks loaded; micro-batches of tokens, the hidden states that enter the first block and the calls of all.

    tokens: int64 [samples, T]
    """

    def __init__(self, model: BlockModel, tokens: Tensor, device: str = "cpu"):
        self.model, self.device = model, device
        model.load_outside(device)
        for index in range(len(model.blocks)):
            model.load(index)
            model.block(index).to(device)
        at_once = LOGIT_TOKENS * (1 if device == "cpu" else 8)
        self.tokens = list(tokens.to(device).split(max(1, at_once // tokens.shape[1])))
        entered = [capture_calls(model, part) for part in self.tokens]
        self.entering = [hidden for hidden, _ in entered]
        self.calls = [calls for _, calls in entered]
        with torch.no_grad():
            call = self.calls[0][0]
            self.returned = values_returned(model.block(0)(self.entering[0], *call.args, **call.kwargs))
        self._structures: dict[int, Structure] = {}

    @property
    def batches(self) -> range:
        return range(len(self.tokens))

    def structure(self, block: int) -> Structure:
        if block not in self._structures:
            self._structures[block] = probed_structure(self.model, block, self.tokens[0])
        return self._structures[block]

    @torch.no_grad()
    def run(self, sublayers: Sequence[Sublayer], hidden: Tensor, batch: int) -> Tensor:
        """Hidden [B, T, d] through sublayers in their order; a block whose two are both there runs as it is."""
        for block, members in groupby(sublayers, key=lambda sublayer: sublayer.block):
            present = [member.kind for member in members]
            absent = [kind for kind in KINDS if kind not in present]
            module, call = self.model.block(block), self.calls[batch][block]
            if absent:
                hidden = run_without(module, self.structure(block), absent, hidden, call)
            else:
                hidden = run_block(module, hidden, call)
        return hidden

    @torch.no_grad()
    def logits(self, hidden: Tensor, batch: int) -> Tensor:
        """What the model makes of the hidden state [B, T, d] that leaves the last block: logits [B * T, V]."""
        return finish(self.model, self.tokens[batch], hidden, self.returned).flatten(0, 1)

    def close(self) -> None:
        """Free the blocks."""
        for index in range(len(self.model.blocks)):
            self.model.unload(index)


def sublayers_of(blocks: Sequence[int] | range) -> list[Sublayer]:
    """Both sublayers of each block, in order."""
    return [Sublayer(block, position) for block in blocks for position in range(len(KINDS))]


def probed_structure(model: BlockModel, block: int, tokens: Tensor) -> Structure:
    """The sublayers of a loaded block, found on the first tokens. tokens: [B, T]"""
    hidden, calls = capture_calls(model, tokens[:1, :PROBE_TOKENS])
    return find_structure(model.block(block), hidden, calls[block], model.blocks[block])


def finish(model: BlockModel, tokens: Tensor, hidden: Tensor, returned: int) -> Tensor:
    """Logits [B, T, V] of a hidden state [B, T, d] that leaves the last block; differentiable in it. tokens: [B, T]

    returned: how many values a block of this model returns, as `capture.RETURNED`
    """
    with leaving(model, hidden, returned):
        return model.model(input_ids=tokens, use_cache=False).logits
