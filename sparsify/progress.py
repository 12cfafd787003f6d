"""Progress on stderr, so that stdout stays clean for results: a bar on a terminal, plain lines everywhere else.

Both come from the same calls: `progress` and `progress_bar` for loops, `stage` for what takes long in one piece, `say` for
a single line. Without a terminal (a file, a pipe, CI, nohup) a loop prints a line for its first and its last step and, at
most every few seconds, for the steps in between, each with the time elapsed and the time left:

    compressing 12/30 model.layers.11  elapsed 1:24  left 2:06

A step that goes on for long is reported again meanwhile. Of several processes that torchrun started only the main one
prints, and nothing is printed inside `silenced`, which is what `--quiet` does. Light: rich is imported for a bar only.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from sparsify.distributed import is_main

T = TypeVar("T")
P = ParamSpec("P")
Clock = Callable[[], float]

FEW_STEPS = 100  # a loop of at most so many steps prints a line for each of them, if they take
STEP_SECONDS = 1.0  # so long; a longer loop prints one every
LOOP_SECONDS = 10.0
ALIVE_SECONDS = 30.0  # a step that takes longer than this is reported again
STAGE_SECONDS = 1.0  # a stage is shown when it has taken so long, and
LONG_SECONDS = 3.0  # says how long it took when that was longer than this
RECENT = 30  # samples, a second or more apart, from which the time left is estimated
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
RATE_SECONDS = 3600.0  # the same for bars: steps of large models take minutes, and rich forgets them after half of one

_active: list[Task] = []  # from the outermost loop to the innermost
_silences = 0  # how many `silenced` blocks are open
_shows = 0  # how many lines and loops were shown


class Task:
    """One loop. `advance` moves it, `describe` says what is being done now. This one shows nothing.

    title: what the loop does; total: its steps, None where nobody knows.
    """

    def __init__(self, title: str, total: float | None, completed: float = 0) -> None:
        self.title, self.total, self.done = title, total, completed
        self.text = ""

    def advance(self, steps: float = 1) -> None:
        self.done += steps

    def describe(self, text: str) -> None:
        self.text = text

    def close(self, failed: bool) -> None:
        """The loop has ended, by an exception if `failed`."""

    @property
    def label(self) -> str:
        """`title 3/30 text`, the title left out where the text begins with it."""
        steps = "" if self.total is None else f"{self.done:g}/{self.total:g}"
        if not self.text.startswith(self.title):
            return " ".join(part for part in (self.title, steps, self.text) if part)
        return f"{self.title}{f' {steps}' if steps else ''}{self.text.removeprefix(self.title)}"


class _Bar(Task):
    """A bar on a terminal."""

    def __init__(self, title: str, total: float | None, completed: float = 0, transient: bool = False) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        super().__init__(title, total, completed)
        columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False), BarColumn()]
        columns += [MofNCompleteColumn()] if total is not None else []
        columns += [TimeElapsedColumn()]
        columns += [TextColumn("left"), TimeRemainingColumn()] if total is not None else []
        self.progress = Progress(
            *columns, console=Console(stderr=True), transient=transient, speed_estimate_period=RATE_SECONDS
        )
        self.task = self.progress.add_task(title, total=total, completed=int(completed))
        self.progress.start()

    def advance(self, steps: float = 1) -> None:
        super().advance(steps)
        self.progress.advance(self.task, steps)

    def describe(self, text: str) -> None:
        super().describe(text)
        self.progress.update(self.task, description=printable(text or self.title))

    def close(self, failed: bool) -> None:
        self.progress.stop()


class _Inner(Task):
    """A loop inside another one's bar: it has no line of its own, the bar says where it stands."""

    def __init__(self, outer: Task, title: str, total: float | None, completed: float = 0) -> None:
        super().__init__(title, total, completed)
        self.outer, self.before = outer, outer.text
        outer.describe(self.label)

    def advance(self, steps: float = 1) -> None:
        super().advance(steps)
        self.outer.describe(self.label)

    def describe(self, text: str) -> None:
        super().describe(text)
        self.outer.describe(self.label)

    def close(self, failed: bool) -> None:
        self.outer.describe(self.before)


class _Lines(Task):
    """Plain lines. alive: seconds after which a step that goes on is reported again."""

    printed = 0.0  # when any loop printed its last line: an outer one stays silent while an inner one prints

    def __init__(
        self,
        title: str,
        total: float | None,
        completed: float = 0,
        stage: bool = False,
        alive: float = ALIVE_SECONDS,
        clock: Clock = time.monotonic,
    ) -> None:
        super().__init__(title, total, completed)
        self.stage, self.alive, self.clock = stage, alive, clock
        self.started = clock()
        self.pause = STEP_SECONDS if total is not None and total - completed <= FEW_STEPS else LOOP_SECONDS
        self.recent = deque([(self.started, completed)], maxlen=RECENT)
        self.lock, self.ended = threading.Lock(), threading.Event()
        if not stage:
            self._print(self.started)
        threading.Thread(target=self._keep_alive, daemon=True).start()

    def advance(self, steps: float = 1) -> None:
        with self.lock:
            super().advance(steps)
            now = self.clock()
            if self.finished or now - _Lines.printed >= self.pause:
                self._print(now)
            if now - self.recent[-1][0] >= STEP_SECONDS:
                self.recent.append((now, self.done))

    def describe(self, text: str) -> None:
        """A loop of unknown length prints what it does when that is something else, not only another number."""
        with self.lock:
            other = re.sub(r"\d+", "", text) != re.sub(r"\d+", "", self.text)
            super().describe(text)
            now = self.clock()
            if self.total is None and text and (other or now - _Lines.printed >= self.pause):
                self._print(now)

    def close(self, failed: bool) -> None:
        self.ended.set()
        with self.lock:
            now = self.clock()
            if self.total is None and not failed and now - self.started >= LONG_SECONDS:
                self.text = ""
                _write(f"{self.title}: done after {duration(now - self.started)}")

    @property
    def finished(self) -> bool:
        return self.total is not None and self.done >= self.total

    def seconds_left(self, now: float) -> float | None:
        """From the speed of the last steps; None before the first step and after the last."""
        then, done = self.recent[0]
        if self.total is None or self.finished or self.done <= done or now <= then:
            return None
        return (self.total - self.done) * (now - then) / (self.done - done)

    def _print(self, now: float) -> None:
        elapsed, left = now - self.started, self.seconds_left(now)
        times = f"  elapsed {duration(elapsed)}" if elapsed >= 0.5 or self.finished else ""
        times += "" if left is None else f"  left {duration(left)}"
        _Lines.printed = now
        _write(self.label + times)

    def _keep_alive(self) -> None:
        if self.stage and not self.ended.wait(STAGE_SECONDS):
            with self.lock:
                if not self.ended.is_set():
                    self._print(self.started)
        while not self.ended.wait(self.alive / 4):
            with self.lock:
                now = self.clock()
                innermost = bool(_active) and _active[-1] is self
                if innermost and now - _Lines.printed >= self.alive and not self.ended.is_set():
                    self._print(now)


@contextmanager
def progress_bar(description: str, total: float | None, completed: int = 0, quiet: bool = False) -> Iterator[Task]:
    """A loop of `total` steps, shown on stderr. With `quiet` nothing inside it is shown, neither lines nor other loops."""
    with silenced(quiet), _shown(_task(description, total, completed)) as task:
        yield task


def progress(items: Iterable[T], description: str, total: float | None = None, quiet: bool = False) -> Iterator[T]:
    """Iterate over `items` and show how far that is."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress_bar(description, total, quiet=quiet) as bar:
        for item in items:
            yield item
            bar.advance()


@contextmanager
def stage(text: str, quiet: bool = False) -> Iterator[Task]:
    """Something that may take long in one piece, such as loading a model: shown once it has taken a second, and at its end."""
    with silenced(quiet), _shown(_task(text, None, 0, stage=True)) as task:
        yield task


def printable(text: str) -> str:
    """A text as a terminal may get it: what would control the terminal or turn the direction of reading is written out, as \\x1b."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str, quiet: bool = False) -> None:
    """One line on stderr, above the bar if there is one."""
    if not quiet and _prints():
        _write(text)


def warn(text: str) -> None:
    """A line on stderr that --quiet leaves: what the user has to know or to do, though the command goes on."""
    if is_main():
        _write(f"warning: {text}")


def describe(text: str) -> None:
    """Say what the innermost loop is doing now, for code that was not handed its `Task`."""
    if _active:
        _active[-1].describe(text)


@contextmanager
def patiently(text: str, seconds: float = LONG_SECONDS) -> Iterator[None]:
    """Say `text` if nothing else was shown so many seconds after the block began: what is going on before the first loop."""
    before = _shows
    timer = threading.Timer(seconds, lambda: say(text, quiet=_shows > before))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def silenced(quiet: bool = True) -> Iterator[None]:
    """Nothing of this module is shown inside the block, if `quiet`."""
    global _silences
    _silences += quiet
    try:
        yield
    finally:
        _silences -= quiet


def quietly(function: Callable[P, T]) -> Callable[P, T]:
    """For a function that takes `quiet`: given true, nothing is shown inside, whatever it calls."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with silenced(bool(signature.bind(*args, **kwargs).arguments.get("quiet"))):
            return function(*args, **kwargs)

    return call


@contextmanager
def without_bars() -> Iterator[None]:
    """Transformers shows no progress bars of its own meanwhile."""
    from transformers.utils import logging as transformers_logging

    show = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if show:
            transformers_logging.enable_progress_bar()


def on_terminal() -> bool:
    """Whether bars can be drawn on stderr."""
    if os.environ.get("TERM", "") in ("dumb", "unknown"):
        return False
    with contextlib.suppress(AttributeError, ValueError):  # it may be closed, or not there at all
        return sys.stderr.isatty()
    return False


def duration(seconds: float) -> str:
    """84 -> 1:24, 3700 -> 1:01:40"""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _prints() -> bool:
    return not _silences and is_main()


def _task(title: str, total: float | None, completed: float, stage: bool = False) -> Task:
    if not _prints():
        return Task(title, total, completed)
    if not on_terminal():
        return _Lines(title, total, completed, stage)
    if _active:
        return _Inner(_active[-1], title, total, completed)
    return _Bar(title, total, completed, transient=stage)


@contextmanager
def _shown(task: Task) -> Iterator[Task]:
    global _shows
    _shows += 1
    _active.append(task)
    failed = True
    try:
        yield task
        failed = False
    finally:
        _active.remove(task)
        task.close(failed)


def _write(line: str) -> None:
    """A line on whatever stderr is now; rich puts another file there while a bar is drawn. That it is closed is no error."""
    global _shows
    _shows += 1
    stream: Any = sys.stderr
    with contextlib.suppress(OSError, ValueError, AttributeError):
        stream.write(printable(line) + "\n")
        stream.flush()
