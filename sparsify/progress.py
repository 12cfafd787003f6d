"""Progress bars with the time left, on stderr so that stdout stays clean for results."""

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")


@dataclass
class Task:
    """One bar. `advance` moves it, `describe` says what is being done now."""

    progress: Progress
    task: TaskID

    def advance(self, steps: float = 1) -> None:
        self.progress.advance(self.task, steps)

    def describe(self, text: str) -> None:
        self.progress.update(self.task, description=text)


@contextmanager
def progress_bar(description: str, total: float | None, completed: int = 0, quiet: bool = False) -> Iterator[Task]:
    """A bar of `total` steps on stderr; silent when `quiet` is set or stderr is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=False) as progress:
        yield Task(progress, progress.add_task(description, total=total, completed=completed))


def progress(items: Iterable[T], description: str, total: float | None = None, quiet: bool = False) -> Iterator[T]:
    """Iterate over `items` with a bar."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress_bar(description, total, quiet=quiet) as bar:
        for item in items:
            yield item
            bar.advance()
