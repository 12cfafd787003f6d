"""Progress: plain lines where there is no terminal, a bar where there is one, nothing where none is wanted."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest

from sparsify import progress
from sparsify.progress import _Lines, duration, progress_bar, quietly, say, silenced, stage, warn


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class _Reader:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self) -> list[str]:
        read = self.capsys.readouterr()
        assert read.out == ""
        return read.err.splitlines()


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> _Reader:
    return _Reader(capsys)


def steps(total: int, seconds: float, completed: int = 0) -> None:
    """A loop whose steps take so long each."""
    clock = Clock()
    task = _Lines("compressing", total, completed, clock=clock)
    for index in range(completed, total):
        clock.now += seconds
        task.describe(f"model.layers.{index}")
        task.advance()
    task.close(failed=False)


def test_a_line_for_every_slow_step_with_the_time_elapsed_and_left(lines: _Reader) -> None:
    steps(30, 7)
    found = lines()
    assert len(found) == 31
    assert found[0] == "compressing 0/30"
    assert found[1] == "compressing 1/30 model.layers.0  elapsed 0:07  left 3:23"
    assert found[12] == "compressing 12/30 model.layers.11  elapsed 1:24  left 2:06"
    assert found[30] == "compressing 30/30 model.layers.29  elapsed 3:30"


def test_a_fast_loop_prints_the_first_and_the_last_step_and_one_every_ten_seconds(lines: _Reader) -> None:
    steps(3200, 1 / 64)
    found = lines()
    assert [line.split()[1] for line in found] == ["0/3200", *(f"{n}/3200" for n in range(640, 3201, 640))]
    assert found[2].endswith("elapsed 0:20  left 0:30")
    steps(90, 0.01)
    assert [line.split()[1] for line in lines()] == ["0/90", "90/90"]


def test_the_time_left_is_that_of_the_last_steps(lines: _Reader) -> None:
    """Of a resumed run the first steps take no time."""
    clock = Clock()
    task = _Lines("compressing", 200, 0, clock=clock)
    for step in range(150):
        clock.now += 0.1 if step < 100 else 20
        task.advance()
    task.close(failed=True)
    assert lines()[-1] == "compressing 150/200  elapsed 16:50  left 16:40"


def test_a_loop_of_unknown_length_prints_what_is_new(lines: _Reader) -> None:
    clock = Clock()
    task = _Lines("depth", None, clock=clock)
    for text in ("depth: trying 1", "depth: trying 2", "depth: trying 3", "depth: writing"):
        clock.now += 2
        task.describe(text)
    clock.now += 1
    task.close(failed=False)
    assert lines() == [
        "depth",
        "depth: trying 1  elapsed 0:02",
        "depth: writing  elapsed 0:08",
        "depth: done after 0:09",
    ]


def test_a_long_step_is_reported_while_it_runs(lines: _Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    task = _Lines("vLLM", 3, alive=0.02)
    monkeypatch.setattr(progress, "_active", [task])
    task.describe("starting")
    for _ in range(500):
        if len(found := progress_lines(lines, task)) > 1:
            break
    task.close(failed=False)
    assert found[0] == "vLLM 0/3" and found[1].startswith("vLLM 0/3 starting"), "the thread printed no line in 5 s"


def progress_lines(lines: _Reader, task: _Lines, kept: dict[int, list[str]] = {}) -> list[str]:  # noqa: B006
    task.ended.wait(0.01)
    kept.setdefault(id(task), []).extend(lines())
    return kept[id(task)]


def test_a_stage_is_shown_once_it_has_taken_long(lines: _Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "STAGE_SECONDS", 60.0)
    with stage("reading"):
        pass
    assert lines() == []
    monkeypatch.setattr(progress, "STAGE_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LONG_SECONDS", 0.0)
    with stage("loading"):
        for _ in range(500):
            if found := lines():
                break
            Event().wait(0.01)
    assert found == ["loading"] and lines()[0].startswith("loading: done after 0:0")


def test_what_stands_inside_stands_still(lines: _Reader) -> None:
    with progress_bar("outer", 2, quiet=True) as bar:
        with stage("inner"):
            say("building")
        bar.advance()
    assert lines() == [] and progress._active == [] and progress._silences == 0
    with silenced(False):
        say("building")
        say("nothing", quiet=True)
    assert lines() == ["building"]


def test_quiet_reaches_what_a_function_calls(lines: _Reader) -> None:
    @quietly
    def load(name: str, quiet: bool = False) -> str:
        with progress_bar(f"loading {name}", 1):
            return name

    assert load("a") == "a" and lines() == ["loading a 0/1"]
    assert load("a", True) == "a" and load("a", quiet=True) == "a" and lines() == []
    with pytest.raises(TypeError):
        load()  # type: ignore[call-arg]


def test_warnings_are_shown_though_quiet(lines: _Reader) -> None:
    with silenced():
        warn("it listens on all addresses")
    assert lines() == ["warning: it listens on all addresses"]


def test_a_long_start_is_explained(lines: _Reader) -> None:
    with progress.patiently("loading PyTorch", seconds=0.01):
        Event().wait(0.5)
    assert lines() == ["loading PyTorch"]
    with progress.patiently("loading PyTorch", seconds=0.3):
        say("reading the model")
        Event().wait(0.5)
    with progress.patiently("loading PyTorch", seconds=60):
        pass
    assert lines() == ["reading the model"]


def test_an_error_leaves_nothing_behind(lines: _Reader) -> None:
    with pytest.raises(ValueError, match="x"), progress_bar("loop", 2, quiet=True):
        raise ValueError("x")
    assert progress._active == [] and progress._silences == 0


def test_of_several_processes_one_speaks(lines: _Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in (("1", []), ("0", ["loading 0/2", "building"])):
        monkeypatch.setenv("RANK", rank)
        with progress_bar("loading", 2):
            say("building")
        assert lines() == expected


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("compressing", 2) as bar:
        bar.describe("model.layers.0")
        with progress_bar("inner", 3) as inner:
            inner.advance()
            assert bar.text == "inner 1/3"
        assert bar.text == "model.layers.0"
        say("building the kernel")
        bar.advance(2)
    shown = screen.getvalue()
    assert "\x1b[" in shown and "model.layers.0" in shown and "2/2" in shown and "building the kernel\n" in shown
    screen.truncate(0)
    monkeypatch.setenv("TERM", "dumb")
    with progress_bar("compressing", 2):
        pass
    assert screen.getvalue().lstrip("\0") == "compressing 0/2\n"


def test_a_closed_stderr_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in (None, io.StringIO()):
        if broken is not None:
            broken.close()
        monkeypatch.setattr(sys, "stderr", broken)
        with stage("loading"):
            say("building")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (84, "1:24"), (3700, "1:01:40"), (-1, "0:00")]
)
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_a_command_without_a_terminal(tmp_path: Path) -> None:
    """Through a pipe: lines on stderr, the result alone on stdout; --quiet leaves the result alone."""
    from tests.helpers.tiny import save_tiny

    source = save_tiny(tmp_path / "model")
    command = [sys.executable, "-m", "sparsify", "export", str(source), "--format", "dense", "--output"]
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    spoken = subprocess.run([*command, str(tmp_path / "a")], capture_output=True, text=True, env=environment)
    silent = subprocess.run([*command, str(tmp_path / "b"), "--quiet"], capture_output=True, text=True, env=environment)
    assert spoken.returncode == silent.returncode == 0, spoken.stderr + silent.stderr
    first, last = (re.compile(rf"^Exporting to dense {part}\b", re.M) for part in ("0/(\\d+)", "(\\d+)/\\1"))
    assert first.search(spoken.stderr) and last.search(spoken.stderr) and "\x1b" not in spoken.stderr
    assert "dense checkpoint written to" in spoken.stdout and "dense checkpoint written to" in silent.stdout
    assert silent.stderr == ""
