"""The checkpoints of a training: the files in one, which there are, and what a student takes from them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn

from sparsify.errors import CheckpointError
from sparsify.formats.tensor_file import read_tensor
from sparsify.manifest import damage
from sparsify.model.checkpoint import read_header
from sparsify.progress import say
from sparsify.training.sharding import share_of

PARAMETERS = "parameters.safetensors"
OPTIMIZER = "optimizer.safetensors"
WATCH = "losses.json"
AVERAGE = "average.safetensors"
BEST = "best.safetensors"
MEASURED = "held-out.json"
MASKS = "masks.safetensors"
PREFIX = "checkpoint-"  # the Trainer's own
KEPT = 2  # checkpoints on disk at a time
SAVING = "saving"  # where one is written before it has a name


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix(PREFIX))


def checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints of a training directory, oldest first."""
    return sorted((p for p in directory.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()), key=step_of)


def last_checkpoint(directory: Path) -> Path | None:
    """The one that training goes on from; None when there is none."""
    return next(reversed(checkpoints(directory)), None)


def discard_unfinished(directory: Path) -> None:
    """What a killed run was writing, and checkpoints that are not any more what was written."""
    shutil.rmtree(directory / SAVING, ignore_errors=True)
    for checkpoint in checkpoints(directory):
        if problem := damage(checkpoint):
            say(f"{checkpoint} is left out: {problem}; training goes on from the one before")
            shutil.rmtree(checkpoint)


def load_parameters(model: nn.Module, checkpoint: Path) -> None:
    """Put the trained parameters of a checkpoint into the student they belong to, of each the share of this process."""
    file = checkpoint / PARAMETERS
    stored, _ = read_header(file)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if set(stored) != set(trained) or any(stored[name].shape != tuple(p.shape) for name, p in trained.items()):
        raise CheckpointError(
            f"{checkpoint} belongs to another training; remove {checkpoint.parent} to train again from the start"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(share_of(read_tensor(file, name), parameter))
