"""The transformers Trainer, for models whose masks are fixed or learned by rule: own loss, own checkpoints, exact resume, FSDP2.

A checkpoint appears whole or not at all. It holds the trained parameters, the optimiser, the losses so far and where in
the data the run is, the mean of the last weights and the best ones where these are kept; the masks where these are
learned, else they belong to the compressed model that training started from and are verified against it before every save.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from sparsify.data.mixture import draw
from sparsify.distributed import is_main, main_first, processes
from sparsify.errors import CheckpointError, NumericalError
from sparsify.files import as_written, publish, read_json, write_json
from sparsify.manifest import seal
from sparsify.progress import Task, progress_bar
from sparsify.recipe import Distill, Finetune
from sparsify.training.averaging import WeightAverage, first_averaged
from sparsify.training.checkpoints import (
    AVERAGE,
    BEST,
    KEPT,
    MASKS,
    MEASURED,
    OPTIMIZER,
    PARAMETERS,
    PREFIX,
    SAVING,
    WATCH,
    checkpoints,
    discard_unfinished,
    last_checkpoint,
    load_parameters,
    step_of,
)  # fmt: skip
from sparsify.training.distill import TextRows
from sparsify.training.held_out import HeldOutText, Measurements, measure
from sparsify.training.learned_masks import LearnedMasks
from sparsify.training.log import LOG, TrainingLog
from sparsify.training.loss_monitor import WINDOW, LossWatch
from sparsify.training.optimizer import TensorwiseAdamW, load_states, save_gathered, states_by_name
from sparsify.training.processes import rows_at_once
from sparsify.training.qat_linear import TrainableLinear
from sparsify.training.sharding import is_sharded, kept_square_mean, whole
from sparsify.training.student import Student
from sparsify.training.tracking import Trackers

BETAS = (0.9, 0.95)
GRADIENT_NORM = 1.0
WIDE = 120  # columns from which the progress bar has room for the parts of the loss
WINDOW_BATCHES = 16  # batches whose rows are sorted by length together


def _by_length(window: Tensor, lengths: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """Batches of rows of similar length, in random order. window: int64, rows in the order drawn, whole batches."""
    batches = window[lengths[window].argsort(stable=True)].reshape(-1, batch_size)
    return batches[torch.randperm(len(batches), generator=generator)].reshape(-1)


class Rows(Dataset[dict[str, Any]]):
    """The rows of all steps, in the order they are trained on, drawn from the seed as `data.mixture.draw` does it: each epoch
    is a permutation of its own.

    The order is a table and not a sampler's state, so a resumed run goes on with the same rows. Rows of unequal lengths
    are sorted within a few batches, whose own order is drawn again: less is padding, and each batch is still a random one.

    lengths: of the rows, or None when all are equal
    """

    def __init__(self, rows: Any, steps: int, batch_size: int, seed: int, lengths: Tensor | None = None):
        self.rows = rows
        counts, weights = (rows.counts, rows.weights) if isinstance(rows, TextRows) else ([len(rows)], [1.0])
        generator = torch.Generator().manual_seed(seed)
        self.order = draw(counts, weights, steps * batch_size, generator)
        if lengths is not None:
            windows = self.order.split(WINDOW_BATCHES * batch_size)
            self.order = torch.cat([_by_length(w, lengths, batch_size, generator) for w in windows])

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.order[index])
        return {"row": row, **self.rows[row]}


def train(
    student: Student,
    groups: Mapping[str, list[nn.Parameter]],
    linears: Mapping[str, TrainableLinear],
    rows: Any,
    collate: Any,
    settings: Distill | Finetune,
    steps: int,
    directory: Path,
    teacher: Any = None,
    quiet: bool = False,
    held_out: HeldOutText | None = None,
) -> Trained:
    """Train `student` for so many steps, going on from the last checkpoint in `directory` when there is one.

    groups: parameters by kind (weights, scales, norms); linears: by name, whose masks change only where settings say so;
    rows: a sequence of mappings; collate: makes a batch with input_ids, labels (and keep) of several;
    teacher: called with a batch, gives the TeacherOutputs; held_out: what else is measured, which may end training early.
    Leaves the student at the state that is to be written: the best on held-out text, or the mean of the last, or the last.
    """
    with main_first():
        if is_main():
            discard_unfinished(directory)
    last = last_checkpoint(directory)
    done = 0 if last is None else step_of(last)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows]) if isinstance(rows, list) else None
    order = Rows(rows, steps, settings.batch_size, settings.seed, lengths)
    with hushed(), progress_bar(describe(settings, None), steps, completed=done, quiet=quiet) as bar:
        trainer = DistillTrainer(
            student, groups, linears, order, collate, settings, steps, directory, teacher, held_out, done
        )
        trainer.show_on(bar)
        try:
            if last is None or not trainer.has_stopped(last):
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            if trainer.trackers is not None:
                trainer.trackers.close()
    for linear in linears.values():
        linear.release()
    trainer.settle()
    return Trained(trainer.watch, trainer.measured, trainer.learned)


@dataclass(frozen=True)
class Trained:
    """What is known after a training: losses of all steps, measurements on held-out text, masks that were learned."""

    watch: LossWatch
    measured: Measurements | None
    learned: LearnedMasks | None


class DistillTrainer(Trainer):
    """A Trainer whose model is a `Student`."""

    def __init__(
        self,
        student: Student,
        groups: Mapping[str, list[nn.Parameter]],
        linears: Mapping[str, TrainableLinear],
        rows: Rows,
        collate: Any,
        settings: Distill | Finetune,
        steps: int,
        directory: Path,
        teacher: Any,
        held_out: HeldOutText | None = None,
        done: int = 0,
    ):
        self.linears, self.settings, self.directory, self.teacher = linears, settings, directory, teacher
        self.groups = groups
        trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
        self.first_averaged = first_averaged(steps, settings.average)
        self.average = WeightAverage(trained) if self.first_averaged <= steps else None
        self.held_out = held_out
        learning = settings.learned_masks if isinstance(settings, Distill) else None
        self.learned = None if learning is None else LearnedMasks(linears, learning, steps)
        if self.learned is not None and not self.learned.linears:
            raise CheckpointError(f"{settings.kind}: no linear of the model is 2:4, so there are no masks to learn")
        since = 0 if self.learned is None else self.learned.last + 1
        self.measured = None if held_out is None else Measurements(held_out.patience, since)
        self.best: dict[str, Tensor] = {}
        self.sizes = {kind: [root_mean_square(p) for p in parameters] for kind, parameters in groups.items()}
        self.watch = LossWatch(max(1, min(WINDOW, math.ceil(settings.warmup * steps))))
        self.log_file = TrainingLog(directory / LOG if is_main() else None, done)
        self.gradient_norm: Tensor | None = None
        self.masks: dict[str, Tensor] = {}
        self.remember_masks()
        self._sums: dict[str, Tensor] = {}
        self._saving_to: Path | None = None
        super().__init__(
            model=student,
            args=arguments(settings, steps, directory),
            data_collator=collate,
            train_dataset=rows,
            callbacks=[_EndOfStep(self)],
        )
        self.remove_callback(PrinterCallback)
        if is_sharded(student):
            student._is_accelerate_prepared = True  # type: ignore[assignment]  # accelerate leaves such a model as it is
        # the loss comes divided by the tokens of the whole step, so the Trainer must neither divide nor average again
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.held = self.args.world_size == 1
        self.trackers = (
            Trackers(settings, {"steps": steps, **settings.model_dump(mode="json")[settings.kind]})
            if is_main()
            else None
        )

    def show_on(self, bar: Task) -> None:
        self.add_callback(_Show(bar, self))

    # ------------------------------------------------------------------------------------------------------------ step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW whose step is relative to the size of each tensor, without decay: nothing says that weights should be small."""
        created: torch.optim.Optimizer | None = getattr(self, "optimizer", None)
        if created is None:
            kind, choices = optimizer_of(self.settings)
            created = kind(
                [
                    {"params": [parameter], "lr": self._rate(kind) * size, "kind": kind, "size": size}
                    for kind, parameters in self.groups.items()
                    for parameter, size in zip(parameters, self.sizes[kind], strict=True)
                ],
                betas=BETAS,
                weight_decay=0.0,
                **choices,
            )
            self.optimizer = created
        return created

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """As the Trainer's; the norm of gradients that are shared out is that over all processes."""
        self.gradient_norm = whole(nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm))
        return self.gradient_norm

    def _rate(self, kind: str) -> float:
        rates = {"scales": self.settings.scale_learning_rate, "norms": self.settings.norm_learning_rate}
        return rates.get(kind, self.settings.learning_rate)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self.held:
            for linear in self.linears.values():
                if not linear.holds:
                    linear.hold(self.model.dtype)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            for linear in self.linears.values():
                linear.release()
            self._end_of_step()
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        teacher_outputs = None if self.teacher is None else self.teacher(inputs)
        outputs = model(
            inputs["input_ids"],
            inputs["labels"],
            num_items_in_batch,
            teacher_outputs=teacher_outputs,
            keep=inputs.get("keep"),
        )
        for name, value in outputs.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        loss = (
            outputs["loss"] * self.accelerator.num_processes
        )  # gradients are averaged over processes, and this is a share
        return (loss, outputs) if return_outputs else loss

    def _end_of_step(self) -> None:
        """Stop before the optimizer uses a loss that is NaN or infinite or has diverged."""
        sums = {name: self.accelerator.reduce(value, "sum").item() for name, value in self._sums.items()}
        self._sums = {}
        problem = self.watch.add(sums)
        if problem is None:
            return
        step = self.state.global_step + 1
        kept = last_checkpoint(self.directory)
        where = (
            f"the state after step {step_of(kept)} is kept in {kept}"
            if kept is not None
            else f"no step was saved; the compressed model is kept in {self.directory.parent}"
        )
        raise NumericalError(
            f"{self.settings.kind}: training diverged at step {step} of {self.state.max_steps}: {problem}; {where}. "
            f"Go on from there with --resume and a lower rate: --set passes.{self.settings.kind}.learning_rate="
            f"{self.settings.learning_rate / 3:.1g}"
        )

    def log_step(self) -> None:
        """Log what is known of the step that has just been made."""
        step, scheduler = self.state.global_step, self.lr_scheduler
        values = {
            **self.watch.losses[-1],
            "learning_rate": self.settings.learning_rate * scheduler.lr_lambdas[0](step - 1),
        }
        if self.gradient_norm is not None:
            values["gradient_norm"] = float(self.gradient_norm)
        self._log(step, values)

    def _log(self, step: int, values: dict[str, float]) -> None:
        self.log_file.add(step, values)
        if self.trackers is not None:
            self.trackers.log(step, values)

    # --------------------------------------------------------------------------------------------- what will be written

    def measure(self) -> None:
        """Measure the state that would be written now, and keep it if it is the best so far."""
        assert self.held_out is not None and self.measured is not None
        with nullcontext() if self.average is None else self.average.in_place():
            for linear in self.linears.values():
                linear.hold(self.model.dtype, exported=True)
            divergence = measure(self.model, self.held_out, self.args.per_device_train_batch_size)
            for linear in self.linears.values():
                linear.release()
            if not math.isfinite(divergence):
                raise NumericalError(
                    f"{self.settings.kind}: the divergence from the teacher on held-out text is {divergence} at step "
                    f"{self.state.global_step}; is held_out.source text that the model can read?"
                )
            self._log(self.state.global_step, {"held_out": divergence})
            if self.measured.add(self.state.global_step, divergence):
                self.best = {name: tensor.detach().clone() for name, tensor in self._state().items()}

    @torch.no_grad()
    def settle(self) -> None:
        """Leave the model at the state that is to be written."""
        chosen = self.best or ({} if self.average is None else self.average.mean)
        for name, tensor in self._state().items():
            if name in chosen:
                tensor.copy_(chosen[name])

    def _state(self) -> dict[str, Tensor]:
        """The tensors that decide what is written: trained parameters, and masks that are learned."""
        state: dict[str, Tensor] = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        masks = {} if self.learned is None else self.learned.linears
        return state | {f"{name}.mask_bits": linear.get_buffer("mask_bits") for name, linear in masks.items()}

    def has_stopped(self, checkpoint: Path) -> bool:
        """Whether training had ended early when this checkpoint was saved; then all that `settle` needs is read from it."""
        if self.measured is None:
            return False
        self._load_states(checkpoint)
        if self.measured.stop:
            self.watch = LossWatch.from_json(read_json(checkpoint / WATCH))
        return self.measured.stop

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_to or self.directory)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer writes aside; the checkpoint gets its name when it is complete and its masks are right."""
        if not self.watch.good and self.state.global_step < self.state.max_steps:
            return
        self.verify_masks()
        aside = self.directory / SAVING
        name = f"{PREFIX}{self.state.global_step}"
        self._saving_to = aside
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving_to = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_json(aside / name / WATCH, self.watch.to_json())
            self._save_states(aside / name)
            seal(aside / name)
            publish(aside / name, self.directory / name)
            for old in checkpoints(self.directory)[:-KEPT]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Only what is trained: everything else is where training started from. All processes take part, one writes."""
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_gathered(self._trained(), Path(output_dir) / PARAMETERS)

    def _trained(self) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The optimizer's states by the names of the parameters, whole, so that any number of processes can read them. The
        schedule follows from the step."""
        save_gathered(states_by_name(self.optimizer, self._trained()), Path(output_dir) / OPTIMIZER)

    def _save_states(self, directory: Path) -> None:
        if self.average is not None and self.average.count:
            save_file({name: mean.contiguous() for name, mean in self.average.mean.items()}, directory / AVERAGE)
        if self.learned is not None:
            save_file(self.learned.state(), directory / MASKS)
        if self.measured is not None:
            save_file({name: one.contiguous() for name, one in self.best.items()}, directory / BEST)
            write_json(directory / MEASURED, self.measured.found)

    def _load_states(self, directory: Path) -> None:
        device = next(self.model.parameters()).device
        if self.average is not None:
            self.average.count = max(0, step_of(directory) - self.first_averaged + 1)
            self.average.mean = load_file(directory / AVERAGE, str(device)) if self.average.count else {}
        if self.learned is not None:
            self.learned.restore(load_file(directory / MASKS, str(device)), step_of(directory))
            self.remember_masks()
        if self.measured is not None:
            self.best = load_file(directory / BEST, str(device))
            with as_written(directory / MEASURED):
                self.measured.found = [(int(step), float(found)) for step, found in read_json(directory / MEASURED)]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_parameters(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As saved, but at the rates of the recipe: going on with a lower one is how to get past a divergence."""
        if checkpoint is None:
            return
        step = step_of(Path(checkpoint))
        load_states(self.optimizer, self._trained(), Path(checkpoint) / OPTIMIZER, step)
        self.watch = LossWatch.from_json(read_json(Path(checkpoint) / WATCH))
        self._load_states(Path(checkpoint))
        scheduler: Any = self.lr_scheduler
        scheduler.last_epoch, scheduler._step_count = step, step + 1
        scheduler.base_lrs = [self._rate(group["kind"]) * group["size"] for group in self.optimizer.param_groups]
        for group, base, shape in zip(
            self.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["initial_lr"], group["lr"] = base, base * shape(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def remember_masks(self) -> None:
        """Note the masks that the linears have, and must have when they are saved."""
        masks = {name: linear.mask_bits for name, linear in self.linears.items()}
        self.masks = {name: bits.clone() for name, bits in masks.items() if bits is not None}

    def relative_rates(self) -> dict[str, tuple[float, float]]:
        """By linear, the learning rate of its weight relative to its size, and that size."""
        groups = {id(group["params"][0]): group for group in self.optimizer.param_groups}
        found = {name: groups[id(linear.weight)] for name, linear in self.linears.items()}
        return {name: (group["lr"] / group["size"], group["size"]) for name, group in found.items()}

    def verify_masks(self) -> None:
        """NumericalError when a linear's mask is not the one training began with, or chose, or keeps other than two of four."""
        for name, bits in self.masks.items():
            linear = self.linears[name]
            two = linear.kept.reshape(-1, 4).sum(1) == 2
            if not torch.equal(linear.get_buffer("mask_bits"), bits) or not bool(two.all()):
                raise NumericalError(
                    f"{name}: its mask changed in training, which is a bug in sparsify; nothing was saved"
                )

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer would guess from the shape of a model it does not know


class _EndOfStep(TrainerCallback):
    """After each step: choose the masks, count the weights in the mean, measure, and stop when nothing has become better."""

    def __init__(self, trainer: DistillTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.learned is not None:
            self.trainer.learned.begin(state.global_step)
        if self.trainer.held_out is not None and state.global_step == 0:
            self.trainer.measure()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, step = self.trainer, state.global_step
        trainer.log_step()
        if trainer.learned is not None:
            if trainer.learned.after_step(step, trainer.relative_rates()):
                trainer.remember_masks()
        if trainer.average is not None and step >= trainer.first_averaged:
            trainer.average.add()
        if trainer.held_out is None or (step % trainer.held_out.every and step < state.max_steps):
            return
        trainer.measure()
        assert trainer.measured is not None
        if trainer.measured.stop:
            control.should_training_stop = control.should_save = True


class _Show(TrainerCallback):
    """Moves the progress bar and tells what the losses are."""

    def __init__(self, bar: Task, trainer: DistillTrainer):
        self.bar, self.trainer = bar, trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.advance()
        self.bar.describe(describe(self.trainer.settings, self.trainer.watch, measured=self.trainer.measured))


def describe(
    settings: Distill | Finetune,
    watch: LossWatch | None,
    columns: int | None = None,
    measured: Measurements | None = None,
) -> str:
    """The progress bar's text: `distill: loss 1.234`, with the last measurement on held-out text, on a wide terminal with the
    parts of the loss that count."""
    if watch is None or not watch.losses:
        return settings.kind
    said = f"{settings.kind}: loss {watch.smoothed:.4g}"
    if measured is not None and measured.found:
        said += f", held-out {measured.found[-1][1]:.4g}"
    if (columns or shutil.get_terminal_size().columns) < WIDE:
        return said
    weights = settings.loss.model_dump()
    parts = [f"{name} {value:.3g}" for name, value in watch.losses[-1].items() if weights.get(name)]
    return f"{said} ({', '.join(parts)})" if len(parts) > 1 else said


def arguments(settings: Distill | Finetune, steps: int, directory: Path) -> TrainingArguments:
    """What the Trainer is told. It knows nothing of sharding, see `sharding`: each process computes on rows of its own."""
    among = processes()
    micro = rows_at_once(settings, among)
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch_size // (micro * among),
        learning_rate=settings.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        warmup_steps=math.ceil(settings.warmup * steps),
        max_grad_norm=GRADIENT_NORM,
        train_sampling_strategy="sequential",  # Rows is in order already
        save_strategy="steps",
        save_steps=settings.save_every or max(1, steps // 10),
        logging_strategy="no",  # `log_step` logs
        logging_nan_inf_filter=False,
        seed=settings.seed % 2**32,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )


def optimizer_of(settings: Distill | Finetune) -> tuple[type[torch.optim.AdamW], dict[str, Any]]:
    """The class of the optimizer that a pass asks for, and what it is told beside rates."""
    on_host, eight_bits = settings.offload == "optimizer", settings.optimizer == "adamw_8bit"
    if on_host or eight_bits:
        return TensorwiseAdamW, {"on_host": on_host, "eight_bits": eight_bits}
    return torch.optim.AdamW, {"fused": True}


def root_mean_square(parameter: Tensor) -> float:
    """Over what is not zero: pruned weights do not count. 1 for a tensor of zeros, such as a new bias."""
    return math.sqrt(kept_square_mean(parameter)) or 1.0


@contextmanager
def hushed() -> Any:
    """The Trainer sets the verbosity of transformers for the whole process; give it back."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
