"""Where the values of a training go beside its own log: the trackers of accelerate, where a recipe names them."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from sparsify.errors import MissingDependency, SparsifyError
from sparsify.recipe import Distill, Finetune, Lora

MODE = "WANDB_MODE"  # wandb's own variable: without it a run stays on disk


def refuse_missing(settings: Distill | Finetune) -> None:
    """MissingDependency for a package that a training pass needs and that is not here."""
    if settings.tensorboard is not None:
        _needed("torch.utils.tensorboard", "tensorboard in the recipe", "sparsify-24[train]")
    if settings.wandb is not None:
        _needed("wandb", "wandb in the recipe", "wandb")
    if isinstance(settings, Lora):
        import_module("sparsify.training.lora")  # says itself what it needs


def _needed(module: str, what: str, package: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        raise MissingDependency(f"{what} needs a package ({error}): pip install '{package}'") from None


class Trackers:
    """The trackers that a pass asks for; without any, nothing is done. Only for the process that logs.

    config: what they note of the run
    """

    def __init__(self, settings: Distill | Finetune, config: dict[str, Any]):
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        self.started: list[Any] = []
        if settings.tensorboard is not None:
            self._start("tensorboard", lambda: TensorBoardTracker("", Path(settings.tensorboard or "")))
        if settings.wandb is not None:
            chosen = {"mode": os.environ.get(MODE, "offline"), "config": config}
            quiet = import_module("wandb").Settings(console="off", silent=True)
            self._start("wandb", lambda: WandBTracker(settings.wandb, **chosen, settings=quiet))

    def _start(self, name: str, make: Callable[[], Any]) -> None:
        try:
            tracker = make()
            if hasattr(tracker, "start"):  # older versions of accelerate start at once
                tracker.start()
        except Exception as error:
            raise SparsifyError(f"{name} in the recipe cannot be started: {str(error) or repr(error)}") from error
        self.started.append(tracker)

    def log(self, step: int, values: dict[str, float]) -> None:
        for tracker in self.started:
            tracker.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Write what is not written yet."""
        for tracker in self.started:
            tracker.finish()
        self.started = []
