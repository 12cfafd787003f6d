"""What stands in for the layers that LLM-Streamline removes, and its training (arXiv 2403.19135, section 3.2).

The replacement learns to make of the hidden state that enters the first removed layer the one that left the last: squared error
on hidden states that one walk over the model cached, then optionally the next-token loss of the whole model. It is a layer of
the model's own kind, begun from the first removed one, so that the result stays a standard architecture. The paper's
feed-forward network is such a layer, too: its attention has zero weights and adds nothing, so what is left of it is
x + feed_forward(norm(x)), which every software that loads the model computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsify.model.capture import capture_calls, run_block
from sparsify.model.decoder import BlockModel
from sparsify.model.in_memory import finish
from sparsify.model.linear import LinearWeights
from sparsify.model.sublayers import ATTENTION, Structure
from sparsify.training.block_tuning import BlockLoss, BlockTuning, Sample, Tuned, block_loss, tune_block


def squared_error(output: Tensor, wanted: Tensor) -> Tensor:
    """sum_b mean_td (output - wanted)^2. output, wanted: [B, T, d]"""
    return (output.float() - wanted.float()).square().mean((1, 2)).sum()


LOSSES: dict[str, BlockLoss] = {"mse": squared_error, "relative": block_loss}


def next_token_loss(model: BlockModel, after: int, returned: int) -> BlockLoss:
    """The loss of a replacement's output [B, T, d] given the tokens [B, T], by the layers from `after` on, which are loaded."""

    def loss(output: Tensor, tokens: Tensor) -> Tensor:
        _, calls = capture_calls(model, tokens)
        hidden = output.to(model.dtype)
        for index in range(after, len(model.blocks)):
            hidden = run_block(model.block(index), hidden, calls[index])
        logits = finish(model, tokens, hidden, returned)[:, :-1].float()
        each = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return each.view(tokens.shape[0], -1).mean(1).sum()

    return loss


@torch.no_grad()
def silence(block: nn.Module, structure: Structure, kind: str) -> None:
    """Set to zero what makes a sublayer add anything."""
    for name, parameter in block.named_parameters():
        if structure.is_silenced(name, kind):
            parameter.zero_()


def train_replacement(
    block: nn.Module,
    linears: Mapping[str, LinearWeights],
    samples: Sequence[Sample],
    settings: BlockTuning,
    loss: BlockLoss,
    structure: Structure | None = None,
    advance: Callable[[int, int], None] = lambda step, steps: None,
) -> Tuned:
    """Train a replacement, begun from `block`.

    linears:   of the block, by their names in it; what lies outside a 2:4 mask stays zero
    structure: of the block, for a replacement without attention
    """
    if structure is not None:
        silence(block, structure, ATTENTION)
        linears = {n: w.zeroed() if structure.is_silenced(n, ATTENTION) else w for n, w in linears.items()}
    return tune_block(block, linears, samples, settings, advance, loss)
