"""Memory of the machine and of this process: budgets, what is free, and the peak of what cannot be given back.

Anonymous memory is what the kernel cannot take away from a process: heap and shared memory (RssAnon and RssShmem in
/proc/self/status). Pages of mapped files are not counted, which `ru_maxrss` does.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sparsify.errors import SparsifyError

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
LARGEST = 2.0**63  # of the number in a size
CONTROL_GROUP = Path("/sys/fs/cgroup")  # of a container, as it sees itself
SHARE = 0.9  # of what is free, where no budget is given
INTERVAL = 0.05  # seconds between two samples


def parse_size(text: str, option: str) -> int:
    """Bytes of `16GB`, `500 MB`, `16GiB`. option: what an error names."""
    found = SIZE.fullmatch(text.strip())
    if found is None or not 0 < float(found[1]) < LARGEST:
        raise SparsifyError(f"{option} {text[:100]}: a size such as 16GB, 500MB or 16GiB is wanted")
    step = 1024 if found[3] else 1000
    power = "kmgt".find(found[2].lower()) + 1 if found[2] else 0
    return int(float(found[1]) * step**power)


def _fields(file: str, names: tuple[str, ...]) -> int | None:
    """The sum of some fields of a file in /proc that counts in kB; None where there is no such file."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.partition(":")[0] in names]
    return sum(found) if found else None


def anonymous() -> int | None:
    """Bytes of anonymous and shared memory of this process that are in memory; None where the system does not say."""
    return _fields("/proc/self/status", ("RssAnon", "RssShmem"))


# Of mallopt(3). Below this size a piece is no mapping of its own; 32 MiB is the most that glibc takes.
TRIM_THRESHOLD, MMAP_THRESHOLD = (-1, 2_000_000_000), (-3, 1 << 25)
MALLOC_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function that only this C library has."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def keep_freed(environment: Mapping[str, str] = os.environ) -> bool:
    """Let the C library keep what is freed for what is allocated next, unless the user has set how it does that. Returns whether it
    does.

    glibc finds its thresholds while a program runs; in every other run or so it then gave back and took anew what a block
    needs, which made forward passes 15% slower (docs/kernel-log.md). For commands: a program that imports sparsify has its own."""
    mallopt = _of_glibc("mallopt")
    if mallopt is None or any(name in environment for name in MALLOC_SETTINGS):
        return False
    return bool(mallopt(*TRIM_THRESHOLD)) and bool(mallopt(*MMAP_THRESHOLD))


def return_freed() -> None:
    """Return to the system what the C library keeps of freed memory. For what is not needed again soon: to take memory anew costs
    more than to keep it."""
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(0)


def anonymous_of_session(session: int) -> int | None:
    """The same of all processes of a session together; None where the system does not say. What they share counts each time."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if len(fields) > 3 and fields[3] == str(session):
            found.append(_fields(str(status.with_name("status")), ("RssAnon", "RssShmem")))
    return sum(nbytes or 0 for nbytes in found) if found else None


def free() -> int | None:
    """Bytes that the machine, or the container around this process, can still give; None where the system does not say."""
    found = (_fields("/proc/meminfo", ("MemAvailable",)), _left_in_container())
    return min((nbytes for nbytes in found if nbytes is not None), default=None)


def _left_in_container() -> int | None:
    """What a control group still allows; cached files do not count, since they can be dropped."""
    for limit, used, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            most, now = (int((CONTROL_GROUP / name).read_text()) for name in (limit, used))
            cached = [line.split() for line in (CONTROL_GROUP / stat).read_text().splitlines()]
        except (OSError, ValueError):
            continue  # no such group, or `max`: no limit
        files = sum(int(value) for name, value in cached if name in ("inactive_file", "active_file"))
        return max(0, most - now + files)
    return None


def budget(asked: str | None) -> int | None:
    """Bytes of anonymous memory that this process may take: as asked for (`16GB`), else nine tenths of what is free beside
    what it has already. Processes that torchrun started on one machine share it. None where the system does not say."""
    if asked is not None:
        return parse_size(asked, "--memory")
    left, own = free(), anonymous()
    if left is None or own is None:
        return None
    return own + int(SHARE * left) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def gpu_budget(asked: str | None) -> int | None:
    """Bytes of this process's GPU, as asked for, else nine tenths of what is free there. None without a GPU."""
    import torch

    from sparsify.distributed import device

    if device() == "cpu":
        return None
    if asked is not None:
        return parse_size(asked, "--gpu-memory")
    return int(SHARE * torch.cuda.mem_get_info(torch.device(device()))[0]) + torch.cuda.memory_reserved()


def gpu_peaks() -> dict[str, int]:
    """The most that tensors of this process took on its GPU, and that torch held there for them, in bytes; {} without one."""
    import torch

    if not torch.cuda.is_initialized():
        return {}
    return {
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
        "peak_gpu_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


class Peak:
    """The largest sample of `anonymous` so far; None where the system does not say."""

    def __init__(self) -> None:
        self.nbytes: int | None = None

    def sample(self) -> int | None:
        """Look now; returns the peak."""
        now = anonymous()
        if now is not None:
            self.nbytes = max(self.nbytes or 0, now)
        return self.nbytes


@contextmanager
def peak_anonymous() -> Iterator[Peak]:
    """Samples the anonymous memory of this process in a thread while the block runs."""
    peak, ended = Peak(), threading.Event()

    def watch() -> None:
        while not ended.wait(INTERVAL):
            peak.sample()

    peak.sample()
    watcher = threading.Thread(target=watch, name="memory", daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()
        peak.sample()
