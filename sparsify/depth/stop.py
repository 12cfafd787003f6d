"""How much to remove: a number of layers, a share of the parameters, a speed-up, or as much as a bound on divergence allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsify.errors import RecipeError
from sparsify.model.sublayers import FEED_FORWARD, KINDS, Sublayer
from sparsify.recipe import Depth


@dataclass(frozen=True)
class Weights:
    """Parameters of a model. sublayers: of every block, by kind; head: of the output head, which each token reads, tied or not;
    outside: of all tensors that belong to no block."""

    sublayers: Sequence[Mapping[str, int]]
    head: int
    outside: int

    @property
    def layers(self) -> int:
        return len(self.sublayers)

    def of(self, kept: Sequence[Sublayer]) -> int:
        return sum(self.sublayers[sublayer.block][sublayer.kind] for sublayer in kept)

    def of_block(self, block: int) -> int:
        return sum(self.sublayers[block].values())

    @property
    def blocks(self) -> int:
        return sum(self.of_block(block) for block in range(self.layers))

    def share(self, left: int) -> float:
        """What share of all parameters is there when so many are left in the blocks."""
        return (left + self.outside) / (self.blocks + self.outside)

    def speedup(self, left: int) -> float:
        """How many times fewer weights each decoded token reads: what decoding gains while memory is the limit."""
        return (self.blocks + self.head) / (left + self.head)


def free_layers(settings: Depth, layers: int) -> int:
    """How many layers may go. RecipeError when protection leaves none."""
    free = layers - settings.protect_first - settings.protect_last
    if free < 1:
        raise RecipeError(
            f"depth: protect_first {settings.protect_first} and protect_last {settings.protect_last} protect all "
            f"{layers} layers of the model; lower one of them"
        )
    return min(free, layers - 1)


def layers_to_drop(settings: Depth, layers: int) -> int | None:
    """The number that `drop` asks of a method for whole layers; None where a target decides. RecipeError when there are too few."""
    free = free_layers(settings, layers)
    if settings.drop is None:
        return None
    drop = settings.drop if isinstance(settings.drop, int) else max(1, round(settings.drop * layers))
    if drop >= layers:
        raise RecipeError(f"depth drops {drop} layers but the model has {layers}; drop fewer")
    if drop + settings.replaces > free:
        taken = f"{drop}, and one more that is replaced," if settings.replaces else str(drop)
        raise RecipeError(
            f"depth drops {taken} of {layers} layers, but with protect_first {settings.protect_first} and protect_last "
            f"{settings.protect_last} only {free} may go; drop fewer or protect fewer"
        )
    return drop


def sublayers_to_drop(settings: Depth, layers: int) -> int | None:
    """The same for FinerCut, in sublayers."""
    free = len(KINDS) * free_layers(settings, layers)
    if settings.drop is None:
        return None
    drop = settings.drop if isinstance(settings.drop, int) else max(1, round(settings.drop * len(KINDS) * layers))
    if settings.units == "pairs" and drop % 2:
        drop += 1  # only a share can be odd here
    if drop >= len(KINDS) * layers:
        raise RecipeError(
            f"depth drops {drop} sublayers but the model has {len(KINDS) * layers} in {layers} layers; drop fewer"
        )
    if drop > free:
        raise RecipeError(
            f"depth drops {drop} of {len(KINDS) * layers} sublayers, but with protect_first {settings.protect_first} and "
            f"protect_last {settings.protect_last} only {free} may go; drop fewer or protect fewer"
        )
    return drop


def reached(settings: Depth, weights: Weights, left: int) -> bool:
    """Whether the goal of the target is reached with so many parameters left in the blocks."""
    target = settings.target
    assert target is not None
    if target.parameters is not None:
        return weights.share(left) <= target.parameters
    return target.speedup is not None and weights.speedup(left) >= target.speedup


def replaced_weights(settings: Depth, weights: Weights, first: int) -> int:
    """Parameters of what stands in for the layers from `first` on."""
    if not settings.replaces:
        return 0
    return weights.of_block(first) if settings.replacement == "layer" else weights.sublayers[first][FEED_FORWARD]


def refuse_goal(settings: Depth, weights: Weights, least: int, what: str) -> RecipeError:
    """The error for a goal that even the most that may go does not reach. least: parameters then left in the blocks."""
    target = settings.target
    assert target is not None
    if target.parameters is not None:
        name, asked, best = "parameters", f"{target.parameters:g}", f"{weights.share(least):.3f} of them would be left"
    else:
        name, asked, best = (
            "speedup",
            f"{target.speedup:g}",
            f"decoding would be about {weights.speedup(least):.2f} times faster",
        )
    return RecipeError(
        f"depth.target.{name} {asked} cannot be met: with all {what} that may go {best}; ask for less or protect fewer layers"
    )


def refuse_bound(bound: float, divergence: float, what: str) -> RecipeError:
    return RecipeError(
        f"depth.target.divergence {bound:g} cannot be met: {what} diverges by {divergence:.4g} nats per token; "
        "raise it or remove less"
    )
