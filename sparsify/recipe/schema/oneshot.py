"""The passes that are one walk over the blocks, the solver that prune and quantize share, and what single linears change."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from sparsify.recipe.methods import QUANTIZE
from sparsify.recipe.schema.base import Model, PassModel, Rate, Share, check_pattern, refuse

PruneMethod = Literal["magnitude", "wanda", "sparsegpt", "alps", "keep"]
Pattern = Literal["2:4"]
QuantizeMethod = Literal["rtn", "gptq"]
Bits = Literal[4, 8]
GroupSize = Literal[32, 64, 128, "channel"]

NO_ACTIVATIONS = "it looks at no activations"


class Solver(Model):
    """How the layer-wise problem is solved: one solver on one Hessian serves prune and quantize."""

    damping: Share = Field(
        default=0.01, description="share of the mean Hessian diagonal added to the diagonal before it is inverted"
    )
    error_propagation: Share = Field(
        default=0.0,
        description="alpha of QEP (arXiv 2504.09629): 0 aims at the original weights and saves the dense run, 1 aims at "
        "the dense model's outputs, between blends",
    )
    coordinate_descent: int = Field(
        default=5,
        ge=0,
        le=100,
        description="passes over masks, codes and scales after the sweep; each lowers the exact layer error",
    )


class Prune(PassModel):
    """Set two of every four consecutive inputs of each linear to zero."""

    kind: ClassVar[Literal["prune"]] = "prune"

    method: PruneMethod = Field(
        description="magnitude (no data), wanda (activation norms), sparsegpt (second order, kept weights repair), alps "
        "(second order, the mask of all inputs at once: better and slower) or keep (the zeros of linears that are 2:4 "
        "already; others are refused). A linear that is 2:4 already keeps its zeros under every method"
    )
    pattern: Pattern = Field(default="2:4", description="two kept of every four: what sparse tensor cores run")


class Quantize(PassModel):
    """Store weights as small integers with one scale, and a zero point where asked for, per group of inputs."""

    kind: ClassVar[Literal["quantize"]] = "quantize"

    method: QuantizeMethod = Field(
        default="gptq",
        description="rtn (round to nearest, no data) or gptq (second order, later columns repair earlier ones)",
    )
    bits: Bits = Field(description="bits per kept weight")
    group_size: GroupSize = Field(
        description="consecutive inputs that share a scale, channel = the whole row; must divide a linear's inputs"
    )
    symmetric: bool = Field(
        default=True,
        description="false: each group has a zero point besides its scale, and the codes reach from its smallest weight to its "
        "largest",
    )
    activation_order: bool = Field(default=False, description="quantize the inputs with the largest activations first")
    scale_search: bool = Field(
        default=True, description="choose each scale for the least error instead of from the largest weight"
    )

    @model_validator(mode="after")
    def _check(self) -> "Quantize":
        if not QUANTIZE[self.method].data:
            self.refuse_set(self.method, activation_order=NO_ACTIVATIONS)
        return self


class _Change(Model):
    """Settings of a pass that some linears have otherwise; None: as the pass has it."""

    @model_serializer(mode="wrap")
    def _given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}

    def changes(self) -> dict[str, Any]:
        """The settings that differ, by name."""
        return {name: value for name, value in self if value is not None}


class PruneChange(_Change):
    """What is other than in the prune pass; what is left out stays."""

    method: PruneMethod | None = Field(default=None, description="as in prune")
    pattern: Pattern | None = Field(default=None, description="as in prune")


class QuantizeChange(_Change):
    """What is other than in the quantize pass; what is left out stays."""

    method: QuantizeMethod | None = Field(default=None, description="as in quantize")
    bits: Bits | None = Field(default=None, description="as in quantize")
    group_size: GroupSize | None = Field(default=None, description="as in quantize")
    symmetric: bool | None = Field(default=None, description="as in quantize")
    activation_order: bool | None = Field(default=None, description="as in quantize")
    scale_search: bool | None = Field(default=None, description="as in quantize")

    @model_validator(mode="after")
    def _check(self) -> "QuantizeChange":
        if self.method is not None and not QUANTIZE[self.method].data and self.activation_order:
            message = f"activation_order has no effect with method {self.method}: {NO_ACTIVATIONS}; remove it"
            raise refuse(message, "activation_order")
        return self


class Override(Model):
    """Other settings for some linears. Where several overrides match a linear, the last one wins, setting by setting."""

    match: Annotated[str, AfterValidator(check_pattern)] = Field(
        description="a linear's name or its last components, with * wildcards, or re:REGEX; after a depth pass, names are "
        "those of the shortened model"
    )
    prune: PruneChange | None = Field(default=PruneChange(), description="null: not pruned; else what changes")
    quantize: QuantizeChange | None = Field(default=QuantizeChange(), description="null: 16 bits; else what changes")

    @model_validator(mode="before")
    @classmethod
    def _refuse_empty(cls, data: Any) -> Any:
        for name in ("prune", "quantize"):
            if isinstance(data, dict) and data.get(name) == {}:
                raise refuse(
                    f"{name} is empty and changes nothing; name a setting, or write null to leave it out", name
                )
        return data

    @model_validator(mode="after")
    def _check(self) -> "Override":
        if self.prune == PruneChange() and self.quantize == QuantizeChange():
            raise refuse(f"the override of '{self.match}' changes nothing; give prune or quantize")
        return self

    @model_serializer(mode="wrap")
    def _given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value != {}}


class Tune(PassModel):
    """Train each block, once it is compressed, to give what the dense block gave; masks fixed, quantization in the loop."""

    kind: ClassVar[Literal["tune"]] = "tune"

    method: Literal["block"] = Field(default="block", description="one block at a time, as the walk leaves it")
    epochs: int = Field(default=4, ge=1, description="passes over the calibration tokens; cost grows in proportion")
    learning_rate: Rate = Field(
        default=1.5e-2, description="of the weights, relative to the root mean square of those kept"
    )
    scale_learning_rate: Rate = Field(default=5e-3, description="of the scales, relative to their root mean square")
    norm_learning_rate: Rate = Field(
        default=5e-3, description="of norms and biases, relative to their root mean square"
    )
    batch_size: int = Field(default=4, ge=1, description="sequences per step")
    holdout: float = Field(
        default=0.0625,
        ge=0,
        le=0.5,
        allow_inf_nan=False,
        description="share of the sequences kept out of training; they decide which state of a block is kept",
    )
    seconds_per_block: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="stop training a block after so many seconds"
    )
