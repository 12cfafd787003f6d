"""Several processes on one job, started by torchrun: who am I, sums over all, and what only one of them does.

Without torchrun every function here is that of a single process. Processes exchange through gloo on CPUs and NCCL on GPUs,
and see the same directories.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

from sparsify.errors import SparsifyError

T = TypeVar("T")
STRIP = 1024  # rows of a symmetric matrix that are sent at a time
STEP = 128  # rows of it that are sent from the first column to the diagonal of the last of them


def processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if processes() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return rank() == 0


def device() -> str:
    """The device of this process: its own GPU, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if processes() > 1 else "cuda"


class Terminated(BaseException):
    """SIGTERM: torchrun ends all processes when one of them has ended, and so do job schedulers when the time is up."""


def hear_the_end() -> None:
    """Let SIGTERM raise `Terminated` in a process of several, so that what it was doing is closed and the user told."""
    if processes() > 1 and threading.current_thread() is threading.main_thread():

        def end(number: int, frame: Any) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise Terminated

        signal.signal(signal.SIGTERM, end)


def speaks_first() -> bool:
    """Whether this process is the first of all that asks. Of those that end with an error it tells the user: it is the one that
    met the cause, and the others would repeat it, or complain that it is gone."""
    if processes() == 1 or "torch" not in sys.modules:
        return True
    import torch.distributed as dist

    if not dist.is_initialized():
        return True
    try:
        return bool(dist.distributed_c10d._get_default_store().add("sparsify/ended", 1) == 1)
    except Exception:  # the process that kept the count is gone itself
        return True


def refuse_different(versions: Mapping[str, str], files: Mapping[str, str]) -> None:
    """SparsifyError where a process has something else than the main one; all must ask. versions: by package; files: digests
    of what is read, by what it is called"""
    host = socket.gethostname()
    (main_host, main), *others = gathered((host, {**files, **versions}))
    for number, (other_host, other) in enumerate(others, 1):
        for name in sorted(main.keys() | other.keys()):
            here, there = main.get(name), other.get(name)
            if here == there:
                continue
            if name in versions:
                found = f"has {name} {there} and process 0 on {main_host} {here}"
            else:
                found = f"reads another {name} than process 0 on {main_host}"
            raise SparsifyError(
                f"process {number} on {other_host} {found}; all processes of a run need the same: make them equal, and start again"
            )


def join() -> None:
    """Meet the other processes. Does nothing in a single process, or a second time."""
    import torch.distributed as dist

    if processes() == 1 or dist.is_initialized():
        return
    if (own := device()).startswith("cuda"):
        import torch

        torch.cuda.set_device(own)
        dist.init_process_group("cuda:nccl,cpu:gloo")
    else:
        dist.init_process_group("gloo")


def sum_over_all(tensor: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place. All get the same bits."""
    if processes() > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def sum_symmetric_over_all(matrix: Tensor) -> Tensor:
    """Add up a symmetric matrix [K, K] over all processes, in place, of which little more than a triangle is sent."""
    if processes() > 1:
        import torch

        for strip in _parts(0, len(matrix), STRIP):
            rows = list(_parts(strip.start, strip.stop, STEP))
            sent = sum_over_all(torch.cat([matrix[part, : part.stop].flatten() for part in rows]))
            for part, summed in zip(rows, sent.split([(p.stop - p.start) * p.stop for p in rows]), strict=True):
                matrix[part, : part.stop] = summed.view(-1, part.stop)
                matrix[: part.start, part] = matrix[part, : part.start].t()
    return matrix


def _parts(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


def gathered(value: T) -> list[T]:
    """What every process gave, in the order of their numbers. For small things, and for tensors on the CPU."""
    if processes() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * processes()
    dist.all_gather_object(found, value)
    return found


def of_main(find: Callable[[], T]) -> T:
    """What the main process finds; the others wait for it."""
    return gathered(find() if is_main() else None)[0]  # type: ignore[return-value]


def wait_for_all() -> None:
    """Return when every process has come this far."""
    if processes() > 1:
        import torch.distributed as dist

        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """The main process does what is inside before all others: they find the files that it wrote."""
    if not is_main():
        wait_for_all()
    yield
    if is_main():
        wait_for_all()


def share(length: int) -> slice:
    """The part of so many things that this process does: contiguous, of equal size up to one."""
    n, me = processes(), rank()
    return slice(length * me // n, length * (me + 1) // n)
