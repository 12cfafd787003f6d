"""What a file holds, as a digest of its every byte: the one notion of identity of models and of what is made from them.

Hashing runs in threads over parts of the files, as fast as most disks read. What was hashed is remembered in the cache under
the device and the inode of the file, and believed as long as its size and its times of modification and of change are the
same to the nanosecond. `touch -r` sets back the first of these times, but not the second.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sparsify.errors import CheckpointError
from sparsify.files import atomic_write, cache_directory, kind_problem
from sparsify.progress import stage
from sparsify.threads import usable_cores

PART = 1 << 26  # bytes that one thread hashes at a time; the digests depend on it
BLOCK = 1 << 20  # bytes that it reads at a time
WORTH_REMEMBERING = 1 << 20  # bytes; a smaller file is hashed faster than it is looked up
UNSETTLED_SECONDS = 2.0  # a file system may give two writes within this time the same stamp (FAT: 2 s), as git knows
LENGTH = 32  # bytes of a digest


def file_digest(path: Path) -> str:
    """The digest of one file, in hexadecimal. CheckpointError where it cannot be read."""
    return file_digests({path.name: path})[path.name]


def file_digests(files: Mapping[str, Path], what: str = "the model") -> dict[str, str]:
    """The digests of files, by the names they are given under. what: whose files they are, for the progress line.

    Raises CheckpointError where one is missing, cannot be read, or is written to meanwhile.
    """
    stamps = {name: _stamp(path) for name, path in files.items()}
    found = {name: digest for name, path in files.items() if (digest := _remembered(stamps[name])) is not None}
    left = {name: path for name, path in files.items() if name not in found}
    nbytes = sum(stamps[name].st_size for name in left)
    started = time.time()
    with stage(f"hashing {what} ({nbytes / 1e9:.1f} GB)"), _threads() as threads:
        parts = {
            name: [threads.submit(_part_digest, path, start) for start in range(0, stamps[name].st_size, PART)]
            for name, path in left.items()
        }
        for name, path in left.items():
            whole = hashlib.blake2b(str(stamps[name].st_size).encode(), digest_size=LENGTH)
            for part in parts[name]:
                whole.update(part.result())
            if _key(_stamp(path)) != _key(stamps[name]):
                raise CheckpointError(f"{path} is being written to; wait until it is complete")
            found[name] = whole.hexdigest()
            _remember(stamps[name], found[name], started)
    return {name: found[name] for name in files}


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that stop at an error or an interrupt, and not only when they have hashed everything."""
    threads = ThreadPoolExecutor(usable_cores())
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


def combined(digests: Mapping[str, str]) -> str:
    """One digest of named digests, in whatever order they come."""
    return hashlib.blake2b(json.dumps(sorted(digests.items())).encode(), digest_size=LENGTH).hexdigest()


def _stamp(path: Path) -> os.stat_result:
    if problem := kind_problem(path):
        raise CheckpointError(f"{path} {problem}")
    with _named(path):
        return path.stat()


def _part_digest(path: Path, start: int) -> bytes:
    """The digest of PART bytes of a file from `start`, or of as many as there are."""
    state = hashlib.blake2b(digest_size=LENGTH)
    buffer = memoryview(bytearray(BLOCK))
    with _named(path), path.open("rb", buffering=0) as file:
        file.seek(start)
        left = PART
        while left and (length := file.readinto(buffer[: min(left, BLOCK)])):
            state.update(buffer[:length])
            left -= length
    return state.digest()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; download or create the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------------- remembered


def _key(stamp: os.stat_result) -> list[int]:
    """What changes whenever a file does, unless someone sets the clock back."""
    return [stamp.st_dev, stamp.st_ino, stamp.st_size, stamp.st_mtime_ns, stamp.st_ctime_ns]


def _memory(stamp: os.stat_result) -> Path:
    """One small file for each inode, so that processes do not wait for each other and old entries make room for new ones."""
    return cache_directory() / "digests" / f"{stamp.st_dev:x}-{stamp.st_ino:x}.json"


def _check(key: list[int], digest: str) -> str:
    return hashlib.blake2b(f"{key} {digest}".encode(), digest_size=8).hexdigest()


def _remembered(stamp: os.stat_result) -> str | None:
    """The digest found earlier; None where there is none, the file is another one now, or the entry is damaged."""
    if stamp.st_size < WORTH_REMEMBERING:
        return None
    try:
        entry = json.loads(_memory(stamp).read_bytes())
        key, digest = entry["key"], entry["digest"]
        good = key == _key(stamp) and entry["check"] == _check(key, digest)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return digest if good else None


def _remember(stamp: os.stat_result, digest: str, started: float) -> None:
    """Keep a digest, unless the file had been changed so shortly before that another change might not show in its times."""
    if stamp.st_size < WORTH_REMEMBERING or started - max(stamp.st_mtime, stamp.st_ctime) < UNSETTLED_SECONDS:
        return
    key = _key(stamp)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        _memory(stamp).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(_memory(stamp), json.dumps({"key": key, "digest": digest, "check": _check(key, digest)}))
