"""The choice of what goes, as the recipe's method and its stop rule make it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsify.compiler.shorten.plan import FEW_ROWS, weights_of
from sparsify.compiler.shorten.source import Source, structures_of
from sparsify.depth import METHODS, best_block
from sparsify.depth.deepest import deepest_block
from sparsify.depth.finercut import METRICS, Greedy, Removal, finercut, kl_divergence, total_distance
from sparsify.depth.layers import Layer, as_layers
from sparsify.depth.stop import (
    free_layers,
    layers_to_drop,
    reached,
    refuse_bound,
    refuse_goal,
    replaced_weights,
    sublayers_to_drop,
)
from sparsify.distributed import device, is_main
from sparsify.files import cache_directory, write_json
from sparsify.model.decoder import BlockModel
from sparsify.model.in_memory import Resident, sublayers_of
from sparsify.model.sequential import Walk
from sparsify.model.sublayers import KINDS, Structure, Sublayer
from sparsify.progress import Task
from sparsify.recipe import Depth
from sparsify.training.block_tuning import Tuned

VERSION = 1  # of the search; raise it when its scores change
COMPARED_TOKENS = 8192  # of those whose states at every layer are kept for cosine similarity


@dataclass
class Choice:
    """What is left, and what metrics.json says of how that came about.

    replaced: for a new layer by its number, the trained tensors of its replacement by their names in the block
    """

    kept: list[Sublayer]
    layers: list[Layer]
    note: dict[str, Any]
    replaced: dict[int, Tuned] = field(default_factory=dict)


def boundary_states(model: BlockModel, tokens: Tensor, positions: Sequence[int]) -> Tensor:
    """Hidden states of some positions of each sequence, entering every layer and leaving the last, by one walk.

    tokens: [samples, T]. Returns [L + 1, samples * positions, d].
    """
    walk = Walk(model, tokens, device=device())
    states = []
    for index in range(len(model.blocks) + 1):
        states.append(torch.cat([walk.hidden[i][:, list(positions)].flatten(0, 1) for i in range(len(walk.hidden))]))
        if index < len(model.blocks):
            walk.replay(index, {})
    return torch.stack(states)


def choose_block(settings: Depth, source: Source, tokens: Tensor | None, bar: Task) -> Choice:
    """Choose a block of consecutive layers."""
    model = source.model
    layers = len(model.blocks)
    structures: dict[int, Structure] = {}
    if (
        settings.replaces and settings.replacement == "feed-forward"
    ):  # how much of a layer that is, one layer tells for all
        structures = dict.fromkeys(range(layers), structures_of(source, [Layer(None, layers // 2)])[layers // 2])
    weights = weights_of(model, structures)
    note: dict[str, Any] = {}
    scores: Tensor | None = None
    method = METHODS.get(settings.method)
    if method is not None:
        assert tokens is not None
        bar.describe(f"depth: {method.measure} of all blocks of layers")
        length = tokens.shape[1]
        stride = 1 if method.last_token else -(-tokens.numel() // COMPARED_TOKENS)
        positions = [length - 1] if method.last_token else range(length - 1, -1, -stride)
        scores = method.score(boundary_states(model, tokens, list(positions)))
        note |= {"measure": method.measure, "matrix": [row[: layers - i].tolist() for i, row in enumerate(scores)]}

    def first_of(count: int) -> int:
        if scores is None or method is None:
            return deepest_block(layers, count, settings.protect_last)
        return best_block(scores, count, settings.protect_first, settings.protect_last, method.greatest)

    def without(count: int) -> list[Sublayer]:
        first = first_of(count)
        return sublayers_of([b for b in range(layers) if not first <= b < first + count])

    more = int(settings.replaces)
    free = free_layers(settings, layers)
    drop = layers_to_drop(settings, layers)
    if drop is None:
        target = settings.target
        assert target is not None
        fits = range(1, free - more + 1)
        if target.has_goal:

            def left(count: int) -> int:
                return weights.of(without(count + more)) + replaced_weights(settings, weights, first_of(count + more))

            drop = next((count for count in fits if reached(settings, weights, left(count))), None)
            if drop is None:
                raise refuse_goal(settings, weights, left(fits[-1]) if fits else weights.blocks, f"{free} layers")
        if target.divergence is not None:
            assert tokens is not None
            judged = tokens if settings.samples else tokens[:FEW_ROWS]
            drop, note["divergence"] = _within(
                target.divergence, drop, fits, lambda n: without(n + more), model, judged, bar
            )
    assert drop is not None
    count = drop + more
    first = first_of(count)
    note |= {"first": first, "count": count}
    if scores is not None:
        note["score"] = float(scores[first, count - 1])
    kept = without(count)
    return Choice(kept, as_layers(kept), note)


def _within(
    bound: float,
    wanted: int | None,
    fits: range,
    without: Callable[[int], list[Sublayer]],
    model: BlockModel,
    tokens: Tensor,
    bar: Task,
) -> tuple[int, float]:
    """The most layers that may go within a bound on the divergence, and that divergence.

    wanted: the number that a goal asks for, which then has to fit.
    """
    resident = Resident(model, tokens, device())
    whole = [
        resident.run(sublayers_of(range(len(model.blocks))), hidden, i) for i, hidden in enumerate(resident.entering)
    ]

    def divergence(count: int) -> float:
        bar.describe(f"depth: divergence without {count} layers")
        total, kept = 0.0, without(count)
        for batch in resident.batches:
            left = resident.logits(resident.run(kept, resident.entering[batch], batch), batch)
            total += total_distance(kl_divergence, resident.logits(whole[batch], batch), left)
        return total / tokens.numel()

    try:
        if wanted is not None:
            if (found := divergence(wanted)) > bound:
                raise refuse_bound(bound, found, f"dropping the {wanted} layers that the goal takes")
            return wanted, found
        best: tuple[int, float] | None = None
        for count in fits:
            found = divergence(count)
            if found > bound:
                if best is None:
                    raise refuse_bound(bound, found, "dropping a single layer")
                break
            best = count, found
        assert best is not None
        return best
    finally:
        resident.close()


class _Record:
    """Removals of earlier searches in the cache, found again for the same model, text, measure and candidates.

    So a search that was killed goes on, and one that is to remove more begins where the last one stopped.
    """

    def __init__(self, settings: Depth, source: Source, tokens: Tensor, search: Greedy):
        self.units = search.units
        protected = sorted((s.block, s.position) for s in search.protected)
        text = hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes()).hexdigest()
        measured = (settings.metric, settings.units, protected, search.model.device, str(source.model.dtype))
        key = repr((VERSION, source.model.checkpoint.fingerprint(), text, *measured))
        self.path = cache_directory() / "finercut" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        self.known = self._read(set(search.kept))

    def _read(self, there: set[Sublayer]) -> list[Removal]:
        try:
            steps = json.loads(self.path.read_text())["steps"]
            gone = [
                tuple(Sublayer(int(block), int(position)) for block, position in step["sublayers"]) for step in steps
            ]
            removals = [Removal(unit, float(step["distance"])) for unit, step in zip(gone, steps, strict=True)]
        except (OSError, ValueError, KeyError, TypeError):
            return []  # none yet, or damaged: it is searched again
        seen = {sublayer for unit in gone for sublayer in unit}
        whole = seen <= there and len(seen) == self.units * len(gone) and all(len(unit) == self.units for unit in gone)
        return removals if whole else []

    def keep(self, removals: Sequence[Removal]) -> None:
        if not is_main() or len(removals) <= len(self.known):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        steps = [{"sublayers": [[s.block, s.position] for s in r.sublayers], "distance": r.distance} for r in removals]
        write_json(self.path, {"steps": steps})


def choose_sublayers(settings: Depth, source: Source, tokens: Tensor, bar: Task) -> Choice:
    """FinerCut's search."""
    model = source.model
    layers = len(model.blocks)
    resident = Resident(model, tokens, device())
    try:
        weights = weights_of(model, {index: resident.structure(index) for index in range(layers)})
        protected = sublayers_of(
            [b for b in range(layers) if b < settings.protect_first or b >= layers - settings.protect_last]
        )
        units = 2 if settings.units == "pairs" else 1
        search = Greedy(resident, sublayers_of(range(layers)), protected, METRICS[settings.metric], units)
        drop, total = sublayers_to_drop(settings, layers), len(KINDS) * layers
        target = settings.target
        bound = target.divergence if target else None

        def enough(kept: Sequence[Sublayer]) -> bool:
            if drop is not None:
                return len(kept) <= total - drop
            return reached(settings, weights, weights.of(kept))

        def report(gone: int) -> None:
            bar.describe(f"depth: {gone} of {drop or 'as many as it takes'} sublayers removed")

        report(0)
        record = _Record(settings, source, tokens, search)

        def advance(removals: list[Removal]) -> None:
            report(total - len(search.kept))
            record.keep(removals)

        removals, exceeded = finercut(search, enough, bound, advance, record.known)
        if exceeded is not None and bound is not None and (not removals or (target is not None and target.has_goal)):
            what = "removing one more sublayer on the way to the goal" if removals else "removing a single sublayer"
            raise refuse_bound(bound, exceeded, what if units == 1 else what.replace("sublayer", "pair of sublayers"))
        if exceeded is None and drop is None and target is not None and target.has_goal and not enough(search.kept):
            raise refuse_goal(settings, weights, weights.of(search.kept), f"{total - len(protected)} sublayers")
        note = {
            "measure": f"{settings.metric} distance of the logits",
            "units": settings.units,
            "steps": [
                {"removed": [[s.block, s.kind] for s in removal.sublayers], "distance": removal.distance}
                for removal in removals
            ],
            "divergence": search.divergence(),
        }
        return Choice(search.kept, as_layers(search.kept), note)
    finally:
        resident.close()
