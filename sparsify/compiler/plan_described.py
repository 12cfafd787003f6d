"""What a plan says that is made from config.json alone, without the files of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsify.formats.foreign import DequantizedCheckpoint
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.described import DescribedCheckpoint
from sparsify.model.separated import SeparatedCheckpoint

if TYPE_CHECKING:
    from sparsify.compiler.plan import Plan


def _described(checkpoint: Checkpoint) -> DescribedCheckpoint | None:
    """The config that a checkpoint is made of; None where there are files."""
    if isinstance(checkpoint, SeparatedCheckpoint):
        return _described(checkpoint.whole)
    if isinstance(checkpoint, DequantizedCheckpoint):
        return _described(checkpoint.stored)
    return checkpoint if isinstance(checkpoint, DescribedCheckpoint) else None


def described_json(plan: Plan) -> dict[str, Any] | None:
    """unread: how the files are quantized where nothing here reads that; other_parts: of the config, which are not planned."""
    found = _described(plan.checkpoint)
    return None if found is None else {"unread": found.unread, "other_parts": found.other_parts}


def described_in_words(plan: Plan) -> list[str]:
    """Lines of a plan that was made from a config alone; none where there are files."""
    found = _described(plan.checkpoint)
    if found is None:
        return []
    said = [
        "planned from config.json alone: zeros that a model has already, and tensors of other names, show in its files only"
    ]
    if found.unread is not None:
        said.append(f"its files are {found.unread}; this is the plan of the dense model")
    if found.other_parts:
        model = type(plan.model.model).__name__
        said.append(
            f"not planned: {', '.join(found.other_parts)}. {model}, the model for text, does not know the tensors of such parts: "
            "apply refuses files that hold them, or carries them over with --allow-unknown-tensors"
        )
    return said
