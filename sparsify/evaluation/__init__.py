"""How good a compressed model still is: perplexity, divergence from the dense model, agreement with it.

The protocol behind every figure: the whole text is tokenised at once, cut into consecutive chunks, and the first
`chunks` of them are scored in float32; perplexity is exp(mean next-token negative log-likelihood).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from sparsify._version import __version__
from sparsify.errors import SparsifyError
from sparsify.evaluation.load import LoadedModel, format_name, load_model, load_tokenizer, load_vocabulary, pick_device
from sparsify.evaluation.result import EvaluationResult, table
from sparsify.evaluation.score import Score, chunked, score_logits, score_models
from sparsify.evaluation.text import SELF, file_chunks, self_chunks
from sparsify.failure import Failure, failure_of
from sparsify.formats.foreign import described
from sparsify.model.checkpoint import open_checkpoint
from sparsify.progress import progress, quietly, stage

__all__ = [
    "EvaluationResult", "LoadedModel", "Score", "check_text", "chunked", "evaluate", "evaluate_all", "format_name", "load_model",
    "load_tokenizer", "pick_device", "score_logits", "score_models", "table",
]  # fmt: skip

# Text of one's own has to be sampled token by token, which costs much more than scoring a file.
FILE_SIZE = (1024, 48)
SELF_SIZE = (512, 16)


def evaluate(
    model: str | Path,
    dense: str | Path | None = None,
    text: str | Path | None = None,
    sequence_length: int | None = None,
    chunks: int | None = None,
    *,
    device: str | None = None,
    cache_dir: Path | None = None,
    quiet: bool = False,
) -> EvaluationResult:
    """Scores one model; see `evaluate_all`."""
    results = evaluate_all(
        [model], dense, text, sequence_length, chunks, device=device, cache_dir=cache_dir, quiet=quiet
    )
    return results[0]


@quietly
def evaluate_all(
    models: Sequence[str | Path],
    dense: str | Path | None = None,
    text: str | Path | None = None,
    sequence_length: int | None = None,
    chunks: int | None = None,
    *,
    labels: Sequence[str] | None = None,
    device: str | None = None,
    cache_dir: Path | None = None,
    quiet: bool = False,
) -> list[EvaluationResult]:
    """Scores several compressed models against one dense model in one pass; the dense logits are computed once.

    text:   a plain text file (`PATH` or `file:PATH`), or None for text that the dense model samples from itself
    sequence_length, chunks: 1024 and 48 on a file, 512 and 16 on sampled text, unless given
    labels: names for the results instead of the specs
    cache_dir: where sampled text is kept for the next time
    A model that cannot be loaded or scored beside others that can has a result that says why; alone it is an error.
    """
    if not models:
        raise SparsifyError("nothing to evaluate: give at least one model directory")
    own = _is_own(text)
    if own and dense is None:
        raise SparsifyError("no text to score: give --text FILE, or --dense MODEL whose own samples are the text")
    length, count = _size(text, sequence_length, chunks)

    # The cheap things that can be wrong come first: text and tokenizer, then the weights.
    with stage("reading the text"):
        first = models[0] if dense is None else dense
        tokenizer = load_tokenizer(first)
        ids = None if own else file_chunks(str(text), tokenizer, length, count, load_vocabulary(first))
    checkpoints = [open_checkpoint(spec) for spec in models]
    reference = None if dense is None else load_model(dense, device)
    loaded = _load_all(models, reference, device)
    if ids is None:
        assert reference is not None and dense is not None
        key = open_checkpoint(dense).fingerprint
        ids = self_chunks(reference.model, tokenizer, length, count, cache_dir, key, quiet)

    started = time.perf_counter()
    ready = [item for item in loaded if isinstance(item, LoadedModel)]
    scores, dense_score = score_models(
        [(m.spec, m.model) for m in ready],
        ids,
        None if reference is None else (reference.spec, reference.model),
        lambda rows: progress(rows, description="evaluate", total=len(ids), quiet=quiet),
    )
    seconds = time.perf_counter() - started
    scored = iter(scores)
    found = [next(scored) if isinstance(item, LoadedModel) else item for item in loaded]
    names = labels or [str(spec) for spec in models]
    results = []
    for name, checkpoint, score in zip(names, checkpoints, found, strict=True):
        failure = _failure(name, score) if isinstance(score, Exception) else None
        mine = None if isinstance(score, Exception) else score
        compared = None if dense_score is None else mine
        results.append(
            EvaluationResult(
                model=name,
                format=format_name({"quantization_config": described(checkpoint)}),
                nbytes=checkpoint.nbytes(),
                perplexity=math.nan if mine is None else mine.perplexity,
                tokens=len(ids) * (length - 1) if mine is None else mine.tokens,
                text=SELF if own else Path(str(text).removeprefix("file:")).name,
                text_source="self" if own else "file",
                sequence_length=length,
                chunks=len(ids),
                dense=None if reference is None else reference.spec,
                dense_nbytes=None if reference is None else reference.nbytes,
                dense_perplexity=None if dense_score is None else dense_score.perplexity,
                kl=None if compared is None else compared.mean_kl,
                top1_agreement=None if compared is None else compared.agreement,
                stability=None if compared is None else compared.stability,
                seconds=seconds,
                versions=_versions(),
                failure=failure,
            )
        )
    return results


def check_text(
    model: str | Path, text: str | Path | None, sequence_length: int | None = None, chunks: int | None = None
) -> None:
    """Raise the error that scoring a text with this model's tokenizer would end with, without loading the model."""
    if not _is_own(text):
        file_chunks(str(text), load_tokenizer(model), *_size(text, sequence_length, chunks), load_vocabulary(model))


def _is_own(text: str | Path | None) -> bool:
    return text is None or str(text) == SELF


def _size(text: str | Path | None, sequence_length: int | None, chunks: int | None) -> tuple[int, int]:
    """Length of a chunk and number of chunks, as asked for or as usual for such a text."""
    usual_length, usual_chunks = SELF_SIZE if _is_own(text) else FILE_SIZE
    return sequence_length or usual_length, chunks or usual_chunks


def _load_all(
    specs: Sequence[str | Path], reference: LoadedModel | None, device: str | None
) -> list[LoadedModel | Exception]:
    """Every model, or the error of one that cannot be loaded; raises when none of them can."""
    loaded: list[LoadedModel | Exception] = []
    for spec in specs:
        try:
            loaded.append(_load(spec, reference, device))
        except Exception as error:
            loaded.append(error)
    if all(isinstance(item, Exception) for item in loaded):
        raise next(item for item in loaded if isinstance(item, Exception))
    return loaded


def _load(spec: str | Path, reference: LoadedModel | None, device: str | None) -> LoadedModel:
    """Loads a model, or takes the dense one when it is the same."""
    if reference is not None and open_checkpoint(spec).directory.resolve() == reference.directory.resolve():
        return reference
    return load_model(spec, device)


def _failure(name: str, error: Exception) -> Failure:
    failure = failure_of(error, "transformers")
    return failure if name in failure.reason else Failure(failure.short, f"{name}: {failure.reason}")


def _versions() -> dict[str, str]:
    return {"sparsify": __version__, "torch": version("torch"), "transformers": version("transformers")}
