"""The depth pass: choose what goes, train what stands in for it, write the shortened model as a directory of its own.

The directory is dense or compressed as the model was, and the rest of a recipe starts from it as from any model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify.compiler.shorten.choose import choose_block, choose_sublayers
from sparsify.compiler.shorten.plan import SEARCHED_ROWS, PlannedDepth, describe_note, plan_depth, weights_of
from sparsify.compiler.shorten.replace import replace_block
from sparsify.compiler.shorten.source import open_source, structures_of
from sparsify.compiler.shorten.write import verify, write_shortened
from sparsify.depth.layers import Layer
from sparsify.depth.stop import Weights
from sparsify.distributed import processes
from sparsify.errors import CheckpointError
from sparsify.model.in_memory import sublayers_of
from sparsify.model.sublayers import KINDS
from sparsify.progress import progress_bar, stage
from sparsify.recipe import Depth

__all__ = ["SEARCHED_ROWS", "PlannedDepth", "describe_note", "plan_depth", "shorten"]


def shorten(settings: Depth, spec: str, tokens: Tensor | None, output: Path, seed: int, quiet: bool) -> dict[str, Any]:
    """Remove layers of the model `spec` and write the result to the directory `output`. Returns what metrics.json says.

    tokens: calibration text, int64 [samples, T]; None for a method that looks at none.
    """
    if settings.replaces and processes() > 1:
        raise CheckpointError(
            "the replacement of depth streamline trains in one process; start it without torchrun, or set replacement: none"
        )
    with stage("depth: loading the model", quiet):
        source = open_source(spec)
    rows = None if tokens is None else tokens[: settings.samples]
    with progress_bar("depth", None, quiet=quiet) as bar:
        if settings.method == "finercut":
            assert rows is not None
            choice = choose_sublayers(settings, source, rows if settings.samples else rows[:SEARCHED_ROWS], bar)
        else:
            choice = choose_block(settings, source, rows, bar)
        if settings.replaces:
            assert rows is not None
            choice = replace_block(settings, source, choice, rows, seed, bar)
        structures = structures_of(source, choice.layers)
        bar.describe("depth: writing the shortened model")
        weights = weights_of(source.model, structures)
        write_shortened(source, choice, structures, output)
        bar.describe("depth: comparing it with the model it came from")
        verify(source, choice, structures, output)
    left = sum(_present(weights, layer) for layer in choice.layers)
    blocks = len(source.model.blocks)
    return {
        "method": settings.method,
        "layers_before": blocks,
        "layers_after": len(choice.layers),
        "layers": [[layer.attention, layer.feed_forward] for layer in choice.layers],
        "removed": [[s.block, s.kind] for s in sublayers_of(range(blocks)) if s not in set(choice.kept)],
        "teacher_blocks": teacher_blocks(choice.layers, blocks),
        "parameters": {"before": weights.blocks + weights.outside, "after": left + weights.outside},
        "speedup_estimate": round(weights.speedup(left), 3),
        **choice.note,
    }


def _present(weights: Weights, layer: Layer) -> int:
    """Parameters of a new layer, those of an absent sublayer left out. Halves of different layers were told apart before."""
    if layer.attention is not None and layer.attention == layer.feed_forward:
        return weights.of_block(layer.attention)
    return sum(weights.sublayers[layer.source(kind)][kind] for kind in KINDS if kind != layer.absent)


def teacher_blocks(layers: Sequence[Layer], blocks: int) -> list[int]:
    """For each new layer the old one whose output its own should be: what the next new layer's attention used to read."""
    found = []
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if following is None:
            found.append(blocks - 1)
        else:
            found.append(layer.last if following.attention is None else max(following.attention - 1, 0))
    return found
