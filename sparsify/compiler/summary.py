"""The table at the end of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparsify.compiler.model_card import (
    basis_in_words,
    evaluation_in_words,
    head_in_words,
    made_in_words,
    training_in_words,
)
from sparsify.compiler.plan_table import carried_in_words, kinds_in_words
from sparsify.compiler.run_phases import phases_in_words
from sparsify.compiler.shorten import describe_note
from sparsify.formats.foreign import source_in_words


def summary(metrics: Mapping[str, Any], title: str, record: Mapping[str, Any] | None = None) -> Table:
    """What metrics.json and run.json (`record`) hold, as the table that a person reads at the end of a run."""
    sizes, layers = metrics["sizes"], metrics["layers"]
    table = Table(title=escape(title), show_header=False)

    def add_row(what: str, said: str) -> None:
        table.add_row(Text(what), Text(said))

    add_row("linears compressed", f"{len(layers)} in {metrics['blocks']} blocks")
    if depth := metrics.get("depth"):
        add_row("depth", describe_note(depth))
    if basis := metrics.get("basis"):
        add_row("basis", basis_in_words(basis))
    if made := metrics.get("llm_compressor"):
        add_row(f"llm-compressor {made['version']}", made_in_words(made))
    ratio = sizes["dense_bytes"] / sizes["compressed_bytes"]
    add_row(
        "size",
        f"{sizes['dense_bytes'] / 1e6:.0f} MB -> {sizes['compressed_bytes'] / 1e6:.0f} MB ({ratio:.2f} times smaller)",
    )
    add_row("bits per linear weight", f"{sizes['bits_per_weight']:.2f}")
    if head := metrics["head"]:
        add_row("output head", head_in_words(head, sizes["head_bytes"]))
    errors = [layer["relative_error"] for layer in layers if layer["relative_error"] is not None]
    if errors:
        worst = max(layers, key=lambda layer: layer["relative_error"] or 0)
        add_row("output error, mean", f"{sum(errors) / len(errors):.4f}")
        add_row("output error, worst", f"{worst['relative_error']:.4f} at {worst['module']}")
    for what, said in tokens_of_experts(layers):
        add_row(what, said)
    for reason, count in Counter(entry["reason"] for entry in metrics["dense_modules"]).items():
        add_row("left dense", f"{count}: {reason}")
    if kept := metrics.get("kept_zeros"):
        add_row("zeros kept", f"in {len(kept)} linears that were 2:4 already")
    if source := metrics.get("source"):
        add_row("source", source_in_words(source))
    if carried := metrics.get("carried"):
        add_row("carried over", carried_in_words(carried).partition(": ")[2])
    if wide := metrics.get("kept_wide"):
        add_row("wider than 16 bits", kinds_in_words(wide))
    if behind := metrics.get("left_behind"):
        add_row("left behind", f"{', '.join(behind)}: adapters, and what looks like a credential")
    for training in metrics["training"]:
        add_row(training["kind"], training_in_words(training))
    if evaluation := metrics.get("evaluation"):
        for name, value in evaluation_in_words(evaluation):
            add_row(name, value)
    for name, value in phases_in_words(record) if record else ():
        add_row(name, value)
    return table


def tokens_of_experts(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Tokens that experts were given, and how many had too few of them; [] where no expert was solved on tokens."""
    linears = [layer for layer in layers if "tokens" in layer]
    experts = {layer["module"].rpartition(".")[0]: layer["tokens"] for layer in linears}
    if not experts:
        return []
    counts = sorted(experts.values())
    said = [
        ("tokens per expert", f"{counts[0]} to {counts[-1]}, median {counts[len(counts) // 2]}, {len(counts)} experts")
    ]
    few = {layer["module"].rpartition(".")[0] for layer in linears if layer["tokens"] and layer["shrinkage"]}
    if few:
        said.append(
            ("few tokens", f"{len(few)} experts had fewer than twice their inputs: Hessian shrunk toward the layer's")
        )
    if none := [name for name, tokens in experts.items() if not tokens]:
        said.append(("no token", f"{len(none)} experts, solved on the layer's Hessian, the first {none[0]}"))
    return said
