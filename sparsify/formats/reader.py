"""Reading checkpoint directories of any known format, with every byte checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.formats import get_format, known_formats
from sparsify.formats.foreign import dequantized, described, is_only_dequantized, reads_foreign
from sparsify.formats.scheme import ModuleScheme, in_block, scheme_problem
from sparsify.model.checkpoint import Checkpoint, open_checkpoint
from sparsify.model.linear import LinearWeights

HEADS = ("lm_head", "embed_out")


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key in which block 10 comes after block 9."""
    pieces = enumerate(re.split("([0-9]+)", name))  # text and digits in turn
    return [(len(digits := piece.lstrip("0")), digits) if index % 2 else (0, piece) for index, piece in pieces]


def tensors_of(module: str, names: Mapping[str, object], suffixes: frozenset[str] | set[str]) -> list[str]:
    """Suffixes of the tensors that belong to a compressed linear."""
    return [suffix for suffix in sorted({*suffixes, "bias"}) if f"{module}.{suffix}" in names]


def is_head(module: str, scheme: ModuleScheme, config: Mapping[str, Any]) -> bool:
    """Whether a linear is the output head: by its usual names, or because it has an output for every token."""
    text = config.get("text_config")
    sizes = {level.get("vocab_size") for level in (config, text) if isinstance(level, dict)}
    return module.rpartition(".")[2] in HEADS or (not in_block(module) and scheme.shape[0] in sizes)


@dataclass(frozen=True)
class CompressedCheckpoint:
    """A checkpoint of any known format, read lazily. modules: the compressed linears (none for `dense`).

    pack-quantized does not record sparsity, so its schemes say "dense"; `linear` reads the pattern off the codes.
    """

    checkpoint: Checkpoint
    format: str
    modules: dict[str, ModuleScheme]

    @property
    def _suffixes(self) -> frozenset[str]:
        """What marks the tensors of a module; modules of the format `dense` are those that are to be trained as they are."""
        return get_format(self.format).suffixes or frozenset({"weight"})

    @property
    def config(self) -> dict[str, Any]:
        return self.checkpoint.config

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory

    def linear(self, module: str) -> LinearWeights:
        """One compressed linear, checked; CheckpointError names the tensor that is wrong."""
        if module not in self.modules:
            raise CheckpointError(f"{self.checkpoint.spec} holds no compressed linear {module}")
        format = get_format(self.format)
        names = tensors_of(module, self.checkpoint.infos, self._suffixes)
        tensors = {suffix: self.checkpoint.tensor(f"{module}.{suffix}") for suffix in names}
        return format.decode(module, tensors, self.modules[module])

    def nbytes(self, module: str) -> int:
        """Bytes on disk of one compressed linear."""
        names = tensors_of(module, self.checkpoint.infos, self._suffixes)
        return sum(self.checkpoint.info(f"{module}.{suffix}").nbytes for suffix in names)

    def dtype(self, module: str) -> torch.dtype:
        """The floating type of the scales or values of a compressed linear, as its file says."""
        names = tensors_of(module, self.checkpoint.infos, self._suffixes - {"bias"})
        found = [self.checkpoint.dtype(f"{module}.{suffix}") for suffix in names if suffix != "bias"]
        return next((dtype for dtype in found if dtype.is_floating_point and dtype.itemsize > 1), torch.bfloat16)

    def other_names(self) -> list[str]:
        """The tensors that are not part of a compressed linear."""
        taken = {f"{m}.{s}" for m in self.modules for s in tensors_of(m, self.checkpoint.infos, self._suffixes)}
        return [name for name in self.checkpoint.names() if name not in taken]

    def dense_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the dense model, by name: a compressed linear is its `weight`, and its `bias` where it has one."""
        biases = {f"{module}.bias" for module in self.modules if f"{module}.bias" in self.checkpoint}
        plain = {name: self.checkpoint.shape(name) for name in {*self.other_names(), *biases}}
        return plain | {f"{module}.weight": scheme.shape for module, scheme in self.modules.items()}

    def tensor(self, name: str) -> Tensor:
        return self.checkpoint.tensor(name)


def recognised(checkpoint: Checkpoint) -> CompressedCheckpoint | None:
    """A checkpoint as one of a known format, a dense model too; None where its config.json names another."""
    config = described(checkpoint)
    foreign = config is not None and reads_foreign(config)
    if config is not None and foreign and is_only_dequantized(config, checkpoint.infos):
        return None
    for name in known_formats():
        format = get_format(name)
        if format.recognises(config):
            shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
            try:
                schemes = format.schemes(config, shapes)
            except CheckpointError:
                if not foreign:
                    raise
                continue
            if foreign and any(scheme_problem(scheme) for scheme in schemes.values()):
                continue
            return CompressedCheckpoint(checkpoint, name, schemes)
    return None


def open_compressed(source: str | Path) -> CompressedCheckpoint:
    """Open a checkpoint of any known format, a dense model too; CheckpointError when it is damaged or unknown.

    What is quantized in a way that no format of ours holds is dense here: dequantized on reading (`formats.foreign`).
    """
    checkpoint = open_checkpoint(source)
    return recognised(checkpoint) or CompressedCheckpoint(dequantized(checkpoint), "dense", {})
