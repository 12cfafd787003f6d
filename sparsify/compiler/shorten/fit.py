"""Whether a model can lose layers at all: its class, built from the shortened config.json, must have the layers that are left.

Some architectures decide by the number of a layer what it is made of (every second one holds experts, say), and no setting
that a shortened config.json could hold says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from sparsify.compiler.shorten.config import shortened_config
from sparsify.depth.layers import Layer, as_layers
from sparsify.depth.stop import layers_to_drop
from sparsify.errors import CheckpointError
from sparsify.model.capture import fake_hidden
from sparsify.model.decoder import BlockModel, find_blocks, meta_model
from sparsify.model.in_memory import sublayers_of
from sparsify.recipe import Depth

Shapes = dict[str, tuple[int, ...]]


def refuse_misfits(settings: Depth, model: BlockModel) -> None:
    """CheckpointError for a model whose layers cannot be removed as the settings ask; no weight is read.

    Which layers go may depend on the text, so what is refused here is what fits nowhere; `misfit` judges the choice itself.
    """
    name, spec = type(model.model).__name__, model.checkpoint.spec
    hidden = fake_hidden(model)
    if hidden is not None and hidden.dim() != 3:
        raise CheckpointError(
            f"{spec}: {name} passes {hidden.shape[0]} streams of hidden states from layer to layer, so no layer of it can be "
            "removed; leave the depth pass out"
        )
    if len({tuple(sorted(shapes.items())) for shapes in _shapes(model)}) == 1:
        return
    problem = None
    for kept in _candidates(settings, len(model.blocks)):
        if (problem := misfit(model, as_layers(sublayers_of(kept)))) is None:
            return
    if problem is not None:
        raise CheckpointError(f"{spec}: {problem}")


def misfit(model: BlockModel, layers: Sequence[Layer]) -> str | None:
    """Why the shortened config.json does not describe these layers of the model; None when it does."""
    described = shortened_config(model.checkpoint, layers, len(model.blocks))
    short = meta_model(model.checkpoint, torch.bfloat16, described)
    blocks = find_blocks(short)
    if len(blocks) != len(layers):
        return f"config.json with {len(layers)} layers makes a model of {len(blocks)}; its layers cannot be removed"
    old, new = _shapes(model), _shapes(BlockModel(model.checkpoint, short, blocks, {}, model.dtype))
    for number, layer in enumerate(layers):
        if layer.attention is None or layer.attention != layer.feed_forward:
            continue
        source = old[layer.attention]
        if different := sorted({*source.items()} ^ {*new[number].items()}):
            return (
                f"{type(model.model).__name__} decides by the number of a layer what it is made of: layer {layer.attention} "
                f"would become layer {number}, which differs in {different[0][0]}; leave the depth pass out, or drop as many "
                "layers as its pattern is long"
            )
    return None


def _candidates(settings: Depth, layers: int) -> Iterator[list[int]]:
    """Layers that may be left: without the first block that may go, and without the last, of every size in question."""
    counts: Sequence[int] = (1, 2)
    if settings.method != "finercut" and (drop := layers_to_drop(settings, layers)) is not None:
        counts = (drop,)
    for count in counts:
        for first in sorted({settings.protect_first, layers - settings.protect_last - count}):
            if first >= settings.protect_first and first + count <= layers - settings.protect_last:
                yield [block for block in range(layers) if not first <= block < first + count]


def _shapes(model: BlockModel) -> list[Shapes]:
    """Shapes of the parameters of each block, by their names in it."""
    return [
        {name: tuple(parameter.shape) for name, parameter in model.block(index).named_parameters()}
        for index in range(len(model.blocks))
    ]
