"""The model that layers are removed from: its blocks with dense weights, whatever format its files have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify import compute
from sparsify.depth.layers import Layer
from sparsify.distributed import device
from sparsify.formats.reader import CompressedCheckpoint, open_compressed
from sparsify.model.checkpoint import Checkpoint, TensorInfo
from sparsify.model.decoder import BlockModel, find_blocks, meta_model, target_names
from sparsify.model.in_memory import probed_structure
from sparsify.model.linear import LinearWeights
from sparsify.model.sublayers import Structure

PROBE = 32  # tokens on which structures are found, and the shortened model is compared with the old one


@dataclass(frozen=True)
class _Decoded(Checkpoint):
    """A compressed checkpoint whose linears are read as dense matrices in `computed_in`."""

    compressed: CompressedCheckpoint | None = None
    computed_in: torch.dtype = torch.float32

    @cached_property
    def config(self) -> dict[str, Any]:
        assert self.compressed is not None
        return self.compressed.config

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        assert self.compressed is not None
        return self.compressed.checkpoint.infos

    def names(self) -> list[str]:
        assert self.compressed is not None
        biases = [f"{module}.bias" for module in self.compressed.modules if f"{module}.bias" in self.infos]
        return [*self.compressed.other_names(), *(f"{module}.weight" for module in self.compressed.modules), *biases]

    def tensor(self, name: str) -> Tensor:
        assert self.compressed is not None
        module, _, last = name.rpartition(".")
        if last == "weight" and module in self.compressed.modules:
            return self.compressed.linear(module).dense(self.computed_in)
        return self.compressed.tensor(name)


@dataclass(frozen=True)
class Source:
    """The model before removal. model: its blocks with dense weights, whatever format the files have."""

    compressed: CompressedCheckpoint
    model: BlockModel

    @property
    def checkpoint(self) -> Checkpoint:
        return self.compressed.checkpoint

    def linears(self, block: int) -> dict[str, LinearWeights]:
        """The linears of a loaded block by their names in it: compressed where the files have them so, else as stored."""
        prefix = self.model.blocks[block] + "."
        stored = {self.model.sources[f"{m}.weight"][0].removesuffix(".weight"): m for m in self.compressed.modules}
        found = {}
        for name, linear in self.model.linears(block).items():
            module = stored.get(prefix + name)
            found[name] = (
                self.compressed.linear(module)
                if module is not None
                else LinearWeights(
                    16, "dense", linear.in_features, values=self.as_stored(f"{prefix}{name}.weight", linear.weight),
                    bias=None if linear.bias is None else self.as_stored(f"{prefix}{name}.bias", linear.bias),
                )
            )  # fmt: skip
        return found

    def as_stored(self, parameter: str, value: Tensor) -> Tensor:
        """A copy of a parameter's value in the type that its tensor has in the files, whatever the model computes in.

        What transformers assembles from several tensors keeps its type."""
        source = self.model.source_of(parameter)
        known = source is not None and source in self.checkpoint.infos
        return value.detach().to(self.checkpoint.dtype(source) if known else value.dtype, copy=True)  # type: ignore[arg-type]


def open_source(spec: str | Path) -> Source:
    """Open a model of any format, dense or compressed, to be run block by block."""
    compressed = open_compressed(spec)
    checkpoint = compressed.checkpoint
    dtype = compute.for_model(checkpoint.dtypes()).dtype
    decoded = _Decoded(checkpoint.spec, checkpoint.directory, compressed, dtype)
    meta: Any = meta_model(checkpoint, dtype)
    return Source(compressed, BlockModel(decoded, meta, find_blocks(meta), target_names(meta, decoded.names()), dtype))


def probe_tokens(source: Source) -> Tensor:
    """Tokens to try things on: numbers from a small range, which every vocabulary has. [1, PROBE]"""
    vocabulary = source.model.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return (torch.arange(PROBE, device=device()) * 7 % min(vocabulary, 512))[None]


def structures_of(source: Source, layers: Sequence[Layer]) -> dict[int, Structure]:
    """The structure of every block that is not kept whole."""
    apart = {
        b for layer in layers if layer.attention != layer.feed_forward for b in (layer.attention, layer.feed_forward)
    }
    found: dict[int, Structure] = {}
    source.model.load_outside(device())
    for block in sorted(b for b in apart if b is not None):
        source.model.load(block)
        source.model.block(block).to(device())
        found[block] = probed_structure(source.model, block, probe_tokens(source))
        source.model.unload(block)
    return found
