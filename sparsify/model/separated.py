"""A checkpoint whose files hold the experts of a layer in one tensor, read as if each linear of an expert had its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.model.checkpoint import Checkpoint, TensorInfo
from sparsify.model.experts import FusedTensor, shape_of


@dataclass(frozen=True)
class SeparatedCheckpoint(Checkpoint):
    """A checkpoint whose files hold fused experts, read as if each linear of an expert had tensors of its own.

    fused: by the name in the files; whole: the checkpoint as it is
    """

    fused: Mapping[str, FusedTensor]
    whole: Checkpoint

    @property
    def config_file(self) -> Path:
        return self.whole.config_file

    @property
    def has_weights(self) -> bool:
        return self.whole.has_weights

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json"""
        return self.whole.config

    def sidecar_files(self, apart_from: Collection[Path] = ()) -> dict[str, Path]:
        return self.whole.sidecar_files(apart_from)

    @cached_property
    def _parts(self) -> dict[str, tuple[str, int, slice]]:
        return {
            name: (stored, number, outputs)
            for stored, fused in self.fused.items()
            for name, (number, outputs) in fused.names().items()
        }

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        stored = self.whole.infos
        found = {name: info for name, info in stored.items() if name not in self.fused}
        for name, (whole, _, outputs) in self._parts.items():
            info, shape = stored[whole], shape_of(self.fused[whole], outputs)
            count = torch.Size(shape).numel()
            found[name] = TensorInfo(info.file, shape, info.dtype, count * info.dtype.itemsize)
        return found

    def tensor(self, name: str) -> Tensor:
        if name not in self._parts:
            return super().tensor(name)
        whole, number, outputs = self._parts[name]
        info = self.info(name)
        try:
            with safe_open(info.file, framework="pt") as file:
                one = file.get_slice(whole)[number]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file}: cannot read {whole} ({error}); download or create it again") from None
        return self.fused[whole].of_expert(one, outputs)

    def first_rows(self, name: str, rows: int) -> Tensor:
        return self.tensor(name)[:rows] if name in self._parts else super().first_rows(name, rows)
