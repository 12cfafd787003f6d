"""Depth methods against each other: every method at several shares of the layers, before and after the training that makes up for it.

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
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparsify.bench.recipes import RecipeResult, compare_recipes, first_of
from sparsify.bench.result import BenchResult, ModelSpeed, failures
from sparsify.errors import SparsifyError
from sparsify.evaluation.result import number
from sparsify.failure import Failure, failure_of, foot
from sparsify.files import atomic_write, read_json
from sparsify.lock import only_run
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
    result.failure: why there is no such model; the numbers of layers and parameters are then 0
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
        passes.append({"lora": {"tokens": heal, "samples": 512, **HEALING, "loss": {"kl": 1, "squarehead": 0}}})
    return {"version": 1, "passes": passes, "export": {"format": "dense"}}


def compare_depth(
    model: str, texts: Sequence[str], output: Path, options: DepthOptions
) -> tuple[list[DepthRow], BenchResult | Failure | None]:
    """Make and score all rows, and with options.speed decode with the dense model and one model of each share; where vLLM
    runs none of them, the reason stands in place of the speeds."""
    unknown = [method for method in options.methods if method not in METHODS]
    if unknown:
        raise SparsifyError(f"{unknown[0]} is no depth method; known are {', '.join(METHODS)}")
    with only_run(output):
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
    if result.failure:
        return DepthRow(*key, result, (0, 0), (0, 0))
    depth = read_json(Path(result.directory) / "metrics.json")["depth"]
    parameters = (depth["parameters"]["before"], depth["parameters"]["after"])
    return DepthRow(*key, result, (depth["layers_before"], depth["layers_after"]), parameters)


def closed_gap(cut: RecipeResult, healed: RecipeResult) -> dict[str, float]:
    """1 - (log ppl(healed) - log ppl(dense)) / (log ppl(cut) - log ppl(dense)), by text."""
    shares = {}
    for text, before in cut.evaluation.items():
        dense = before.dense_perplexity
        after = healed.evaluation.get(text)
        if dense is None or not before.perplexity > dense or after is None or after.failure:
            continue
        gap = math.log(before.perplexity / dense)
        shares[text] = 1 - math.log(after.perplexity / dense) / gap
    return shares


def _speed(model: str, rows: Sequence[DepthRow], options: DepthOptions) -> BenchResult | Failure:
    from sparsify.bench import BenchOptions, latency

    chosen = [row for row in rows if row.method == options.methods[-1] and not row.healed and not row.result.failure]
    directories = [open_checkpoint(model).directory, *(Path(row.result.directory) for row in chosen)]
    labels = ["dense", *(row.result.label for row in chosen)]
    try:
        return latency(directories, options=BenchOptions(quiet=options.quiet), labels=labels)
    except SparsifyError as error:  # what took hours to make and to score is shown all the same
        return failure_of(error, "vLLM")


def table(rows: Sequence[DepthRow], speed: BenchResult | Failure | None) -> Table:
    """A row per model, by share and method; the dense model first."""
    ran = [row for row in rows if not row.result.failure]
    texts = list(ran[0].result.evaluation)
    first = ran[0].result.evaluation[texts[0]]
    failed = [failure for row in rows for failure in row.result.failures]
    decoding: dict[str, str | Text] = {}
    if isinstance(speed, Failure):
        failed.append(speed)
        decoding["dense"] = Text(speed.short, "yellow")
    elif speed is not None:
        failed += failures(speed)
        decoding = {row.model: _decoding(row) for row in speed.models}
    view = Table(
        title="Depth methods compared", title_justify="left", caption_justify="left",
        caption=escape(f"{first.tokens} tokens in chunks of {first.sequence_length}; KL(dense || model) in nats per token; "
        "gap closed: of the log-perplexity that removal cost; decoding: tokens per second in vLLM, ratio to dense in one run\n"
        + foot(failed)).rstrip(),
    )  # fmt: skip
    for name in ("removed", "method", "layers", "parameters"):
        view.add_column(name, justify="left" if name == "method" else "right")
    for text in texts:
        view.add_column(f"perplexity, {text}" if len(texts) > 1 else "perplexity", justify="right")
        for name in ("KL", "stability", "gap closed"):
            view.add_column(name, justify="right")
    view.add_column("decoding", justify="right")
    dense: list[str] = []
    for text in texts:
        dense += [number(first_of([row.result for row in ran], text).dense_perplexity), "0", "100.0%", ""]
    view.add_row("0%", "dense", str(ran[0].layers[0]), "100%", *dense, decoding.get("dense", ""), style="dim")
    for row in rows:
        named = Text(row.method + (", healed" if row.healed else ""))
        if row.result.failure:
            view.add_row(row.drop, named, "", "", Text(row.result.failure.short, "yellow"))
            continue
        scores: list[str | Text] = []
        for text, score in row.result.evaluation.items():
            perplexity = Text(score.failure.short, "yellow") if score.failure else number(score.perplexity)
            stable = "–" if score.stability is None else f"{score.stability:.1%}"
            closed = f"{row.closed[text]:.0%}" if text in row.closed else ""
            scores += [perplexity, number(score.kl, 4), stable, closed]
        view.add_row(
            row.drop, named, str(row.layers[1]),
            f"{row.parameters[1] / row.parameters[0]:.0%}", *scores, decoding.get(row.result.label, ""),
        )  # fmt: skip
    return view


def _decoding(row: ModelSpeed) -> str | Text:
    """The ratio to the dense model, or why there is none."""
    if row.failure:
        return Text(row.failure.short, "yellow")
    return f"{row.ratios['decode']:.2f}x" if "decode" in row.ratios else ""
