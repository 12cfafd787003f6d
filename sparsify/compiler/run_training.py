"""Training of the whole compressed model, between the walk and the finished directory.

The parts that the walk wrote become a transformers model whose linears are trainable inside their masks; what comes out
of training is written as the next stage of the parts. The Trainer's checkpoints lie in the work directory, so a killed run
goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsify.compiler.metrics import ADAPTER
from sparsify.compiler.open_student import OpenedStudent, open_student, rewrite
from sparsify.compiler.plan_training import PlannedTraining
from sparsify.compiler.training_text import held_out_rows, reads_files, repeats_in_words, training_rows
from sparsify.compute import for_precision
from sparsify.distributed import device, is_main, join, main_first, wait_for_all
from sparsify.errors import CalibrationError
from sparsify.files import atomic_write
from sparsify.formats.writer import CheckpointWriter
from sparsify.model.attention import tiled_attention
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.decoder import find_blocks
from sparsify.model.linear import LinearWeights
from sparsify.model.pretrained import load_causal_lm
from sparsify.progress import say, stage, without_bars
from sparsify.recipe import Calibration, Distill, Finetune, Lora
from sparsify.training.averaging import first_averaged
from sparsify.training.distill import TextRows, cache_teacher, collate, online
from sparsify.training.held_out import HeldOutText
from sparsify.training.qat_linear import TrainableLinear, make_trainable
from sparsify.training.sharding import shard
from sparsify.training.student import Student, Teacher, trainable_parameters

if TYPE_CHECKING:
    from sparsify.training.trainer import Trained


@tiled_attention()
def train_stage(
    number: int,
    planned: PlannedTraining,
    checkpoint: Checkpoint,
    calibration: Calibration,
    writer: CheckpointWriter,
    conclude: Callable[[dict[str, Any], dict[str, LinearWeights]], None],
    quiet: bool = False,
) -> None:
    """Run the training pass `number` (from 1) and make its result the next stage of the parts.

    checkpoint: the model of the recipe, dense or compressed. conclude: is told what metrics.json should say, and the
    compressed linears by name, before the stage counts as done.
    """
    # here, since it brings transformers' Trainer and peft, which no run without training needs
    from sparsify.training.trainer import train

    settings = planned.settings
    directory = writer.work / f"training-{number}"
    directory.mkdir(parents=True, exist_ok=True)
    join()
    quiet = quiet or not is_main()
    with main_first():
        rows = training_rows(planned, checkpoint, calibration, directory, quiet)
        measured_on = None
        if isinstance(settings, Distill) and settings.held_out is not None:
            measured_on = held_out_rows(planned, checkpoint, calibration, directory, quiet)
    if not reads_files(settings, calibration):  # else it was said before compressing
        for said in repeats_in_words(settings, calibration, rows):
            say(said, quiet)
    steps = planned.steps if planned.steps is not None else len(rows) * _epochs(settings) // settings.batch_size
    if steps < 1:
        raise CalibrationError(
            f"{settings.kind}: {len(rows)} rows are less than one step of batch_size {settings.batch_size}; "
            "lower batch_size or give more data"
        )
    outputs_of_teacher, held_out = prepare_teacher(planned, rows, measured_on, directory, quiet)
    with stage(f"{settings.kind}: loading the student", quiet):
        opened, student, groups = prepare(settings, writer, checkpoint)
    masked = {} if isinstance(settings, Lora) else opened.linears
    trained = train(
        student, groups, masked, rows, collate, settings, steps, directory, outputs_of_teacher, quiet, held_out
    )
    summary = training_note(planned, rows, steps, trained)
    if opened.adapter is not None:
        keep_adapter(opened, writer)
    with stage(f"{settings.kind}: writing what was trained", quiet):
        rewrite(writer, opened, student, partial(conclude, summary))
    wait_for_all()
    writer.stage = number


def prepare(
    settings: Distill | Finetune, writer: CheckpointWriter, checkpoint: Checkpoint
) -> tuple[OpenedStudent, Student, dict[str, list[nn.Parameter]]]:
    """The student as training begins, shared out over the processes, and what is trained of it, by kind."""
    names: dict[str, list[str]] = {"weights": [], "scales": [], "norms": []}
    if isinstance(settings, Lora):
        opened = open_student(writer, checkpoint, partial(_frozen, settings), lambda opened, block: None)
        place_adapters(opened, settings)
        names["weights"] = [name for name, p in opened.model.named_parameters() if p.requires_grad]
        for block in find_blocks(opened.model):
            shard(opened.model.get_submodule(block))
    else:
        opened = open_student(writer, checkpoint, partial(_trainable, settings), partial(_ready, settings, names))
    if settings.gradient_checkpointing:
        opened.model.gradient_checkpointing_enable()
    student = Student(opened.model, settings.loss, settings.temperature, for_precision(settings.precision))
    shard(student)
    parameters = dict(opened.model.named_parameters())  # sharding made new ones
    groups = {kind: [parameters[name] for name in found] for kind, found in names.items() if found}
    return opened, student, groups


def _trainable(
    settings: Distill | Finetune, model: nn.Module, linears: Mapping[str, LinearWeights]
) -> dict[str, TrainableLinear]:
    placed = make_trainable(model, linears)
    for linear in placed.values():
        linear.quantize_in_loop = settings.quantize_in_loop
    return placed


def _ready(settings: Distill | Finetune, names: dict[str, list[str]], opened: OpenedStudent, block: str) -> None:
    """Say what is trained of a block that is complete, and share it out. names: by kind, gets those of what is trained"""
    among = opened.within(block)
    linears = {name: linear for name, linear in opened.linears.items() if f"{name}.weight" in among}
    found = trainable_parameters(opened.model, linears, settings.train, opened.dtypes, among)
    called = {parameter: name for name, parameter in opened.model.named_parameters()}
    for kind, parameters in found.items():
        names[kind] += [called[parameter] for parameter in parameters]
    if block:
        shard(opened.model.get_submodule(block))


def _frozen(settings: Lora, model: nn.Module, linears: Mapping[str, LinearWeights]) -> dict[str, Any]:
    from sparsify.training.lora import freeze

    exact = {
        name: TrainableLinear(linear).export() for name, linear in linears.items()
    }  # each in the type that is stored
    return freeze(model, exact, settings.quantized_base, for_precision(settings.precision))


def place_adapters(opened: OpenedStudent, settings: Lora) -> None:
    """Give the compressed linears of a frozen student adapters."""
    from sparsify.training.lora import add_adapters, targeted

    wanted = targeted(opened.linears, settings.targets)
    merge = settings.export == "merge"
    placed, config = add_adapters(
        opened.model,
        wanted,
        rank=settings.rank,
        alpha=settings.alpha,
        merge=merge,
        quantize_in_loop=settings.quantize_in_loop,
        seed=settings.seed,
    )
    opened.linears = placed if merge else {}
    opened.adapter = None if merge else config


def keep_adapter(opened: OpenedStudent, writer: CheckpointWriter) -> None:
    """Put the trained adapter into the work directory, from where it goes into the finished one."""
    from sparsify.training.lora import adapter_files

    files = adapter_files(opened.model, opened.adapter, writer.output.name)  # gathered from all processes
    if is_main():
        directory = writer.work / ADAPTER
        directory.mkdir(exist_ok=True)
        for name, content in files.items():
            atomic_write(directory / name, content)


def prepare_teacher(
    planned: PlannedTraining, rows: Any, measured_on: TextRows | None, directory: Path, quiet: bool
) -> tuple[Any, HeldOutText | None]:
    """What the teacher says of a batch, as `train` calls it (None without a teacher), and what is measured beside training."""
    settings = planned.settings
    if planned.teacher is None:
        return None, None
    with stage(f"{settings.kind}: loading the teacher", quiet):
        teacher = open_teacher(planned, device())
    if not isinstance(settings, Distill):
        return online(teacher), None
    learned = measured = online(teacher)
    if settings.teacher_logits == "cached":
        with main_first():
            learned = cache_teacher(teacher, rows.tokens, settings.top_k, directory / "teacher", quiet)
            if measured_on is not None:
                place = directory / "teacher-held-out"
                measured = cache_teacher(teacher, measured_on.tokens, settings.top_k, place, quiet)
    if measured_on is None or settings.held_out is None:
        return learned, None
    return learned, HeldOutText(measured_on, measured, planned.measured_every, settings.held_out.patience)


def training_note(planned: PlannedTraining, rows: Any, steps: int, trained: Trained) -> dict[str, Any]:
    """What metrics.json says of a training. steps: that were to be done"""
    settings, done = planned.settings, len(trained.watch.losses)
    held_out = None
    if trained.measured is not None:
        assert isinstance(settings, Distill) and settings.held_out is not None
        held_out = {
            "source": settings.held_out.source,
            "rows": settings.held_out.samples,
            "stopped": done < steps,
            **trained.measured.summary(),
        }
    return {
        "kind": settings.kind,
        "precision": str(for_precision(settings.precision)).removeprefix("torch."),
        "steps": done,
        "planned_steps": steps,
        "rows": len(rows),
        "tokens": _tokens(rows, done * settings.batch_size),
        "teacher": None if planned.teacher is None else planned.teacher.spec,
        "masks": None if trained.learned is None else trained.learned.summary(),
        "averaged_steps": max(0, done + 1 - first_averaged(steps, settings.average)),
        "held_out": held_out,
        **trained.watch.summary(),
    }


def _epochs(settings: Distill | Finetune) -> int:
    return settings.epochs if isinstance(settings, Finetune) else 1


def _tokens(rows: Any, seen: int) -> int:
    """Tokens of so many rows, all of them equally often."""
    return sum(len(row["input_ids"]) for row in rows) * seen // len(rows)


def open_teacher(planned: PlannedTraining, device: str) -> Teacher:
    """The dense model, in the precision of the products."""
    assert planned.teacher is not None
    settings = planned.settings
    with without_bars():
        teacher = planned.teacher
        model = load_causal_lm(teacher.loadable_directory(), teacher.spec, dtype=for_precision(settings.precision))
    model.to(device)
    loss = settings.loss
    measured = isinstance(settings, Distill) and settings.held_out is not None
    return Teacher(
        model, feature=loss.squarehead > 0, logits=loss.divergence or measured, blocks=planned.teacher_blocks
    )
