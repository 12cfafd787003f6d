"""What of a training pass several processes can do, and how they share out its rows."""

from __future__ import annotations

from sparsify.errors import CheckpointError
from sparsify.recipe import Distill, Finetune


def rows_at_once(settings: Distill | Finetune, among: int) -> int:
    """Rows of a micro-batch of each of so many processes. CheckpointError where they cannot share a batch out."""
    micro = min(settings.micro_batch_size or settings.batch_size, max(1, settings.batch_size // among))
    if settings.batch_size % (micro * among):
        raise CheckpointError(
            f"{settings.kind}: batch_size {settings.batch_size} does not divide into {among} processes of {micro} rows; "
            f"choose a multiple of {micro * among}"
        )
    return micro


def refuse_processes(settings: Distill | Finetune, among: int) -> None:
    """CheckpointError for a pass that so many processes cannot carry out."""
    if among > 1 and (alone := _in_one_process(settings)):
        raise CheckpointError(
            f"{settings.kind}: {alone} works in one process; start it without torchrun, or leave it out"
        )
    rows_at_once(settings, among)


def _in_one_process(settings: Distill | Finetune) -> str | None:
    """The first setting of a pass that several processes cannot carry out."""
    if settings.average:
        return "average"
    if not isinstance(settings, Distill):
        return None
    return "held_out" if settings.held_out is not None else "masks: learned" if settings.learned_masks else None
