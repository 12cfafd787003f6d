"""Where evaluation tokens come from: a file, or the dense model's own samples when there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.data.calibration import calibration_tokens
from sparsify.data.fitting import refuse_beyond, vocabulary_of
from sparsify.errors import SparsifyError
from sparsify.evaluation.score import chunked
from sparsify.files import encoding_problem
from sparsify.recipe.schema import Calibration

SELF = "self"

# Calibration samples its text from the same model, with seed 0 unless the recipe says otherwise. Evaluation must never
# see the calibration text, so its samples start far away from every seed that people write by hand.
SELF_SEED = 0x5EED_0E7A


def file_chunks(
    path: str | Path, tokenizer: Any, sequence_length: int, chunks: int, vocabulary: int | None = None
) -> Tensor:
    """The protocol: the whole file is tokenised at once and cut into consecutive chunks. Returns [C, S].

    vocabulary: how many tokens the model has an embedding for; a token beyond is refused by name.
    """
    path = Path(str(path).removeprefix("file:")).expanduser()
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
