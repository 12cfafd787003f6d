"""Depth methods against each other: every method at several shares of the layers, before and after what is to make up for it.

The recipes are written into the output directory and run by `bench recipes`, so an interrupted table goes on where it was, and
each of its rows can be made again with `sparsify apply`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from sparsify.bench.recipes import RecipeResult, compare_recipes
from sparsify.bench.result import BenchResult
from sparsify.errors import SparsifyError
from sparsify.evaluation.result import number
from sparsify.files import atomic_write, read_json
from sparsify.model.checkpoint import open_checkpoint

METHODS: dict[str, dict[str, Any]] = {
    "deepest": {"method": "deepest"},
    "angular": {"method": "angular"},
    "streamline": {"method": "streamline", "replacement": "none"},
    "finercut": {"method": "finercut", "units": "pairs"},
    "finercut-free": {"method": "finercut", "units": "sublayers"},
}
DROPS = ("10%", "20%", "30%", "50%")
HEALING = {"sequence_length": 512, "batch_size": 4, "learning_rate": 0.005}


@dataclass(frozen=True)
class DepthOptions:
    """What a table of depth methods holds.

    heal: tokens that the adapters learn from, as in a recipe ("500k"); None leaves healing out
    speed: also decode in vLLM with the dense model and the last method's result at every share
    """

    drops: Sequence[str] = DROPS
    methods: Sequence[str] = ("deepest", "angular", "streamline", "finercut")
    heal: str | None = "500k"
    speed: bool = False
    overrides: Sequence[str] = field(default_factory=tuple)
    sequence_length: int | None = None
    chunks: int | None = None
    quiet: bool = False


@dataclass(frozen=True)
class DepthRow:
    """One model. healed: after the training of a replacement, or of adapters; layers, parameters: before and after.

    closed: what share of the gap in log-perplexity between the cut and the whole model healing closed, by text
    """

    method: str
    drop: str
    healed: bool
    result: RecipeResult
    layers: tuple[int, int]
    parameters: tuple[int, int]
    closed: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "result": self.result.to_json()}


def recipe_of(method: str, drop: str, heal: str | None) -> dict[str, Any]:
    """The recipe of one row. LLM-Streamline makes up for what it removes by its replacement, the others by adapters."""
    depth = {**METHODS[method], "drop": drop}
    passes: list[dict[str, Any]] = [{"depth": depth}]
    if heal is not None and method == "streamline":
        depth["replacement"] = "layer"
    elif heal is not None:
        weights = {"feature": 0, "logits": 1}
        passes.append({"lora": {"tokens": heal, "samples": 512, **HEALING, "weights": weights}})
    return {"version": 1, "passes": passes, "export": {"format": "dense"}}


def compare_depth(
    model: str, texts: Sequence[str], output: Path, options: DepthOptions
) -> tuple[list[DepthRow], BenchResult | None]:
    """Make and score all rows, and with options.speed decode with the dense model and one model of each share."""
    unknown = [method for method in options.methods if method not in METHODS]
    if unknown:
        raise SparsifyError(f"{unknown[0]} is no depth method; known are {', '.join(METHODS)}")
    (output / "recipes").mkdir(parents=True, exist_ok=True)
    rows: dict[str, tuple[str, str, bool]] = {}
    specs = []
    for drop in options.drops:
        for method in options.methods:
            for heal in (None, options.heal) if options.heal else (None,):
                label = f"{method}-{drop.removesuffix('%')}" + ("-healed" if heal else "")
                file = output / "recipes" / f"{label}.yaml"
                atomic_write(file, yaml.safe_dump(recipe_of(method, drop, heal), sort_keys=False))
                rows[label] = (method, drop, heal is not None)
                specs.append(f"{label}={file}")
    results = compare_recipes(
        specs, model, texts, output, options.overrides, options.sequence_length, options.chunks, options.quiet
    )
    found = [_row(rows[result.label], result) for result in results]
    cut = {(row.method, row.drop): row for row in found if not row.healed}
    for row in found:
        if row.healed:
            row.closed.update(closed_gap(cut[row.method, row.drop].result, row.result))
    return found, _speed(model, found, options) if options.speed else None


def _row(key: tuple[str, str, bool], result: RecipeResult) -> DepthRow:
    depth = read_json(Path(result.directory) / "metrics.json")["depth"]
    parameters = (depth["parameters"]["before"], depth["parameters"]["after"])
    return DepthRow(*key, result, (depth["layers_before"], depth["layers_after"]), parameters)


def closed_gap(cut: RecipeResult, healed: RecipeResult) -> dict[str, float]:
    """1 - (log ppl(healed) - log ppl(dense)) / (log ppl(cut) - log ppl(dense)), by text."""
    shares = {}
    for text, before in cut.evaluation.items():
        dense = before.dense_perplexity
        if dense is None or not before.perplexity > dense:
            continue
        gap = math.log(before.perplexity / dense)
        shares[text] = 1 - math.log(healed.evaluation[text].perplexity / dense) / gap
    return shares


def _speed(model: str, rows: Sequence[DepthRow], options: DepthOptions) -> BenchResult:
    from sparsify.bench import BenchOptions, latency

    chosen = [row for row in rows if row.method == options.methods[-1] and not row.healed]
    directories = [open_checkpoint(model).directory, *(Path(row.result.directory) for row in chosen)]
    labels = ["dense", *(row.result.label for row in chosen)]
    return latency(directories, options=BenchOptions(quiet=options.quiet), labels=labels)


def table(rows: Sequence[DepthRow], speed: BenchResult | None) -> Table:
    """A row per model, by share and method; the dense model first."""
    texts = list(rows[0].result.evaluation)
    first = rows[0].result.evaluation[texts[0]]
    view = Table(
        title="Depth methods compared", title_justify="left", caption_justify="left",
        caption=f"{first.tokens} tokens in chunks of {first.sequence_length}; KL(dense || model) in nats per token; gap closed: of "
        "the log-perplexity that removal cost; decoding: tokens per second in vLLM, ratio to dense in one run",
    )  # fmt: skip
    for name in ("removed", "method", "layers", "parameters"):
        view.add_column(name, justify="left" if name == "method" else "right")
    for text in texts:
        view.add_column(f"perplexity, {text}" if len(texts) > 1 else "perplexity", justify="right")
        for name in ("KL", "stability", "gap closed"):
            view.add_column(name, justify="right")
    view.add_column("decoding", justify="right")
    ratios = {} if speed is None else {m.model: m.ratios.get("decode") for m in speed.models}
    dense: list[str] = []
    for text in texts:
        dense += [number(rows[0].result.evaluation[text].dense_perplexity), "0", "100.0%", ""]
    view.add_row("0%", "dense", str(rows[0].layers[0]), "100%", *dense, "1.00x" if speed else "", style="dim")
    for row in rows:
        scores: list[str] = []
        for text, score in row.result.evaluation.items():
            stable = "–" if score.stability is None else f"{score.stability:.1%}"
            closed = f"{row.closed[text]:.0%}" if text in row.closed else ""
            scores += [number(score.perplexity), number(score.kl, 4), stable, closed]
        ratio = ratios.get(row.result.label)
        view.add_row(
            row.drop, Text(row.method + (", healed" if row.healed else "")), str(row.layers[1]),
            f"{row.parameters[1] / row.parameters[0]:.0%}", *scores, f"{ratio:.2f}x" if ratio else "",
        )  # fmt: skip
    return view
