"""Several processes on one job, started by torchrun: who am I, sums over all, and what only one of them does.

Without torchrun every function here is that of a single process. Processes exchange through gloo on CPUs and NCCL on GPUs,
and see the same directories.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


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


def gathered(value: T) -> list[T]:
    """What every process gave, in the order of their numbers. For small things, and for tensors on the CPU."""
    if processes() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * processes()
    dist.all_gather_object(found, value)
    return found


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
