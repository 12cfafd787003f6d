"""What the training passes of a recipe will do: steps, tokens, teacher, all checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsify.distributed import processes
from sparsify.errors import CheckpointError
from sparsify.formats.foreign import open_dense
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.pretrained import load_tokenizer
from sparsify.recipe import Distill, Finetune, Recipe
from sparsify.recipe.sources import sources_in_words
from sparsify.training.distill import check_same_language
from sparsify.training.processes import refuse_processes


@dataclass(frozen=True)
class Shortened:
    """What a depth pass left of a model, for those who learn from the whole one.

    layers: of the whole model; teacher_blocks: for each layer that is left, the layer of the whole model whose output its
    own should be
    """

    layers: int
    teacher_blocks: tuple[int, ...]


@dataclass(frozen=True)
class PlannedTraining:
    """One training pass. steps, tokens: None where they depend on data that is not read yet; teacher: None without one.

    teacher_blocks: the teacher's layers whose outputs are compared with the student's, when it has more of them
    """

    settings: Distill | Finetune
    steps: int | None
    tokens: int | None
    teacher: Checkpoint | None
    teacher_blocks: tuple[int, ...] | None = None

    def describe(self) -> str:
        """`distill: 488 steps of 8 x 512 tokens (2.0M) of self, teacher embedded:..., quantization in the loop`"""
        settings = self.settings
        batch = f"{settings.batch_size} x {settings.sequence_length}"
        if isinstance(settings, Distill):
            assert self.tokens is not None
            text = (
                sources_in_words(settings.model_dump()[settings.kind]) if settings.mixture else "the calibration source"
            )
            what = f"{self.steps} steps of {batch} tokens ({short(self.tokens)}) of {text}"
            if settings.samples is not None and self.tokens > settings.samples * settings.sequence_length:
                seen = self.tokens / (settings.samples * settings.sequence_length)
                what += f", {settings.samples} rows, each seen {seen:.3g} times"
        else:
            times = "once" if settings.epochs == 1 else f"{settings.epochs} times"
            what = f"{settings.data} {times}, {settings.batch_size} conversations of at most {settings.sequence_length} tokens a step"
        teacher = "" if self.teacher is None else f", teacher {self.teacher.spec}"
        if self.teacher is not None and self.teacher.quantization is not None:
            teacher += f" (dequantized: {self.teacher.quantization})"
        return f"{settings.kind}: {what}{teacher}{self._chosen()}"

    def _chosen(self) -> str:
        """How masks and the state that is written are chosen, where it is not the first ones and the last one."""
        said = ""
        if isinstance(self.settings, Distill) and (learned := self.settings.learned_masks) is not None:
            assert self.steps is not None
            last = learned.last_choice(self.steps)
            said += f", masks learned ({learned.method}, every {learned.every} steps up to step {last})"
        if self.settings.average:
            said += f", mean of the weights of the last {self.settings.average:.0%} of the steps"
        if isinstance(self.settings, Distill) and self.settings.held_out is not None:
            held_out = self.settings.held_out
            said += (
                f", best state on {held_out.samples} rows of {held_out.source}, measured every {self.measured_every} steps, "
                f"stopping after {held_out.patience} without a better one"
            )
        return said

    @property
    def measured_every(self) -> int:
        """Steps between two measurements on held-out text."""
        assert isinstance(self.settings, Distill) and self.settings.held_out is not None and self.steps is not None
        return self.settings.held_out.every or max(1, self.steps // 10)

    @property
    def measured_tokens(self) -> int:
        """Tokens of all measurements on held-out text together, 0 without such a text."""
        if not isinstance(self.settings, Distill) or self.settings.held_out is None:
            return 0
        assert self.steps is not None
        times = 1 + -(-self.steps // self.measured_every)
        return times * self.settings.held_out.samples * self.settings.sequence_length

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.settings.kind,
            "steps": self.steps,
            "tokens": self.tokens,
            "teacher": None if self.teacher is None else self.teacher.spec,
        }


def short(count: int) -> str:
    """2000000 as 2.0M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def plan_training(recipe: Recipe, model: Checkpoint, shortened: Shortened | None = None) -> tuple[PlannedTraining, ...]:
    """The training passes of a recipe for a model, dense or compressed. CheckpointError for a teacher that cannot teach it."""
    return tuple(_planned(settings, model, shortened) for settings in recipe.training)


def _planned(settings: Distill | Finetune, model: Checkpoint, shortened: Shortened | None) -> PlannedTraining:
    spec = settings.teacher
    refuse_processes(settings, processes())
    if isinstance(settings, Distill) and settings.needs_teacher and spec is None:
        spec = model.spec  # a recipe that compresses starts from the dense model
    teacher = None
    if spec is not None:
        teacher = model if spec == model.spec else open_dense(spec)
        layers = None if shortened is None else shortened.layers
        check_same_language(model.config, teacher.config, spec, settings.loss.squarehead > 0, layers)
        _check_tokenizers(model, teacher)
    blocks = None if teacher is None or shortened is None else shortened.teacher_blocks
    if isinstance(settings, Distill):
        tokens = settings.drawn_rows * settings.sequence_length
        return PlannedTraining(settings, settings.steps, tokens, teacher, blocks)
    return PlannedTraining(settings, None, None, teacher, blocks)


def _check_tokenizers(student: Checkpoint, teacher: Checkpoint) -> None:
    """Vocabularies of one size may still be different languages."""
    if student.directory == teacher.directory:
        return
    try:
        one, other = (load_tokenizer(c.directory, c.spec).get_vocab() for c in (student, teacher))
    except (OSError, ValueError):
        return  # a checkpoint without a tokenizer says nothing about its tokens; the text will need one and say so
    if one != other:
        token = next(token for token in one if one[token] != other.get(token)) if set(one) - set(other) or one else "?"
        raise CheckpointError(
            f"teacher {teacher.spec} has another vocabulary than the student (token {one.get(token)} is {token!r} to the "
            "student); take the dense model it was made from"
        )
