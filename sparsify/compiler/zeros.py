"""Zeros that a model brings along: which of its linears are 2:4 already, and keep their masks."""

from __future__ import annotations

from collections.abc import Iterable

from sparsify.model.checkpoint import Checkpoint
from sparsify.model.linear import is_two_four

PEEKED_ROWS = 32  # outputs that are looked at before a whole weight is read: a dense linear is told by its first


def two_four_sources(checkpoint: Checkpoint, names: Iterable[str], whole: bool) -> set[str]:
    """The matrices [N, K] of a checkpoint that hold at most two non-zero of every 4 consecutive inputs.

    whole: every weight that begins so is read to its end; without it the first rows decide, for a plan that must not
    read a model.
    """
    found: set[str] = set()
    for name in names:
        shape = checkpoint.shape(name)
        if len(shape) != 2 or shape[1] % 4 or checkpoint.dtype(name).itemsize == 1:
            continue
        if is_two_four(checkpoint.first_rows(name, PEEKED_ROWS)) and (
            not whole or is_two_four(checkpoint.tensor(name))
        ):
            found.add(name)
    return found
