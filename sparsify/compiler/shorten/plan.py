"""What a depth pass will do to a model, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsify.compiler.plan_training import short
from sparsify.compiler.shorten.fit import refuse_misfits
from sparsify.depth import METHODS
from sparsify.depth.stop import (
    Weights,
    free_layers,
    layers_to_drop,
    reached,
    refuse_goal,
    replaced_weights,
    sublayers_to_drop,
)
from sparsify.errors import RecipeError
from sparsify.model.decoder import BlockModel
from sparsify.model.sublayers import FEED_FORWARD, KINDS, Structure
from sparsify.recipe import Depth

FEW_ROWS = 16  # what a divergence is judged by unless the recipe says otherwise
SEARCHED_ROWS = 4  # what FinerCut judges every candidate by in every step


@dataclass(frozen=True)
class PlannedDepth:
    """What the depth pass will do to a model of so many layers.

    left: how many parameters the blocks will hold; only an upper bound where a divergence decides
    """

    settings: Depth
    weights: Weights
    left: int
    exact: bool

    @property
    def share(self) -> float:
        """What share of the blocks' weights will be left."""
        return self.left / max(self.weights.blocks, 1)

    def describe(self) -> str:
        """`depth: angular drops 6 of 30 layers, ...; about 80% of their weights are left`"""
        settings, layers = self.settings, self.weights.layers
        target = settings.target
        if settings.method == "finercut":
            pairs = " in pairs" if settings.units == "pairs" else ""
            what = f"of {len(KINDS) * layers} sublayers{pairs}, each time the least missed by {settings.metric} distance of the logits"
            count = sublayers_to_drop(settings, layers)
        else:
            how = (
                "the block before the last" if settings.method == "deepest" else f"the block of {_criterion(settings)}"
            )
            what = f"of {layers} layers, {how}"
            count = layers_to_drop(settings, layers)
        if settings.replaces:
            what += f", and trains one {settings.replacement} in place of them and one more"
        if count is not None:
            return f"depth: {settings.method} drops {count} {what}; about {self.share:.0%} of their weights are left"
        assert target is not None
        goals = [f"at most {target.parameters:.0%} of all parameters"] if target.parameters else []
        goals += [f"decoding about {target.speedup:g} times faster"] if target.speedup else []
        goals += [f"within {target.divergence:g} nats per token of the model before"] if target.divergence else []
        size = f"about {self.share:.0%} of their weights are left" if self.exact else "how many only the text can say"
        return f"depth: {settings.method} drops as many {what}, as it takes for {' and '.join(goals)}; {size}"

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.settings.method,
            "layers": self.weights.layers,
            "weights_left": round(self.share, 4),
            "exact": self.exact,
            "speedup": round(self.weights.speedup(self.left), 3),
        }


def _criterion(settings: Depth) -> str:
    method = METHODS[settings.method]
    return f"{'greatest' if method.greatest else 'least'} {method.measure}"


def plan_depth(settings: Depth, model: BlockModel) -> PlannedDepth:
    """Check a depth pass against a model. RecipeError when it asks for what no choice could give, CheckpointError when no layer
    of this architecture can go; runs nothing."""
    weights = weights_of(model, {})
    layers = weights.layers
    free = free_layers(settings, layers)
    if settings.method == "finercut":
        drop = sublayers_to_drop(settings, layers)
        mean = weights.blocks / (len(KINDS) * layers)
        least = sum(
            weights.of_block(b)
            for b in (*range(settings.protect_first), *range(layers - settings.protect_last, layers))
        )
        what = f"{len(KINDS) * free} sublayers"
        left = None if drop is None else round(weights.blocks - drop * mean)
    else:
        drop = layers_to_drop(settings, layers)
        most = free - settings.replaces
        if most < 1:
            raise RecipeError(
                f"depth: {free} of {layers} layers may go, and a replacement takes the place of at least two; protect fewer "
                "layers or set replacement: none"
            )
        first = layers // 2
        end = layers - settings.protect_last
        gone = [sum(map(weights.of_block, range(end - n - settings.replaces, end))) for n in range(most + 1)]
        stands = replaced_weights(settings, weights, first)
        least = (
            weights.blocks - gone[most] + (stands if settings.replacement == "layer" else 0)
        )  # a half: at least nothing
        what = f"{free} layers"
        left = None if drop is None else weights.blocks - gone[drop] + stands
    exact = True
    if left is None:
        assert settings.target is not None
        exact = settings.target.has_goal
        if exact and not reached(settings, weights, least):
            raise refuse_goal(settings, weights, least, what)
        left = _least_removal(settings, weights, least) if exact else weights.blocks
    refuse_misfits(settings, model)
    return PlannedDepth(settings, weights, left, exact)


def _least_removal(settings: Depth, weights: Weights, least: int) -> int:
    """About how many parameters are left when the goal is just reached, layer by layer (FinerCut: half a layer by half)."""
    steps = weights.layers * (len(KINDS) if settings.method == "finercut" else 1)
    for gone in range(steps + 1):
        left = round(weights.blocks * (1 - gone / steps))
        if reached(settings, weights, left):
            return max(left, least)
    return least


def weights_of(model: BlockModel, structures: Mapping[int, Structure]) -> Weights:
    """Count parameters. Where the structure of a block is not known, all of it counts as feed-forward: sums are the same."""
    sublayers = []
    for index in range(len(model.blocks)):
        counts = dict.fromkeys(KINDS, 0)
        for name, parameter in model.block(index).named_parameters():
            kind = structures[index].kind_of(name) if index in structures else FEED_FORWARD
            counts[kind] += parameter.numel()
        sublayers.append(counts)
    blocks = sum(sum(counts.values()) for counts in sublayers)
    return Weights(sublayers, model.head_weights(), sum(p.numel() for p in model.model.parameters()) - blocks)


def describe_note(note: Mapping[str, Any]) -> str:
    """`angular: 30 layers became 24, without 21 to 26; 134.5M parameters became 113.3M`"""
    before, after = (short(note["parameters"][key]) for key in ("before", "after"))
    text = f"{note['method']}: {note['layers_before']} layers became {note['layers_after']}"
    if "first" in note:
        text += f", without {note['first']} to {note['first'] + note['count'] - 1}"
    else:
        text += f", without {len(note['removed'])} sublayers"
    if replacement := note.get("replacement"):
        text += f", one {replacement['kind']} trained in their place (loss {replacement['before']:.4g} to {replacement['after']:.4g})"
    text += f"; {before} parameters became {after}"
    if note.get("divergence") is not None:
        text += f"; {note['divergence']:.4g} nats per token from the model before"
    return text
