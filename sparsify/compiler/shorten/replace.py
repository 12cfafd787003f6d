"""The training of what stands in for a removed block, on the hidden states of one walk over the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsify.compiler.shorten.choose import Choice
from sparsify.compiler.shorten.source import Source
from sparsify.depth.layers import Layer
from sparsify.depth.replacement import LOSSES, next_token_loss, train_replacement
from sparsify.distributed import device
from sparsify.model.capture import call_of_row, values_returned
from sparsify.model.in_memory import probed_structure
from sparsify.model.sequential import Walk
from sparsify.progress import Task
from sparsify.recipe import Depth
from sparsify.training.block_tuning import BlockTuning, Sample, Tuned


def replace_block(settings: Depth, source: Source, choice: Choice, tokens: Tensor, seed: int, bar: Task) -> Choice:
    """Train what stands in for the removed block, on the hidden states of one walk."""
    model, first, count = source.model, choice.note["first"], choice.note["count"]
    bar.describe("depth: hidden states for the replacement")
    walk = Walk(model, tokens, device=device())
    entering: list[Tensor] = []
    for index in range(first + count):
        if index == first:
            entering = [walk.hidden[i].clone() for i in range(len(walk.hidden))]
        walk.replay(index, {})
    leaving = [walk.hidden[i] for i in range(len(walk.hidden))]
    samples = [
        Sample(entered[row : row + 1], left[row : row + 1], call_of_row(calls[first], row, len(entered)))
        for entered, left, calls in zip(entering, leaving, walk.calls, strict=True)
        for row in range(len(entered))
    ]
    model.load(first)
    block = model.block(first).to(device())
    structure = None
    if settings.replacement == "feed-forward":
        structure = probed_structure(model, first, tokens[:1].to(device()))
    linears = source.linears(first)
    tuning = BlockTuning(
        epochs=settings.epochs, learning_rate=settings.learning_rate, batch=settings.batch_size, seed=seed
    )  # fmt: skip

    def report(what: str) -> Callable[[int, int], None]:
        return lambda step, steps: bar.describe(f"depth: {what}, step {step} of {steps}")

    tuned = train_replacement(block, linears, samples, tuning, LOSSES[settings.loss], structure, report("replacement"))
    tuned = _as_stored(tuned, source, first)
    note: dict[str, Any] = {
        "kind": settings.replacement,
        "loss": settings.loss,
        "before": tuned.before,
        "after": tuned.after,
        "steps": tuned.steps,
    }
    if settings.llm_epochs:
        place(block, tuned)
        for index in range(first + count, len(model.blocks)):
            model.load(index)
            model.block(index).to(device())
        call = walk.calls[0][first]
        returned = values_returned(block(entering[0], *call.args, **call.kwargs))
        loss = next_token_loss(model, first + count, returned)
        rows = tokens.to(device()).split(1)
        distilled = [Sample(one.entering, row, one.call) for one, row in zip(samples, rows, strict=True)]
        tuning = BlockTuning(
            epochs=settings.llm_epochs, learning_rate=settings.learning_rate / 5, batch=settings.batch_size, seed=seed
        )  # fmt: skip
        better = train_replacement(block, tuned.linears, distilled, tuning, loss, structure, report("next-token loss"))
        better = _as_stored(better, source, first)
        tuned = Tuned(better.linears, tuned.others | better.others, better.before, better.after, better.steps)
        note["next_token"] = {"before": better.before, "after": better.after, "steps": better.steps}
    for index in range(len(model.blocks)):
        model.unload(index)
    layer = Layer(first if settings.replacement == "layer" else None, first)
    layers = [*choice.layers[:first], layer, *choice.layers[first:]]
    return Choice(choice.kept, layers, choice.note | {"replacement": note}, {first: tuned})


def _as_stored(tuned: Tuned, source: Source, block: int) -> Tuned:
    """Round what was trained beside the linears to what the files will hold, so that what is compared is what is written."""
    prefix = source.model.blocks[block] + "."
    others = {name: source.as_stored(prefix + name, tensor).to(tensor.dtype) for name, tensor in tuned.others.items()}
    return dataclasses.replace(tuned, others=others)


@torch.no_grad()
def place(block: torch.nn.Module, tuned: Tuned) -> None:
    """Give a loaded block the tensors of a trained replacement."""
    for name, linear in tuned.linears.items():
        module: Any = block.get_submodule(name)
        module.weight.copy_(linear.dense(module.weight.dtype))
        if linear.bias is not None:
            module.bias.copy_(linear.bias)
    for name, tensor in tuned.others.items():
        block.get_parameter(name).copy_(tensor)
