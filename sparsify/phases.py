"""Where the time of a run goes: seconds of each phase. A phase that runs inside another one, such as the forward pass whose
outputs become statistics, counts for itself and not for the outer one, so seconds of phases add up to at most the whole.

On a GPU the work of one phase may still be going on when the next one begins, and is then counted there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Phases:
    """Seconds by phase. clock: gives the time in seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self._seconds: dict[str, float] = {}
        self._running: list[tuple[str, bool]] = []  # the innermost last
        self._since = 0.0

    def enter(self, name: str, whole: bool = False) -> None:
        """Begin a phase inside of those that run. whole: those that begin inside of it count as this one."""
        self._count()
        within_whole = self._running and self._running[-1][1]
        self._running.append(self._running[-1] if within_whole else (name, whole))

    def leave(self) -> None:
        self._count()
        self._running.pop()

    def _count(self) -> None:
        """Give the time since the last change to the phase that runs."""
        now = self.clock()
        if self._running:
            inner, _ = self._running[-1]
            self._seconds[inner] = self._seconds.get(inner, 0.0) + now - self._since
        self._since = now

    def seconds(self) -> dict[str, float]:
        """Of every phase so far, also of those that run."""
        self._count()
        return dict(self._seconds)


_measured: Phases | None = None


@contextmanager
def measured(clock: Callable[[], float] = time.perf_counter) -> Iterator[Phases]:
    """Count phases until the end of this context; a run inside another one counts its own."""
    global _measured
    outer, _measured = _measured, Phases(clock)
    try:
        yield _measured
    finally:
        _measured = outer


@contextmanager
def phase(name: str, whole: bool = False) -> Iterator[None]:
    """The time of what is inside counts for this phase, also that of phases inside it if it is `whole`. Where nothing is
    measured, this does nothing."""
    of = _measured
    if of is None:
        yield
        return
    of.enter(name, whole)
    try:
        yield
    finally:
        of.leave()


def seconds_so_far() -> dict[str, float]:
    """Seconds by phase of the run that is measured now; none where nothing is."""
    return {} if _measured is None else _measured.seconds()
