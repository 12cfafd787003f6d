"""Calibration tokens: rows of text as the model's own tokenizer sees it, always full, never padded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify.data.cache import cached, tokenizer_key
from sparsify.data.files import RECORD_FILES, file_records, hub_records, read_text, refuse_other_kind
from sparsify.data.fitting import refuse_beyond
from sparsify.data.mixture import interleave
from sparsify.data.packing import documents, rows_of, tokenize
from sparsify.errors import CalibrationError
from sparsify.progress import stage
from sparsify.recipe.schema import Calibration, SelfText
from sparsify.recipe.sources import SELF, parse_source

__all__ = ["calibration_tokens", "check_sources", "source_rows"]

CHARACTERS_PER_TOKEN = 64  # far above any tokenizer's mean: bounds how much of a huge text is tokenised
LEAST_CHARACTERS = 1 << 26
NOT_TEXT = {".json": "JSON", ".csv": "a table", ".tsv": "a table"}


def calibration_tokens(
    spec: Calibration,
    tokenizer: Any,
    model_factory: Callable[[], Any] | None = None,
    cache_dir: Path | None = None,
    key: Callable[[], str] | None = None,
    quiet: bool = False,
    vocabulary: int | None = None,
) -> Tensor:
    """The rows that a recipe calibrates on. Returns int64 [samples, sequence_length] on the CPU.

    `self`: the model that `model_factory` returns writes them. `file:`: a plain text is tokenised whole and cut into
    consecutive rows; records (.jsonl, .parquet) are documents one after another, in the order of the file. `hub:`: the
    same with the records of a data set, shuffled by the seed. A mixture takes from each source its share of the rows, and
    the seed shuffles the sources among each other.

    With `cache_dir`, downloaded rows are kept there, and written ones where `key` gives the digest of the model's checkpoint.
    Raises CalibrationError when the text is missing, unreadable, too short, or holds tokens beyond `vocabulary`, the number
    of tokens that the model has an embedding for."""
    return interleave(source_rows(spec, tokenizer, model_factory, cache_dir, key, quiet, vocabulary), spec.seed)


def source_rows(
    spec: Calibration,
    tokenizer: Any,
    model_factory: Callable[[], Any] | None = None,
    cache_dir: Path | None = None,
    key: Callable[[], str] | None = None,
    quiet: bool = False,
    vocabulary: int | None = None,
    short: bool = False,
    files_only: bool = False,
) -> list[Tensor]:
    """The rows of each source, in the order of `spec.mixture`: int64 [its share of the samples, sequence_length].

    short: a text that holds fewer rows than its share gives those it holds; otherwise it is refused
    files_only: of the sources that are files only, to know early whether they hold what is asked of them
    All else as in `calibration_tokens`."""
    check_sources(spec)
    parts: dict[int, Tensor] = {}
    asked = [
        (number, source, rows) for number, ((source, _), rows) in enumerate(zip(spec.mixture, spec.rows, strict=True))
    ]
    for number, source, samples in sorted(asked, key=lambda one: one[1] == SELF):  # the model writes for minutes: last
        if files_only and parse_source(source).kind != "file":
            continue
        own = spec.self if source == SELF else None
        alone = spec.model_copy(update={"source": source, "sources": None, "samples": samples, "self": own})
        parts[number] = _rows(alone, source, tokenizer, model_factory, cache_dir, key, quiet, short)
        refuse_beyond(parts[number], vocabulary, tokenizer, source)
    return [parts[number] for number in sorted(parts)]


def check_sources(spec: Calibration) -> None:
    """Whether the files of a recipe are there and hold text. Cheap: call it before loading any model."""
    for name, _ in spec.mixture:
        _checked_path(name)


def _rows(
    spec: Calibration,
    name: str,
    tokenizer: Any,
    model_factory: Callable[[], Any] | None,
    cache_dir: Path | None,
    key: Callable[[], str] | None,
    quiet: bool,
    short: bool,
) -> Tensor:
    """The rows of the one source `name` of `spec`."""
    source = parse_source(name)
    shape = (spec.samples, spec.sequence_length)
    asked = {**spec.model_dump(), "tokenizer": tokenizer_key(tokenizer)}
    if source.kind == "self":
        return _own_text(spec, tokenizer, model_factory, cache_dir, asked, key, quiet)
    if source.kind == "hub":
        with stage(f"reading {name}", quiet):
            return cached(
                cache_dir,
                asked,
                shape,
                lambda: rows_of(documents(hub_records(source, spec.seed), tokenizer), *shape, name, short),
            )
    path = _checked_path(name)
    assert path is not None
    with stage(f"reading {path.name}", quiet):
        if path.suffix.lower() in RECORD_FILES:
            return rows_of(documents(file_records(path), tokenizer), *shape, str(path), short)
        limit = max(LEAST_CHARACTERS, CHARACTERS_PER_TOKEN * spec.samples * spec.sequence_length)
        return rows_of([tokenize(tokenizer, read_text(path, limit))], *shape, str(path), short)


def _checked_path(source: str) -> Path | None:
    """The file that a `file:` source names, None for other sources."""
    path = parse_source(source).path
    if path is None:
        return None
    if path.is_dir():
        raise CalibrationError(f"{path} is a directory; give one text file, .jsonl or .parquet, as calibration.source")
    refuse_other_kind(path)
    if not path.is_file():
        raise CalibrationError(f"{path} does not exist (looked in {Path.cwd()}); give the path of the calibration text")
    if path.suffix.lower() in NOT_TEXT:
        raise CalibrationError(
            f"{path} holds {NOT_TEXT[path.suffix.lower()]}, which would be read as prose; "
            f'write it as .jsonl, one {{"text": "..."}} or {{"messages": [...]}} per line'
        )
    return path


def _own_text(
    spec: Calibration,
    tokenizer: Any,
    model_factory: Callable[[], Any] | None,
    cache_dir: Path | None,
    asked: dict[str, Any],
    key: Callable[[], str] | None,
    quiet: bool,
) -> Tensor:
    if model_factory is None:
        raise CalibrationError("calibration source self needs the model; give a text with calibration.source=file:PATH")
    options = spec.self or SelfText()

    def sample() -> Tensor:
        from sparsify.data.self_generated.rows import own_rows

        with stage("loading the model that writes the text", quiet):
            writer = model_factory()
        limit = getattr(writer.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is not None and spec.sequence_length > limit:
            raise CalibrationError(
                f"calibration.sequence_length is {spec.sequence_length} but the model reads at most {limit} tokens; lower it"
            )
        return own_rows(writer, tokenizer, spec.samples, spec.sequence_length, spec.seed, options, quiet)

    if cache_dir is None or key is None:
        return sample()
    asked |= {"self": options.model_dump(), "model": key()}
    return cached(cache_dir, asked, (spec.samples, spec.sequence_length), sample)
