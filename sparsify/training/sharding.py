"""A student whose parameters, gradients and optimizer states are shared out over the processes: FSDP2, on CPUs and GPUs alike.

torch's `fully_shard` (Zhao et al. 2023, arXiv 2304.11277, in its second form) is called block by block while the model is read, so
that no process ever holds more than one block as a whole. accelerate would shard a model that is complete, and on GPUs only; it
is told that the student is ready. In a single process nothing is sharded and every function here gives what it was given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.distributed import device, processes, sum_over_all


@cache
def _mesh(kind: str, among: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(kind, (among,))


def move(module: nn.Module) -> None:
    """Move what is loaded of a module, and is whole, to the device of this process."""
    own = device()
    module._apply(lambda tensor: tensor if tensor.is_meta or is_shard(tensor) else tensor.to(own))


def shard(module: nn.Module) -> None:
    """Move a module to the device of this process; of several, each keeps its share of the parameters, but for those of modules
    inside that are sharded already."""
    move(module)
    if processes() > 1:
        from torch.distributed.fsdp import fully_shard

        fully_shard(module, mesh=_mesh(torch.device(device()).type, processes()))


def is_shard(tensor: Tensor) -> bool:
    """Whether this is a process's share of a tensor."""
    return hasattr(tensor, "full_tensor")


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter of a module is shared out."""
    return any(is_shard(parameter) for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is shared out, gathered; all processes must ask for it. Another one as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor, shared out as `like` is; the tensor itself where that is whole. No exchange."""
    tensor = tensor.to(device=like.device, dtype=like.dtype)
    if not is_shard(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placed: Any = like
    return distribute_tensor(tensor, placed.device_mesh, placed.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    held = getattr(tensor, "to_local", None)
    return tensor if held is None else held()


def as_share(held: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a tensor that is shared out as another is; itself where that is whole. held: of the shape of
    `local(like)`, on any device"""
    if not is_shard(like):
        return held
    from torch.distributed.tensor import DTensor

    placed: Any = like
    return DTensor.from_local(
        held,
        _mesh(held.device.type, processes()),
        placed.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


@torch.no_grad()
def kept_square_mean(parameter: Tensor) -> float:
    """The mean square of what is not zero, over all processes; 0 where everything is."""
    held = local(parameter.detach())
    sums = torch.stack([held.count_nonzero().double(), held.float().square().sum().double()])
    if is_shard(parameter):
        sum_over_all(sums)
    kept, squares = sums.tolist()
    return squares / kept if kept else 0.0


@contextmanager
def gathered_inside(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The parameters of sharded modules, without those of sharded modules inside of them, are whole inside the block. All
    processes must enter it."""
    sharded: list[Any] = [module for module in modules if hasattr(module, "unshard")]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
