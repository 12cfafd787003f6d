"""Training of the whole compressed model, between the walk and the finished directory.

The parts that the walk wrote become a transformers model whose linears are trainable inside their masks; what comes out
of training is written as the next stage of the parts. The Trainer's checkpoints lie in the work directory, so a killed run
goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from sparsify.compiler.metrics import ADAPTER
from sparsify.compiler.plan_training import PlannedTraining
from sparsify.compiler.training_text import held_out_rows, reads_files, repeats_in_words, training_rows
from sparsify.compute import for_precision
from sparsify.distributed import device, is_main, join, main_first, processes, wait_for_all
from sparsify.errors import CalibrationError, CheckpointError
from sparsify.files import atomic_write
from sparsify.formats.reader import natural
from sparsify.formats.scheme import in_block
from sparsify.formats.writer import CheckpointWriter
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.decoder import load_state, meta_model, target_names
from sparsify.model.linear import LinearWeights
from sparsify.model.pretrained import load_causal_lm
from sparsify.progress import say, stage, without_bars
from sparsify.recipe import Calibration, Distill, Finetune, Lora
from sparsify.training.averaging import first_averaged
from sparsify.training.distill import TextRows, cache_teacher, collate, online
from sparsify.training.held_out import HeldOutText
from sparsify.training.qat_linear import make_trainable
from sparsify.training.student import Student, Teacher, trainable_parameters
from sparsify.training.trainer import PREFIX, Trained, load_parameters, train


@dataclass
class OpenedStudent:
    """The compressed model as one that can be trained.

    linears:  trainable, by their name in the model; those that end with other weights than they began with
    modules:  name of a compressed linear in the checkpoint -> its name in the model
    tensors:  name of any other tensor in the checkpoint -> name of the parameter that it is
    dtypes:   name of such a parameter -> its type in the checkpoint
    adapter:  peft's settings of an adapter that is exported beside the weights
    """

    model: Any
    linears: dict[str, Any]
    modules: dict[str, str]
    tensors: dict[str, str]
    dtypes: dict[str, torch.dtype]
    adapter: Any = None


def open_student(writer: CheckpointWriter, checkpoint: Checkpoint) -> OpenedStudent:
    """Build the model of `checkpoint` in float32 from the finished parts; its compressed linears in the blocks can be trained."""
    linears: dict[str, LinearWeights] = {}
    others: dict[str, Tensor] = {}
    for part in sorted(writer.parts(), key=natural):
        more, tensors = writer.read_part(part)
        linears |= more
        others |= tensors
    model: Any = meta_model(checkpoint, torch.float32)
    targets = target_names(model, [*others, *(f"{module}.weight" for module in linears)])
    modules = {module: targets[f"{module}.weight"][0].removesuffix(".weight") for module in linears}
    state = {name: tensor for name, tensor in others.items() if name in targets}  # the model knows no others
    for module, linear in linears.items():
        state[f"{module}.weight"] = linear.dense(torch.float32)
        if linear.bias is not None:
            state[f"{module}.bias"] = linear.bias
    head = model.get_output_embeddings()
    if any(model.get_submodule(name) is head for name in modules.values()):
        _untie(model)  # it has codes of its own
    load_state(model, state, torch.float32)
    model.tie_weights()
    lacking = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if lacking:
        raise CheckpointError(
            f"{checkpoint.spec} lacks the tensor {lacking[0]}; is it complete and of this model type?"
        )
    inside = {
        modules[module]: linear  # the linears of a sublayer that was removed stay zero
        for module, linear in linears.items()
        if in_block(modules[module]) and not linear.is_zero()
    }
    placed = make_trainable(model, inside)
    known = {name: target for name, (target, same) in targets.items() if same and name in others}
    return OpenedStudent(model, placed, modules, known, {known[name]: others[name].dtype for name in known})


def _untie(model: Any) -> None:
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = False
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=False)


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
    if processes() == 1:
        student.to(device())  # FSDP moves its shards itself
    masked = {} if isinstance(settings, Lora) else opened.linears
    trained = train(
        student, groups, masked, rows, collate, settings, steps, directory, outputs_of_teacher, quiet, held_out
    )
    summary = training_note(planned, rows, steps, trained)
    if is_main():
        if processes() > 1:  # what was trained is in shards here, and whole in the last checkpoint
            opened, student, _ = prepare(settings, writer, checkpoint)
            load_parameters(student, directory / f"{PREFIX}{steps}")
        if opened.adapter is not None:
            keep_adapter(opened, writer)
        with stage(f"{settings.kind}: writing what was trained", quiet):
            rewrite(writer, opened, partial(conclude, summary))
    wait_for_all()
    writer.stage = number


def prepare(
    settings: Distill | Finetune, writer: CheckpointWriter, checkpoint: Checkpoint
) -> tuple[OpenedStudent, Student, dict[str, list[nn.Parameter]]]:
    """The student as training begins, and what is trained of it, by kind."""
    opened = open_student(writer, checkpoint)
    if isinstance(settings, Lora):
        groups = {"weights": place_adapters(opened, settings)}
        if settings.gradient_checkpointing:
            opened.model.gradient_checkpointing_enable()
        return (
            opened,
            Student(opened.model, settings.loss, settings.temperature, for_precision(settings.precision)),
            groups,
        )
    for linear in opened.linears.values():
        linear.quantize_in_loop = settings.quantize_in_loop
    groups = trainable_parameters(opened.model, opened.linears, settings.train, opened.dtypes)
    if settings.gradient_checkpointing:
        opened.model.gradient_checkpointing_enable()
    student = Student(opened.model, settings.loss, settings.temperature, for_precision(settings.precision))
    return opened, student, groups


def place_adapters(opened: OpenedStudent, settings: Lora) -> list[nn.Parameter]:
    """Freeze the student and give its compressed linears adapters. Returns what is trained."""
    from sparsify.training.lora import add_adapters, targeted

    if processes() > 1:
        raise CheckpointError("lora trains in one process; start it without torchrun, or distill instead")
    everything = {name: linear.export() for name, linear in opened.linears.items()}
    wanted = targeted(everything, settings.targets)
    merge = settings.export == "merge"
    placed, config = add_adapters(
        opened.model,
        everything,
        wanted,
        rank=settings.rank,
        alpha=settings.alpha,
        merge=merge,
        quantized_base=settings.quantized_base,
        quantize_in_loop=settings.quantize_in_loop,
        dtype=for_precision(settings.precision),
        seed=settings.seed,
    )
    opened.linears = placed if merge else {}
    opened.adapter = None if merge else config
    return [parameter for parameter in opened.model.parameters() if parameter.requires_grad]


def keep_adapter(opened: OpenedStudent, writer: CheckpointWriter) -> None:
    """Put the trained adapter into the work directory, from where it goes into the finished one."""
    from sparsify.training.lora import adapter_files

    directory = writer.work / ADAPTER
    directory.mkdir(exist_ok=True)
    for name, content in adapter_files(opened.model, opened.adapter, writer.output.name).items():
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


@torch.no_grad()
def rewrite(
    writer: CheckpointWriter, opened: OpenedStudent, conclude: Callable[[dict[str, LinearWeights]], None]
) -> None:
    """Write all parts again with what was trained; a linear that was not, and every other tensor, stay as they were."""
    inside: dict[str, LinearWeights] = {}
    with writer.next_stage() as write:
        for part in sorted(writer.parts(), key=natural):
            linears, tensors = writer.read_part(part)
            for module in linears:
                trained = opened.linears.get(opened.modules[module])
                if trained is not None:
                    linears[module] = trained.cpu().export().validate(module)
                if in_block(opened.modules[module]):
                    inside[module] = linears[module]
            for name, tensor in tensors.items():
                owner, _, last = opened.tensors.get(name, "").rpartition(".")
                if name in opened.tensors and is_parametrized(opened.model.get_submodule(owner), last):
                    tensors[name] = getattr(opened.model.get_submodule(owner), last).to(tensor.dtype).cpu()
            write(part, linears, tensors)
        conclude(inside)


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
