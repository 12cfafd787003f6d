"""The text of a training pass: rows to train on and to measure on, kept for a resumed run, and how often each row is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsify.compiler.plan_training import PlannedTraining
from sparsify.compute import for_precision
from sparsify.data.calibration import source_rows
from sparsify.data.chat import conversation_rows
from sparsify.data.fitting import refuse_beyond, vocabulary_of
from sparsify.data.given import read_tokens, token_file
from sparsify.data.self_generated.generator import open_writer, writer_key
from sparsify.errors import CalibrationError
from sparsify.files import cache_directory
from sparsify.manifest import keep
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.pretrained import load_config, tokenizer_for_text
from sparsify.progress import say, stage
from sparsify.recipe import Calibration, Distill, Finetune
from sparsify.recipe.sources import SELF, parse_source, shares
from sparsify.training.distill import TextRows

ROWS = "rows.safetensors"  # what a training pass reads, in its folder of the work directory
HELD_OUT = "held-out.safetensors"  # what it is measured on
HELD_OUT_SEED = 1 << 33  # added to the seed of a pass: text of the model's own that no seed in use has written


def read_ahead(
    planned: PlannedTraining, checkpoint: Checkpoint, calibration: Calibration, directory: Path | None, quiet: bool
) -> None:
    """Read what a pass reads, if it lies in files: what is wrong with it is better known before hours of compressing.

    directory: where the rows are kept for the training, None to read them only.
    """
    settings = planned.settings
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    if reads_files(settings, calibration):
        rows = training_rows(planned, checkpoint, calibration, directory, quiet)
        for said in repeats_in_words(settings, calibration, rows):
            say(said, quiet)
    elif isinstance(settings, Distill):  # some of it is written by the model, later
        asked, writes = training_text(settings, calibration), planned.teacher or checkpoint
        _read(asked, settings, writes, quiet, settings.samples is None, files_only=True)
    if isinstance(settings, Distill) and settings.held_out is not None and _in_file(settings.held_out.source):
        held_out_rows(planned, checkpoint, calibration, directory, quiet)


def reads_files(settings: Distill | Finetune, calibration: Calibration) -> bool:
    """Whether all that is trained on lies in files."""
    if isinstance(settings, Distill):
        return all(_in_file(name) for name, _ in training_text(settings, calibration).mixture)
    return _in_file(settings.data)


def _in_file(source: str) -> bool:
    return parse_source(source).kind == "file"


def training_rows(
    planned: PlannedTraining, checkpoint: Checkpoint, calibration: Calibration, directory: Path | None, quiet: bool
) -> Any:
    """The rows to train on; a resumed run takes those of the first one, whatever became of their source."""
    settings = planned.settings
    file = None if directory is None else directory / ROWS
    if isinstance(settings, Distill):
        asked = training_text(settings, calibration)
        return _text_rows(file, asked, settings, planned.teacher or checkpoint, quiet, settings.samples is None)

    def read() -> dict[str, Tensor]:
        tokenizer = tokenizer_for_text(checkpoint.directory, checkpoint.spec)
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


def held_out_rows(
    planned: PlannedTraining, checkpoint: Checkpoint, calibration: Calibration, directory: Path | None, quiet: bool
) -> TextRows:
    """The rows that a pass is measured on, kept as those that it is trained on."""
    settings = planned.settings
    assert isinstance(settings, Distill) and settings.held_out is not None
    source = settings.held_out.source
    asked = Calibration(
        source=source,
        samples=settings.held_out.samples,
        sequence_length=settings.sequence_length,
        seed=(settings.seed + HELD_OUT_SEED) % 2**63,
        self=calibration.self if source == SELF else None,
    )
    file = None if directory is None else directory / HELD_OUT
    return _text_rows(file, asked, settings, planned.teacher or checkpoint, quiet, False, "held_out.")


def training_text(settings: Distill, calibration: Calibration) -> Calibration:
    """What to read: the calibration source unless the pass names its own, as many rows as its tokens need."""
    rows = settings.samples or settings.drawn_rows
    changes: dict[str, Any] = {"samples": rows, "sequence_length": settings.sequence_length}
    own = settings.source or settings.sources
    if own is None:
        return calibration.model_copy(update=changes)
    writes = calibration.self if SELF in [name for name, _ in settings.mixture or ()] else None
    return Calibration(source=settings.source, sources=settings.sources, seed=settings.seed, self=writes, **changes)


def repeats_in_words(settings: Distill | Finetune, calibration: Calibration, rows: Any) -> list[str]:
    """A sentence for each text that is seen more than once because it is too short for the steps, none where the recipe says
    how many rows to read. rows: what `training_rows` gave"""
    if not isinstance(settings, Distill) or settings.samples is not None:
        return []
    assert isinstance(rows, TextRows)
    said = []
    mixture = training_text(settings, calibration).mixture
    for (source, _), count, share in zip(mixture, rows.counts, shares(settings.drawn_rows, rows.weights), strict=True):
        if count < share:
            said.append(
                f"{settings.kind}: {source} holds {count} rows of {settings.sequence_length} tokens and {share} are drawn of it, "
                f"so each is seen {share / count:.3g} times"
            )
    return said


def repeats_of_files(planned: PlannedTraining, checkpoint: Checkpoint, calibration: Calibration) -> list[str]:
    """The same before a run, for a pass whose texts lie in files; of other texts nobody knows yet."""
    settings = planned.settings
    if not isinstance(settings, Distill) or settings.samples is not None or not reads_files(settings, calibration):
        return []
    return repeats_in_words(settings, calibration, training_rows(planned, checkpoint, calibration, None, True))


def _text_rows(
    file: Path | None,
    asked: Calibration,
    settings: Distill,
    writes: Checkpoint,
    quiet: bool,
    short: bool,
    place: str = "",
) -> TextRows:
    """Rows of all sources of `asked`, from `file` when it is there; `self` means the teacher, `writes`."""

    def read() -> dict[str, Tensor]:
        parts = _read(asked, settings, writes, quiet, short, place)
        return {"tokens": torch.cat(parts), "counts": torch.tensor([len(part) for part in parts])}

    made = kept(file, read)
    return TextRows(made["tokens"], made["counts"].tolist(), [weight for _, weight in asked.mixture])


def _read(
    asked: Calibration,
    settings: Distill,
    writes: Checkpoint,
    quiet: bool,
    short: bool,
    place: str = "",
    files_only: bool = False,
) -> list[Tensor]:
    """The rows of each source, or of those that are files."""
    key = f"passes.{settings.kind}.{place}"
    if 0 in asked.rows:
        raise CalibrationError(
            f"{asked.mixture[asked.rows.index(0)][0]} has so little weight that {settings.kind} reads no row of it; raise "
            f"{key}tokens, or name the text to train on with {key}source"
        )
    try:
        if (given := token_file(asked)) is not None:
            tokens = read_tokens(given, asked.samples, asked.sequence_length, short)
            refuse_beyond(tokens, vocabulary_of(load_config(writes.directory, writes.spec)), None, str(given))
            return [tokens]
        return source_rows(
            asked,
            tokenizer_for_text(writes.directory, writes.spec),
            lambda: open_writer(writes.loadable_directory(), for_precision(settings.precision)),
            cache_dir=cache_directory() / "calibration",
            key=lambda: writer_key(writes, for_precision(settings.precision)),
            quiet=quiet,
            vocabulary=vocabulary_of(load_config(writes.directory, writes.spec)),
            short=short,
            files_only=files_only,
        )
    except CalibrationError as error:
        said = str(error).replace("calibration.sequence_length", f"passes.{settings.kind}.sequence_length")
        raise CalibrationError(said.replace("calibration.", key)) from None


def kept(file: Path | None, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a file, which is written whole when it is not there. Without a file they are made and not kept."""
    if file is None:
        return make()
    if not file.exists():
        aside = file.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in make().items()}, aside)
        keep(aside, file)
    return load_file(file)
