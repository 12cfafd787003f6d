"""Numbers of the report, derived from the JSON that apply, eval and bench write. No HTML here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsify.model.checkpoint import Checkpoint

LINEARS, EMBEDDINGS, OTHER, HEAD = "decoder linears", "embeddings", "other", "output head"
EMBEDDING_NAMES = re.compile(r"(^|\.)(lm_head|embed_out|(\w*_)?embed(ding)?s?(_\w+)?|wte|wpe)(\.|$)")
SCALE_BITS = 16
HEAT_STEPS = 7


@dataclass(frozen=True)
class Layer:
    """One compressed linear as metrics.json lists it. relative_error is None when no data ran through the model."""

    module: str
    kind: str
    block: int
    shape: tuple[int, int]
    relative_error: float | None
    sparsity: float | None
    bits: int
    group_size: int | None
    pattern: str
    symmetric: bool = True

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class KindSummary:
    """All linears of one kind, such as every down_proj."""

    kind: str
    count: int
    shapes: list[tuple[int, int]]
    weights: int
    bits: list[int]
    sparsity: float | None
    mean_error: float | None
    worst: Layer | None


def read_layers(metrics: Mapping[str, Any]) -> list[Layer]:
    """The layers of metrics.json, in the order of blocks."""
    layers = [
        Layer(
            module=str(entry["module"]),
            kind=kind_of(str(entry["module"]), int(entry["block"])),
            block=int(entry["block"]),
            shape=(int(entry["shape"][0]), int(entry["shape"][1])),
            relative_error=_finite(entry.get("relative_error")),
            sparsity=_finite(entry.get("sparsity")),
            bits=int(entry["bits"]),
            group_size=entry.get("group_size"),
            pattern=str(entry.get("pattern") or "dense"),
            symmetric=bool(entry.get("symmetric", True)),
        )
        for entry in metrics.get("layers") or []
    ]
    return sorted(layers, key=lambda layer: layer.block)  # stable: the order inside a block stays


def kind_of(module: str, block: int) -> str:
    """`model.layers.3.mlp.down_proj` in block 3 is a `mlp.down_proj`."""
    before, found, after = module.partition(f".{block}.")
    return after if found and after else module


def short_kinds(kinds: Iterable[str]) -> dict[str, str]:
    """Full kind -> its last component where that is unique, as `down_proj`; the full kind elsewhere."""
    names = list(dict.fromkeys(kinds))
    last = [name.rsplit(".", 1)[-1] for name in names]
    return {name: end if last.count(end) == 1 else name for name, end in zip(names, last, strict=True)}


def by_kind(layers: Sequence[Layer]) -> list[KindSummary]:
    """One summary per kind, in order of first appearance."""
    return [_summary(kind, [x for x in layers if x.kind == kind]) for kind in dict.fromkeys(x.kind for x in layers)]


def _summary(kind: str, members: Sequence[Layer]) -> KindSummary:
    measured = [layer for layer in members if layer.relative_error is not None]
    weights = sum(layer.weights for layer in members)
    known = [(layer.sparsity, layer.weights) for layer in members if layer.sparsity is not None]
    return KindSummary(
        kind=kind,
        count=len(members),
        shapes=sorted({layer.shape for layer in members}),
        weights=weights,
        bits=sorted({layer.bits for layer in members}),
        sparsity=sum(s * w for s, w in known) / sum(w for _, w in known) if known else None,
        mean_error=mean([layer.relative_error for layer in measured]),
        worst=max(measured, key=lambda layer: layer.relative_error or 0) if measured else None,
    )


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is known; None when nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def errors_by_block(layers: Sequence[Layer]) -> list[tuple[int, float, float, float]]:
    """(block, least, mean, greatest relative error) of every block that has one."""
    blocks: dict[int, list[float]] = {}
    for layer in layers:
        if layer.relative_error is not None:
            blocks.setdefault(layer.block, []).append(layer.relative_error)
    return [(block, min(e), sum(e) / len(e), max(e)) for block, e in sorted(blocks.items())]


def heat_edges(values: Sequence[float], steps: int = HEAT_STEPS) -> list[float]:
    """Upper edges of `steps` colours between the least and the greatest value, evenly spaced in the logarithm.

    Errors of linears spread over orders of magnitude: on a linear scale one bad layer would bleach all others.
    """
    positive = [value for value in values if value > 0]
    if not positive:
        return [0.0]
    low, high = min(positive), max(positive)
    if high / low < 1.05:
        return [high]
    return [low * (high / low) ** ((i + 1) / steps) for i in range(steps)]


def heat_step(value: float, edges: Sequence[float]) -> int:
    """Index of the colour of a value."""
    for i, edge in enumerate(edges):
        if value <= edge * (1 + 1e-9):
            return i
    return len(edges) - 1


def is_two_four(layer: Layer) -> bool:
    """Whether at most two of every four consecutive inputs of a linear have a weight."""
    return layer.pattern == "2:4"


def stored_bits(layer: Layer, export_format: str) -> float:
    """Bits per dense weight on disk (design, section 5): values, 2 index bits per kept value, scales and zero points."""
    sparse = is_two_four(layer) and export_format == "sparse24"
    if export_format == "dense" or layer.bits == 16:
        return 9.0 if sparse else 16.0
    zero_point = 0 if layer.symmetric else 8 if export_format == "sparse24" else layer.bits
    scale = (SCALE_BITS + zero_point) / (layer.group_size or layer.shape[1])
    return (layer.bits / 2 + 1 if sparse else layer.bits) + scale


def bits_per_weight(layers: Sequence[Layer], metrics: Mapping[str, Any]) -> float | None:
    """Mean bits per weight of the compressed linears: from the bytes on disk when they are known."""
    weights = sum(layer.weights for layer in layers)
    if not weights:
        return None
    if recorded := (metrics.get("sizes") or {}).get("bits_per_weight"):
        return float(recorded)
    parts = ((metrics.get("sizes") or {}).get("parts") or {}).get("compressed") or {}
    if parts.get(LINEARS):
        return float(parts[LINEARS]) * 8 / weights
    export_format = export_format_of(metrics)
    return sum(stored_bits(layer, export_format) * layer.weights for layer in layers) / weights


def export_format_of(metrics: Mapping[str, Any]) -> str:
    """The format that the recipe exports to."""
    return str(((metrics.get("recipe") or {}).get("export") or {}).get("format") or "sparse24")


def head_of(metrics: Mapping[str, Any]) -> Layer | None:
    """The quantized output head, which lies in no block (-1); None when the head stayed as it was."""
    entry = metrics.get("head")
    if not entry:
        return None
    return Layer(
        module=str(entry["module"]),
        kind=str(entry["module"]),
        block=-1,
        shape=(int(entry["shape"][0]), int(entry["shape"][1])),
        relative_error=None,
        sparsity=None,
        bits=int(entry["bits"]),
        group_size=entry.get("group_size"),
        pattern=str(entry.get("pattern") or "dense"),
    )


def size_parts(checkpoint: Checkpoint, modules: Iterable[str], head: str | None = None) -> dict[str, int]:
    """Bytes of a checkpoint by part; `modules` are the names of the linears that were compressed, `head` that of the
    output head when it was: then it is a part of its own, empty in a dense model that ties it.

    Call it for the dense and for the compressed checkpoint and keep both as metrics["sizes"]["parts"] =
    {"dense": ..., "compressed": ...}; without it embeddings count as "other".
    """
    compressed = set(modules)
    parts = dict.fromkeys((LINEARS, EMBEDDINGS, OTHER, *((HEAD,) if head else ())), 0)
    for name in checkpoint.names():
        if name.rpartition(".")[0] in compressed:
            part = LINEARS
        elif head and name.rpartition(".")[0] == head:
            part = HEAD
        else:
            part = EMBEDDINGS if EMBEDDING_NAMES.search(name) else OTHER
        parts[part] += checkpoint.info(name).nbytes
    return parts


def sizes(metrics: Mapping[str, Any]) -> list[tuple[str, dict[str, int]]]:
    """[(label, bytes by part)] for the dense and the compressed checkpoint."""
    given = metrics.get("sizes") or {}
    totals = {"dense": given.get("dense_bytes"), "compressed": given.get("compressed_bytes")}
    layers, export_format = read_layers(metrics), export_format_of(metrics)
    computed = {
        "dense": sum(2 * layer.weights for layer in layers),
        "compressed": sum(round(stored_bits(layer, export_format) * layer.weights / 8) for layer in layers),
    }
    found = []
    for which, label in (("dense", "dense"), ("compressed", export_format)):
        if parts := (given.get("parts") or {}).get(which):
            names = (LINEARS, EMBEDDINGS, OTHER, *((HEAD,) if metrics.get("head") else ()))
            found.append((label, {name: int(parts.get(name, 0)) for name in names}))
        elif total := totals[which]:
            outside = given.get("outside_bytes")
            head = int(given.get("dense_head_bytes" if which == "dense" else "head_bytes") or 0)
            linears = min(int(total), computed[which]) if outside is None else int(total) - int(outside) - head
            stack = {LINEARS: linears, OTHER: int(total) - linears - head}
            found.append((label, {**stack, HEAD: head} if metrics.get("head") else stack))
    return found if len(found) == 2 else []


def as_list(results: Any) -> list[dict[str, Any]]:
    """One evaluation, several, or none, as a list of rows with their texts."""
    if not results:
        return []
    return [with_texts(row) for row in ([results] if isinstance(results, Mapping) else results)]


def rows_of(given: Iterable[Any]) -> list[Any]:
    """The evaluations of several files, each of which holds one or a list."""
    return [row for one in given for row in (one if isinstance(one, list) else [one])]


def with_texts(row: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of an evaluation with `texts`, which one that is older lacks, and at its top the failure of the first text alone."""
    texts = row.get("texts")
    if texts is None:
        texts = {} if row.get("tokens") is None else {str(row.get("text") or "the given text"): row}
    first: Mapping[str, Any] = next(iter(texts.values()), {})
    return {**row, "texts": texts, "failure": first.get("failure")}


def subject(rows: Sequence[Mapping[str, Any]], export_format: str) -> Mapping[str, Any] | None:
    """The row of the model this report is about: the one in the recipe's format, else the last."""
    matching = [row for row in rows if row.get("format") == export_format] or list(rows)
    return matching[-1] if matching else None


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
