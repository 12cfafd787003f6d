"""One run at a time into one output: an advisory lock beside it.

The lock is a POSIX record lock (`fcntl`) on the file `OUTPUT.lock`, and that file says who holds it. The kernel gives it up
when its process ends, however that happens, and NFS carries it to the server, so that no lock of a dead process has to be
guessed at from a number that another process, container or machine may have by now. Where a file system has no locks,
the run says so and goes on without one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from sparsify.distributed import is_main
from sparsify.errors import CheckpointError
from sparsify.files import PARTIAL, beside
from sparsify.progress import say, warn

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: set[Path] = set()  # outputs of this process: the kernel keeps apart processes only
_around: ContextVar[tuple[Path, ...]] = ContextVar("_around", default=())  # outputs that the running code has locked


@contextmanager
def only_run(output: str | Path) -> Iterator[None]:
    """Hold the lock of `output` while the block runs.

    Of several processes that torchrun started, the main one takes it for all. A run inside of another takes no second lock
    of the same output, nor of what lies in its work directory. CheckpointError names the run that holds the lock.
    """
    output = Path(output)
    file, place = beside(output, LOCK), output.resolve()
    inside = any(place == other or place.is_relative_to(beside(other, PARTIAL)) for other in _around.get())
    if inside or not is_main():
        yield
        return
    if place in _held:
        raise CheckpointError(_taken(output, "in this process"))
    made = _make_folder(file.parent)
    descriptor = _locked(file, output)
    _held.add(place)
    before = _around.set((*_around.get(), place))
    try:
        yield
    finally:
        _around.reset(before)
        _held.discard(place)
        with suppress(OSError):
            file.unlink(missing_ok=True)  # still locked: who opened it meanwhile sees that it has no name any more
        os.close(descriptor)
        with suppress(OSError):  # not empty: the run has written something
            for folder in made:
                folder.rmdir()


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder with those around it; returns the new ones, innermost first."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _locked(file: Path, output: Path) -> int:
    """The descriptor of the lock file, locked, with this process written into it."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(descriptor)
            if error.errno in NO_LOCKS:
                warn(f"the file system of {file} has no locks: nothing keeps a second run out of {output}")
                return descriptor
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(_taken(output, holder or "by another process")) from None
            raise
        if not _is_still(descriptor, file):  # its holder has removed it between the two calls
            os.close(descriptor)
            continue
        if left := _holder(descriptor):
            say(f"{file} was left behind by a run {left} that has ended without removing it; this run takes it over")
        os.ftruncate(descriptor, 0)
        own = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.pwrite(descriptor, json.dumps(own).encode(), 0)
        return descriptor


def _is_still(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """Who wrote the lock file, as `of process 12 on HOST since TIME`; nothing where that is not to be read."""
    try:
        found = json.loads(os.pread(descriptor, 1000, 0))
        return f"of process {int(found['pid'])} on {str(found['host'])[:80]!r} since {str(found['since'])[:40]}"
    except (ValueError, KeyError, TypeError, OSError):
        return ""


def _taken(output: Path, holder: str) -> str:
    return f"another run {holder} is writing {output}; wait until it has ended, or choose another output"
