"""One run at a time into one output."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sparsify import lock
from sparsify.bench.depth import DepthOptions, compare_depth
from sparsify.bench.recipes import compare_recipes
from sparsify.compiler.apply import apply
from sparsify.compiler.convert import export
from sparsify.errors import CheckpointError
from sparsify.lock import only_run
from sparsify.recipe import load_recipe
from sparsify.search.budget import parse_budget
from sparsify.search.run import search
from tests.helpers.tiny import save_tiny

HOLD = """
import sys, time
from sparsify.lock import only_run
with only_run(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the lock of `out`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "new" / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"locked\n"
    yield process
    process.kill()
    process.communicate()


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_second_run_names_the_first_and_touches_nothing(tmp_path: Path, holder) -> None:
    before = tree(tmp_path)
    for spelled in (tmp_path / "new" / "out", tmp_path / "new" / ".." / "new" / "out"):
        with pytest.raises(CheckpointError) as caught, only_run(spelled):
            pytest.fail("the lock was given twice")
        said = str(caught.value)
        assert f"process {holder.pid} on {socket.gethostname()!r}" in said and "is writing" in said
    assert tree(tmp_path) == before
    with only_run(tmp_path / "new" / "other"):  # another output is free
        pass
    holder.communicate()
    with only_run(tmp_path / "new" / "out"):
        pass
    assert not list(tmp_path.rglob("*.lock"))


def test_the_lock_of_a_dead_process_is_taken_over_with_a_word(tmp_path: Path, holder, capfd) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    file = tmp_path / "new" / "out.lock"
    assert json.loads(file.read_text())["pid"] == holder.pid
    with only_run(tmp_path / "new" / "out"):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    said = capfd.readouterr().err
    assert f"left behind by a run of process {holder.pid}" in said and "takes it over" in said
    with only_run(tmp_path / "new" / "out"):
        pass
    assert "left behind" not in capfd.readouterr().err


def test_a_run_inside_of_a_run_takes_no_second_lock(tmp_path: Path) -> None:
    with only_run(tmp_path / "out"):
        with only_run(tmp_path / "out"), only_run(tmp_path / "out.partial" / "before-depth"):
            assert [path.name for path in tmp_path.rglob("*.lock")] == ["out.lock"]
        failed = []

        def second() -> None:
            try:
                with only_run(tmp_path / "out"):
                    pass
            except CheckpointError as error:
                failed.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert len(failed) == 1 and "in this process" in failed[0]
    assert not list(tmp_path.iterdir())


def test_one_process_of_torchrun_takes_the_lock(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with only_run(tmp_path / "out"):
        assert not list(tmp_path.iterdir())


def test_a_lock_that_is_removed_meanwhile_is_taken_again(tmp_path: Path, monkeypatch) -> None:
    calls = []
    real = lock._is_still

    def removed_once(descriptor: int, file: Path) -> bool:
        if not calls:
            calls.append(file)
            file.unlink()
        return real(descriptor, file)

    monkeypatch.setattr(lock, "_is_still", removed_once)
    with only_run(tmp_path / "out"):
        assert (tmp_path / "out.lock").exists()
        assert calls


def test_folders_made_for_the_lock_go_where_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError), only_run(tmp_path / "a" / "b" / "out"):
        raise ValueError
    assert not (tmp_path / "a").exists()
    with only_run(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "b" / "out").mkdir()
    assert (tmp_path / "a" / "b" / "out").is_dir()


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch, capfd) -> None:
    def lockf(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    with only_run(tmp_path / "out"):
        pass
    assert "has no locks" in capfd.readouterr().err


@pytest.mark.parametrize("output", ["", ".", "..", "/", "a/.."])
def test_an_output_without_a_name(output: str) -> None:
    with pytest.raises(CheckpointError, match="is no name for a new directory"), only_run(output):
        pass


@pytest.mark.parametrize("command", ["apply", "resume", "export", "search", "bench recipes", "bench depth"])
def test_every_command_that_writes_a_directory_takes_the_lock(
    tmp_path: Path, holder, command: str, monkeypatch
) -> None:
    monkeypatch.setattr("sparsify.bench.recipes.check_inputs", lambda *given: None)
    model, output = str(save_tiny(tmp_path / "source")), tmp_path / "new" / "out"
    recipe = load_recipe("magnitude-rtn", model=model)
    run = {
        "apply": lambda: apply(recipe, model, output, quiet=True),
        "resume": lambda: apply(recipe, model, output, resume=True, quiet=True),
        "export": lambda: export(model, "dense", output, quiet=True),
        "search": lambda: search(recipe, model, output, [parse_budget("bits=8")], quiet=True),
        "bench recipes": lambda: compare_recipes(["magnitude-rtn"], model, None, output, quiet=True),
        "bench depth": lambda: compare_depth(
            model, ["t.txt"], output, DepthOptions(drops=("1",), methods=("angular",))
        ),
    }[command]
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=f"process {holder.pid}"):
        run()
    assert tree(tmp_path) == before
