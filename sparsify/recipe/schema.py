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
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sparsify.recipe.document import KeyPath
from sparsify.recipe.sources import SELF, same_text, shares, source_problem
from sparsify.recipe.wording import closest


def refuse(message: str, *path: str | int) -> PydanticCustomError:
    """A validation error at `path` below the model that raises it."""
    return PydanticCustomError("refused", "{message}", {"message": message, "path": path})


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class SelfText(_Model):
    """How the model writes its own calibration text. The defaults are for every kind of use; nothing needs to be set."""

    chat: Share | None = Field(
        default=None,
        description="share of rows that are conversations with both sides written by the model, the others are plain "
        "documents; null: a quarter where the tokenizer has a chat template, else none",
    )
    openings: Share = Field(
        default=0.5,
        description="share of plain documents that begin with given words (English, many kinds and subjects)",
    )
    corpora: Share = Field(
        default=0.25,
        description="share of the plain rows that are rewritten as research corpora hold text (Penn Treebank, WikiText): "
        "punctuation apart, rare words <unk>",
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        le=2,
        allow_inf_nan=False,
        description="of the hottest rows; 1 is the model's own distribution",
    )
    coolest: float = Field(
        default=0.8,
        gt=0,
        le=2,
        allow_inf_nan=False,
        description="temperature of the coolest rows; the rows lie evenly between the two, and each keeps its own",
    )
    first_temperature: float = Field(
        default=1.5,
        gt=0,
        le=5,
        allow_inf_nan=False,
        description="of the first token of a document or a question, falling to that of the row: varies the subjects",
    )
    first_tokens: int = Field(
        default=10, ge=0, description="tokens within which it falls; 0: the temperature of the row throughout"
    )
    candidates: float = Field(
        default=1.125,
        ge=1,
        le=10,
        allow_inf_nan=False,
        description="rows written per row kept: rows that repeat themselves, and then those that the model finds least "
        "likely, are dropped; 1 keeps all",
    )

    @model_validator(mode="after")
    def _check(self) -> "SelfText":
        if self.coolest > self.temperature:
            raise refuse(f"coolest is {self.coolest}, above temperature, {self.temperature}; lower it", "coolest")
        return self


class WeightedSource(_Model):
    """One text of a mixture."""

    source: str = Field(description="as calibration.source")
    weight: float = Field(gt=0, allow_inf_nan=False, description="share of the rows, relative to the other weights")

    @field_validator("source")
    @classmethod
    def _known_source(cls, source: str) -> str:
        return _checked_source(source)


def _checked_source(source: str) -> str:
    if problem := source_problem(source):
        raise refuse(problem)
    return source


class Calibration(_Model):
    """The text whose activations steer pruning and quantization."""

    source: str | None = Field(
        default=SELF,
        description="self (the model samples its own text), file:PATH (txt, jsonl, parquet) or hub:ID[:CONFIG[:SPLIT]]",
    )
    sources: list[WeightedSource] | None = Field(
        default=None, min_length=1, description="instead of source: several texts, rows in proportion to their weights"
    )
    samples: int = Field(default=128, ge=1, description="rows of text; cost grows in proportion")
    sequence_length: int = Field(default=512, ge=2, description="tokens per row")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of whatever is drawn at random")
    self: SelfText | None = Field(default=None, description="how the model writes, where a source is self")

    @model_validator(mode="before")
    @classmethod
    def _sources_replace_the_default(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("sources") is not None and "source" not in data:
            return {**data, "source": None}
        return data

    @field_validator("source")
    @classmethod
    def _known_source(cls, source: str | None) -> str | None:
        return None if source is None else _checked_source(source)

    @model_validator(mode="after")
    def _check(self) -> "Calibration":
        if self.source is None and self.sources is None:
            raise refuse(
                "calibration needs a source: self, file:PATH or hub:ID, or a list of sources with weights", "source"
            )
        if self.source is not None and self.sources is not None:
            raise refuse("calibration has both source and sources; keep one (source: null removes it)", "sources")
        names = [source for source, _ in self.mixture]
        for index, name in enumerate(names):
            if any(name == other or same_text(name, other) for other in names[:index]):
                raise refuse(
                    f"source '{name}' is here a second time; give it once, with the sum of the weights",
                    "sources",
                    index,
                    "source",
                )
        for index, count in enumerate(self.rows):
            if not count:
                raise refuse(
                    f"source '{names[index]}' has so little weight that it gets none of the {self.samples} samples; "
                    f"raise its weight or the samples, or remove it",
                    "sources",
                    index,
                    "weight",
                )
        if self.self is not None and SELF not in names:
            raise refuse("self has no effect: the model writes no text here since no source is self; remove it", "self")
        return self

    @property
    def mixture(self) -> list[tuple[str, float]]:
        """(source, weight) of every source; the weights sum to 1."""
        if self.sources is None:
            return [(self.source or SELF, 1.0)]
        total = sum(entry.weight for entry in self.sources)
        return [(entry.source, entry.weight / total) for entry in self.sources]

    @property
    def rows(self) -> list[int]:
        """How many of the samples each source gives, in the order of `mixture`."""
        return shares(self.samples, [weight for _, weight in self.mixture])


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
    Share,
    Field(
        description="share of the mean Hessian diagonal added to the diagonal before it is inverted",
    ),
]
Correction = Annotated[
    Share,
    Field(
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

    method: Literal["magnitude", "wanda", "sparsegpt", "alps"] = Field(
        description="magnitude (no data), wanda (activation norms), sparsegpt (second order, kept weights repair) or "
        "alps (second order, the mask of all inputs at once: better and slower)"
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
        if self.method in ("magnitude", "wanda"):
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


UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


def _count(value: Any) -> Any:
    """`2M`, `500k` and `1.5B` as numbers; whatever else is left to the type check."""
    if isinstance(value, str) and (found := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kKMBG]?)", value.strip())):
        return round(float(found[1]) * UNITS[found[2]])
    return value


Count = Annotated[
    int,
    BeforeValidator(_count),
    Field(ge=1),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?\s*[kKMBG]?$"},
            ]
        }
    ),
]
"""A number of tokens, written as 2000000, 500k, 2M or 1.5B."""

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LossWeights(_Model):
    """How much each part of the loss counts; 0 leaves it out."""

    feature: Weight = Field(
        default=1.0, description="SquareHead: relative squared distance of the hidden states after every block"
    )
    logits: Weight = Field(default=1.0, description="KL divergence from the teacher's next-token distribution")
    cross_entropy: Weight = Field(default=0.0, description="next-token loss on the text itself")


class FinetuneWeights(LossWeights):
    """How much each part of the loss counts; feature and logits need a teacher."""

    feature: Weight = Field(default=0.0, description="as in distill")
    logits: Weight = Field(default=0.0, description="as in distill")
    cross_entropy: Weight = Field(default=1.0, description="next-token loss on the answers")


class _Training(_Pass):
    """Common to the passes that train the whole model. Masks never change."""

    method: str
    sequence_length: int = Field(default=512, ge=2, description="tokens per row of training text")
    batch_size: int = Field(default=8, ge=1, description="rows per optimiser step, all devices together")
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="rows that run at once on a device, less memory when small; default batch_size"
    )
    learning_rate: Rate = Field(
        default=5e-3, description="of the weights at its peak, relative to the root mean square of those kept"
    )
    scale_learning_rate: Rate = Field(default=2e-3, description="of the scales, relative to their root mean square")
    norm_learning_rate: Rate = Field(
        default=1e-3, description="of norms and biases, relative to their root mean square"
    )
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps over which the rate rises from 0")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="how the learning rate falls to 0 after warmup; constant: it stays"
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="divides both models' logits before their divergence is taken",
    )
    train: list[Literal["linears", "norms", "embedding"]] = Field(
        default=["linears", "norms"],
        min_length=1,
        description="what changes: the compressed linears, norms (with all biases), embedding (with a head tied to it)",
    )
    quantize_in_loop: bool = Field(
        default=True,
        description="train what quantization makes of the weights, scales too; false rounds once, at the end",
    )
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="of matrix products; parameters are always float32. auto: bfloat16 where the processor is fast at it",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="keep one activation per block and compute the rest again: less memory, more time"
    )
    save_every: int | None = Field(
        default=None, ge=1, description="steps between checkpoints to resume from; default a tenth of all steps"
    )
    tensorboard: str | None = Field(default=None, min_length=1, description="directory for TensorBoard's event files")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the order of the rows")

    @model_validator(mode="after")
    def _check_batch(self) -> "_Training":
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise refuse(f"micro_batch_size {micro} does not divide batch_size {self.batch_size}", "micro_batch_size")
        return self


class Distill(_Training):
    """Train the compressed model to do what the dense one does. One teacher, the same text for both."""

    kind: ClassVar[str] = "distill"

    method: Literal["squarehead"] = Field(
        description="squarehead: hidden states after every block, next-token distribution, and the text itself"
    )
    tokens: Count = Field(description="tokens seen in training, repeated ones counted again: 2M, 500k")
    source: str | None = Field(
        default=None, description="text to train on, as calibration.source; default what calibration reads"
    )
    samples: int | None = Field(
        default=None,
        ge=1,
        description="rows of text to read, repeated until tokens is reached; default as many as tokens asks for",
    )
    weights: LossWeights = LossWeights()
    teacher: str | None = Field(default=None, min_length=1, description="default the dense model")
    teacher_logits: Literal["online", "cached"] = Field(
        default="online",
        description="online runs the teacher beside the student; cached runs it once and keeps its top_k on disk",
    )
    top_k: int = Field(default=64, ge=1, description="logits per token in the cache; the others are kept as one sum")

    @field_validator("source")
    @classmethod
    def _known_source(cls, source: str | None) -> str | None:
        if source is not None and (problem := source_problem(source)):
            raise refuse(problem)
        return source

    @property
    def needs_teacher(self) -> bool:
        """False only for a pass that may learn from the text alone."""
        return bool(self.weights.feature or self.weights.logits)

    @model_validator(mode="after")
    def _check(self) -> "Distill":
        weights = self.weights
        step = self.batch_size * self.sequence_length
        if self.tokens < step:
            raise refuse(
                f"{self.tokens} tokens are less than one step of {self.batch_size} x {self.sequence_length} = {step}; "
                f"raise tokens or lower batch_size",
                "tokens",
            )
        if not self.needs_teacher and not isinstance(self, Lora):
            raise refuse("neither feature nor logits counts, so there is nothing to learn from the teacher", "weights")
        if self.teacher_logits == "cached" and weights.feature:
            raise refuse(
                "the cache holds the teacher's logits but weights.feature asks for its hidden states; "
                "set weights.feature: 0 or teacher_logits: online",
                "teacher_logits",
            )
        if self.teacher_logits == "online" and self.top_k != type(self).model_fields["top_k"].default:
            raise refuse("top_k has no effect with teacher_logits online; remove it", "top_k")
        if self.temperature != 1 and not weights.logits:
            raise refuse("temperature has no effect without weights.logits; remove it", "temperature")
        if self.temperature != 1 and self.teacher_logits == "cached":
            raise refuse(
                "cached logits know the sum of the rest at temperature 1 only; remove temperature", "temperature"
            )
        return self


class Lora(Distill):
    """Heal the compressed model with low-rank adapters; its own weights stand still. Losses and text as in distill."""

    kind: ClassVar[str] = "lora"

    method: Literal["squarehead"] = Field(default="squarehead", description="as in distill")
    rank: int = Field(default=16, ge=1, description="of each adapter B A")
    alpha: float = Field(default=32.0, gt=0, allow_inf_nan=False, description="B A counts alpha / rank")
    targets: Annotated[list[str], AfterValidator(_check_patterns)] | None = Field(
        default=None, min_length=1, description="compressed linears that get one, written as in ignore; default all"
    )
    export: Literal["merge", "adapter"] = Field(
        default="merge",
        description="merge: into the weights, inside the mask and compressed again; adapter: in the directory adapter/ of "
        "the output, as peft and vLLM load it",
    )
    quantized_base: bool = Field(
        default=True, description="QLoRA: the weights stay codes in memory and are multiplied out for each product"
    )
    learning_rate: Rate = Field(default=1e-3, description="of B at its peak, and of A relative to its root mean square")

    @model_validator(mode="after")
    def _check_lora(self) -> "Lora":
        frozen = "the model's own weights stand still"
        self._refuse_set("lora", train=frozen, scale_learning_rate=frozen, norm_learning_rate=frozen)
        if not (self.needs_teacher or self.weights.cross_entropy):
            raise refuse("all weights are 0, so there is nothing to learn", "weights")
        if not self.needs_teacher and self.teacher is not None:
            raise refuse("teacher has no effect while weights.feature and weights.logits are 0", "teacher")
        if self.export == "adapter":
            why = "an adapter that is not merged is not rounded"
            self._refuse_set("lora and export adapter", quantize_in_loop=why)
        return self


class Columns(_Model):
    """Names of the fields of records that are no `messages`."""

    prompt: str = Field(min_length=1, description="field with what the user says")
    answer: str = Field(min_length=1, description="field with what the model should answer")


class Finetune(_Training):
    """Supervised fine-tuning on conversations; only what the assistant says is learned."""

    kind: ClassVar[Literal["finetune"]] = "finetune"

    method: Literal["sft"] = Field(default="sft", description="sft: cross entropy on the answers")
    data: str = Field(
        description='file:PATH (jsonl or parquet, {"messages": [...]} per record) or hub:ID[:CONFIG[:SPLIT]]'
    )
    columns: Columns | None = Field(default=None, description="for records with other fields than messages")
    epochs: int = Field(default=1, ge=1, description="how often each conversation is seen")
    samples: int | None = Field(default=None, ge=1, description="conversations to read; default all")
    weights: FinetuneWeights = FinetuneWeights()
    teacher: str | None = Field(
        default=None, min_length=1, description="a dense model fine-tuned on the same data, for feature and logits"
    )

    @field_validator("data")
    @classmethod
    def _known_source(cls, data: str) -> str:
        if problem := source_problem(data):
            raise refuse(problem.replace("self, ", ""))
        if data == "self":
            raise refuse("fine-tuning needs conversations: file:PATH or hub:ID[:CONFIG[:SPLIT]]")
        return data

    @model_validator(mode="after")
    def _check(self) -> "Finetune":
        weights = self.weights
        if not (weights.feature or weights.logits or weights.cross_entropy):
            raise refuse("all weights are 0, so there is nothing to learn", "weights")
        if self.teacher is None and (weights.feature or weights.logits):
            raise refuse(
                "feature and logits compare with a teacher; name one with teacher, or set both to 0", "weights"
            )
        if self.teacher is not None and not (weights.feature or weights.logits):
            raise refuse("teacher has no effect while weights.feature and weights.logits are 0", "teacher")
        if self.temperature != 1 and not weights.logits:
            raise refuse("temperature has no effect without weights.logits; remove it", "temperature")
        return self


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


class DepthTarget(_Model):
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


class Depth(_Pass):
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
            self._refuse_set(
                self.method, metric="only finercut looks at logits", units="only finercut removes sublayers"
            )
        if self.units == "pairs" and isinstance(self.drop, int) and self.drop % 2:
            raise refuse(f"units pairs removes two sublayers at a time, so drop must be even, not {self.drop}", "drop")
        nothing = "nothing is trained in place of what is removed"
        trained = dict.fromkeys(("epochs", "learning_rate", "batch_size", "loss", "llm_epochs"), nothing)
        if self.method != "streamline":
            self._refuse_set(self.method, replacement=nothing, **trained)
        elif self.replacement == "none":
            self._refuse_set("streamline and replacement none", **trained)
        if self.method == "deepest" and not (self.target and self.target.divergence):
            self._refuse_set("deepest", samples="it looks at no text")
        return self

    @property
    def needs_data(self) -> bool:
        return self.method != "deepest" or bool(self.target and self.target.divergence)

    @property
    def replaces(self) -> bool:
        """Whether something is trained to stand where layers were."""
        return self.method == "streamline" and self.replacement != "none"


PASSES: dict[str, type[_Pass]] = {
    model.kind: model for model in (Depth, Prune, Quantize, Tune, Distill, Finetune, Lora)
}


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
    if key not in PASSES:
        raise refuse(f"unknown pass '{key}'{closest(str(key), PASSES) or ';'} known passes: {known}", key)
    return value


def _kind(value: Any) -> str:
    return value.kind if isinstance(value, _Pass) else next(iter(value))


Pass = Annotated[
    Annotated[Depth, Tag("depth")]
    | Annotated[Prune, Tag("prune")]
    | Annotated[Quantize, Tag("quantize")]
    | Annotated[Tune, Tag("tune")]
    | Annotated[Distill, Tag("distill")]
    | Annotated[Finetune, Tag("finetune")]
    | Annotated[Lora, Tag("lora")],
    Discriminator(_kind),
    BeforeValidator(_one_key),
]


def head_format_problem(format: str) -> str | None:
    """Why `format` cannot hold a quantized output head, or None."""
    if format == "dense":
        return "dense stores 16-bit weights, so a quantized head would lose accuracy and save nothing; leave head out"
    return None


class Head(_Model):
    """The output head (lm_head) as a quantized linear without zeros.

    A model that ties it to its embedding gets a head of its own; the embedding stays as it is.
    """

    bits: Literal[4, 8] = Field(description="bits per weight; 8 is nearly lossless")
    method: Literal["gptq", "rtn"] | None = Field(
        default=None,
        description="gptq (solved on the calibration text) or rtn (round to nearest, no data); "
        "default gptq for 4 bits where the recipe calibrates, else rtn",
    )
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
    passes: list[Pass] = Field(min_length=1, description="what is done to the model; each kind at most once")
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
    def prune(self) -> Prune | None:
        return next((step for step in self.passes if isinstance(step, Prune)), None)

    @property
    def quantize(self) -> Quantize | None:
        return next((step for step in self.passes if isinstance(step, Quantize)), None)

    def learns_from(self, text: str) -> bool:
        """Whether calibration or training reads this text (file:PATH)."""
        sources = [source for source, _ in self.calibration.mixture]
        own = [step.source if isinstance(step, Distill) else step.data for step in self.training]
        sources += [source for source in own if source is not None]
        return any(same_text(source, text) for source in sources)

    @property
    def tune(self) -> Tune | None:
        return next((step for step in self.passes if isinstance(step, Tune)), None)

    @property
    def training(self) -> list[Distill | Finetune]:
        """The passes that train the whole model after it was compressed, in order."""
        return [step for step in self.passes if isinstance(step, Distill | Finetune)]

    @property
    def compresses(self) -> bool:
        """Whether linears of a dense model are compressed first; otherwise the recipe starts from a compressed one."""
        return any(not isinstance(step, Depth | Distill | Finetune) for step in self.passes)

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
    if "tune" in kinds and not {"prune", "quantize"} & set(kinds[: kinds.index("tune")]):
        raise refuse(
            "tune trains what compression left over, so it comes after prune and quantize; put it after them",
            "passes",
            kinds.index("tune"),
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


def _depth_between(recipe: Recipe) -> None:
    """Prune, quantize and tune are one walk over the blocks: depth comes before all of them or after."""
    kinds = [step.kind for step in recipe.passes]
    if "depth" not in kinds:
        return
    place = kinds.index("depth")
    walked = {"prune", "quantize", "tune"}
    if walked & set(kinds[:place]) and walked & set(kinds[place:]):
        raise refuse(
            "depth stands between passes that share one walk over the layers (prune, quantize, tune); "
            "put it before all of them or after",
            "passes",
            place,
            "depth",
        )


def _training_last(recipe: Recipe) -> None:
    """Training needs all masks and scales; nothing after it could compress without undoing it."""
    first = next((index for index, step in enumerate(recipe.passes) if isinstance(step, Distill | Finetune)), None)
    for index, step in enumerate(recipe.passes):
        if first is not None and index > first and not isinstance(step, Distill | Finetune):
            before = recipe.passes[first].kind
            raise refuse(
                f"{step.kind} comes after {before}, which trains the compressed model as a whole; put {step.kind} first",
                "passes",
                index,
                step.kind,
            )


def _adapter_last(recipe: Recipe) -> None:
    """An adapter belongs to the weights it was trained on."""
    for index, step in enumerate(recipe.passes[:-1]):
        if isinstance(step, Lora) and step.export == "adapter":
            raise refuse(
                f"{recipe.passes[index + 1].kind} comes after lora and would change the weights that its adapter belongs to; "
                "put lora last or merge it",
                "passes",
                index,
                "lora",
                "export",
            )


def _starts_compressed(recipe: Recipe) -> None:
    """A recipe that only trains reads a compressed checkpoint, which does not say what the dense model was."""
    if recipe.compresses or recipe.depth is not None:
        return
    for index, step in enumerate(recipe.passes):
        if isinstance(step, Distill) and step.needs_teacher and step.teacher is None:
            raise refuse(
                "this recipe starts from a compressed model, so name the dense one: teacher: MODEL",
                "passes",
                index,
                step.kind,
            )
    if recipe.export.head is not None:
        raise refuse(
            "a recipe that only trains leaves the output head as it is; quantize it with sparsify export --head",
            "export",
            "head",
        )


def _joint(recipe: Recipe) -> None:
    """Pruning and quantizing a linear share one Hessian and one target, so what shapes those cannot differ."""
    prune, quantize = recipe.prune, recipe.quantize
    if prune is None or quantize is None or prune.method == "magnitude" or quantize.method == "rtn":
        return
    shared = ["correction"] if prune.method == "wanda" and not prune.correction else ["correction", "damping"]
    shared += ["refine"] if prune.method in ("sparsegpt", "alps") else []
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
    if recipe.export.format == "pack-quantized" and recipe.quantize is None and recipe.compresses:
        raise refuse(
            "pack-quantized stores integers but no pass quantizes; add a quantize pass or export sparse24",
            "export",
            "format",
        )


def _leak(recipe: Recipe) -> None:
    if recipe.evaluation is None:
        return
    for step in recipe.training:
        text = step.source if isinstance(step, Distill) else step.data
        if text is not None and same_text(text, recipe.evaluation.text):
            raise refuse(
                f"evaluation reads the text that {step.kind} trains on, which would flatter the result; "
                "give one of them another file",
                "evaluation",
                "text",
            )
    for source, _ in recipe.calibration.mixture:
        if same_text(source, recipe.evaluation.text):
            raise refuse(
                f"evaluation reads the same text as calibration ({source}), which would flatter the result; "
                "never calibrate on what is evaluated: give one of them another file",
                "evaluation",
                "text",
            )


CONFLICTS: tuple[Callable[[Recipe], None], ...] = (
    _duplicates,
    _depth_between,
    _training_last,
    _adapter_last,
    _order,
    _starts_compressed,
    _joint,
    _format,
    _leak,
)


def problem_path(context: dict[str, Any]) -> KeyPath:
    """Where below its model an error made by `refuse` belongs."""
    return tuple(context.get("path", ()))
