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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from sparsify.compiler.metrics import ADAPTER
from sparsify.compiler.plan_training import PlannedTraining
from sparsify.compute import for_precision
from sparsify.data.calibration import calibration_tokens
from sparsify.data.chat import conversation_rows
from sparsify.data.fitting import vocabulary_of
from sparsify.data.self_generated.generator import open_writer, writer_key
from sparsify.distributed import device, is_main, join, main_first, processes, wait_for_all
from sparsify.errors import CalibrationError, CheckpointError
from sparsify.files import atomic_write, cache_directory, publish
from sparsify.formats.reader import natural
from sparsify.formats.scheme import in_block
from sparsify.formats.writer import CheckpointWriter
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.decoder import load_state, meta_model, target_names
from sparsify.model.linear import LinearWeights
from sparsify.model.pretrained import load_causal_lm, load_config, load_tokenizer
from sparsify.progress import stage, without_bars
from sparsify.recipe import Calibration, Distill, Finetune, Lora
from sparsify.recipe.sources import SELF, parse_source
from sparsify.training.distill import TextRows, cache_teacher, collate, online
from sparsify.training.qat_linear import make_trainable
from sparsify.training.student import Student, Teacher, trainable_parameters
from sparsify.training.trainer import PREFIX, load_parameters, train

ROWS = "rows.safetensors"  # what a training pass reads, in its folder of the work directory


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
    steps = planned.steps if planned.steps is not None else len(rows) * _epochs(settings) // settings.batch_size
    if steps < 1:
        raise CalibrationError(
            f"{settings.kind}: {len(rows)} rows are less than one step of batch_size {settings.batch_size}; "
            "lower batch_size or give more data"
        )
    teacher = None
    if planned.teacher is not None:
        with stage(f"{settings.kind}: loading the teacher", quiet):
            teacher = open_teacher(planned, device())
    outputs_of_teacher: Any = None
    if teacher is not None and isinstance(settings, Distill) and settings.teacher_logits == "cached":
        with main_first():
            outputs_of_teacher = cache_teacher(teacher, rows.tokens, settings.top_k, directory / "teacher", quiet)
        teacher = None
    elif teacher is not None:
        outputs_of_teacher = online(teacher)
    with stage(f"{settings.kind}: loading the student", quiet):
        opened, student, groups = prepare(settings, writer, checkpoint)
    if processes() == 1:
        student.to(device())  # FSDP moves its shards itself
    masked = {} if isinstance(settings, Lora) else opened.linears
    watch = train(student, groups, masked, rows, collate, settings, steps, directory, outputs_of_teacher, quiet)
    summary = {
        "kind": settings.kind,
        "precision": str(for_precision(settings.precision)).removeprefix("torch."),
        "steps": steps,
        "rows": len(rows),
        "tokens": planned.tokens if planned.tokens is not None else _tokens(rows, steps * settings.batch_size),
        "teacher": None if planned.teacher is None else planned.teacher.spec,
        **watch.summary(),
    }
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


def read_ahead(
    planned: PlannedTraining, checkpoint: Checkpoint, calibration: Calibration, directory: Path | None, quiet: bool
) -> None:
    """Read the rows to train on, if they lie in files: what is wrong with them is better known before hours of compressing.

    directory: where they are kept for the training, None to read them only.
    """
    settings = planned.settings
    if isinstance(settings, Distill):
        sources = [name for name, _ in training_text(settings, calibration).mixture]
    else:
        sources = [settings.data]
    if all(parse_source(name).kind == "file" for name in sources):
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        training_rows(planned, checkpoint, calibration, directory, quiet)


def training_rows(
    planned: PlannedTraining, checkpoint: Checkpoint, calibration: Calibration, directory: Path | None, quiet: bool
) -> Any:
    """The rows to train on; a resumed run takes those of the first one, whatever became of their source."""
    settings = planned.settings
    file = None if directory is None else directory / ROWS
    if isinstance(settings, Distill):
        asked = training_text(settings, calibration)
        made = kept(file, lambda: {"tokens": text_tokens(asked, settings, planned.teacher or checkpoint, quiet)})
        return TextRows(made["tokens"])

    def read() -> dict[str, Tensor]:
        tokenizer = load_tokenizer(checkpoint.directory, checkpoint.spec)
        rows = conversation_rows(
            settings.data,
            settings.columns,
            tokenizer,
            settings.sequence_length,
            settings.samples,
            settings.seed,
            vocabulary_of(load_config(checkpoint.directory, checkpoint.spec)),
        )
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {"lengths": lengths, **{key: torch.cat([row[key] for row in rows]) for key in ("input_ids", "labels")}}

    with stage(f"{settings.kind}: reading {settings.data}", quiet):
        made = kept(file, read)
    lengths = made["lengths"].tolist()
    ids, labels = (made[key].split(lengths) for key in ("input_ids", "labels"))
    return [{"input_ids": i, "labels": one} for i, one in zip(ids, labels, strict=True)]


def training_text(settings: Distill, calibration: Calibration) -> Calibration:
    """What to read: the calibration source unless distill names its own, as many rows as its tokens need."""
    rows = settings.samples or -(-settings.tokens // settings.sequence_length)
    changes: dict[str, Any] = {"samples": rows, "sequence_length": settings.sequence_length}
    if settings.source is not None:
        own = calibration.self if settings.source == SELF else None
        return Calibration(source=settings.source, seed=settings.seed, self=own, **changes)
    return calibration.model_copy(update=changes)


def text_tokens(asked: Calibration, settings: Distill, writes: Checkpoint, quiet: bool) -> Tensor:
    """Tokens [samples, sequence_length]; `self` means the teacher."""
    try:
        return calibration_tokens(
            asked,
            load_tokenizer(writes.directory, writes.spec),
            lambda: open_writer(writes.loadable_directory(), for_precision(settings.precision)),
            cache_dir=cache_directory() / "calibration",
            key=lambda: writer_key(writes, for_precision(settings.precision)),
            quiet=quiet,
            vocabulary=vocabulary_of(load_config(writes.directory, writes.spec)),
        )
    except CalibrationError as error:
        raise CalibrationError(str(error).replace("calibration.", f"passes.{settings.kind}.")) from None


def kept(file: Path | None, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a file, which is written whole when it is not there. Without a file they are made and not kept."""
    if file is None:
        return make()
    if not file.exists():
        aside = file.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in make().items()}, aside)
        publish(aside, file)
    return load_file(file)


def open_teacher(planned: PlannedTraining, device: str) -> Teacher:
    """The dense model, in the precision of the products."""
    assert planned.teacher is not None
    settings = planned.settings
    with without_bars():
        teacher = planned.teacher
        model = load_causal_lm(teacher.loadable_directory(), teacher.spec, dtype=for_precision(settings.precision))
    model.to(device)
    loss = settings.loss
    return Teacher(model, feature=loss.squarehead > 0, logits=loss.divergence, blocks=planned.teacher_blocks)
