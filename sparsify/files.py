"""Files appear under their final name only when they are whole: write aside, fsync, rename."""

import codecs
import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sparsify.errors import CheckpointError, SparsifyError
from sparsify.units import size

PACKAGE = Path(__file__).resolve().parent  # the directory of the `sparsify` package
PARTIAL = ".partial"
LONGEST_PATH, LONGEST_NAME = 4096, 255  # bytes, as Linux has them
KINDS = (
    (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip
MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip


def cache_directory() -> Path:
    """Where sparsify keeps what it can make again: `$SPARSIFY_CACHE`, else `$XDG_CACHE_HOME/sparsify`, else `~/.cache/sparsify`."""
    if chosen := os.environ.get("SPARSIFY_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsify"


def beside(output: Path, suffix: str) -> Path:
    """The path next to `output` that has its name and a suffix. CheckpointError where `output` is no name of a new directory."""
    if output.name in ("", ".."):
        raise CheckpointError(f"the output '{output}' is no name for a new directory; write one, such as out/model")
    return output.with_name(output.name + suffix)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """An error of the operating system inside of the block names the file; those of reads and writes do not by themselves."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def fsync(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with named(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(aside: Path, final: Path) -> None:
    """Make the finished file or directory `aside` appear as `final`: fsync the contents, rename, fsync the parent."""
    if aside.is_dir():
        for entry in aside.rglob("*"):
            fsync(entry)
    fsync(aside)
    os.replace(aside, final)
    fsync(final.parent)


def atomic_write(path: str | Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new, never half of it."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with named(path):
            aside.write_bytes(content.encode() if isinstance(content, str) else content)
        publish(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(final: str | Path) -> Iterator[Path]:
    """Yield an empty directory beside `final`; it takes that name when the block ends well and is removed when it raises."""
    final = Path(final)
    if final.exists():
        raise CheckpointError(f"{final} exists already; choose another output or remove it first")
    aside = final.with_name(f".{final.name}.{os.getpid()}{PARTIAL}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        publish(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def path_problem(path: str | Path) -> str | None:
    """`has a name that is too long` and the like for what no file system takes as a path, where looking raises; else None."""
    text = os.fspath(path)
    try:
        length = len(os.fsencode(text))
    except UnicodeEncodeError:
        return "has a name that is no text; give the path of a file"
    if "\0" in text:
        return "has a name with a zero byte; give the path of a file"
    if length >= LONGEST_PATH or any(len(os.fsencode(part)) > LONGEST_NAME for part in text.split("/")):
        return "has a name that is too long; give the path of a file"
    return None


def expanded(path: str | Path) -> Path:
    """The path with the home directory for `~`; as it is where that is not known."""
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError):
        return Path(path)


def kind_problem(path: str | Path) -> str | None:
    """`is a pipe, which is not read; ...` for what is there and no file: reading it could wait for ever. Links are followed."""
    if problem := path_problem(path):
        return problem
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return None  # whoever opens it says why it cannot
    if stat.S_ISREG(mode):
        return None
    kind = next((word for is_kind, word in KINDS if is_kind(mode)), "no file")
    return f"is {kind}, which is not read; give a file"


def encoding_problem(path: str | Path) -> str | None:
    """Where a file stops being text in UTF-8, as `byte 0xe9 at offset 17`, and what its encoding may be; None where it does not."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = 0
    with Path(path).open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            if not start and (name := next((name for mark, name in MARKS if block.startswith(mark)), None)):
                return f"byte 0x{block[0]:02x} at offset 0, the mark of {name}; save it as UTF-8"
            pending = decoder.getstate()[0]
            try:
                text = decoder.decode(block)
            except UnicodeDecodeError as error:
                return f"byte 0x{error.object[error.start]:02x} at offset {start - len(pending) + error.start}; save it as UTF-8"
            if "\0" in text:
                return f"byte 0x00 at offset {start + block.index(0)}: UTF-16, or no text at all; save it as UTF-8"
            start += len(block)
    if pending := decoder.getstate()[0]:
        return f"byte 0x{pending[0]:02x} at offset {start - len(pending)}, where the file ends; it may be cut off"
    return None


def write_json(path: str | Path, value: Any, allow_nan: bool = False) -> None:
    """Write indented JSON atomically. NaN and infinities are refused because JSON has none, but with `allow_nan`, for the
    config of a model, which is written back as Python and transformers read it."""
    atomic_write(path, written_json(value, allow_nan))


def written_json(value: Any, allow_nan: bool = False) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=2, allow_nan=allow_nan) + "\n"


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or damaged one, and what is no file, raises CheckpointError with its name."""
    if problem := kind_problem(path):
        raise CheckpointError(f"{path} {problem}")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is this a complete checkpoint directory?") from None
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply to be read; download or create it again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # also for an integer with more digits than Python converts
        raise CheckpointError(f"{path} is damaged ({error}); download or create it again") from None


@contextlib.contextmanager
def as_written(path: str | Path) -> Iterator[None]:
    """Turn what is raised over a record that is not as sparsify writes it into one sentence."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(
            f"{path} is not as sparsify writes it ({why}); remove the directory that it lies in, and start again"
        ) from error


def reserve(path: Path, nbytes: int) -> None:
    """Make a file of so many bytes for which there is room on the disk, so that writing to its mapped pages cannot fail.

    SparsifyError where there is none. A file of that size that is there already is used again.
    """
    try:
        with path.open("ab") as file:
            if file.tell() != nbytes:
                file.truncate(0)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(nbytes, 1))
            else:
                file.truncate(nbytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise SparsifyError(
            f"{path}: no room for {size(nbytes)} of hidden states ({reason}); make room, put --output on another "
            "disk, or raise --memory so that they stay in memory; then go on with --resume"
        ) from None


def only_user(path: Path) -> IO[bytes]:
    """Lock a file that is written in place. The lock is held until what this returns is closed or gone; SparsifyError where
    another process, or this one, holds it."""
    file = path.with_name(path.name + ".lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise SparsifyError(
            f"{path} is in use by another run; let that one end, or give this one another --output"
        ) from None
    except OSError:
        pass  # a file system without locks
    return file


def in_memory(path: Path) -> bool:
    """Whether a directory lies in a file system that is kept in memory (tmpfs)."""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    kinds = {mount.split()[1]: mount.split()[2] for mount in lines}
    where = path.resolve()
    return next((kinds[str(p)] for p in (where, *where.parents) if str(p) in kinds), "") in ("tmpfs", "ramfs")
