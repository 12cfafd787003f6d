"""Where evaluation tokens come from: a file, or the dense model's own samples when there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.data.calibration import calibration_tokens
from sparsify.data.fitting import refuse_beyond, vocabulary_of
from sparsify.errors import SparsifyError
from sparsify.evaluation.score import chunked
from sparsify.files import encoding_problem, expanded, kind_problem
from sparsify.recipe.schema import Calibration

SELF = "self"

# Calibration samples its text from the same model, with seed 0 unless the recipe says otherwise. Evaluation must never
# see the calibration text, so its samples start far away from every seed that people write by hand.
SELF_SEED = 0x5EED_0E7A

# Text of one's own has to be sampled token by token, which costs much more than scoring a file.
FILE_SIZE = (1024, 48)
SELF_SIZE = (512, 16)
ALL = 2**31  # chunks: as many as a file has

Lengths = int | Sequence[int] | None  # tokens of a chunk: of one size, or a text at several
Texts = str | Path | Sequence[str | Path] | None  # one or several texts as a caller names them


@dataclass(frozen=True)
class Text:
    """A text to score. name: what figures on it are called; path: None where the dense model writes it."""

    name: str
    path: str | None
    sequence_length: int
    chunks: int

    @property
    def source(self) -> str:
        """`file` or `self`."""
        return SELF if self.path is None else "file"


def texts_of(asked: Texts, sequence_length: Lengths = None, chunks: int | None = None) -> list[Text]:
    """The texts that a caller names: files (`PATH` or `file:PATH`), or `self` for what the dense model writes.

    Each is called by its file's name, or by its path where two files have one name, with the length where there are several.
    sequence_length, chunks: instead of the usual ones; every text is read at each of several lengths
    """
    given = [str(one).removeprefix("file:") for one in ([asked] if isinstance(asked, str | Path) else asked or ())]
    if twice := next((one for one in given if given.count(one) > 1), None):
        raise SparsifyError(f"{twice} is given twice as a text; give each text once")
    bases = [Path(one).name for one in given]
    texts = []
    lengths: list[int | None] = (
        [sequence_length] if sequence_length is None or isinstance(sequence_length, int) else [*sequence_length]
    )
    if twice_long := next((length for length in lengths if lengths.count(length) > 1), None):
        raise SparsifyError(f"the sequence length {twice_long} is given twice; give each length once")
    for one, base in zip(given, bases, strict=True):
        if one == SELF and chunks == ALL:
            raise SparsifyError(
                "the text that the dense model writes has no end: give a number of --chunks with --text self"
            )
        name = one if bases.count(base) > 1 else base
        usual = SELF_SIZE if one == SELF else FILE_SIZE
        for asked_length in lengths:
            length, count = asked_length or usual[0], chunks or usual[1]
            called = name if len(lengths) == 1 else f"{name} ({length})"
            texts.append(Text(called, None if one == SELF else one, length, count))
    return texts


def file_chunks(
    path: str | Path, tokenizer: Any, sequence_length: int, chunks: int, vocabulary: int | None = None
) -> Tensor:
    """The protocol: the whole file is tokenised at once and cut into consecutive chunks. Returns [C, S].

    vocabulary: how many tokens the model has an embedding for; a token beyond is refused by name.
    """
    path = expanded(str(path).removeprefix("file:"))
    if problem := kind_problem(path):
        raise SparsifyError(f"{str(path)[:200]}: the evaluation text {problem}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        problem = encoding_problem(path) if "\0" in text else None
    except OSError as error:
        raise SparsifyError(f"{path}: cannot read the evaluation text ({error.strerror or error})") from None
    except UnicodeDecodeError:
        problem = encoding_problem(path)
    if problem is not None:
        raise SparsifyError(f"{path}: the evaluation text is not UTF-8 ({problem}); evaluation reads plain text files")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    result = chunked(ids, sequence_length, chunks)
    if not len(result):
        raise SparsifyError(
            f"{path} gives {len(ids)} tokens, fewer than one chunk of {sequence_length}: "
            "use a longer text or a smaller --sequence-length"
        )
    refuse_beyond(result, vocabulary, tokenizer, f"{path}: the evaluation text")
    return result


def self_chunks(
    dense: nn.Module,
    tokenizer: Any,
    sequence_length: int,
    chunks: int,
    cache_dir: Path | None = None,
    key: Callable[[], str] | None = None,
    quiet: bool = False,
) -> Tensor:
    """Text that the dense model samples from itself at temperature 1. Returns [C, S]. cache_dir, key: of `calibration_tokens`."""
    spec = Calibration(source=SELF, samples=chunks, sequence_length=sequence_length, seed=SELF_SEED)
    vocabulary = vocabulary_of(dense.config)
    return calibration_tokens(spec, tokenizer, lambda: dense, cache_dir, key, quiet, vocabulary)
