"""Zeros that a model brings along: which of its linears are 2:4 already, and keep their masks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sparsify.errors import CheckpointError
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.linear import is_two_four

PEEKED_ROWS = 32  # outputs that are looked at before a whole weight is read: a dense linear is told by its first


def two_four_sources(checkpoint: Checkpoint, names: Iterable[str], whole: bool) -> set[str]:
    """The matrices [N, K] of a checkpoint that hold at most two non-zero of every 4 consecutive inputs.

    whole: every weight that begins so is read to its end; without it the first rows decide, for a plan that must not
    read a model.
    """
    by_file: dict[Path, list[str]] = {}
    for name in names:
        shape = checkpoint.shape(name)
        if len(shape) == 2 and shape[1] % 4 == 0 and checkpoint.dtype(name).itemsize > 1:
            by_file.setdefault(checkpoint.info(name).file, []).append(name)
    found: set[str] = set()
    for path, inside in by_file.items():
        try:
            with safe_open(path, framework="pt") as file:
                begun = [name for name in inside if is_two_four(file.get_slice(name)[:PEEKED_ROWS])]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); download or create it again") from None
        found |= {name for name in begun if not whole or is_two_four(checkpoint.tensor(name))}
    return found
