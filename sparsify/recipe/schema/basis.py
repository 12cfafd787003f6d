"""The pass that writes the model in another basis."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sparsify.recipe.schema.base import PassModel, refuse


class Basis(PassModel):
    """Rewrite the model into an equal one of which 2:4 sparsity removes less; costs nothing when the model runs."""

    kind: ClassVar[Literal["basis"]] = "basis"

    residual: bool = Field(
        default=True,
        description="turn the residual stream by one orthogonal matrix, norm gains folded into the linears; an output head "
        "that is tied to the embedding gets weights of its own",
    )
    heads: bool = Field(default=True, description="turn the values of every key-value head")
    channels: bool = Field(default=True, description="order the channels of every feed-forward")
    steps: int = Field(default=60, ge=1, le=10_000, description="steps of gradient descent for each rotation")

    @model_validator(mode="after")
    def _check(self) -> "Basis":
        if not (self.residual or self.heads or self.channels):
            raise refuse("basis changes nothing when residual, heads and channels are all false; leave the pass out")
        return self

    def describe(self) -> str:
        """`another basis: residual stream turned, values of heads turned, feed-forward channels ordered`"""
        parts = [
            ("residual stream turned", self.residual),
            ("values of heads turned", self.heads),
            ("feed-forward channels ordered", self.channels),
        ]
        return f"another basis: {', '.join(words for words, done in parts if done)}"
