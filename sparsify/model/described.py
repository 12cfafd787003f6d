"""A checkpoint of which only config.json is at hand: what its files would hold is derived from the model that it describes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sparsify.errors import CheckpointError
from sparsify.files import kind_problem, path_problem
from sparsify.model.checkpoint import (
    Checkpoint,
    TensorInfo,
    from_hub,
    levels_of,
    model_dtype,
    refuse_many_layers,
    without_quantization,
)
from sparsify.model.decoder import kept_wide, meta_model
from sparsify.model.experts import EXPERT_COUNTS
from sparsify.model.pretrained import class_of, load_config, refuse_foreign_code

CONFIG = "config.json"
MOST_EXPERTS = 4096  # of a layer; no model has as many


@dataclass(frozen=True)
class DescribedCheckpoint(Checkpoint):
    """A model that config.json describes. Its tensors have names, shapes and types as transformers writes them, and no values.

    file: the config; quantized: the tensors of its files where it says that they are quantized
    unread: how they are quantized, in words, where nothing here reads that; the dense model is described then
    """

    file: Path
    quantized: Mapping[str, TensorInfo] | None = None
    unread: str | None = None

    @property
    def config_file(self) -> Path:
        return self.file

    @property
    def has_weights(self) -> bool:
        return False

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config; without its quantization where nothing here reads that."""
        return without_quantization(self.read_config()) if self.unread else self.read_config()

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        if self.quantized is not None:
            return dict(self.quantized)
        model = meta_model(self, model_dtype(self.config))
        return {
            name: TensorInfo(self.file, tuple(tensor.shape), tensor.dtype, tensor.numel() * tensor.dtype.itemsize)
            for name, tensor in written_tensors(model).items()
        }

    @cached_property
    def other_parts(self) -> list[str]:
        """Parts that the config describes and the model for text does not have, such as `vision_config`."""
        kind: Any = class_of(load_config(self.config_place, self.spec))
        known = {*TEXT, *getattr(getattr(kind, "config_class", None), "sub_configs", {})}
        return [
            key for key, value in self.config.items() if key.endswith("_config") and key not in known and is_part(value)
        ]

    def sidecar_files(self, apart_from: Collection[Path] = ()) -> dict[str, Path]:
        return {}

    def tensor(self, name: str) -> NoReturn:
        raise CheckpointError(
            f"{self.spec} is a config.json alone, and {name} cannot be read from it; give the whole model"
        )

    def first_rows(self, name: str, rows: int) -> NoReturn:
        self.tensor(name)


TEXT = ("text_config", "quantization_config", "compression_config", "generation_config", "sparsity_config")


def is_part(value: object) -> bool:
    """Whether an entry of a config describes a model of its own."""
    return isinstance(value, dict) and ("model_type" in value or "hidden_size" in value)


def open_described(spec: str | Path) -> DescribedCheckpoint:
    """Open a config.json alone. spec: the file, a directory that holds it, or a Hub id, of which only this file is fetched.

    CheckpointError where there is none, or where it describes no model.
    """
    text = str(spec)
    if problem := path_problem(text):
        raise CheckpointError(f"the model {text[:100]!r} {problem}")
    place = Path(text)
    named = text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith(".json")
    if named and not place.exists():
        place = from_hub(text, [CONFIG])
    file = place / CONFIG if place.is_dir() else place
    if not file.exists():
        raise CheckpointError(f"{text} holds no config.json; --config-only takes such a file or its directory")
    if problem := kind_problem(file):
        raise CheckpointError(f"{file} {problem}")
    checkpoint = DescribedCheckpoint(text, file.parent, file)
    refuse_foreign_code(checkpoint.config_place, text)
    refuse_many_layers(checkpoint, {})
    for level in levels_of(checkpoint.config):
        for key in EXPERT_COUNTS:
            if isinstance(count := level.get(key), int) and count > MOST_EXPERTS:
                raise CheckpointError(
                    f"{text}: config.json has {key} {str(count)[:20]}, and no model has as many experts"
                )
    return checkpoint


def written_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors, without values, that `save_pretrained` writes of a model on the meta device, by their names in the files."""
    from transformers.core_model_loading import revert_weight_conversion

    left_out = {*(getattr(model, "all_tied_weights_keys", None) or {}), *(model._keys_to_ignore_on_save or ())}  # type: ignore[misc]
    wide = kept_wide(model)
    state = {}
    for name, tensor in model.state_dict().items():
        if name not in left_out:
            is_wide = tensor.is_floating_point() and wide is not None and wide.search(name)
            state[name] = tensor.to("meta", torch.float32 if is_wide else None)
    written: dict[str, Tensor] = revert_weight_conversion(model, state)
    return written
