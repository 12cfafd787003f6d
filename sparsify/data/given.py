"""Calibration text that a Python caller gives as objects, written where a recipe can name it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.data.files import RECORD_FILES
from sparsify.data.fitting import refuse_surrogates
from sparsify.errors import CalibrationError
from sparsify.files import PARTIAL
from sparsify.recipe.schema import Calibration
from sparsify.recipe.sources import SELF, parse_source

COLUMNS = ("text", "messages")
TOKENS = ".safetensors"  # a file of token ids instead of text: one tensor `tokens`, int64 [rows, length]


def write_calibration(given: Any, settings: Calibration, folder: Path) -> Calibration:
    """The calibration of a recipe with another source.

    given: a path or source as in a recipe, documents, a data set with a column `text` or `messages`, or token ids
    [rows, length], of which all rows are used. folder: where objects are written. Raises CalibrationError.
    """
    update: dict[str, Any] = {"sources": None, "self": None}
    if isinstance(given, Tensor):
        update |= {"source": f"file:{_write_tokens(given, folder)}"}
        update |= {"samples": given.shape[0], "sequence_length": given.shape[1]}
    elif isinstance(given, Path):
        update["source"] = f"file:{given}"
    elif isinstance(given, str):
        known = given == SELF or given.startswith(("file:", "hub:"))
        update |= {"source": given if known else f"file:{given}"}
    else:
        update["source"] = f"file:{_write_records(_records(given), folder)}"
    return settings.model_copy(update=update)


def token_file(settings: Calibration) -> Path | None:
    """The file of token ids that a recipe calibrates on; None where it calibrates on text."""
    files = [path for source, _ in settings.mixture if (path := parse_source(source).path) is not None]
    given = [path for path in files if path.suffix.lower() == TOKENS]
    if given and len(settings.mixture) > 1:
        raise CalibrationError(f"{given[0]} holds token ids, which cannot be mixed with text; make it the only source")
    return given[0] if given else None


def read_tokens(file: Path, samples: int, sequence_length: int, short: bool = False) -> Tensor:
    """The first rows of a file of token ids. Returns int64 [samples, sequence_length]; CalibrationError names what is wrong.

    short: a file of fewer rows gives those it holds
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{file}: not a readable safetensors file ({error})") from None
    tokens = tensors.get("tokens")
    if tokens is None or tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise CalibrationError(f"{file} needs one tensor `tokens`, int64 [rows, length], for calibration on token ids")
    samples = min(samples, max(1, tokens.shape[0])) if short else samples
    if tokens.shape[0] < samples or tokens.shape[1] < sequence_length:
        raise CalibrationError(
            f"{file} holds {tokens.shape[0]} rows of {tokens.shape[1]} tokens, the recipe asks for {samples} of "
            f"{sequence_length}; lower calibration.samples or calibration.sequence_length"
        )
    return tokens[:samples, :sequence_length].long()


def _write_tokens(tokens: Tensor, folder: Path) -> Path:
    from safetensors.torch import save_file

    if tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
        raise CalibrationError(
            f"calibration token ids must be whole numbers [rows, length], not {tokens.dtype} {list(tokens.shape)}"
        )
    file = folder / f"tokens{TOKENS}"
    save_file({"tokens": tokens.detach().cpu().long().contiguous()}, file)
    return file


def _records(given: Any) -> Iterable[Mapping[str, Any]]:
    """Documents as records of a .jsonl file."""
    columns = getattr(given, "column_names", None)
    if isinstance(columns, Mapping):
        raise CalibrationError(f"calibration is a data set of several splits ({', '.join(columns)}); pass one of them")
    if columns is not None:
        column = next((name for name in COLUMNS if name in columns), None)
        if column is None:
            raise CalibrationError(
                f"the calibration data set has the columns {', '.join(columns)}; it needs `text` or `messages`"
            )
        return ({column: row[column]} for row in given)
    if isinstance(given, Sequence) and given and all(isinstance(text, str) for text in given):
        return ({"text": text} for text in given)
    raise CalibrationError(
        "calibration is a path, a list of strings, a datasets.Dataset or token ids [rows, length], "
        f"not {'an empty list' if isinstance(given, Sequence) and not given else type(given).__name__}"
    )


def _write_records(records: Iterable[Mapping[str, Any]], folder: Path) -> Path:
    assert ".jsonl" in RECORD_FILES
    file = folder / "documents.jsonl"
    aside = file.with_name(file.name + PARTIAL)
    with aside.open("w", encoding="utf-8") as stream:
        for number, record in enumerate(records, 1):
            refuse_surrogates(record, f"calibration document {number}")
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    aside.replace(file)
    return file
