"""The top of the page: what was done to which model, and the five figures that people ask for first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsify import units
from sparsify.report import svg
from sparsify.report.figures import (
    Layer,
    bits_per_weight,
    export_format_of,
    head_of,
    is_two_four,
    stored_bits,
    subject,
)


@dataclass(frozen=True)
class Card:
    """One figure. value: None where it was not measured; under: what it is, or how to measure it."""

    name: str
    value: str | None
    under: str


def header(
    metrics: Mapping[str, Any], layers: Sequence[Layer], evaluated: Sequence[Mapping[str, Any]], bench: Any
) -> dict[str, Any]:
    """Context of header.html.j2."""
    return {
        "emblem": svg.emblem(),
        "name": model_name(metrics),
        "lead": lead(metrics, layers),
        "chips": describe(metrics, layers),
        "kinds": len({layer.kind for layer in layers}),
        "cards": headline(metrics, layers, evaluated, bench),
    }


def model_name(metrics: Mapping[str, Any]) -> str:
    """`embedded:NAME`, `org/NAME` and `a/path/NAME` are all called NAME."""
    return str(metrics.get("base_model") or "model").rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]


def lead(metrics: Mapping[str, Any], layers: Sequence[Layer]) -> str:
    """How many linears were compressed, layers removed, and how long it took, without the full stop."""
    blocks = len({layer.block for layer in layers})
    text = f"{len(layers)} linears in {blocks} decoder blocks were compressed" if layers else "Nothing was compressed"
    if depth := metrics.get("depth"):
        shorter = f"{depth['layers_before']} decoder layers became {depth['layers_after']}"
        text = f"{shorter}, and {text}" if layers else shorter
    if seconds := metrics.get("seconds"):
        text += f" in {units.span(seconds)}"
    return text


def describe(metrics: Mapping[str, Any], layers: Sequence[Layer]) -> list[str]:
    """What was done, in a few words each."""
    chips = []
    if layers and all(is_two_four(layer) for layer in layers):
        chips.append("2:4 sparse")
    elif any(is_two_four(layer) for layer in layers):
        chips.append(f"{sum(map(is_two_four, layers))} of {len(layers)} linears 2:4 sparse")
    quantized = sorted({layer.bits for layer in layers if layer.bits < 16})
    chips += [f"{bits}-bit weights" for bits in quantized]
    # One number for all of them is a group size; per-channel scales have as many as there are input widths.
    groups = {layer.group_size for layer in layers if layer.bits < 16}
    if quantized and len(groups) == 1:
        chips.append(f"groups of {groups.pop()}")
    for entry in (metrics.get("recipe") or {}).get("passes") or []:
        kind, settings = pass_of(entry)
        if settings.get("method"):
            chips.append(f"{kind}: {settings['method']}")
    if head := head_of(metrics):
        chips.append(f"{head.bits}-bit output head")
    chips.append(f"format {export_format_of(metrics)}")
    return chips


def pass_of(entry: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """A pass is {kind: settings} in a YAML file and {"kind": kind, ...settings} in a dumped Recipe."""
    if "kind" in entry:
        return str(entry["kind"]), entry
    kind = next(iter(entry), "")
    settings = entry.get(kind)
    return str(kind), settings if isinstance(settings, Mapping) else {}


def headline(
    metrics: Mapping[str, Any], layers: Sequence[Layer], evaluated: Sequence[Mapping[str, Any]], bench: Any
) -> list[Card]:
    """The five figures people ask for first, measured or not."""
    cards = []
    given, kind = metrics.get("sizes") or {}, export_format_of(metrics)
    dense, compressed = given.get("dense_bytes"), given.get("compressed_bytes")
    if dense and compressed:
        changed = f"smaller: {units.size(dense)} → {units.size(compressed)}"
        cards.append(Card("Size on disk", units.ratio(dense / compressed), changed))
    else:
        cards.append(Card("Size on disk", None, "not recorded"))
    bits = bits_per_weight(layers, metrics)
    under = "in the compressed linears, dense 16"
    if head := head_of(metrics):
        under = f"in the linears of the blocks, {stored_bits(head, kind):.2f} in the output head, dense 16"
    cards.append(Card("Bits per weight", f"{bits:.2f}" if bits else None, under))
    row = subject([row for row in evaluated if row["texts"]], kind)
    if row and row.get("failure"):
        cards.append(Card("Perplexity", None, row["failure"]["reason"]))
    elif row and row.get("dense_perplexity"):
        before, after = row["dense_perplexity"], row.get("perplexity")
        cards.append(Card("Perplexity", units.number(after), f"dense {units.number(before)}, on {text_of(row)}"))
    elif row:
        cards.append(Card("Perplexity", units.number(row.get("perplexity")), f"on {text_of(row)}"))
    else:
        cards.append(Card("Perplexity", None, "sparsify eval measures it"))
    agreement = row.get("top1_agreement") if row else None
    if agreement is not None:
        cards.append(Card("Top-1 agreement", units.percent(agreement), "same next token as the dense model"))
    else:
        cards.append(Card("Top-1 agreement", None, "sparsify eval --dense measures it"))
    cards.append(speed_card(bench, kind))
    return cards


def speed_card(bench: Mapping[str, Any] | None, kind: str) -> Card:
    """How many times as many tokens per second as the first model, in decoding or else in throughput."""
    models = (bench or {}).get("models") or []
    row = subject(models[1:], kind)
    if not row:
        return Card("Tokens per second", None, "sparsify bench measures it")
    key, what = ("decode", "decoding") if "decode" in row["ratios"] else ("throughput", "throughput")
    if key not in row["ratios"]:
        failed = row.get("failure") or models[0].get("failure")
        return Card("Tokens per second", None, failed["reason"] if failed else "sparsify bench measures it")
    mine, base = tokens_per_second(row, key), tokens_per_second(models[0], key)
    return Card("Tokens per second", units.ratio(row["ratios"][key]), f"{what} in vLLM, {base:.1f} → {mine:.1f} tok/s")


def tokens_per_second(row: Mapping[str, Any], key: str) -> float:
    """Of one row of a benchmark. key: `decode` or `throughput`."""
    if key == "decode":
        return float(row["latency"]["decode_tokens_per_second"])
    return float(row["throughput"]["output_tokens_per_second"])


def text_of(row: Mapping[str, Any]) -> str:
    """What a model was scored on, in words."""
    return "its own samples" if row.get("text_source") == "self" else str(row.get("text") or "the given text")
