"""The passes that train the whole model after it was compressed."""

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from sparsify.recipe.schema.base import Count, Model, PassModel, Patterns, Rate, Source, Weight, refuse
from sparsify.recipe.schema.calibration import WeightedSource, refuse_mixture
from sparsify.recipe.sources import shares, source_problem


class LossWeights(Model):
    """How much each part of the loss counts; 0 leaves it out."""

    kl: Weight = Field(
        default=1.0,
        description="KL(teacher || student) of the next-token distributions: cover all that the teacher may say",
    )
    reverse_kl: Weight = Field(
        default=0.0, description="KL(student || teacher): say nothing that the teacher would not; may be added to kl"
    )
    squarehead: Weight = Field(
        default=1.0, description="SquareHead: relative squared distance of the hidden states after every block"
    )
    cross_entropy: Weight = Field(default=0.0, description="next-token loss on the text itself")

    @property
    def divergence(self) -> bool:
        """Whether the teacher's next-token distribution counts."""
        return bool(self.kl or self.reverse_kl)

    @property
    def needs_teacher(self) -> bool:
        return self.divergence or bool(self.squarehead)


class FinetuneLossWeights(LossWeights):
    """How much each part of the loss counts; all but cross_entropy need a teacher."""

    kl: Weight = Field(default=0.0, description="as in distill")
    squarehead: Weight = Field(default=0.0, description="as in distill")
    cross_entropy: Weight = Field(default=1.0, description="next-token loss on the answers")


class HeldOut(Model):
    """Text that is only measured: the weights that are nearest to the teacher on it are the ones that are kept."""

    source: Source = Field(
        description="as calibration.source, best of another kind than what is trained on; of self other rows are written"
    )
    samples: int = Field(default=16, ge=1, description="rows of sequence_length tokens")
    every: int | None = Field(
        default=None, ge=1, description="steps between two measurements; default a tenth of all steps"
    )
    patience: int = Field(
        default=3, ge=1, description="measurements in a row without a new best after which training stops"
    )


class MaskLearning(Model):
    """How 2:4 masks move in training."""

    method: Literal["ast", "cast"] = Field(
        default="ast",
        description="ast: the forward pass multiplies with the kept weights, gradients pass straight through to the dropped ones; "
        "cast: it multiplies with all, and the dropped ones are taken to zero",
    )
    every: int = Field(default=10, ge=1, description="steps between two choices of the masks")
    frozen: float = Field(
        default=0.4,
        gt=0,
        lt=1,
        allow_inf_nan=False,
        description="share of the steps, the last ones, in which masks stand still",
    )
    decay: float = Field(
        default=3.0,
        ge=0,
        allow_inf_nan=False,
        description="pull of the dropped weights to zero in units of the learning rate, from 0 up to this when masks stand still",
    )
    input_norms: bool = Field(
        default=False, description="choose by |W| times the norm of its input over the first step, not by |W| alone"
    )

    def last_choice(self, steps: int) -> int:
        """The last of so many steps, from 1, after which masks may change; 0 where they never do."""
        return steps - round(steps * self.frozen)


class TrainingPass(PassModel):
    """Common to the passes that train the whole model."""

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
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw",
        description="adamw_8bit: both moments of AdamW in 8 bits, 6 bytes per parameter less; the steps are nearly the same",
    )
    offload: Literal["none", "optimizer"] = Field(
        default="none",
        description="optimizer: its states in the memory of the host, 8 bytes per parameter less on a GPU; steps take longer",
    )
    average: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="share of the steps, the last ones, over which the weights before rounding are averaged; the mean is "
        "rounded once, at the end",
    )
    save_every: int | None = Field(
        default=None, ge=1, description="steps between checkpoints to resume from; default a tenth of all steps"
    )
    tensorboard: str | None = Field(default=None, min_length=1, description="directory for TensorBoard's event files")
    wandb: str | None = Field(
        default=None,
        min_length=1,
        description="project of Weights & Biases; kept on disk (wandb sync uploads it) unless WANDB_MODE is set",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the order of the rows")

    @model_validator(mode="after")
    def _check_batch(self) -> "TrainingPass":
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise refuse(f"micro_batch_size {micro} does not divide batch_size {self.batch_size}", "micro_batch_size")
        return self


class Distill(TrainingPass):
    """Train the compressed model to do what the dense one does. One teacher, the same text for both."""

    kind: ClassVar[str] = "distill"

    tokens: Count = Field(description="tokens seen in training, repeated ones counted again: 2M, 500k")
    source: Source | None = Field(
        default=None, description="text to train on, as calibration.source; default what calibration reads"
    )
    sources: list[WeightedSource] | None = Field(
        default=None,
        min_length=1,
        description="instead of source: several texts, rows drawn in proportion to their weights",
    )
    samples: int | None = Field(
        default=None,
        ge=1,
        description="rows of text to read, of several sources each its share, repeated until tokens is reached; default as "
        "many as tokens asks for, or as a text holds",
    )
    held_out: HeldOut | None = Field(
        default=None,
        description="text on which the distance to the teacher is measured while training; keeps the best state",
    )
    masks: Literal["fixed", "learned"] = Field(
        default="fixed",
        description="fixed: as compression left them; learned: which two of four are kept changes in training",
    )
    mask_learning: MaskLearning | None = Field(default=None, description="how, where masks are learned")
    loss: LossWeights = LossWeights()
    teacher: str | None = Field(default=None, min_length=1, description="default the dense model")
    teacher_logits: Literal["online", "cached"] = Field(
        default="online",
        description="online runs the teacher beside the student; cached runs it once and keeps its top_k on disk",
    )
    top_k: int = Field(default=64, ge=1, description="logits per token in the cache; the others are kept as one sum")

    @property
    def needs_teacher(self) -> bool:
        """False only for a pass that may learn from the text alone."""
        return self.loss.needs_teacher

    @property
    def texts(self) -> list[str]:
        """The sources that this pass names itself: what it trains on, and what it chooses the best state by."""
        held_out = [] if self.held_out is None else [self.held_out.source]
        return [*(source for source, _ in self.mixture or ()), *held_out]

    @property
    def mixture(self) -> list[tuple[str, float]] | None:
        """(source, weight) of every text of its own, the weights of sum 1; None where it reads what calibration reads."""
        if self.sources is None:
            return None if self.source is None else [(self.source, 1.0)]
        total = sum(entry.weight for entry in self.sources)
        return [(entry.source, entry.weight / total) for entry in self.sources]

    @property
    def steps(self) -> int:
        """Optimiser steps that the tokens make."""
        return self.tokens // (self.batch_size * self.sequence_length)

    @property
    def drawn_rows(self) -> int:
        """Rows that all steps take, a row as often as it is drawn."""
        return self.steps * self.batch_size

    @property
    def learned_masks(self) -> MaskLearning | None:
        """How masks are learned, None where they are fixed."""
        return None if self.masks == "fixed" else self.mask_learning or MaskLearning()

    def _check_masks(self) -> None:
        learned = self.learned_masks
        if learned is None:
            if self.mask_learning is not None:
                raise refuse(
                    "mask_learning has no effect with masks: fixed; remove it, or set masks: learned", "mask_learning"
                )
            return
        if "linears" not in self.train:
            raise refuse("masks of linears that are not trained cannot be learned; add linears to train", "masks")
        if not learned.last_choice(self.steps):
            raise refuse(
                f"masks stand still in all of the {self.steps} steps, so none is learned; give more tokens or lower "
                "mask_learning.frozen",
                "masks",
            )
        if self.average > learned.frozen:
            raise refuse(
                f"average counts the last {self.average:.0%} of the steps and masks move until the last {learned.frozen:.0%}; a mean "
                "of weights of different masks is none: lower average, or raise mask_learning.frozen",
                "average",
            )

    def _check_text(self) -> None:
        if self.source is not None and self.sources is not None:
            raise refuse("there are both source and sources; keep one (source: null removes it)", "sources")
        mixture = self.mixture or []
        names, weights = [name for name, _ in mixture], [weight for _, weight in mixture]
        for total in (self.drawn_rows, self.samples or self.drawn_rows) if mixture else ():
            refuse_mixture(names, shares(total, weights), total)
        if self.held_out is not None and not self.needs_teacher:
            raise refuse(
                "held_out measures the distance to a teacher, and the loss has none; give kl, reverse_kl or squarehead a weight",
                "held_out",
            )

    @model_validator(mode="after")
    def _check(self) -> "Distill":
        step = self.batch_size * self.sequence_length
        if self.tokens < step:
            raise refuse(
                f"{self.tokens} tokens are less than one step of {self.batch_size} x {self.sequence_length} = {step}; "
                f"raise tokens or lower batch_size",
                "tokens",
            )
        self._check_text()
        self._check_masks()
        if not self.needs_teacher and not isinstance(self, Lora):
            raise refuse(
                "none of kl, reverse_kl and squarehead counts, so there is nothing to learn from the teacher", "loss"
            )
        if self.teacher_logits == "cached" and self.loss.squarehead:
            raise refuse(
                "the cache holds the teacher's logits but loss.squarehead asks for its hidden states; "
                "set loss.squarehead: 0 or teacher_logits: online",
                "teacher_logits",
            )
        if self.teacher_logits == "online" and self.top_k != type(self).model_fields["top_k"].default:
            raise refuse("top_k has no effect with teacher_logits online; remove it", "top_k")
        if self.temperature != 1 and not self.loss.divergence:
            raise refuse("temperature has no effect without loss.kl or loss.reverse_kl; remove it", "temperature")
        if self.temperature != 1 and self.teacher_logits == "cached":
            raise refuse(
                "cached logits know the sum of the rest at temperature 1 only; remove temperature", "temperature"
            )
        return self


class Lora(Distill):
    """Heal the compressed model with low-rank adapters; its own weights stand still. Losses and text as in distill."""

    kind: ClassVar[str] = "lora"

    rank: int = Field(default=16, ge=1, description="of each adapter B A")
    alpha: float = Field(default=32.0, gt=0, allow_inf_nan=False, description="B A counts alpha / rank")
    targets: Patterns | None = Field(
        default=None, min_length=1, description="compressed linears that get one, written as in ignore; default all"
    )
    export: Literal["merge", "adapter"] = Field(
        default="merge",
        description="merge: into the weights, inside the mask and compressed again; adapter: in the directory adapter/ of "
        "the output, as peft and vLLM load it",
    )
    quantized_base: bool = Field(
        default=True, description="QLoRA: the weights stay codes in memory and are dequantized for each product"
    )
    learning_rate: Rate = Field(default=1e-3, description="of B at its peak, and of A relative to its root mean square")

    @model_validator(mode="after")
    def _check_lora(self) -> "Lora":
        frozen = "the model's own weights stand still"
        self.refuse_set("lora", train=frozen, scale_learning_rate=frozen, norm_learning_rate=frozen, masks=frozen)
        if not (self.needs_teacher or self.loss.cross_entropy):
            raise refuse("all parts of the loss are 0, so there is nothing to learn", "loss")
        if not self.needs_teacher and self.teacher is not None:
            raise refuse("teacher has no effect while loss.kl, loss.reverse_kl and loss.squarehead are 0", "teacher")
        if self.held_out is not None and not self.quantize_in_loop:
            raise refuse(
                "held_out measures the weights of the loop, and quantize_in_loop false writes others; remove one of them",
                "held_out",
            )
        if self.export == "adapter":
            why = "an adapter that is not merged is not rounded"
            self.refuse_set("lora and export adapter", quantize_in_loop=why)
        return self


class Columns(Model):
    """Names of the fields of records that are no `messages`."""

    prompt: str = Field(min_length=1, description="field with what the user says")
    answer: str = Field(min_length=1, description="field with what the model should answer")


class Finetune(TrainingPass):
    """Supervised fine-tuning on conversations; only what the assistant says is learned."""

    kind: ClassVar[Literal["finetune"]] = "finetune"

    method: Literal["sft"] = Field(default="sft", description="sft: cross entropy on the answers")
    data: str = Field(
        description='file:PATH (jsonl or parquet, {"messages": [...]} per record) or hub:ID[:CONFIG[:SPLIT]]'
    )
    columns: Columns | None = Field(default=None, description="for records with other fields than messages")
    epochs: int = Field(default=1, ge=1, description="how often each conversation is seen")
    samples: int | None = Field(default=None, ge=1, description="conversations to read; default all")
    loss: FinetuneLossWeights = FinetuneLossWeights()
    teacher: str | None = Field(
        default=None, min_length=1, description="a dense model fine-tuned on the same data, for kl and squarehead"
    )

    @property
    def texts(self) -> list[str]:
        """The sources that this pass reads."""
        return [self.data]

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
        if not (self.loss.needs_teacher or self.loss.cross_entropy):
            raise refuse("all parts of the loss are 0, so there is nothing to learn", "loss")
        if self.teacher is None and self.loss.needs_teacher:
            raise refuse(
                "kl, reverse_kl and squarehead compare with a teacher; name one with teacher, or set them to 0", "loss"
            )
        if self.teacher is not None and not self.loss.needs_teacher:
            raise refuse("teacher has no effect while loss.kl, loss.reverse_kl and loss.squarehead are 0", "teacher")
        if self.temperature != 1 and not self.loss.divergence:
            raise refuse("temperature has no effect without loss.kl or loss.reverse_kl; remove it", "temperature")
        return self
