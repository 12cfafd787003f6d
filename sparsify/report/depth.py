"""Pictures of a depth pass: the map of all blocks of layers that could go, and what did go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsify import units
from sparsify.report.figures import heat_edges, heat_step
from sparsify.report.svg import Drawing, every

KIND_NAMES = {"attention": "attention", "feed_forward": "feed-forward"}


def block_map(depth: Mapping[str, Any], width: float) -> str:
    """A cell for every block of layers: its first layer from left to right, how many layers from bottom to top, coloured by how
    much changes across it. The chosen block has a frame. The picture of arXiv 2403.17887, figure 4."""
    rows: Sequence[Sequence[float]] = depth["matrix"]
    layers, measure = len(rows), depth["measure"]
    similar = "similarity" in measure
    changes = {(first, n): (1 - v if similar else v) for first, row in enumerate(rows) for n, v in enumerate(row, 1)}
    edges = heat_edges(list(changes.values()))
    left, axis = 44, 40
    cell = (width - left) / layers
    gap = 1 if cell > 8 else min(1, cell / 5)
    chosen = (depth["first"], depth["count"])
    drawing = Drawing(
        width, layers * cell + axis,
        f"Map of the {measure} across every block of layers; the block of {chosen[1]} from layer {chosen[0]} on was removed",
    )  # fmt: skip
    for (first, n), change in changes.items():
        value = rows[first][n - 1]
        css = f"cell h{heat_step(change, edges) if len(edges) > 1 else 2}" + (" chosen" if (first, n) == chosen else "")
        title = f"{n} layers, {first} to {first + n - 1}: {measure} {value:.4g}"
        drawing.rect(left + first * cell, (layers - n) * cell, cell - gap, cell - gap, css, title)
    stride = every(layers, width - left)
    for i in range(0, layers, stride):
        drawing.text(left + (i + 0.5) * cell, layers * cell + 15, str(i), "tick", "middle")
        drawing.text(left - 8, (layers - i - 0.5) * cell + 4, str(i + 1), "tick", "end")
    drawing.text(width, layers * cell + 34, "first layer of the block; upwards: how many layers", "tick", "end")
    return drawing.render()


def removal_strip(depth: Mapping[str, Any], width: float) -> str:
    """Attention and feed-forward of every layer of the whole model: what stayed, and what went in which step."""
    layers = depth["layers_before"]
    steps = {
        tuple(entry): number for number, step in enumerate(depth.get("steps") or [], 1) for entry in step["removed"]
    }
    gone = {tuple(entry) for entry in depth["removed"]}
    left, row, axis = 100, 26, 22
    cell = (width - left) / layers
    gap = 2 if cell > 8 else min(1, cell / 5)
    drawing = Drawing(
        width, len(KIND_NAMES) * row + axis, f"{len(gone)} of {2 * layers} sublayers of {layers} layers were removed"
    )  # fmt: skip
    for i, (kind, name) in enumerate(KIND_NAMES.items()):
        drawing.text(left - 10, i * row + 17, name, "label", "end")
        for block in range(layers):
            removed = (block, kind) in gone
            state = "removed" if removed else "kept"
            number = steps.get((block, kind))
            title = f"layer {block}, {name}: {state}" + (f" in step {number}" if number else "")
            x = left + block * cell
            css = "cell track" if removed else "cell ours"
            drawing.rect(x, i * row + 1, cell - gap, row - 3, css, title, radius=min(4, cell / 4))
            if number and cell >= 18:
                drawing.text(x + (cell - gap) / 2, i * row + 17, str(number), "tick", "middle")
    for block in range(0, layers, every(layers, width - left)):
        drawing.text(left + (block + 0.5) * cell - gap / 2, len(KIND_NAMES) * row + 15, str(block), "tick", "middle")
    drawing.text(left - 10, len(KIND_NAMES) * row + 15, "layer", "tick", "end")
    return drawing.render()


def depth_facts(depth: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the pass did, as pairs of words. Nothing here needs escaping."""
    before, after = depth["parameters"]["before"], depth["parameters"]["after"]
    found = [
        ("layers", f"{depth['layers_before']} → {depth['layers_after']}"),
        ("parameters", f"{units.count(before)} → {units.count(after)} ({after / before:.0%})"),
        ("weights read per token", f"{depth['speedup_estimate']:.2f} times fewer"),
    ]
    halves = sum(None in layer for layer in depth["layers"])
    if halves:
        found.append(("layers of one half", f"{halves}, with zero weights for the other"))
    if depth.get("score") is not None:
        found.append((depth["measure"], f"{depth['score']:.4g} across the removed block"))
    if depth.get("divergence") is not None:
        found.append(
            ("divergence", f"{depth['divergence']:.4g} nats per token from the model before, on calibration text")
        )
    if replacement := depth.get("replacement"):
        loss = f"loss {replacement['before']:.4g} → {replacement['after']:.4g} on held-out sequences"
        found.append((f"trained {replacement['kind']}", f"{replacement['steps']:,} steps, {loss}"))
        if better := replacement.get("next_token"):
            found.append(("next-token loss", f"{better['before']:.4g} → {better['after']:.4g} on held-out sequences"))
    return found


def removed_rows(depth: Mapping[str, Any]) -> list[list[Any]]:
    """Layer, part and step of everything that was removed; no step where all went at once."""
    steps = {
        tuple(entry): number for number, step in enumerate(depth.get("steps") or [], 1) for entry in step["removed"]
    }
    return [[*entry, steps.get(tuple(entry))] for entry in depth["removed"]]
