"""What a recipe will do to a model: a scheme for every linear, before anything runs. What it costs is in `estimate.py`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparsify.compiler.estimate import Estimate, bits_per_weight, estimate, time_in_words, training_in_words
from sparsify.compiler.left_dense import none_held
from sparsify.compiler.memory import FREE, Limits, in_words
from sparsify.compiler.merged import merged_with, merging_problem
from sparsify.compiler.plan_described import described_in_words, described_json
from sparsify.compiler.plan_experts import (
    experts_in_words,
    refuse_balancing,
    refuse_unlike,
    why_dense,
    why_not_compressed,
)
from sparsify.compiler.plan_training import PlannedTraining, Shortened, plan_training
from sparsify.compiler.shorten import PlannedDepth, plan_depth
from sparsify.compiler.training_text import repeats_of_files
from sparsify.compiler.zeros import two_four_sources
from sparsify.compute import Choice, for_model
from sparsify.errors import CheckpointError, RecipeError
from sparsify.formats import ModuleScheme, get_format
from sparsify.formats.foreign import DequantizedCheckpoint, open_dense, open_described_dense, source_in_words
from sparsify.formats.reader import CompressedCheckpoint, open_compressed
from sparsify.formats.scheme import FLOATS, in_block
from sparsify.formats.writer import partial_directory
from sparsify.model.capture import fake_hidden
from sparsify.model.checkpoint import Checkpoint, TensorInfo
from sparsify.model.decoder import (
    ROUTER,
    ROUTES,
    BlockModel,
    find_blocks,
    meta_model,
    open_blocks,
    refuse_other_tensors,
    target_names,
)
from sparsify.model.experts import fused_experts, is_expert
from sparsify.model.linear_groups import skipped_by_shape
from sparsify.model.output_head import OutputHead, find_head
from sparsify.model.pretrained import ADAPTER
from sparsify.model.sidecars import secrets
from sparsify.model.transposed import transposed_weights, unread_problem
from sparsify.recipe import Depth, LinearSettings, Recipe, override_problem, settings_of
from sparsify.recipe.llmcompressor.whole import REMOVED, SAVED, leaves_zeros, names_of, needs_older, reads_text
from sparsify.recipe.methods import KEEP, QUANTIZE, needs_of
from sparsify.recipe.sources import sources_in_words
from sparsify.solver.head_quantization import head_problem, head_scheme
from sparsify.solver.solve import Scheme
from sparsify.units import size

EXPERT = re.compile(r"\bexperts\.\d+\.")
MANY_CARRIED = 6  # kinds of unknown tensors that a table names
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


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
        inside = _inside(self.checkpoint)
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
        packed = planned.given is not None and not self._is_dense
        return planned.weights * 2 if packed else self.checkpoint.info(planned.source).nbytes

    def dense_bytes(self) -> int:
        """Bytes of the dense model."""
        if self.compressed is None or self._is_dense:
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
            "repeated_text": self._repeats,
            "calibration": self.recipe.calibration.model_dump(mode="json") if self.reads_text else None,
            "compute": self.compute.to_json() if self.computes else None,
            "parameters": self.parameters,
            "bits_per_weight": None if self.recipe.whole else round(bits_per_weight(self), 4),
            "config_only": described_json(self),
            "estimate": None if self.recipe.whole else self.cost.to_json(),
        }

    @property
    def _is_dense(self) -> bool:
        """Whether the recipe starts from a dense model and compresses no linear of it."""
        return self.compressed is not None and self.compressed.format == "dense"

    @property
    def _depth_first(self) -> bool:
        return self.recipe.depth is self.recipe.passes[0]

    def _head_json(self) -> dict[str, Any] | None:
        if self.head is None:
            return None
        head = self.head.head
        scheme = describe(self.head.scheme)
        return {"module": head.module, "shape": list(head.shape), "scheme": scheme, "tied": head.tied}

    def table(self) -> Table:
        """One row per kind of linear and one for the output head, costs below."""
        if self.recipe.whole:
            return self._whole_table()
        cost = self.cost
        ratio = cost.dense_bytes / max(cost.output_bytes, 1)
        table = Table(title=escape(f"{self.checkpoint.spec}: {len(self.model.blocks)} blocks"), caption_justify="left")
        for column in ("linear", "shape", "blocks", "becomes"):
            table.add_column(column, justify="right" if column in ("shape", "blocks") else "left")
        kinds: dict[tuple[str, tuple[int, int], str], tuple[int, set[int]]] = {}
        unheld = self.written_dense()
        for name, planned in self.linears.items():
            inside = name.removeprefix(self.model.blocks[planned.block] + ".")
            what = planned.describe() + (f"; written dense: {unheld[name]}" if name in unheld else "")
            inside = EXPERT.sub(r"experts.*.", inside)
            count, blocks = kinds.get((inside, planned.shape, what), (0, set()))
            kinds[inside, planned.shape, what] = (count + 1, blocks | {planned.block})
        for (inside, shape, what), (count, blocks) in kinds.items():
            each = f" x {count / len(blocks):g} experts" if count > len(blocks) else ""
            table.add_row(Text(inside), f"{shape[0]} x {shape[1]}", f"{len(blocks)}{each}", Text(what))
        if self.head is not None:
            n, k = self.head.head.shape
            table.add_row(Text(self.head.head.module), f"{n} x {k}", "", self.head.describe())
        calibration = self.recipe.calibration.model_dump()
        how = (
            f"calibration on {sources_in_words(calibration)}\none walk over the blocks"
            + (" beside the dense model" if self.needs_dense_reference else "")
            if self.needs_data
            else "no walk: data-free"
        )
        if self.compressed is not None:
            how = "no linear is compressed" if self._is_dense else "compressed already, masks stay as they are"
        if self.recipe.basis is not None:
            how = f"first {self.recipe.basis.describe()}\n{how}"
        if self.depth is not None:
            how = f"{self.depth.describe()}\n{how}" if self._depth_first else f"{how}\nthen {self.depth.describe()}"
        if self.recipe.llm_compressor:
            text = f", on {sources_in_words(calibration)}" if self.reads_text else ""
            how = f"first, in llm-compressor{text}: {', '.join(names_of(self.recipe.llm_compressor))}\n{how}"
        table.caption = escape(
            f"{how}; {cost.dense_bytes / 1e6:.0f} MB become {cost.output_bytes / 1e6:.0f} MB ({ratio:.2f} times smaller), "
            f"the linears {bits_per_weight(self):.3g} bits per weight\n"
            f"memory about {cost.memory_bytes / 1e9:.1f} GB"
            + (f", {time_in_words(cost.operations, self.compute.dtype)}" if cost.operations else "")
            + _memory_in_words(cost)
            + (f"\n{self.compute.describe()}" if self.computes else "")
            + (f"\nthe source is {source_in_words(source)}" if (source := self.source_json()) else "")
            + (f"\n{carried_in_words(carried)}" if (carried := self.carried_json()) else "")
            + (f"\nstays wider than 16 bits: {kinds_in_words(wide)}" if (wide := self.kept_wide()) else "")
            + (
                f"\nleft behind, as an adapter or what looks like a credential: {', '.join(behind)}"
                if (behind := self.left_behind())
                else ""
            )
            + "".join(f"\n{said}" for said in (*described_in_words(self), *experts_in_words(self)))
            + "".join(
                f"\nthen {training_in_words(self, planned)}" + "".join(f"\n{line}" for line in found.describe())
                for planned, found in zip(self.training, cost.training, strict=True)
            )
            + "".join(f"\n{said}" for said in self._repeats)
        )
        return table

    @cached_property
    def _repeats(self) -> list[str]:
        """Of the training passes, the texts that are too short for the steps. Reads those texts."""
        if not self.checkpoint.has_weights:  # no tokenizer either
            return []
        return [
            said
            for planned in self.training
            for said in repeats_of_files(planned, self.checkpoint, self.recipe.calibration)
        ]

    def _whole_table(self) -> Table:
        """Of a recipe that llm-compressor runs: which linears it changes, and how, is for llm-compressor to say."""
        entries, format = self.recipe.llm_compressor or [], self.recipe.export.format
        table = Table(title=escape(f"{self.checkpoint.spec}: {len(self.model.blocks)} blocks"), caption_justify="left")
        table.add_column("in llm-compressor, in this order")
        for name in names_of(entries):
            table.add_row(name)
        said = ["llm-compressor runs all of this recipe, in an environment of its own"]
        said += [f"calibration on {sources_in_words(self.recipe.calibration.model_dump())}"] if self.reads_text else []
        said += [f"{REMOVED} needs llm-compressor 0.13: 0.14 has it no more"] if needs_older(entries) else []
        said += ["its zeros have no pattern: no kernel makes them smaller or faster"] if leaves_zeros(entries) else []
        said += [f"written as {format}, as llm-compressor saves it" if format == SAVED else f"written as {format}"]
        said += [f"the source is {source_in_words(source)}"] if (source := self.source_json()) else []
        table.caption = escape("\n".join(said))
        return table


def _memory_in_words(cost: Estimate) -> str:
    """Lines on the memory of a walk by item, where hidden states lie, what is on the disk, and what does not fit."""
    walk = cost.memory
    if walk is None:
        return ""
    lines = [f"memory of the walk {size(walk.peak)}: {in_words(walk.host)}"]
    lines += [f"of the GPU {size(sum(walk.gpu.values()))}: {in_words(walk.gpu)}"] if walk.gpu else []
    lines += [f"{walk.describe()}; disk: {in_words(walk.disk)}"]
    lines += [f"does not fit: {problem}"] if (problem := walk.problem()) else []
    if walk.budget is not None and cost.writing_bytes > walk.budget:
        lines.append(
            f"does not fit: the whole model writes the calibration text, {size(cost.writing_bytes)} of memory; "
            "with --set calibration.source=file:TEXT it is read instead"
        )
    return "".join(f"\n{line}" for line in lines)


def carried_in_words(carried: Mapping[str, Any]) -> str:
    """`carried over as they are: 11 tensors (2.1 MB) unknown to LlamaForCausalLM: model.layers.2.*`"""
    kinds = [re.sub(r"^((?:.*?\.)?\d+\.).*", r"\1*", name) for name in carried["tensors"]]
    size = f"({carried['bytes'] / 1e6:.1f} MB) {carried['reason']}"
    return f"carried over as stored: {_counted(kinds, size)}"


def kinds_in_words(names: Sequence[str]) -> str:
    """`12 tensors: model.layers.*.mlp.gate.e_score_correction_bias`"""
    return _counted([re.sub(r"\.\d+(?=\.)", ".*", name) for name in names])


def _counted(kinds: Sequence[str], more: str = "") -> str:
    """How many tensors, and what kinds of them there are."""
    different = [*dict.fromkeys(kinds)]
    shown = ", ".join(different[:MANY_CARRIED]) + (", ..." if len(different) > MANY_CARRIED else "")
    return f"{len(kinds)} tensor{'s' if len(kinds) > 1 else ''}{' ' * bool(more)}{more}: {shown}"


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


def make_plan(
    recipe: Recipe, model: str, shortened: Shortened | None = None, served: bool = True, config_only: bool = False
) -> Plan:
    """Bind a recipe to a model. Raises RecipeError or CheckpointError when the two do not fit; runs nothing.

    shortened: what a depth pass left; the recipe is then what follows it
    served: the result is what is exported, and vLLM has to load it
    config_only: `model` is a config.json alone, or its directory (`open_described_dense`); such a plan cannot be run
    """
    if config_only and (recipe.whole or not recipe.compresses):
        raise RecipeError(
            "--config-only plans a recipe with prune or quantize: what this one does depends on the linears that the files "
            "hold compressed; plan it with them, without --config-only"
        )
    if recipe.whole:
        return _whole_plan(recipe, model)
    plan = _plan_linears(recipe, model, shortened if recipe.depth is None else None, served, config_only)
    plan.checkpoint.sidecar_files()  # a link out of the directory is better known now
    plan = keep_zeros(without_skipped(plan), whole=False)
    format = recipe.export.format
    stored = [name for name, planned in plan.linears.items() if planned.stored() is not None]
    unheld = plan.written_dense()
    if problem := none_held(format, unheld, stored, model) or get_format(format).together_problem(
        plan.stored_schemes(unheld)
    ):
        raise RecipeError(f"export.format: {problem}")
    if problem := unread_problem(sorted(transposed_weights(plan.model.model)), recipe.export.encoding):
        raise RecipeError(f"export.format: {problem}")
    if served and (problem := merging_problem(plan.linears, format)):
        raise RecipeError(problem)
    return plan if recipe.depth is None else replace(plan, depth=plan_depth(recipe.depth, plan.model))


def _whole_plan(recipe: Recipe, model: str) -> Plan:
    """The plan of a recipe that llm-compressor runs from end to end, which decides on each linear."""
    checkpoint = open_dense(model)
    opened = open_blocks(checkpoint)
    checkpoint.sidecar_files()
    return Plan(recipe, opened, {}, {}, DTYPES.get(recipe.export.dtype) or _storage_type(checkpoint))


def saved_plan(recipe: Recipe, directory: Path) -> Plan:
    """The plan of what is left of such a recipe: to write what llm-compressor saved in the export format.

    Raises CheckpointError where that cannot hold what llm-compressor left.
    """
    plan, format = _training_plan(recipe, str(directory), None), recipe.export.format
    if format == "dense":
        return plan
    opened = plan.checkpoint
    quantized = opened.quantization if isinstance(opened, DequantizedCheckpoint) else None
    if format == SAVED and quantized is not None:
        return plan
    problem = none_held(recipe.export.encoding, plan.written_dense(), plan.linears, "the model")
    if problem or not plan.linears or format == SAVED:
        raise CheckpointError(
            problem
            or f"llm-compressor left {quantized or 'a dense model'}, which {format} cannot hold; set export.format to "
            f"{SAVED if quantized is not None else 'dense'}"
        )
    return plan


def without_skipped(plan: Plan) -> Plan:
    """The plan without linears that a walk would skip for their shapes; CheckpointError where none is left."""
    if not plan.needs_data or plan.compressed is not None:
        return plan
    skipped = {name: why for name, why in skipped_by_shape(plan.model).items() if name in plan.schemes}
    linears = {
        name: replace(planned, scheme=None, asked=None, reason=skipped[name]) if name in skipped else planned
        for name, planned in plan.linears.items()
    }
    if plan.schemes and not plan.schemes.keys() - skipped.keys():
        raise CheckpointError(nothing_compressed(plan, skipped.values()))
    return replace(plan, linears=linears)


def nothing_compressed(plan: Plan, reasons: Iterable[str]) -> str:
    """The error of a run that could compress nothing."""
    return (
        f"none of the {len(plan.schemes)} linears of {plan.checkpoint.spec} that the recipe names can be compressed: "
        + ("; ".join(f"{why} ({count})" for why, count in Counter(reasons).most_common()))
    )


def keep_zeros(plan: Plan, whole: bool = True) -> Plan:
    """The plan in which linears that are 2:4 already keep their masks: existing zeros are never revived or chosen anew.

    whole: read the weights, as a run does before it begins; a plan looks at their first rows only
    Raises RecipeError for a linear that is not 2:4 although the recipe says `prune: {method: keep}`.
    """
    asked = {p.module: p for p in plan.linears.values() if p.asked is not None and p.reason is None}
    sources = {p.source for p in asked.values()}
    if plan.checkpoint.has_weights:
        found = two_four_sources(plan.checkpoint, sources, whole) if sources else set()
    else:  # no zeros are seen: the recipe is believed
        found = {p.source for p in asked.values() if p.asked is not None and p.asked.prune == KEEP}
    kept = {module for module, planned in asked.items() if planned.source in found}
    linears = dict(plan.linears)
    for module, planned in asked.items():
        scheme = planned.asked
        assert scheme is not None
        if module in kept:
            scheme = _kept(scheme, module, kept, plan)
        elif scheme.prune == KEEP:
            raise RecipeError(
                f"prune: {{method: keep}} keeps the zeros of linears that are 2:4 already, and {planned.source} of "
                f"{plan.checkpoint.spec} is not: some group of 4 inputs holds more than two non-zero weights; "
                "leave it out with an override or ignore, or prune it by another method"
            )
        linears[module] = replace(planned, scheme=scheme)
    return replace(plan, linears=linears)


def _stored_without_mask(module: str, kept: set[str], plan: Plan) -> bool:
    """Whether this linear is there and not stored as 2:4."""
    planned = plan.linears.get(module)
    return planned is not None and module not in kept and (planned.asked is None or planned.asked.prune is None)


def _kept(scheme: Scheme, module: str, kept: set[str], plan: Plan) -> Scheme:
    """What is asked of a linear that is 2:4 already, inside its mask."""
    needs = needs_of(KEEP, scheme.quantize)
    return replace(
        scheme,
        prune=KEEP,
        error_propagation=scheme.error_propagation if needs.data else 0.0,
        coordinate_descent=scheme.coordinate_descent if needs.sweep else 0,
        as_dense=scheme.prune is None and any(_stored_without_mask(other, kept, plan) for other in merged_with(module)),
    )


def _plan_linears(
    recipe: Recipe, model: str, shortened: Shortened | None, served: bool, config_only: bool = False
) -> Plan:
    """The plan without the depth pass: every linear of the model as it is."""
    if not recipe.compresses:
        return _training_plan(recipe, model, shortened)
    checkpoint = open_described_dense(model) if config_only else open_dense(model)
    store = DTYPES.get(recipe.export.dtype) or _storage_type(checkpoint)
    opened, linears, other = _open_linears(recipe, checkpoint, store, served and shortened is None)
    checkpoint = opened.checkpoint
    if shortened is None and (
        problem := override_problem(recipe, linears, model)
    ):  # a depth pass may remove what one names
        raise RecipeError(problem)
    refuse_unlike(recipe, linears)
    training = plan_training(recipe, checkpoint, shortened)
    plan = Plan(recipe, opened, linears, other, store, None, training)
    plan = replace(plan, head=_head(recipe, opened, store, calibrates=plan.needs_data))
    if not plan.schemes:
        reasons = sorted(set(plan.dense_modules().values()))
        raise RecipeError(f"the recipe changes no linear of {model}: {'; '.join(reasons) or 'it has none'}")
    refuse_balancing(recipe, plan)
    if plan.computes and not plan.needs_data:  # else `without_skipped` runs it so
        fake_hidden(opened)  # refuses a model that does not call its blocks one after another
    outside = {name for name in opened.source_names(None) if len(checkpoint.shape(name)) == 2}
    outside -= {plan.head.head.source} if plan.head is not None and not plan.head.head.tied else set()
    other |= {opened.sources[name][0].removesuffix(".weight"): "outside the decoder blocks" for name in sorted(outside)}
    return plan


def _open_linears(
    recipe: Recipe, checkpoint: Checkpoint, store: torch.dtype, whole: bool
) -> tuple[BlockModel, dict[str, Planned], dict[str, str]]:
    """The model of a checkpoint, its linears, and why other weights of its blocks stay as they are.

    Experts are taken apart where one of them is compressed. whole: this recipe makes what is exported of the whole model
    """
    why = why_not_compressed(recipe) if whole else "experts are compressed neither before nor after a depth pass"
    opened = open_blocks(checkpoint, separate=why is None)
    dense = why_dense(recipe, opened.checkpoint)
    linears, other = _linears_of(recipe, opened, store, dense)
    experts = [planned for name, planned in linears.items() if is_expert(name)]
    if experts and all(planned.scheme is None and planned.asked is None for planned in experts):
        why = experts[0].reason
        opened = open_blocks(checkpoint)
        linears, other = _linears_of(recipe, opened, store, dense)
    if why := why or opened.fused:
        fused = tuple(f"{path}." for path in fused_experts(opened.model))
        other |= {name: why for name in other if name.startswith(fused)}
    return opened, linears, other


def _linears_of(
    recipe: Recipe, opened: BlockModel, store: torch.dtype, dense: str | None
) -> tuple[dict[str, Planned], dict[str, str]]:
    """The linears of the blocks with what the recipe asks of them, and why other weights stay as they are.

    dense: why experts stay dense, None where they need not
    """
    linears: dict[str, Planned] = {}
    other: dict[str, str] = {}
    for index, block in enumerate(opened.blocks):
        for name, linear in opened.linears(index).items():
            module = f"{block}.{name}"
            shape = (linear.out_features, linear.in_features)
            source = opened.source_of(f"{module}.weight")
            if source is None:
                other[module] = "transformers assembles its weight from several tensors of the checkpoint"
                continue
            settings = settings_of(recipe, module)
            scheme = scheme_of(recipe, settings, store)
            reason = settings.dense if scheme is None else scheme.reason_dense(shape[1])
            if ROUTER.search(name):
                reason = ROUTES
            elif is_expert(module):
                reason = reason or dense
            asked = None if reason else scheme
            linears[module] = Planned(module, source, index, shape, asked, reason, asked=asked)
        for name in opened.other_parameters(index):
            other[f"{block}.{name}"] = _why_other(opened, f"{block}.{name}")
    return linears, other


def _why_other(opened: BlockModel, name: str) -> str:
    """Why a matrix that belongs to no plain linear stays as it is."""
    path = name.rpartition(".")[0]
    if ROUTER.search(path):
        return ROUTES
    if path.endswith("experts"):
        return (
            f"experts of the class {type(opened.model.get_submodule(path)).__name__} cannot be taken apart into linears"
        )
    return "not a plain linear"


def _training_plan(recipe: Recipe, model: str, shortened: Shortened | None) -> Plan:
    """The plan of a recipe without prune and quantize: the checkpoint is compressed already and is only trained.

    A dense one is served by depth alone; what trains it then trains all linears of its blocks, 16-bit as they are.
    """
    compressed = open_compressed(model) if recipe.export.format != SAVED else _as_saved(open_dense(model))
    checkpoint = compressed.checkpoint
    meta = meta_model(checkpoint, torch.float32)
    refuse_other_tensors(meta, checkpoint, compressed.dense_shapes())
    names = [*compressed.other_names(), *(f"{module}.weight" for module in compressed.modules)]
    opened = BlockModel(checkpoint, meta, find_blocks(meta), target_names(meta, names), torch.float32)
    depth = recipe.depth is not None or recipe.basis is not None or shortened is not None
    if depth and not compressed.modules:
        if recipe.basis is not None and recipe.export.format != "dense":
            raise RecipeError(
                f"basis alone leaves the linears of {model} dense: set export.format: dense, or add prune or quantize"
            )
        if recipe.depth is not None and not _may_be_dense(recipe.depth, recipe.export.format):
            raise RecipeError(
                f"nothing compresses the linears of {model}, so the result is dense: set export.format: dense, "
                "or add prune or quantize"
            )
        dense = _dense_linears(opened) if recipe.training else {}
        compressed = replace(compressed, modules=dense | _zero_linears(opened, recipe.export.format))
    linears = {}
    for module, scheme in compressed.modules.items():
        source = f"{module}.weight"
        target, same = opened.sources.get(source, (source, True))
        if (not same or is_expert(module)) and not recipe.whole:
            raise CheckpointError(
                f"{model} holds {module} compressed, which transformers puts together with others into one tensor, so it cannot "
                "be trained; start from the dense model"
            )
        if (block := opened.owner(target)) is not None:
            name = target.removesuffix(".weight") if same else module
            linears[name] = Planned(name, source, block, scheme.shape, None, None, scheme)
    if not linears and not depth and not recipe.whole:
        raise CheckpointError(
            f"{model} holds no compressed linear, and this recipe only trains; compress it first, for instance with "
            f"2of4, or write 2:4 zeros as such: sparsify export {model} --format sparse24"
        )
    outside = {name for name in compressed.other_names() if len(checkpoint.shape(name)) == 2}
    other = {
        name.removesuffix(".weight"): "outside the decoder blocks"
        if opened.owner(opened.sources[name][0]) is None
        else "dense"
        for name in sorted(outside)
        if name in opened.sources
    }
    store = DTYPES.get(recipe.export.dtype) or _storage_type(checkpoint)
    training = plan_training(recipe, checkpoint, shortened)
    return Plan(recipe, opened, linears, other, store, None, training, compressed)


def _as_saved(checkpoint: Checkpoint) -> CompressedCheckpoint:
    """A checkpoint of any scheme that stays as it is stored: its weights are not unpacked but where they are looked at."""
    quantized = checkpoint.modules if isinstance(checkpoint, DequantizedCheckpoint) else {}
    modules = {name: ModuleScheme(one.bits, one.group_size, "dense", one.shape) for name, one in quantized.items()}
    return CompressedCheckpoint(checkpoint, "dense", modules)


def _may_be_dense(depth: Depth, format: str) -> bool:
    """Whether a format can hold a model of which depth alone changes anything. In sparse24 the linears of removed sublayers
    are sparse linears without a single weight, which the runtime skips; there must be a chance of any."""
    halves = depth.method == "finercut" and depth.units == "sublayers"
    return format == "dense" or (format == "sparse24" and (halves or depth.replacement == "feed-forward"))


def _zero_linears(opened: BlockModel, format: str) -> dict[str, ModuleScheme]:
    """The linears of removed sublayers, by their names in the files, as modules of 2:4 values that are all zero."""
    if format != "sparse24":
        return {}
    return {
        module: replace(scheme, pattern="2:4")
        for module, scheme in _dense_linears(opened).items()
        if not opened.checkpoint.tensor(f"{module}.weight").any()
    }


def _dense_linears(opened: BlockModel) -> dict[str, ModuleScheme]:
    """The plain linears of a dense model's blocks as modules of 16 bits, by their names in the files."""
    found = {}
    for index, block in enumerate(opened.blocks):
        for name, linear in opened.linears(index).items():
            source = opened.source_of(f"{block}.{name}.weight")
            if source is not None and not ROUTER.search(name):
                shape = (linear.out_features, linear.in_features)
                found[source.removesuffix(".weight")] = ModuleScheme(16, shape[1], "dense", shape)
    return found


def _head(recipe: Recipe, opened: BlockModel, store: torch.dtype, calibrates: bool) -> PlannedHead | None:
    """What the recipe asks of the output head; RecipeError when this model's head cannot become it."""
    if recipe.export.head is None:
        return None
    head = find_head(opened.checkpoint, opened.model, opened.sources)
    planned = PlannedHead(head, head_scheme(recipe.export.head, store, calibrates))
    problem = head_problem(head.module, head.shape, planned.scheme)
    if problem or (problem := get_format(recipe.export.format).problem(planned.stored(), store)):
        raise RecipeError(f"export.head: {problem}")
    return planned


def _storage_type(checkpoint: Checkpoint) -> torch.dtype:
    """The 16-bit type of most numbers in the blocks; bfloat16 where there is none."""
    numbers: Counter[torch.dtype] = Counter()
    for info in _inside(checkpoint):
        numbers[info.dtype] += math.prod(info.shape)
    return torch.float16 if numbers[torch.float16] > numbers[torch.bfloat16] else torch.bfloat16


def _inside(checkpoint: Checkpoint) -> list[TensorInfo]:
    """The floating tensors of the blocks; of the whole model where no name tells what a block is."""
    floating = {name: info for name, info in checkpoint.infos.items() if info.dtype.is_floating_point}
    return [info for name, info in floating.items() if in_block(name)] or [*floating.values()]


def scheme_of(recipe: Recipe, settings: LinearSettings, store: torch.dtype) -> Scheme | None:
    """What is asked of one linear, as one scheme; None when it stays dense."""
    prune, quantize, solver = settings.prune, settings.quantize, recipe.solver
    if prune is None and quantize is None:
        return None
    needs = needs_of(prune.method if prune else None, quantize.method if quantize else None)
    return Scheme(
        prune=prune.method if prune else None,
        quantize=quantize.method if quantize else None,
        bits=quantize.bits if quantize else 16,
        group_size=0 if quantize is None or quantize.group_size == "channel" else quantize.group_size,
        damping=solver.damping,
        error_propagation=solver.error_propagation if needs.data else 0.0,
        activation_order=bool(quantize and quantize.activation_order and QUANTIZE[quantize.method].data),
        scale_search=bool(quantize is None or quantize.scale_search),
        symmetric=quantize is None or quantize.symmetric,
        coordinate_descent=solver.coordinate_descent if needs.sweep else 0,
        dtype=store,
    )
