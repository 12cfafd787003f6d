"""The model that writes its own text, where it writes fastest."""

from pathlib import Path
from typing import Any

import torch

from sparsify.distributed import device
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.pretrained import load_causal_lm
from sparsify.progress import without_bars

SHARE_OF_GPU = 0.5  # of its free memory that the weights may take; the rest is for keys and values


def writer_key(checkpoint: Checkpoint, dtype: torch.dtype) -> str:
    """What decides a text that this model writes, for `calibration_tokens`: every byte of it, and the type it computes in."""
    return f"{checkpoint.fingerprint()} {dtype}"


def open_writer(directory: Path, dtype: torch.dtype) -> Any:
    """The causal language model of a directory: on the GPU where all of it fits there, else on the CPU."""
    with without_bars():
        model = load_causal_lm(directory, dtype=dtype)
    place = device()
    if place != "cpu" and model.get_memory_footprint() < SHARE_OF_GPU * torch.cuda.mem_get_info(place)[0]:
        model.to(place)
    return model
