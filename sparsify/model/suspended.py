"""Forward passes of a block that stop at one linear after the other: each is a coroutine that a pre-hook suspends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from sparsify.errors import SparsifyError
from sparsify.model.capture import BlockCall, run_block
from sparsify.model.experts import SeparateExperts
from sparsify.model.footprint import Footprint, ReadAgain, Release
from sparsify.model.hidden_states import Activations
from sparsify.phases import phase


class Room:
    """Bytes that suspended forwards may hold together. limit: None for as many as they need."""

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self.used = 0

    def take(self, nbytes: int) -> bool:
        """Whether there is room for so many more, which are then taken."""
        if self.limit is not None and self.used + nbytes > self.limit:
            return False
        self.used += nbytes
        return True


def _modes() -> tuple[Any, ...]:
    """torch's thread-local modes, which coroutines of one thread share and therefore must agree on."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_default_dtype(),
    )


@dataclass
class _Forward:
    """The forward of one micro-batch.

    release: of what it never reads again
    held:    bytes that count for it in the room
    """

    run: greenlet
    release: Release
    held: int = 0

    def to(self, stop: int, value: Any = None) -> Any:
        """Let it run to a stop, counted from 0, or to its end. value: what it begins with. Returns where it waits, or its output."""
        with self.release:
            arrived = self.run.switch() if value is None else self.run.switch(value)
        if not self.run.dead:
            self.release.at(stop)
        return arrived


class InStep:
    """The forwards of all micro-batches through one block, which stop at one linear after the other.

    room:    for those that wait; one that finds none is given up and computed anew when it is to go on
    watched: the forward of the first micro-batch, operation by operation
    alone:   the block writes into what it is given, so every forward needs its own copy
    phase:   that its time counts for
    """

    def __init__(
        self,
        block: nn.Module,
        stops: Sequence[nn.Module],
        hidden: Activations,
        calls: Sequence[Sequence[BlockCall]],
        index: int,
        room: Room,
        watched: Footprint,
        alone: bool,
        phase: str,
    ):
        self.main = getcurrent()
        self.modes = _modes()
        self.block, self.hidden, self.calls, self.index = block, hidden, calls, index
        self.hooks = [stop.register_forward_pre_hook(self._wait) for stop in stops]
        self.room, self.watched, self.alone, self.phase = room, watched, alone, phase
        own = hidden[0].nbytes if alone else 0
        self.waiting = [nbytes + own for nbytes in watched.waiting]
        self.passed = 0  # stops where every micro-batch has been
        self.running = 0  # the micro-batch whose forward goes on
        self.kept: dict[int, _Forward] = {}
        self.known: Tensor | None = None  # what a linear will make of the micro-batch that waits at it
        self.handing: list[nn.Module] = []

    def _wait(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        assert _modes() == self.modes, (
            "the model changes torch's modes around a linear; its forwards cannot be suspended there"
        )
        self.main.switch((module, args))  # returns None: a pre-hook's value would replace the input

    def advance(self, i: int, goes_on: bool = False) -> tuple[nn.Module | None, Any]:
        """Take one micro-batch to its next stop. Returns the linear that it waits at and what that reads, [tokens, K], or
        the experts and what they are called with; None and the output [B, T, d] when it has left the block.

        goes_on: from its next stop before any other micro-batch, so that there is room for it"""
        self.running = i
        forward = self._taken(i)
        with phase(self.phase):
            forward, arrived = self._begun(i) if forward is None else self._gone_on(i, forward)
        if not isinstance(arrived, tuple):
            return None, arrived
        module, args = arrived
        self._keep(i, forward, 0 if goes_on else self._bytes(i))
        return module, args if isinstance(module, SeparateExperts) else args[0].reshape(-1, args[0].shape[-1])

    def _taken(self, i: int) -> _Forward | None:
        """The forward of a micro-batch, which goes on, if it was kept."""
        forward = self.kept.pop(i, None)
        if forward is not None:
            self.room.used -= forward.held
        return forward

    def _keep(self, i: int, forward: _Forward, held: int) -> None:
        """Keep a forward that waits; where there is no room for it, it ends."""
        if self.room.take(held):
            forward.held = held
            self.kept[i] = forward
        else:
            forward.run.throw()

    def _gone_on(self, i: int, forward: _Forward) -> tuple[_Forward, Any]:
        """A forward at its next stop, or what it returned. One that reads again what it let go of is computed anew."""
        try:
            return forward, forward.to(self.passed)
        except ReadAgain:
            return self._begun(i, releases=False)

    def _begun(self, i: int, releases: bool = True) -> tuple[_Forward, Any]:
        """A new forward of a micro-batch, past the linears where it has been, or what it returned."""
        x, call = self.hidden[i], self.calls[i][self.index]
        watched = self.watched if releases else Footprint((), 0)
        forward = _Forward(greenlet(lambda hidden: run_block(self.block, hidden, call)), Release(watched))
        try:
            arrived = forward.to(0, x.clone() if self.alone else x)
            for stop in range(1, self.passed + 1):
                if forward.run.dead:
                    raise different_paths()
                arrived = forward.to(stop)
        except ReadAgain:
            return self._begun(i, releases=False)
        return forward, arrived

    def _bytes(self, i: int) -> int:
        """What a micro-batch holds at the stop that it has come to; the first one is the largest."""
        if self.passed >= len(self.waiting):
            return 0
        first, this = self.hidden.shapes[0].numel(), self.hidden.shapes[i].numel()
        return -(-self.waiting[self.passed] * this // first)

    def output(self, linear: nn.Module, x: Tensor) -> Tensor:
        """What the linear that a micro-batch waits at makes of it, which is not computed again when that goes on.
        x: [tokens, K]. Returns [tokens, N]."""
        with phase(self.phase):
            self.known = type(linear).forward(linear, x)
        return self.known

    def hands_over(self, linear: nn.Module) -> None:
        """Let a linear return what `output` found for the micro-batch that goes on."""

        def forward(x: Tensor) -> Tensor:
            known, self.known = self.known, None
            return type(linear).forward(linear, x) if known is None else known.view(*x.shape[:-1], -1)

        linear.forward = forward
        self.handing.append(linear)

    def finish(self, i: int) -> None:
        """Keep the output of a micro-batch as the hidden state that enters the next block."""
        stop, output = self.advance(i)
        if stop is not None:
            raise different_paths()
        self.hidden[i] = output

    def close(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()
        while self.handing:
            del self.handing.pop().forward  # or block and walk would hold each other
        while self.kept:
            forward = self.kept.popitem()[1]
            self.room.used -= forward.held
            forward.run.throw()


def different_paths() -> SparsifyError:
    """What to raise when a forward stops elsewhere than the others, or not at all."""
    return SparsifyError("the micro-batches take different paths through a block; recipes cannot calibrate this model")
