"""The text that choices are measured on: apart from the text that they are solved on."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from sparsify.compiler.calibrate import text_rows
from sparsify.compiler.plan import Plan
from sparsify.data.fitting import refuse_beyond, vocabulary_of
from sparsify.data.given import read_tokens, token_file
from sparsify.errors import CalibrationError
from sparsify.formats.tensor_file import LazyTensor, write_tensors
from sparsify.manifest import keep
from sparsify.model.checkpoint import read_header
from sparsify.recipe import Calibration
from sparsify.recipe.sources import SELF, same_text

HELD_OUT = "held-out.safetensors"
SEED = 0x5EA2C4  # of text that the model writes, far from the seeds that people write by hand


def held_out_rows(plan: Plan, text: str | None, samples: int, length: int | None, work: Path, quiet: bool) -> Tensor:
    """Rows to measure on, int64 [samples, length]; a resumed search uses those of the first run.

    length: tokens of a row; None for that of a calibration row
    text: a source as in a recipe. Default: what follows the calibration rows in the first file or data set of the recipe;
    where the model writes its own text, other text of its own.
    Raises CalibrationError where there is too little of it.
    """
    file = work / HELD_OUT
    if file.exists():
        read_header(file)
        return load_file(file)["tokens"]
    given = token_file(plan.recipe.calibration) if text is None else None
    length = length or plan.recipe.calibration.sequence_length
    try:
        tokens = (
            _given_rows(plan, given, samples, length)
            if given is not None
            else _text_rows(plan, text, samples, length, quiet)
        )
    except CalibrationError as error:
        raise CalibrationError(f"the text that choices are measured on: {error}; --text names another") from None
    aside = file.with_suffix(".partial")
    keep(aside, file, write_tensors(aside, {"tokens": LazyTensor.of(tokens)}, {}))
    return tokens


def _given_rows(plan: Plan, file: Path, samples: int, length: int) -> Tensor:
    calibration = plan.recipe.calibration
    tokens = read_tokens(file, calibration.samples + samples, length)[calibration.samples :]
    refuse_beyond(tokens, vocabulary_of(plan.model.model.config), None, str(file))
    return tokens


def held_out_source(
    calibration: Calibration, text: str | None, samples: int, length: int | None = None
) -> tuple[Calibration, int]:
    """What to read, and how many of its first rows were calibrated on, at least in part."""
    length = length or calibration.sequence_length
    taken = dict.fromkeys((source for source, _ in calibration.mixture), 0)
    for (source, _), rows in zip(calibration.mixture, calibration.rows, strict=True):
        taken[source] += rows
    read = next((source for source in taken if source != SELF), SELF) if text is None else text
    own = calibration.self if read == SELF else None
    if read == SELF:
        seed = (calibration.seed + SEED) % 2**63
        return Calibration(samples=samples, sequence_length=length, seed=seed, self=own), 0
    skip = sum(rows for source, rows in taken.items() if source == read or same_text(source, read))
    skip = -(-skip * calibration.sequence_length // length)
    asked = Calibration(source=read, samples=skip + samples, sequence_length=length, seed=calibration.seed)
    return asked, skip


def _text_rows(plan: Plan, text: str | None, samples: int, length: int, quiet: bool) -> Tensor:
    asked, skip = held_out_source(plan.recipe.calibration, text, samples, length)
    return text_rows(plan, asked, quiet)[skip:]
