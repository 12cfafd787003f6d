"""What metrics.json says of a run, gathered block by block so that a resumed run has it too."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsify.compiler.checkpoint_names import OUTSIDE, exported_name, part_name
from sparsify.compiler.plan import Plan
from sparsify.compiler.plan_experts import not_in_vllm
from sparsify.errors import CheckpointError
from sparsify.files import read_json
from sparsify.formats.foreign import DequantizedCheckpoint
from sparsify.formats.writer import CheckpointWriter
from sparsify.manifest import keep_json
from sparsify.model.linear import LinearWeights
from sparsify.recipe.llmcompressor.whole import SAVED, names_of
from sparsify.recipe.methods import KEEP

METRICS = "metrics.json"
RECORD = "run.json"
CARD = "README.md"
RECIPE = "recipe.yaml"
LLMCOMPRESSOR = "llm-compressor.json"  # in the work directory, written last: what llm-compressor has made, and of what
LAYER = {"module": str, "block": int, "shape": list, "bits": int, "pattern": str, "group_size": int}  # of a note
ADAPTER = "adapter"  # folder of an adapter that was trained beside the weights


@dataclass(frozen=True)
class Before:
    """What a run did before its last plan was made.

    plan:   of the whole recipe and the whole model
    depth:  what metrics.json says of the depth pass
    basis:  what it says of the basis pass
    errors: output errors of linears that were compressed before it, by their new names
    head:   what metrics.json says of the output head, when that was quantized before it
    kept_zeros: linears that were 2:4 before they were compressed before it, by their new names
    """

    plan: Plan
    depth: dict[str, Any] | None = None
    errors: dict[str, float] = field(default_factory=dict)
    head: dict[str, Any] | None = None
    kept_zeros: tuple[str, ...] = ()
    basis: dict[str, Any] | None = None


class Notes:
    """What metrics.json will say of each finished block, kept beside the parts so that a resumed run has it too."""

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def write(
        self, index: int, layers: list[dict[str, Any]], skipped: dict[str, str], tuning: dict[str, Any] | None = None
    ) -> None:
        note = {"layers": layers, "skipped": skipped, "tuning": tuning}
        keep_json(self.directory / f"{part_name(index)}.json", note)

    def write_layers(self, index: int, layers: list[dict[str, Any]]) -> None:
        """What became of the layers of a finished block afterwards."""
        keep_json(self.directory / f"{part_name(index)}.json", {**self.read(index), "layers": layers})

    def read(self, index: int) -> dict[str, Any]:
        """The note of a block. CheckpointError where it is not as `write` leaves it."""
        file = self.directory / f"{part_name(index)}.json"
        note = read_json(file)
        layers = note.get("layers") if isinstance(note, dict) else None
        if not isinstance(layers, list) or not isinstance(note.get("skipped"), dict):
            raise self._damaged(file)
        if not all(_is_layer(layer) for layer in layers):
            raise self._damaged(file)
        return {"tuning": None, **note}

    def _damaged(self, file: Path) -> CheckpointError:
        return CheckpointError(f"{file} is damaged; remove {self.directory.parent} and start again")

    def write_head(self, note: dict[str, Any]) -> None:
        keep_json(self.directory / f"{OUTSIDE}.json", note)

    def write_training(self, number: int, note: dict[str, Any]) -> None:
        keep_json(self.directory / f"training-{number}.json", note)

    def read_training(self, number: int) -> dict[str, Any]:
        return self._read_object(self.directory / f"training-{number}.json")

    def read_head(self) -> dict[str, Any]:
        head = self._read_object(self.directory / f"{OUTSIDE}.json")
        if not isinstance(head.get("module"), str):
            raise self._damaged(self.directory / f"{OUTSIDE}.json")
        return head

    def _read_object(self, file: Path) -> dict[str, Any]:
        found = read_json(file)
        if not isinstance(found, dict):
            raise self._damaged(file)
        return found


def _is_layer(layer: Any) -> bool:
    """Whether this is an entry of `layer_notes`, as far as what is read of it again."""
    if not isinstance(layer, dict) or not all(isinstance(layer.get(key), kind) for key, kind in LAYER.items()):
        return False
    error = layer.get("relative_error")
    finite = all(math.isfinite(value) for value in layer.values() if isinstance(value, float))
    sizes = len(layer["shape"]) == 2 and all(isinstance(size, int) for size in layer["shape"])
    return sizes and finite and (error is None or isinstance(error, int | float))


def layer_notes(
    block: int,
    linears: dict[str, LinearWeights],
    errors: dict[str, float],
    experts: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """What is said of the compressed linears of a block. experts: what else, of linears of experts"""
    return [
        {
            "module": module,
            "block": block,
            "shape": list(linear.shape),
            "bits": linear.bits,
            "pattern": linear.pattern,
            "group_size": linear.group_size,
            "symmetric": linear.symmetric,
            "sparsity": _sparsity(linear),
            "relative_error": errors.get(module),
            **(experts or {}).get(module, {}),
        }
        for module, linear in linears.items()
        if linear.bits < 16 or linear.pattern != "dense"  # such a one is trained, but not compressed
    ]


def saved_notes(plan: Plan, block: int) -> list[dict[str, Any]]:
    """The same of linears that stay as llm-compressor saved them."""
    return [
        {
            "module": module,
            "block": block,
            "shape": list(planned.shape),
            "bits": planned.given.bits,
            "pattern": planned.given.pattern,
            "group_size": planned.given.group_size,
            "sparsity": round(float((plan.checkpoint.tensor(planned.source) == 0).float().mean()), 6),
            "relative_error": None,
        }
        for module, planned in plan.linears.items()
        if planned.block == block and planned.given is not None
    ]


def _sparsity(linear: LinearWeights) -> float:
    return round(float((linear.unscaled() == 0).float().mean()), 6)


def metrics_of(plan: Plan, notes: Notes, writer: CheckpointWriter, before: Before) -> dict[str, Any]:
    found = [notes.read(index) for index in range(len(plan.model.blocks))]
    left_dense = plan.dense_modules()
    for note in found:
        left_dense |= note["skipped"]
    left_dense |= writer.dense_modules()
    whole = before.plan
    head = before.head if plan.head is None else notes.read_head()
    by_module = writer.linear_bytes() | _saved_bytes(plan)
    layers = [layer for note in found for layer in note["layers"]]
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    names = [exported_name(plan, layer["module"]) for layer in layers]
    if lacking := [name for name in [*names, *([head["module"]] if head is not None else [])] if name not in by_module]:
        raise CheckpointError(
            f"{writer.work} holds no {lacking[0]}, which its notes say is compressed; remove it and start again"
        )
    linear_bytes = sum(by_module[name] for name in names)
    dense = (
        whole if before.basis is not None and before.depth is None else plan
    )  # a basis pass may have given the head weights of its own
    own = [dense.head.head.source] if dense.head is not None and not dense.head.head.tied else []
    dense_head_bytes = sum(dense.checkpoint.info(name).nbytes for name in own)
    outside = (
        dense.dense_bytes() - sum(dense.dense_linear_bytes(layer["module"]) for layer in layers) - dense_head_bytes
    )
    if before.head is not None:
        dense_head_bytes = 0 if before.head["tied"] else 2 * before.head["shape"][0] * before.head["shape"][1]
        outside -= 2 * before.head["shape"][0] * before.head["shape"][1]
    calibration = plan.recipe.calibration
    return {
        "version": 1,
        "base_model": whole.checkpoint.spec,
        "recipe": whole.recipe.model_dump(mode="json"),
        "format": plan.recipe.export.format,
        "blocks": len(plan.model.blocks),
        "llm_compressor": _handed_over(writer, whole),
        "depth": before.depth,
        "basis": before.basis,
        "calibration": {
            **calibration.model_dump(mode="json"),
            "tokens": calibration.samples * calibration.sequence_length if _reads_text(plan, whole) else 0,
            "computed_in": whole.compute.name if _computes_on_text(plan, whole) else None,
        },
        "layers": layers,
        "tuning": [note["tuning"] for note in found] if plan.recipe.tune is not None else None,
        "head": head,
        "dense_modules": [{"module": module, "reason": reason} for module, reason in left_dense.items()],
        "kept_zeros": [
            *before.kept_zeros,
            *(name for name, scheme in plan.schemes.items() if scheme.prune == KEEP),
        ],
        "carried": plan.carried_json(),
        "source": whole.source_json(),
        "kept_wide": plan.kept_wide(),
        "not_in_vllm": not_in_vllm(plan),
        "left_behind": whole.left_behind(),
        "sizes": {
            "dense_bytes": whole.dense_bytes(),
            "compressed_bytes": sum(writer.tensor_bytes().values()),
            "outside_bytes": outside,
            "bits_per_weight": round(8 * linear_bytes / weights, 4) if weights else 16.0,
            "head_bytes": 0 if head is None else by_module[head["module"]],
            "dense_head_bytes": dense_head_bytes,
        },
        "training": [notes.read_training(number) for number in range(1, len(plan.training) + 1)],
        "evaluation": None,
    }


def _handed_over(writer: CheckpointWriter, whole: Plan) -> dict[str, Any] | None:
    """What llm-compressor did: its version, its modifiers in their order, whether that was all, and then how the result was
    stored and the share of zeros in it."""
    if whole.recipe.llm_compressor is None:
        return None
    note = read_json(writer.work / LLMCOMPRESSOR)
    return {
        "version": note["llmcompressor"],
        "modifiers": names_of(whole.recipe.llm_compressor),
        "whole": whole.recipe.whole,
        "stored": note.get("stored"),
        "zeros": note.get("zeros"),
    }


def _saved_bytes(plan: Plan) -> dict[str, int]:
    """Bytes of the linears that stay as llm-compressor saved them."""
    opened = plan.checkpoint
    if plan.recipe.export.format != SAVED or not isinstance(opened, DequantizedCheckpoint):
        return {}
    return {
        module: sum(opened.stored.info(f"{module}.{suffix}").nbytes for suffix in one.stored)
        for module, one in opened.modules.items()
    }


def _reads_text(plan: Plan, whole: Plan) -> bool:
    return whole.reads_text or _computes_on_text(plan, whole)


def _computes_on_text(plan: Plan, whole: Plan) -> bool:
    depth = whole.recipe.depth
    return (
        plan.needs_data
        or whole.recipe.basis is not None
        or (depth is not None and (depth.needs_data or whole.needs_data))
    )


def json_text(value: Any) -> str:
    """What a JSON file of an output directory holds."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
