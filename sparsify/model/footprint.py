"""How many bytes of activations one forward through a block holds: at the linears where it waits, and at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsify.model.capture import BlockCall, run_block


@dataclass(frozen=True)
class Footprint:
    """Bytes of what the forward of one micro-batch through a block has made and still holds.

    waiting: at every linear where it waits, in order
    peak:    at most, what it returns included
    """

    waiting: tuple[int, ...]
    peak: int

    @property
    def most_waiting(self) -> int:
        return max(self.waiting, default=0)

    def with_dense(self, leaves: bool) -> int:
        """Bytes that it holds together with the same forward of the dense model, at most. That one waits at the next linear
        where it holds less there (`_InStep.go_ahead`); leaves: from the last one it goes on."""
        after = (*self.waiting[1:], 0 if leaves else self.most_waiting)
        return max((here + min(here, there) for here, there in zip(self.waiting, after, strict=False)), default=0)


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors that operations inside of it make, until they are freed. Views count once."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        output = func(*args, **kwargs)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.alive())
        return output

    def alive(self) -> int:
        """Bytes that are alive now."""
        self.made = {key: made for key, made in self.made.items() if not made[0].expired()}
        return sum(nbytes for _, nbytes in self.made.values())


@torch.no_grad()
def footprint(block: nn.Module, stops: Sequence[nn.Module], x: Tensor, call: BlockCall) -> Footprint:
    """Run a block once on one micro-batch, which may be of fake tensors, and see what is alive.

    stops: where the forward waits, the first linear of each group; x: [B, T, d]
    """
    main = getcurrent()
    counted = _Alive()

    def wait(module: nn.Module, args: Any) -> None:
        main.switch(args)

    hooks = [stop.register_forward_pre_hook(wait) for stop in stops]
    run = greenlet(lambda hidden: run_block(block, hidden, call))
    waiting = []
    try:
        with counted:
            arrived = run.switch(x)
        while not run.dead:
            waiting.append(counted.alive())
            with counted:
                arrived = run.switch()
        del arrived
    finally:
        for hook in hooks:
            hook.remove()
    return Footprint(tuple(waiting), counted.peak)


def kept_for_backward(block: nn.Module, x: Tensor, call: BlockCall, dtype: torch.dtype) -> int:
    """Bytes that the forward pass of a block leaves until its backward pass, what it returns included.

    x: [B, T, d] float32, which may be fake; dtype: of the products, those of bfloat16 by autocast
    """
    entering = x.detach().requires_grad_(True)
    counted = _Alive()
    with torch.enable_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16), counted:
        output = run_block(block, entering, call)
    nbytes = counted.alive()
    del output
    return nbytes
