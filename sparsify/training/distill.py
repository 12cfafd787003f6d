"""Sparse distillation: the compressed model learns from the dense one on the same text.

SquareHead: Kurtic et al. 2023 (arXiv 2310.06927). The rows are full and never padded; the teacher runs beside the student,
or once before it, with its largest logits kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsify.distributed import is_main
from sparsify.errors import CheckpointError
from sparsify.manifest import keep, unsound
from sparsify.progress import progress, say
from sparsify.training.losses import IGNORED, Given, Projected, TopK
from sparsify.training.student import Teacher, TeacherOutputs

ROWS_PER_FILE = 64
TOKENS_AT_ONCE = 4096


class TextRows(Sequence[dict[str, Tensor]]):
    """Rows of text with the next token as label; the last token of a row predicts nothing.

    tokens: int64 [N, T], one source after another; counts, weights: of each source its rows, and how often they are drawn
    """

    def __init__(self, tokens: Tensor, counts: Sequence[int] | None = None, weights: Sequence[float] = (1.0,)):
        self.tokens = tokens
        self.counts = [len(tokens)] if counts is None else list(counts)
        self.weights = list(weights)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Any) -> Any:
        row = self.tokens[index]
        return {"input_ids": row, "labels": torch.cat([row[1:], torch.full((1,), IGNORED)])}


def collate(rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch of rows. Shorter ones are filled up on the right, where causal attention never looks: no mask is needed."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {
        "row": torch.tensor([row["row"] for row in rows]),
        "input_ids": torch.stack([_filled(row["input_ids"], longest, 0) for row in rows]),
        "labels": torch.stack([_filled(row["labels"], longest, IGNORED) for row in rows]),
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    if (lengths < longest).any():
        batch["keep"] = torch.arange(longest)[None] < lengths[:, None]
    return batch


def _filled(row: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, length - len(row)), value=value)


def online(teacher: Teacher) -> Callable[[Mapping[str, Tensor]], TeacherOutputs]:
    """A teacher that runs on each batch."""
    return lambda batch: teacher(batch["input_ids"])


class CachedTeacher:
    """The teacher's k largest logits of every token, on disk: 6 bytes each and 4 for the sum of all exponentials."""

    def __init__(self, directory: Path, rows: int):
        self.files = [directory / f"{start:08d}.safetensors" for start in range(0, rows, ROWS_PER_FILE)]

    def __call__(self, batch: Mapping[str, Tensor]) -> TeacherOutputs:
        found = [self._read(int(row)) for row in batch["row"]]
        device = batch["input_ids"].device
        values, indices, log_sum = (torch.cat(parts).to(device) for parts in zip(*found, strict=True))
        return TeacherOutputs([], TopK(values, indices, log_sum))

    def _read(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        file = self.files[row // ROWS_PER_FILE]
        inside = row % ROWS_PER_FILE
        with safe_open(file, framework="pt") as opened:
            values, indices, log_sum = (opened.get_slice(name)[inside] for name in ("values", "indices", "log_sum"))
        return values, indices, log_sum


def cache_teacher(teacher: Teacher, tokens: Tensor, k: int, directory: Path, quiet: bool = False) -> CachedTeacher:
    """Run the teacher once over all rows. tokens: int64 [N, T]. Files that are there already are kept."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in unsound(directory, "*.safetensors") if is_main() else ():
        say(f"{file} is damaged; it is made again")
        file.unlink()
    cached = CachedTeacher(directory, len(tokens))
    device = next(teacher.parameters()).device
    for file, rows in progress(
        zip(cached.files, tokens.split(ROWS_PER_FILE), strict=True), "running the teacher", len(cached.files), quiet
    ):
        if file.exists():
            continue
        pieces = [_largest(teacher, piece.to(device), k) for piece in _batches(rows)]
        values, indices, log_sum = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        aside = file.with_suffix(".partial")
        save_file({"values": values.bfloat16(), "indices": indices.int(), "log_sum": log_sum}, aside)
        keep(aside, file)
    return cached


def _batches(rows: Tensor) -> Iterator[Tensor]:
    return iter(rows.split(max(1, TOKENS_AT_ONCE // rows.shape[1])))


def _largest(teacher: Teacher, ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids: [B, T]. Returns values [B, T, k], indices [B, T, k], and the log of the sum of exponentials [B, T]."""
    target = teacher(ids).target
    assert isinstance(target, Given | Projected)
    found = []
    for rows in _slices(ids.numel()):
        logits = target.logits(rows)
        values, indices = logits.topk(min(k, logits.shape[1]), dim=1)
        found.append((values.cpu(), indices.cpu(), logits.logsumexp(1).cpu()))
    return tuple(torch.cat(p).unflatten(0, ids.shape) for p in zip(*found, strict=True))


def _slices(rows: int, step: int = 128) -> Iterator[slice]:
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def check_same_language(
    student: Mapping[str, Any], teacher: Mapping[str, Any], spec: str, feature: bool, layers: int | None = None
) -> None:
    """Refuse a teacher that cannot teach this student. student, teacher: contents of their config.json.

    layers: that the student had before some were removed
    """
    one, other = (_text_config(config) for config in (student, teacher))
    if layers is not None:
        one = {**one, "num_hidden_layers": layers}
    if one.get("vocab_size") != other.get("vocab_size"):
        raise CheckpointError(
            f"teacher {spec} has a vocabulary of {other.get('vocab_size')} tokens and the student one of "
            f"{one.get('vocab_size')}; a teacher must speak the student's language: take the dense model it was made from"
        )
    for key, what in (("hidden_size", "hidden states of size"), ("num_hidden_layers", "blocks:")):
        if feature and one.get(key) != other.get(key):
            raise CheckpointError(
                f"teacher {spec} has {what} {other.get(key)} and the student {one.get(key)}, so their hidden states cannot be "
                "compared; set loss.squarehead: 0, or take the dense model the student was made from"
            )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config
