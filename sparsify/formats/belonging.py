"""Whether the tensors of a checkpoint, compressed or not, are those of the model that its config.json describes."""

from __future__ import annotations

import torch

from sparsify.errors import CheckpointError
from sparsify.formats import get_format, known_formats
from sparsify.formats.reader import CompressedCheckpoint, recognised
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.decoder import meta_model, refuse_other_tensors

OTHER_QUANTIZERS = {"qweight", "qzeros", "g_idx", "weight_scale_inv", "weight_global_scale", "absmax", "quant_map"}


def refuse_foreign_tensors(checkpoint: Checkpoint) -> None:
    """CheckpointError where tensors are missing, unknown or of another shape. Reads headers only, no weights.

    A checkpoint of a format that sparsify does not know is left to whoever loads it.
    """
    opened = recognised(checkpoint)
    if opened is not None:
        compare_with_config(opened)


def compare_with_config(opened: CompressedCheckpoint) -> str | None:
    """The same for an opened checkpoint. Returns why it could not be compared: transformers cannot build the model."""
    try:
        model = meta_model(opened.checkpoint, torch.bfloat16)
    except CheckpointError as error:
        return str(error)
    refuse_other_tensors(model, opened.checkpoint, opened.dense_shapes(), _hint(opened))
    return None


def _hint(opened: CompressedCheckpoint) -> str:
    """What may be wrong where tensors of quantized linears lie in a model that says it is dense."""
    if opened.format != "dense":
        return ""
    packed = {suffix for name in known_formats() for suffix in get_format(name).suffixes} | OTHER_QUANTIZERS
    found = sorted({name.rpartition(".")[2] for name in opened.checkpoint.names()} & packed)
    if not found:
        return ""
    return f" It holds quantized linears ({', '.join(found)}), but config.json has no quantization_config"
