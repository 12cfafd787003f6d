"""The pass that removes layers."""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from sparsify.recipe.schema.base import Model, PassModel, Rate, refuse


def _amount(value: Any) -> Any:
    """`20%` as the share 0.2; whole numbers stay what they are."""
    if isinstance(value, str) and (found := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*%", value.strip())):
        value = float(found[1]) / 100
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse(f"drop must be a whole number or a share such as 20%, not {value!r}")
    if isinstance(value, float) and not 0 < value < 1:
        raise refuse(f"drop must be a whole number or a share of more than 0% and less than 100%, not {value:g}")
    if isinstance(value, int) and value < 1:
        raise refuse("drop must be at least 1; leave the depth pass out to keep all layers")
    return value


Amount = Annotated[
    int | float,
    BeforeValidator(_amount),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?\s*%$"},
            ]
        }
    ),
]
"""How many, or what share of all: 6, 0.2 or 20%."""


class DepthTarget(Model):
    """When to stop removing: a goal to reach, a bound not to pass, or both."""

    parameters: float | None = Field(
        default=None, gt=0, lt=1, allow_inf_nan=False, description="at most this share of the parameters is left"
    )
    speedup: float | None = Field(
        default=None,
        gt=1,
        allow_inf_nan=False,
        description="decoding at least so many times faster, estimated from the weights that each token reads",
    )
    divergence: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="mean KL divergence in nats per calibration token from the model before removal, without what is trained "
        "in its place; alone: remove as much as stays within it",
    )

    @model_validator(mode="after")
    def _check(self) -> "DepthTarget":
        if self.parameters is not None and self.speedup is not None:
            raise refuse("target has both parameters and speedup; keep the one that decides", "speedup")
        if self.parameters is None and self.speedup is None and self.divergence is None:
            raise refuse("target is empty; give parameters, speedup or divergence")
        return self

    @property
    def has_goal(self) -> bool:
        return self.parameters is not None or self.speedup is not None


class Depth(PassModel):
    """Remove decoder layers, or single attention and feed-forward sublayers."""

    kind: ClassVar[Literal["depth"]] = "depth"

    method: Literal["angular", "deepest", "streamline", "finercut"] = Field(
        description="angular (the block of layers across which the last token turns least), deepest (the layers before "
        "the last, no data), streamline (the block across which hidden states stay most similar, a trained layer in its "
        "place) or finercut (sublayer by sublayer, the one whose removal changes the output least)"
    )
    drop: Amount | None = Field(
        default=None,
        description="layers fewer in the result (a replacement counts as one of those left), with finercut sublayers; "
        "or a share of all: 20%",
    )
    target: DepthTarget | None = Field(default=None, description="instead of drop: when to stop")
    protect_first: int = Field(default=1, ge=0, description="layers at the start that stay whole")
    protect_last: int = Field(default=1, ge=0, description="layers at the end that stay whole")
    samples: int | None = Field(
        default=None,
        ge=1,
        description="rows of the calibration text to judge by; default all, at most 4 with finercut and 16 for divergence",
    )
    metric: Literal["angular", "euclidean", "jensen-shannon"] = Field(
        default="angular", description="finercut: how the change of the logits is measured"
    )
    units: Literal["sublayers", "pairs"] = Field(
        default="sublayers",
        description="finercut: sublayers removes them one by one; pairs removes two neighbours at a time, so that all "
        "that is left is whole layers, which any software runs without doing the removed work",
    )
    replacement: Literal["layer", "feed-forward", "none"] = Field(
        default="layer",
        description="streamline: what is trained to stand in for the removed layers, begun from the first of them",
    )
    epochs: int = Field(default=8, ge=1, description="streamline: passes over the hidden states")
    learning_rate: Rate = Field(
        default=5e-3, description="streamline: of the replacement, relative to the root mean square of each tensor"
    )
    batch_size: int = Field(default=4, ge=1, description="streamline: sequences per step")
    loss: Literal["mse", "relative"] = Field(
        default="mse",
        description="streamline: squared error of hidden states; relative: to the size of each token, so that the few of "
        "massive activations do not decide",
    )
    llm_epochs: int = Field(
        default=0, ge=0, description="streamline: passes of next-token loss through the whole model after that"
    )

    @model_validator(mode="after")
    def _check(self) -> "Depth":
        if (self.drop is None) == (self.target is None):
            raise refuse(
                "depth needs either drop (how many layers, or 20%) or target (parameters, speedup, divergence)"
            )
        if self.method != "finercut":
            self.refuse_set(
                self.method, metric="only finercut looks at logits", units="only finercut removes sublayers"
            )
        if self.units == "pairs" and isinstance(self.drop, int) and self.drop % 2:
            raise refuse(f"units pairs removes two sublayers at a time, so drop must be even, not {self.drop}", "drop")
        nothing = "nothing is trained in place of what is removed"
        trained = dict.fromkeys(("epochs", "learning_rate", "batch_size", "loss", "llm_epochs"), nothing)
        if self.method != "streamline":
            self.refuse_set(self.method, replacement=nothing, **trained)
        elif self.replacement == "none":
            self.refuse_set("streamline and replacement none", **trained)
        if self.method == "deepest" and not (self.target and self.target.divergence):
            self.refuse_set("deepest", samples="it looks at no text")
        return self

    @property
    def needs_data(self) -> bool:
        return self.method != "deepest" or bool(self.target and self.target.divergence)

    @property
    def replaces(self) -> bool:
        """Whether something is trained to stand where layers were."""
        return self.method == "streamline" and self.replacement != "none"
