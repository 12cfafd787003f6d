"""Sections about what was done to the model: layers removed, training, every linear, what stayed dense, the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import yaml

from sparsify import units
from sparsify.report import svg
from sparsify.report.depth import block_map, depth_facts, removal_strip, removed_rows
from sparsify.report.figures import KindSummary, Layer, by_kind, errors_by_block, head_of, short_kinds
from sparsify.report.parts import HALF, Cell, Facts, Table, picture


def depth(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Context of depth.html.j2: which layers were removed, and why these. None where none were."""
    note = metrics.get("depth")
    if not note:
        return None
    context: dict[str, Any] = {
        "facts": [(name, [str(value)]) for name, value in depth_facts(note)],
        "measure": note["measure"],
        "removed": picture(
            lambda w: removal_strip(note, w), "layers-removed", ["layer", "part", "step"], removed_rows(note)
        ),
        "cost": None,
        "map": None,
    }
    if steps := note.get("steps"):
        curve = [(number, float(step["distance"])) for number, step in enumerate(steps, 1)]
        label = f"{note['measure']} after each of {len(steps)} removals, at last {curve[-1][1]:.4g}"
        context["cost"] = picture(
            partial(svg.loss_curve, curve, label=label), "cost-of-removals", ["removals", note["measure"]], curve
        )
    if note.get("matrix"):
        cells = [(first, n, value) for first, row in enumerate(note["matrix"]) for n, value in enumerate(row, 1)]
        head = ["first layer", "layers", note["measure"]]
        context["map"] = picture(lambda w: block_map(note, w), "blocks-of-layers", head, cells, HALF + 164)
    return context


def training(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Context of training.html.j2: one table and one curve for each training pass."""
    runs = []
    for note in metrics.get("training") or []:
        curve = [(int(step), float(loss)) for step, loss in note["curve"]]
        first, last = note["first"], note["last"]
        facts: Facts = [
            ("steps", [f"{note['steps']:,}"]),
            ("tokens", [f"{units.count(note['tokens'])} of {note['rows']:,} rows"]),
            ("teacher", [Cell(note["teacher"], code=True) if note.get("teacher") else "none"]),
        ]
        if masks := note.get("masks"):
            moved = f"{masks['method']}, up to step {masks['last_change']}: {masks['moved']:.1%} of the kept weights are new"
            facts.append(("learned masks", [moved]))
        for name in first:
            if name in last:
                facts.append((name.replace("_", " "), [f"{first[name]:.4g} → {last[name]:.4g}"]))
        label = f"Loss of {note['kind']}, from {first['loss']:.4g} to {last['loss']:.4g}"
        drawn = picture(partial(svg.loss_curve, curve, label=label), f"loss-{note['kind']}", ["step", "loss"], curve)
        measured = None
        if held_out := note.get("held_out"):
            facts.append((f"divergence on {held_out['source']}", [_kept_state(held_out)]))
            points = [(int(step), float(found)) for step, found in held_out["curve"]]
            measured = picture(
                partial(svg.loss_curve, points, label=f"Divergence on held-out text: {_kept_state(held_out)}"),
                f"divergence-{note['kind']}",
                ["step", "divergence"],
                points,
            )
        runs.append({"kind": note["kind"], "facts": facts, "curve": drawn, "held_out": measured})
    return runs


def _kept_state(held_out: Mapping[str, Any]) -> str:
    """`1.24 → 0.912 at step 120, where training stopped early`"""
    stopped = "; training stopped early" if held_out["stopped"] else ""
    return f"{held_out['curve'][0][1]:.4g} → {held_out['best']:.4g}, the state of step {held_out['best_step']}{stopped}"


def by_layer(metrics: Mapping[str, Any], layers: Sequence[Layer]) -> dict[str, Any] | None:
    """Context of layers.html.j2; None where no linear was compressed. No pictures where no error was measured."""
    if not layers:
        return None
    measured = any(layer.relative_error is not None for layer in layers)
    head = ["module", "block", "kind", "outputs", "inputs", "bits", "zeros", "relative error"]
    rows = [[one.module, one.block, one.kind, *one.shape, one.bits, one.sparsity, one.relative_error] for one in layers]
    blocks = ["block", "least", "mean", "greatest"]
    return {
        "heat_map": picture(lambda w: svg.heat_map(layers, w), "error-of-linears", head, rows) if measured else None,
        "by_depth": picture(lambda w: svg.depth_chart(layers, w), "error-by-depth", blocks, errors_by_block(layers))
        if measured
        else None,
        "kinds": kind_table(layers, head_of(metrics)),
        "all": full_table(layers),
    }


def kind_table(layers: Sequence[Layer], output_head: Layer | None = None) -> Table:
    """One row per kind of linear, and one for a quantized output head."""
    names = short_kinds(layer.kind for layer in layers)
    kinds = by_kind(layers)
    largest = max([kind.mean_error or 0 for kind in kinds] + [1e-30])
    rows = [kind_row(kind, names[kind.kind], largest) for kind in kinds]
    if output_head is not None:
        n, k = output_head.shape
        name = Cell(output_head.kind, sub="output head")
        rows.append([name, "1", f"{n} × {k}", units.count(n * k), str(output_head.bits), "–", "–", "–"])
    return Table(["linear", "count", "shape", "weights", "bits", "zeros", "mean error", "worst"], rows)


def kind_row(kind: KindSummary, name: str, largest: float) -> list[str | Cell]:
    """largest: the mean error that the longest bar stands for."""
    shapes = ", ".join(f"{n} × {k}" for n, k in kind.shapes[:2]) + (" …" if len(kind.shapes) > 2 else "")
    mean: str | Cell = units.error(kind.mean_error)
    if kind.mean_error is not None:
        text = units.error(kind.mean_error)
        mean = Cell(text, picture=svg.mini_bar(kind.mean_error / largest, f"mean error {text}"))
    worst: str | Cell = "–"
    if kind.worst is not None:
        worst = Cell(units.error(kind.worst.relative_error), sub=f"block {kind.worst.block}")
    return [
        name, str(kind.count), shapes, units.count(kind.weights), ", ".join(map(str, kind.bits)),
        units.percent(kind.sparsity), mean, worst,
    ]  # fmt: skip


def full_table(layers: Sequence[Layer]) -> Table:
    """One row per linear."""
    rows: list[list[str | Cell]] = [
        [
            Cell(layer.module, code=True), f"{layer.shape[0]} × {layer.shape[1]}", str(layer.bits),
            str(layer.group_size or "–"), units.percent(layer.sparsity), units.error(layer.relative_error),
        ]
        for layer in layers
    ]  # fmt: skip
    return Table(["module", "shape", "bits", "group", "zeros", "error"], rows)


def dense_modules(metrics: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Context of dense.html.j2: why modules stayed dense, and which, the most frequent reason first."""
    by_reason: dict[str, list[str]] = {}
    for entry in metrics.get("dense_modules") or []:
        by_reason.setdefault(str(entry.get("reason") or "no reason recorded"), []).append(str(entry.get("module")))
    return sorted(by_reason.items(), key=lambda item: -len(item[1]))


def recipe(metrics: Mapping[str, Any]) -> str | None:
    """The recipe of the run as YAML; None where it was not recorded."""
    given = metrics.get("recipe")
    if not given or isinstance(given, str):
        return given or None
    return str(yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=100))
