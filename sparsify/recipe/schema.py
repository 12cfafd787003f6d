"""The typed form of a recipe: frozen models that refuse unknown keys, wrong types and impossible combinations.

In YAML a pass is a mapping of one key, `- prune: {...}`; here it is the object under that key, and the key is its
`kind`. To add a kind of pass: write its model below and add it to `Pass` and `PASSES`.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sparsify.recipe.document import KeyPath
from sparsify.recipe.sources import same_text, source_problem
from sparsify.recipe.words import closest


def refuse(message: str, *path: str | int) -> PydanticCustomError:
    """A validation error at `path` below the model that raises it."""
    return PydanticCustomError("refused", "{message}", {"message": message, "path": path})


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Calibration(_Model):
    """The text whose activations steer pruning and quantization."""

    source: str = Field(
        default="self",
        description="self (the model samples its own text), file:PATH (txt, jsonl, parquet) or hub:ID[:CONFIG[:SPLIT]]",
    )
    samples: int = Field(default=128, ge=1, description="rows of text; cost grows in proportion")
    sequence_length: int = Field(default=512, ge=2, description="tokens per row")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of whatever is drawn at random")

    @field_validator("source")
    @classmethod
    def _known_source(cls, source: str) -> str:
        if problem := source_problem(source):
            raise refuse(problem)
        return source


def _check_patterns(patterns: list[str]) -> list[str]:
    for index, pattern in enumerate(patterns):
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise refuse(f"'{pattern}' is not a valid regular expression: {error}", index) from None
        elif not pattern:
            raise refuse("an empty pattern matches nothing; remove it", index)
    return patterns


Ignore = Annotated[
    list[str],
    AfterValidator(_check_patterns),
    Field(description="linears to leave dense: a module name or its last components, with * wildcards, or re:REGEX"),
]
Damping = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="share of the mean Hessian diagonal added to the diagonal before it is inverted",
    ),
]
Correction = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="0 aims at the original weights, 1 at the dense model's outputs, between blends",
    ),
]
Refine = Annotated[
    int,
    Field(
        ge=0,
        le=100,
        description="passes of coordinate descent over masks, codes and scales after the sweep; each lowers the exact layer error",
    ),
]

NO_HESSIAN = "it inverts no Hessian"
NO_SWEEP = "there is no sweep to refine"
NO_OUTPUTS = "it never runs the model, so there are no outputs to aim at"


class _Pass(_Model):
    """Common to all passes: the one-key YAML form, in both directions."""

    kind: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _unwrap(cls, data: Any) -> Any:
        if isinstance(data, dict) and list(data) == [cls.kind]:
            return {} if data[cls.kind] is None else data[cls.kind]
        if isinstance(data, dict) and data.get("kind") == cls.kind:  # keyword form, Prune(kind="prune", ...)
            return {key: value for key, value in data.items() if key != "kind"}
        return data

    @model_serializer(mode="wrap")
    def _wrap(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {self.kind: handler(self)}

    def _refuse_set(self, method: str, **reasons: str) -> None:
        """Refuse options that the method would silently not honour."""
        for name, reason in reasons.items():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise refuse(f"{name} has no effect with method {method}: {reason}; remove it", name)


class Prune(_Pass):
    """Set two of every four consecutive inputs of each linear to zero."""

    kind: ClassVar[Literal["prune"]] = "prune"

    method: Literal["magnitude", "wanda", "sparsegpt"] = Field(
        description="magnitude (no data), wanda (activation norms) or sparsegpt (second order, kept weights repair)"
    )
    pattern: Literal["2:4"] = Field(default="2:4", description="two kept of every four: what sparse tensor cores run")
    ignore: Ignore = ["lm_head"]
    damping: Damping = 0.01
    correction: Correction = 0.0
    refine: Refine = 5

    @model_validator(mode="after")
    def _check(self) -> "Prune":
        if self.method == "magnitude":
            self._refuse_set("magnitude", correction=NO_OUTPUTS, damping=NO_HESSIAN)
        if self.method == "wanda" and not self.correction:
            self._refuse_set("wanda", damping=NO_HESSIAN)
        if self.method != "sparsegpt":
            self._refuse_set(self.method, refine=NO_SWEEP)
        return self


class Quantize(_Pass):
    """Store weights as small integers with one scale per group of inputs."""

    kind: ClassVar[Literal["quantize"]] = "quantize"

    method: Literal["rtn", "gptq"] = Field(
        description="rtn (round to nearest, no data) or gptq (second order, later columns repair earlier ones)"
    )
    bits: Literal[4, 8] = Field(description="bits per kept weight")
    group_size: Literal[32, 64, 128, "channel"] = Field(
        description="consecutive inputs that share a scale, channel = the whole row; must divide a linear's inputs"
    )
    ignore: Ignore = ["lm_head"]
    damping: Damping = 0.01
    correction: Correction = 0.0
    activation_order: bool = Field(default=False, description="quantize the inputs with the largest activations first")
    scale_search: bool = Field(
        default=True, description="choose each scale for the least error instead of from the largest weight"
    )
    refine: Refine = 5

    @model_validator(mode="after")
    def _check(self) -> "Quantize":
        if self.method == "rtn":
            self._refuse_set(
                "rtn",
                correction=NO_OUTPUTS,
                damping=NO_HESSIAN,
                activation_order="it looks at no activations",
                refine=NO_SWEEP,
            )
        return self


Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class Tune(_Pass):
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


PASSES: dict[str, type[_Pass]] = {model.kind: model for model in (Prune, Quantize, Tune)}
PLANNED_PASSES = ("depth", "distill")


def _one_key(value: Any) -> Any:
    """Say what is wrong with a list entry that is not `- kind: {...}` before pydantic tries every pass on it."""
    if isinstance(value, _Pass):
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
    if key in PLANNED_PASSES:
        raise refuse(f"pass '{key}' does not exist in this version of sparsify; known passes: {known}", key)
    if key not in PASSES:
        raise refuse(f"unknown pass '{key}'{closest(str(key), PASSES) or ';'} known passes: {known}", key)
    return value


def _kind(value: Any) -> str:
    return value.kind if isinstance(value, _Pass) else next(iter(value))


Pass = Annotated[
    Annotated[Prune, Tag("prune")] | Annotated[Quantize, Tag("quantize")] | Annotated[Tune, Tag("tune")],
    Discriminator(_kind),
    BeforeValidator(_one_key),
]


def head_format_problem(format: str) -> str | None:
    """Why `format` cannot hold a quantized output head, or None."""
    if format == "dense":
        return "dense stores 16-bit weights, so a quantized head would lose accuracy and save nothing; leave head out"
    return None


class Head(_Model):
    """The output head (lm_head) as a quantized linear without zeros, rounded to nearest.

    A model that ties it to its embedding gets a head of its own; the embedding stays as it is.
    """

    bits: Literal[4, 8] = Field(description="bits per weight; 8 is nearly lossless")
    group_size: Literal[32, 64, 128, "channel"] = Field(
        description="consecutive inputs that share a scale, channel = the whole row; must divide the hidden size"
    )


class Export(_Model):
    """What is written."""

    format: Literal["sparse24", "dense", "pack-quantized"] = Field(
        default="sparse24",
        description="sparse24 (smallest, needs the sparsify plugin), pack-quantized (stock vLLM and "
        "transformers, stores the zeros) or dense (runs everywhere, no smaller)",
    )
    dtype: Literal["auto", "bfloat16", "float16"] = Field(
        default="auto", description="dtype of scales and of what stays dense; auto keeps the model's"
    )
    head: Head | None = Field(
        default=None, description="quantize the output head as well; without it the head stays 16-bit"
    )

    @model_validator(mode="after")
    def _check(self) -> "Export":
        if self.head is not None and (problem := head_format_problem(self.format)):
            raise refuse(problem, "head")
        return self


class Evaluation(_Model):
    """How the result is measured after it is written."""

    text: str = Field(description="file:PATH of a text that was not used for calibration")
    sequence_length: int = Field(default=1024, ge=2, description="tokens per scored chunk")
    chunks: int = Field(default=48, ge=1, description="chunks scored, from the start of the text")

    @field_validator("text")
    @classmethod
    def _is_file(cls, text: str) -> str:
        if not text.startswith("file:") or not text[5:]:
            raise refuse(f"evaluation text must be file:PATH, not '{text}'")
        return text


class Recipe(_Model):
    """A whole recipe, version 1."""

    version: Literal[1] = Field(description="version of the recipe language")
    model: str | None = Field(
        default=None, min_length=1, description="hub id, directory, *.gguf file or embedded:NAME; --model overrides"
    )
    calibration: Calibration = Calibration()
    passes: list[Pass] = Field(min_length=1, description="what is done to the linears; each kind at most once")
    export: Export = Export()
    evaluation: Evaluation | None = Field(default=None)

    @property
    def prune(self) -> Prune | None:
        return next((step for step in self.passes if isinstance(step, Prune)), None)

    @property
    def quantize(self) -> Quantize | None:
        return next((step for step in self.passes if isinstance(step, Quantize)), None)

    @property
    def tune(self) -> Tune | None:
        return next((step for step in self.passes if isinstance(step, Tune)), None)

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        for check in CONFLICTS:
            check(self)
        return self


def _duplicates(recipe: Recipe) -> None:
    seen: dict[str, int] = {}
    for index, step in enumerate(recipe.passes):
        if step.kind in seen:
            raise refuse(
                f"pass '{step.kind}' is here a second time (first as passes.{seen[step.kind]}); "
                f"a weight is decided once, so keep one of the two",
                "passes",
                index,
                step.kind,
            )
        seen[step.kind] = index


def _order(recipe: Recipe) -> None:
    kinds = [step.kind for step in recipe.passes]
    if "prune" in kinds and "quantize" in kinds and kinds.index("quantize") < kinds.index("prune"):
        raise refuse(
            "prune comes after quantize, but then scales would be fitted to weights that are about to be removed "
            "and nothing could repair the pruning; put prune first",
            "passes",
            kinds.index("prune"),
            "prune",
        )
    if "tune" in kinds and kinds[0] == "tune":
        raise refuse(
            "tune trains what compression left over, so it comes after prune and quantize; put it after them",
            "passes",
            0,
            "tune",
        )
    if "tune" in kinds and kinds.index("tune") < max(
        kinds.index(kind) for kind in kinds if kind in ("prune", "quantize")
    ):
        raise refuse(
            "a pass that decides weights comes after tune, which would undo the tuning; put tune last",
            "passes",
            kinds.index("tune"),
            "tune",
        )


def _joint(recipe: Recipe) -> None:
    """Pruning and quantizing a linear share one Hessian and one target, so what shapes those cannot differ."""
    prune, quantize = recipe.prune, recipe.quantize
    if prune is None or quantize is None or prune.method == "magnitude" or quantize.method == "rtn":
        return
    shared = ["correction"] if prune.method == "wanda" and not prune.correction else ["correction", "damping"]
    shared += ["refine"] if prune.method == "sparsegpt" else []
    for name in shared:
        one, other = getattr(prune, name), getattr(quantize, name)
        if one != other:
            raise refuse(
                f"{name} is {one} in prune but {other} in quantize; both work on one Hessian toward one target, "
                f"so give both the same",
                "passes",
                recipe.passes.index(quantize),
                "quantize",
                name,
            )


def _format(recipe: Recipe) -> None:
    if recipe.export.format == "pack-quantized" and recipe.quantize is None:
        raise refuse(
            "pack-quantized stores integers but no pass quantizes; add a quantize pass or export sparse24",
            "export",
            "format",
        )


def _leak(recipe: Recipe) -> None:
    if recipe.evaluation is not None and same_text(recipe.calibration.source, recipe.evaluation.text):
        raise refuse(
            "evaluation reads the same text as calibration, which would flatter the result; "
            "never calibrate on what is evaluated: give one of them another file",
            "evaluation",
            "text",
        )


CONFLICTS: tuple[Callable[[Recipe], None], ...] = (_duplicates, _order, _joint, _format, _leak)


def problem_path(context: dict[str, Any]) -> KeyPath:
    """Where below its model an error made by `refuse` belongs."""
    return tuple(context.get("path", ()))
