"""What a recipe will do to a model: a scheme for every linear, before anything runs. `planning.py` makes it, `estimate.py` says
what it costs, `plan_table.py` shows it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from sparsify.compiler.estimate import Estimate, bits_per_weight, estimate
from sparsify.compiler.memory import FREE, Limits
from sparsify.compiler.plan_described import described_json
from sparsify.compiler.plan_table import plan_table
from sparsify.compiler.plan_training import PlannedTraining
from sparsify.compiler.shorten import PlannedDepth
from sparsify.compiler.training_text import repeats_of_files
from sparsify.compute import Choice, for_model
from sparsify.formats import ModuleScheme, get_format
from sparsify.formats.foreign import DequantizedCheckpoint
from sparsify.formats.reader import CompressedCheckpoint
from sparsify.formats.scheme import FLOATS, in_block
from sparsify.formats.writer import partial_directory
from sparsify.model.checkpoint import Checkpoint, TensorInfo
from sparsify.model.decoder import BlockModel
from sparsify.model.output_head import OutputHead
from sparsify.model.pretrained import ADAPTER
from sparsify.model.sidecars import secrets
from sparsify.recipe import Recipe
from sparsify.recipe.llmcompressor.whole import SAVED, reads_text
from sparsify.recipe.methods import KEEP
from sparsify.solver.solve import Scheme


@dataclass(frozen=True)
class Planned:
    """One linear of a decoder block. source: its tensor in the checkpoint; scheme: None when it stays dense, and why.

    given: how it is compressed already, in a recipe that starts from a compressed checkpoint
    asked: what the recipe asks of any such linear, before it was known whether it is 2:4 already
    """

    module: str
    source: str
    block: int
    shape: tuple[int, int]
    scheme: Scheme | None
    reason: str | None
    given: ModuleScheme | None = None
    asked: Scheme | None = None

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    def stored(self) -> ModuleScheme | None:
        """What is to be packed; None for what stays dense, and for what is only trained."""
        if self.scheme is not None:
            group = self.scheme.group_size if self.scheme.quantize else 0
            group = group or self.shape[1]
            return ModuleScheme(self.scheme.bits, group, self.scheme.pattern, self.shape, self.scheme.symmetric)
        trained = self.given is not None and self.given.bits == 16 and self.given.pattern == "dense"
        return None if trained else self.given

    def describe(self) -> str:
        """Its new form, in words."""
        if self.given is not None:
            groups = (
                "one scale per channel"
                if self.given.group_size == self.shape[1]
                else f"groups of {self.given.group_size}"
            )
            if self.given.bits == 16 and self.given.pattern == "dense":
                return "stays dense, trained"
            kind = f"{self.given.bits}-bit" if self.given.symmetric else f"asymmetric {self.given.bits}-bit"
            bits = "16-bit" if self.given.bits == 16 else f"{kind}, {groups}"
            return f"is {self.given.pattern} {bits}, trained"
        return describe(self.scheme) if self.scheme else f"stays dense: {self.reason}"


@dataclass(frozen=True)
class PlannedHead:
    """The output head as a quantized linear without zeros."""

    head: OutputHead
    scheme: Scheme

    def stored(self) -> ModuleScheme:
        """What is to be packed."""
        (n, k), scheme = self.head.shape, self.scheme
        return ModuleScheme(scheme.bits, scheme.group_size or k, "dense", (n, k), scheme.symmetric)

    def describe(self) -> str:
        """In words, with the form of the embedding."""
        return describe(self.scheme) + ("; the embedding that it was tied to stays dense" if self.head.tied else "")


@dataclass(frozen=True)
class Plan:
    """A validated recipe bound to a model."""

    recipe: Recipe
    model: BlockModel
    linears: dict[str, Planned]
    other_dense: dict[str, str]
    store: torch.dtype
    head: PlannedHead | None = None
    training: tuple[PlannedTraining, ...] = ()
    compressed: CompressedCheckpoint | None = None
    depth: PlannedDepth | None = None
    limits: Limits = FREE

    @property
    def checkpoint(self) -> Checkpoint:
        return self.model.checkpoint

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The linears to compress."""
        return {name: planned.scheme for name, planned in self.linears.items() if planned.scheme is not None}

    @property
    def needs_data(self) -> bool:
        solved = [*self.schemes.values(), *([self.head.scheme] if self.head is not None else [])]
        reading = self.recipe.tune is not None or self.recipe.basis is not None
        return reading or any(scheme.needs_data for scheme in solved)

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is read, by our passes or by llm-compressor."""
        return self.needs_data or reads_text(self.recipe.llm_compressor or ())

    @property
    def compute(self) -> Choice:
        """The type that the model is computed in, as it suits this machine or the run that is going on."""
        return for_model(self.checkpoint.dtypes())

    @property
    def computes(self) -> bool:
        """Whether the model runs at all: data-free passes only look at weights."""
        return self.needs_data or bool(self.training) or (self.depth is not None and self.depth.settings.needs_data)

    @property
    def needs_dense_reference(self) -> bool:
        return self.recipe.tune is not None or any(scheme.error_propagation > 0 for scheme in self.schemes.values())

    @cached_property
    def source_is_narrow(self) -> bool:
        """Whether most floating numbers of the blocks are stored in at most 16 bits: what is wider there is so on purpose."""
        inside = floats_of_blocks(self.checkpoint)
        wide = sum(math.prod(info.shape) for info in inside if info.dtype.itemsize > 2)
        return 2 * wide < sum(math.prod(info.shape) for info in inside)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The type in the output of a tensor of the checkpoint that is not compressed.

        That of the recipe, except for float32 and float64 among 16-bit tensors and what the model class keeps in float32;
        without one in the recipe, what has 16 bits already stays as it is.
        """
        dtype = self.checkpoint.dtype(name)
        if not dtype.is_floating_point or (dtype.itemsize > 2 and self.source_is_narrow):
            return dtype
        if dtype in FLOATS and self.recipe.export.dtype == "auto":
            return dtype
        if name in self.model.kept_wide:
            return dtype if dtype == self.store else torch.float32
        return self.store

    def dense_linear_bytes(self, module: str) -> int:
        """Bytes of a linear before it was compressed: 16-bit where that was done before this recipe."""
        planned = self.linears[module]
        packed = planned.given is not None and not self.is_dense
        return planned.weights * 2 if packed else self.checkpoint.info(planned.source).nbytes

    def dense_bytes(self) -> int:
        """Bytes of the dense model."""
        if self.compressed is None or self.is_dense:
            return self.checkpoint.nbytes()
        inside = {module: scheme.shape for module, scheme in self.compressed.modules.items()}
        packed = sum(self.compressed.nbytes(module) for module in inside)
        return self.checkpoint.nbytes() - packed + sum(2 * n * k for n, k in inside.values())

    def input_digests(self, output: Path, whole: bool = True) -> dict[str, str]:
        """Digests of the files of the model, and of the teachers by their place in the recipe. whole: as for
        `Checkpoint.digests`. output: the directory that is written, which may lie inside of the model's."""
        apart = (output, partial_directory(output))
        found = self.checkpoint.digests(whole, apart)
        for number, planned in enumerate(self.training, 1):
            if planned.teacher is not None and planned.teacher.directory != self.checkpoint.directory:
                digests = planned.teacher.digests(whole, apart)
                found |= {f"teacher {number}: {name}": digest for name, digest in digests.items()}
        return found

    def carried(self) -> list[str]:
        """Tensors of the checkpoint that the model class does not know, such as a layer for predicting further tokens. No
        pass reads them; they come into the output as they are."""
        names = self.checkpoint.names() if self.compressed is None else self.compressed.other_names()
        return [name for name in names if name not in self.model.sources]

    def kept_wide(self) -> list[str]:
        """Tensors that stay float32 or float64 in a model of 16-bit types."""
        packed = {planned.source for planned in self.linears.values() if planned.scheme or planned.given}
        names = self.checkpoint.names() if self.compressed is None else self.compressed.other_names()
        kept = {name: self.stored_dtype(name) for name in names if name not in packed}
        return [name for name, dtype in kept.items() if dtype.is_floating_point and dtype.itemsize > 2]

    def left_behind(self) -> list[str]:
        """Files of the model that do not come along: what looks like a credential, and an adapter, which is not merged."""
        if not self.checkpoint.has_weights:
            return []
        adapter = [ADAPTER] if (self.checkpoint.directory / ADAPTER).exists() else []
        return [*adapter, *secrets(self.checkpoint.directory)]

    def carried_json(self) -> dict[str, Any] | None:
        """What metrics.json says of them."""
        names = self.carried()
        nbytes = sum(self.checkpoint.info(name).nbytes for name in names)
        return (
            {"reason": f"unknown to {type(self.model.model).__name__}", "bytes": nbytes, "tensors": names}
            if names
            else None
        )

    def source_json(self) -> dict[str, Any] | None:
        """What metrics.json says of a source that is quantized itself."""
        return self.checkpoint.to_json() if isinstance(self.checkpoint, DequantizedCheckpoint) else None

    def saved_config(self) -> dict[str, Any]:
        """What config.json of the output says as llm-compressor has written it."""
        opened = self.checkpoint
        if self.recipe.export.format != SAVED or not isinstance(opened, DequantizedCheckpoint):
            return {}
        return {"quantization_config": opened.stored.config["quantization_config"]}

    def dense_modules(self) -> dict[str, str]:
        """What stays dense and why."""
        kept = {name: planned.reason for name, planned in self.linears.items() if planned.reason is not None}
        return {**kept, **self.other_dense}

    def written_dense(self) -> dict[str, str]:
        """Linears that the export format cannot hold as the recipe wants them: they are written dense, and why."""
        target, reasons = get_format(self.recipe.export.encoding), {}
        for module, planned in self.linears.items():
            scheme = planned.stored()
            if scheme is not None and (problem := target.problem(scheme, self.store)):
                reasons[module] = problem
        return reasons

    def stored_schemes(self, apart_from: Iterable[str] = ()) -> dict[str, ModuleScheme]:
        """How each linear is to be packed, the output head included."""
        left = {*apart_from}
        inside = {name: planned.stored() for name, planned in self.linears.items() if name not in left}
        found = {name: scheme for name, scheme in inside.items() if scheme is not None}
        return found if self.head is None else {**found, self.head.head.module: self.head.stored()}

    @cached_property
    def cost(self) -> Estimate:
        """What it will cost."""
        return estimate(self)

    @property
    def parameters(self) -> int:
        """Of the dense model; what is tied counts once."""
        return sum(parameter.numel() for parameter in self.model.model.parameters())

    def estimate(self) -> Estimate:
        """`cost`, looked at anew: what is free changes."""
        return estimate(self)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.checkpoint.spec,
            "blocks": len(self.model.blocks),
            "linears": {
                name: {
                    "shape": list(p.shape),
                    "block": p.block,
                    "scheme": describe(p.scheme) if p.scheme else None,
                    "reason": p.reason,
                }
                for name, p in self.linears.items()
            },
            "llm_compressor": self.recipe.llm_compressor,
            "depth": None if self.depth is None else self.depth.to_json(),
            "basis": None if self.recipe.basis is None else self.recipe.basis.model_dump(mode="json"),
            "head": self._head_json(),
            "dense_modules": self.dense_modules() | self.written_dense(),
            "carried": self.carried_json(),
            "source": self.source_json(),
            "kept_wide": self.kept_wide(),
            "left_behind": self.left_behind(),
            "walks": 1 if self.needs_data else 0,
            "training": [planned.to_json() for planned in self.training],
            "repeated_text": self.repeats,
            "calibration": self.recipe.calibration.model_dump(mode="json") if self.reads_text else None,
            "compute": self.compute.to_json() if self.computes else None,
            "parameters": self.parameters,
            "bits_per_weight": None if self.recipe.whole else round(bits_per_weight(self), 4),
            "config_only": described_json(self),
            "estimate": None if self.recipe.whole else self.cost.to_json(),
        }

    @property
    def is_dense(self) -> bool:
        """Whether the recipe starts from a dense model and compresses no linear of it."""
        return self.compressed is not None and self.compressed.format == "dense"

    @property
    def depth_first(self) -> bool:
        return self.recipe.depth is self.recipe.passes[0]

    def _head_json(self) -> dict[str, Any] | None:
        if self.head is None:
            return None
        head = self.head.head
        scheme = describe(self.head.scheme)
        return {"module": head.module, "shape": list(head.shape), "scheme": scheme, "tied": head.tied}

    def table(self) -> Table:
        """One row per kind of linear and one for the output head, costs below."""
        return plan_table(self)

    @cached_property
    def repeats(self) -> list[str]:
        """Of the training passes, the texts that are too short for the steps. Reads those texts."""
        if not self.checkpoint.has_weights:  # no tokenizer either
            return []
        return [
            said
            for planned in self.training
            for said in repeats_of_files(planned, self.checkpoint, self.recipe.calibration)
        ]


def describe(scheme: Scheme) -> str:
    """A scheme in words: `2:4 sparsegpt + 4-bit gptq, groups of 64`."""
    parts = []
    if scheme.prune:
        kept = ", stored as dense" if scheme.as_dense else ""
        parts.append(f"2:4 already, zeros kept{kept}" if scheme.prune == KEEP else f"2:4 {scheme.prune}")
    if scheme.quantize:
        groups = f"groups of {scheme.group_size}" if scheme.group_size else "one scale per channel"
        kind = "" if scheme.symmetric else "asymmetric "
        parts.append(f"{kind}{scheme.bits}-bit {scheme.quantize}, {groups}")
    return " + ".join(parts) + (f", error propagation {scheme.error_propagation:g}" if scheme.error_propagation else "")


def floats_of_blocks(checkpoint: Checkpoint) -> list[TensorInfo]:
    """The floating tensors of the blocks; of the whole model where no name tells what a block is."""
    floating = {name: info for name, info in checkpoint.infos.items() if info.dtype.is_floating_point}
    return [info for name, info in floating.items() if in_block(name)] or [*floating.values()]
