"""The recipe itself, and the list of passes that it is made of."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from sparsify.recipe.rules import RULES
from sparsify.recipe.schema.base import Model, PassModel, Patterns, refuse
from sparsify.recipe.schema.basis import Basis
from sparsify.recipe.schema.calibration import Calibration
from sparsify.recipe.schema.depth import Depth
from sparsify.recipe.schema.export import Evaluation, Export
from sparsify.recipe.schema.oneshot import Override, Prune, Quantize, Solver, Tune
from sparsify.recipe.schema.training import Distill, Finetune, Lora
from sparsify.recipe.sources import same_text
from sparsify.recipe.wording import closest

PASSES: dict[str, type[PassModel]] = {
    model.kind: model for model in (Depth, Basis, Prune, Quantize, Tune, Distill, Finetune, Lora)
}


def _one_key(value: Any) -> Any:
    """Say what is wrong with a list entry that is not `- kind: {...}` before pydantic tries every pass on it."""
    if isinstance(value, PassModel):
        return value
    known = ", ".join(PASSES)
    if isinstance(value, str) and value in PASSES:
        raise refuse(f"pass '{value}' needs its settings: write '- {value}: {{method: ...}}'")
    if not isinstance(value, dict) or not value:
        raise refuse(f"a pass is a mapping of one key, '- prune: {{method: ...}}'; known passes: {known}")
    if len(value) > 1:
        keys = list(value)
        if keys[0] in PASSES and any(key in PASSES[keys[0]].model_fields for key in keys[1:]):
            raise refuse(
                f"'{keys[1]}' stands beside '{keys[0]}' instead of inside it; indent the settings of "
                f"'{keys[0]}' two more columns",
                keys[1],
            )
        raise refuse(
            f"a pass has one key but here are {len(keys)} ({', '.join(map(str, keys))}); "
            f"start each pass with its own '-'",
            keys[1],
        )
    (key,) = value
    if key not in PASSES:
        raise refuse(f"unknown pass '{key}'{closest(str(key), PASSES) or ';'} known passes: {known}", key)
    return value


def _kind(value: Any) -> str:
    return value.kind if isinstance(value, PassModel) else next(iter(value))


Pass = Annotated[
    Annotated[Depth, Tag("depth")]
    | Annotated[Basis, Tag("basis")]
    | Annotated[Prune, Tag("prune")]
    | Annotated[Quantize, Tag("quantize")]
    | Annotated[Tune, Tag("tune")]
    | Annotated[Distill, Tag("distill")]
    | Annotated[Finetune, Tag("finetune")]
    | Annotated[Lora, Tag("lora")],
    Discriminator(_kind),
    BeforeValidator(_one_key),
]


class Recipe(Model):
    """A whole recipe, version 1."""

    version: Literal[1] = Field(default=1, description="version of the recipe language; a file has to say it")
    model: str | None = Field(
        default=None, min_length=1, description="hub id, directory, *.gguf file or embedded:NAME; --model overrides"
    )
    calibration: Calibration = Calibration()
    ignore: Patterns = Field(
        default=["lm_head"],
        description="linears that prune and quantize leave dense: a module name or its last components, with * wildcards, "
        "or re:REGEX",
    )
    solver: Solver = Solver()
    llm_compressor: list[dict[str, dict[str, Any]]] | None = Field(
        default=None,
        min_length=1,
        description="modifiers of llm-compressor, run in llm-compressor's own environment. Before passes, those that change the "
        "dense model: AWQModifier (with the QuantizationModifier that it prepares for), SmoothQuantModifier, SpinQuantModifier. "
        "With 'passes: []', all that is done, in this order: also AutoRoundModifier, GPTQModifier, QuantizationModifier, "
        "SparseGPTModifier, WandaPruningModifier and others",
    )
    passes: list[Pass] = Field(
        description="what is done to the model; each kind at most once. Empty where llm_compressor does it all"
    )
    overrides: list[Override] = Field(
        default=[],
        description="other settings for some linears; the last match wins. Linears that vLLM merges must agree",
    )
    export: Export = Export()
    evaluation: Evaluation | None = Field(default=None)

    @property
    def depth(self) -> Depth | None:
        return next((step for step in self.passes if isinstance(step, Depth)), None)

    def around_depth(self) -> "tuple[Recipe | None, Recipe]":
        """The recipe before its depth pass (None when that comes first) and the one after it, which may have no passes."""
        assert self.depth is not None
        place = self.passes.index(self.depth)
        before = self.model_copy(update={"passes": self.passes[:place], "evaluation": None}) if place else None
        return before, self.model_copy(update={"passes": self.passes[place + 1 :]})

    @property
    def basis(self) -> Basis | None:
        return next((step for step in self.passes if isinstance(step, Basis)), None)

    def after_basis(self) -> "Recipe":
        """The recipe without its basis pass, which is its first; it may have no passes."""
        return self.model_copy(update={"passes": [step for step in self.passes if not isinstance(step, Basis)]})

    @property
    def prune(self) -> Prune | None:
        return next((step for step in self.passes if isinstance(step, Prune)), None)

    @property
    def quantize(self) -> Quantize | None:
        return next((step for step in self.passes if isinstance(step, Quantize)), None)

    def learns_from(self, text: str) -> bool:
        """Whether calibration or training reads this text (file:PATH)."""
        sources = [source for source, _ in self.calibration.mixture]
        sources += [source for step in self.training for source in step.texts]
        return any(same_text(source, text) for source in sources)

    @property
    def tune(self) -> Tune | None:
        return next((step for step in self.passes if isinstance(step, Tune)), None)

    @property
    def training(self) -> list[Distill | Finetune]:
        """The passes that train the whole model after it was compressed, in order."""
        return [step for step in self.passes if isinstance(step, Distill | Finetune)]

    @property
    def whole(self) -> bool:
        """Whether llm-compressor does all that is done."""
        return bool(self.llm_compressor) and not self.passes

    @property
    def compresses(self) -> bool:
        """Whether linears of a dense model are compressed first; otherwise the recipe starts from a compressed one."""
        return any(not isinstance(step, Depth | Basis | Distill | Finetune) for step in self.passes)

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        for rule in RULES:
            rule(self)
        return self
