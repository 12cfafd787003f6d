"""Texts from files and from the hub, one record at a time. A record is a mapping with `text` or with chat `messages`."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from sparsify.errors import CalibrationError, MissingDependency
from sparsify.files import encoding_problem, kind_problem
from sparsify.recipe.sources import Source

FIELDS = ("messages", "text")
SHUFFLE_BUFFER = 1000  # records of a hub data set that are mixed; more of them are downloaded before the first is used
RECORD_FILES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


def read_text(path: Path, limit: int) -> str:
    """A plain text file, or its first `limit` characters up to a line end when it is longer."""
    refuse_other_kind(path)
    try:
        with path.open(encoding="utf-8-sig") as stream:
            text = stream.read(limit)
            text = text if len(text) < limit else text + stream.readline()
        if "\0" not in text:
            return text
        problem = encoding_problem(path)
    except UnicodeDecodeError:
        problem = encoding_problem(path)
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read ({error.strerror}); give the path of a text file") from None
    raise CalibrationError(
        f"{path} is not a UTF-8 text ({problem}); text is read from plain, .jsonl and .parquet files"
    )


def file_records(path: Path, whole: bool = False) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, record) of each record of a jsonl or parquet file; the place is what errors name.

    whole: all columns of a parquet file, not only those that calibration reads
    """
    return _jsonl(path) if RECORD_FILES[path.suffix.lower()] == "jsonl" else _parquet(path, whole)


def refuse_other_kind(path: Path) -> None:
    """CalibrationError for what is there and no file."""
    if problem := kind_problem(path):
        raise CalibrationError(f"{path} {problem}")


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    refuse_other_kind(path)
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    if "\0" in line:
                        raise CalibrationError(f"{path} is not UTF-8 ({encoding_problem(path)})") from None
                    reason = getattr(error, "msg", str(error))
                    raise CalibrationError(f"{path}:{number}: not a JSON record ({reason}); repair the line") from None
                if not isinstance(record, dict):
                    raise CalibrationError(f'{path}:{number}: a record must be a JSON object such as {{"text": "..."}}')
                yield f"{path}:{number}", record
    except UnicodeDecodeError:
        raise CalibrationError(f"{path} is not UTF-8 ({encoding_problem(path)}); JSON Lines must be") from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read ({error.strerror}); give the path of a .jsonl file") from None


def _parquet(path: Path, whole: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingDependency(f"reading {path} needs pyarrow: pip install 'sparsify-24[data]'") from None
    refuse_other_kind(path)
    if not path.is_file():
        raise CalibrationError(f"{path} does not exist; give the path of a .parquet file")
    row = 0
    try:
        with ParquetFile(path) as file:
            columns = file.schema_arrow.names
            present = columns if whole else [name for name in FIELDS if name in columns]
            names = present or columns[:1]  # without either field one column is enough to say so
            for batch in file.iter_batches(batch_size=256, columns=names):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path} row {row}", record if present else dict.fromkeys(columns)
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: a text after row {row} is not UTF-8 ({error}); create the file again"
        ) from None
    except (ArrowException, OSError) as error:
        raise CalibrationError(f"{path} is not a readable parquet file ({error}); create it again") from None


def hub_records(source: Source, seed: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, record) of a data set on the Hugging Face hub, streamed so that only what is used is downloaded."""
    try:
        import datasets
    except ImportError:
        raise MissingDependency(
            "calibrating on a hub data set needs datasets: pip install 'sparsify-24[data]'"
        ) from None
    name = ":".join(filter(None, (source.dataset, source.config, source.split)))
    try:
        loaded = datasets.load_dataset(source.dataset, source.config, split=source.split, streaming=True)
        stream = iter(loaded.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER))
        first = next(stream, None)  # the download starts here, so here is where it fails
    except Exception as error:  # datasets raises anything from FileNotFoundError to the errors of its HTTP client
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CalibrationError(
            f"hub:{name} cannot be loaded ({reason}); check the name, configuration and split, or calibrate on a file"
        ) from None
    records: Iterable[Any] = [] if first is None else chain([first], stream)
    for number, record in enumerate(records, 1):
        yield f"hub:{name} record {number}", record
