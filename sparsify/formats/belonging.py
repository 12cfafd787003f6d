"""Whether the tensors of a checkpoint, compressed or not, are those of the model that its config.json describes."""

from __future__ import annotations

import functools

import torch

from sparsify.errors import CheckpointError
from sparsify.formats import ModuleScheme, get_format
from sparsify.formats.foreign import dequantized, described, reads_foreign
from sparsify.formats.reader import CompressedCheckpoint, recognised
from sparsify.formats.scheme import FLOATS
from sparsify.model.belonging import Differences, refuse
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.decoder import meta_model, refuse_other_tensors
from sparsify.model.linear import LinearWeights


def check_tensors(checkpoint: Checkpoint) -> None:
    """CheckpointError where tensors are missing, unknown or of another shape. Reads headers only, no weights.

    A checkpoint of a format that sparsify does not know is left to whoever loads it.
    """
    opened, config = recognised(checkpoint), described(checkpoint)
    if opened is None and config is not None and reads_foreign(config):
        opened = CompressedCheckpoint(dequantized(checkpoint), "dense", {})
    if opened is not None:
        compare_with_config(opened)


def compare_with_config(opened: CompressedCheckpoint) -> str | None:
    """The same for an opened checkpoint. Returns why it could not be compared: transformers cannot build the model."""
    lacking = [
        f"{module}.{suffix}"
        for module, scheme in opened.modules.items()
        for suffix in _suffixes(opened.format, scheme.bits, scheme.pattern, _group_size(scheme))
        if f"{module}.{suffix}" not in opened.checkpoint
    ]
    refuse(Differences("", lacking, [], []), opened.checkpoint.spec)
    try:
        model = meta_model(opened.checkpoint, torch.bfloat16)
    except CheckpointError as error:
        return str(error)
    refuse_other_tensors(model, opened.checkpoint, opened.dense_shapes())
    return None


def _group_size(scheme: ModuleScheme) -> int | None:
    return None if scheme.group_size == scheme.shape[1] else scheme.group_size


@functools.cache
def _suffixes(format: str, bits: int, pattern: str, group_size: int | None) -> frozenset[str]:
    """The tensors that a linear of such a scheme consists of in a format, as it writes a small one of zeros.

    group_size: None for one scale per output
    """
    n = k = 256  # fits the tiles and groups of every format
    group = group_size or k
    for dtype in FLOATS:
        codes = torch.zeros(n, k, dtype=torch.int8)
        if bits == 16:
            linear = LinearWeights(16, pattern, k, values=codes.to(dtype))
        else:
            linear = LinearWeights(bits, pattern, group, codes=codes, scale=torch.ones(n, k // group, dtype=dtype))
        if get_format(format).supports(linear) is None:
            return frozenset(get_format(format).encode(linear))
    return frozenset()
