"""What one forward through a block holds: how many bytes, and which tensors that it will never read again.

A forward that waits at a linear still has every tensor that a name of a suspended function stands for: behind attention the queries,
keys and values, behind the MLP's first linears what these have read. One forward is watched operation by operation (`footprint`); what
no operation after a stop has read is let go of there in every other forward (`Release`).
"""

from __future__ import annotations

import weakref
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

    waiting:    at every linear where it waits, in order, without what it never reads again
    peak:       at most, what it returns included
    operations: that it consists of, in order
    unread:     for every linear where it waits, which of their results it never reads again; results are counted through
    """

    waiting: tuple[int, ...]
    peak: int
    operations: tuple[Any, ...] = ()
    unread: tuple[frozenset[int], ...] = ()

    @property
    def most_waiting(self) -> int:
        return max(self.waiting, default=0)

    def with_dense(self, leaves: bool) -> int:
        """Bytes that it holds together with the same forward of the dense model, at most. leaves: from the last linear that one
        goes on at once."""
        both = self.waiting[:-1] if leaves else self.waiting
        return max(2 * max(both, default=0), self.most_waiting)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass(eq=False)
class _Made:
    """Memory that an operation has taken. read: after how many operations it was read last; never, if it is kept for good"""

    storage: StorageWeakRef
    nbytes: int
    read: float = 0

    def is_alive(self) -> bool:
        return not self.storage.expired()


class _Alive(TorchDispatchMode):
    """Watches the memory of tensors that operations inside of it make, until it is freed. Views count once."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, _Made] = {}
        self.peak = 0
        self.operations: list[Any] = []
        self.results: list[_Made | None] = []  # None for views of what was made elsewhere

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        self.operations.append(func)
        for address in given & self.made.keys():
            self.made[address].read = len(self.operations)
        output = func(*args, **kwargs)
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self.made[storage._cdata] = _Made(StorageWeakRef(storage), storage.nbytes())
            self.results.append(self.made.get(storage._cdata))
        self.peak = max(self.peak, self.alive())
        return output

    def alive(self) -> int:
        """Bytes that are alive now."""
        self.made = {key: made for key, made in self.made.items() if made.is_alive()}
        return sum(made.nbytes for made in self.made.values())


class Release(TorchDispatchMode):
    """One forward that lets go of what it never reads again. Entered whenever it runs.

    A tensor that is let go of becomes an empty one, whatever names it still has. A forward that takes another path than the one
    that was watched may read such a tensor after all: `ReadAgain`, before anything is computed from it.
    """

    def __init__(self, watched: Footprint) -> None:
        super().__init__()
        self.watched = watched
        self.wanted = frozenset().union(*watched.unread)
        self.done = 0  # operations so far
        self.same = True  # as those that were watched
        self.count = 0  # of their results
        self.results: dict[int, weakref.ref[Tensor]] = {}
        self.released: dict[int, weakref.ref[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.same = (
            self.same and self.done < len(self.watched.operations) and func is self.watched.operations[self.done]
        )
        self.done += 1
        if not self.same:
            if self.released and any(self._was_released(tensor) for tensor in _tensors((args, kwargs))):
                raise ReadAgain
            return func(*args, **kwargs)
        output = func(*args, **kwargs)
        for tensor in _tensors(output):
            if self.count in self.wanted:
                self.results[self.count] = weakref.ref(tensor)
            self.count += 1
        return output

    def _was_released(self, tensor: Tensor) -> bool:
        found = self.released.get(id(tensor))
        return found is not None and found() is tensor

    def at(self, stop: int) -> None:
        """The forward waits: let go of what it never reads again."""
        if not self.same or stop >= len(self.watched.unread):
            return
        for number in self.watched.unread[stop] & self.results.keys():
            tensor = self.results.pop(number)()
            if tensor is not None:
                self.released[id(tensor)] = weakref.ref(tensor)
                tensor.set_()  # type: ignore[call-overload]


class ReadAgain(Exception):
    """A forward reads what it was not expected to read any more."""


@torch.no_grad()
def footprint(block: nn.Module, stops: Sequence[nn.Module], x: Tensor, call: BlockCall) -> Footprint:
    """Run a block once on one micro-batch, which may be of fake tensors, and see what is alive and what is read.

    stops: where the forward waits, the first linear of each group; x: [B, T, d]
    """
    main = getcurrent()
    counted = _Alive()

    def wait(module: nn.Module, args: Any) -> None:
        main.switch(args)

    hooks = [stop.register_forward_pre_hook(wait) for stop in stops]
    run = greenlet(lambda hidden: run_block(block, hidden, call))
    seen: list[tuple[int, list[_Made]]] = []  # at every stop: operations so far, and what is alive
    try:
        with counted:
            arrived = run.switch(x)
        while not run.dead:
            counted.alive()
            seen.append((len(counted.operations), [*counted.made.values()]))
            with counted:
                arrived = run.switch()
        counted.alive()
        for made in counted.made.values():  # what it returns, and what somebody else keeps
            made.read = len(counted.operations) + 1
        del arrived
    finally:
        for hook in hooks:
            hook.remove()
    waiting = tuple(sum(made.nbytes for made in alive if made.read > done) for done, alive in seen)
    unread = [{made for made in alive if made.read <= done} for done, alive in seen]
    results = [(number, made) for number, made in enumerate(counted.results) if made is not None]
    return Footprint(
        waiting,
        counted.peak,
        tuple(counted.operations),
        tuple(frozenset(number for number, made in results if made in gone) for gone in unread),
    )


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
