"""Skips by instruction set, and what a run says of them at its end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify.processor import FORCE, LEVELS
from tests.helpers import levels
from tests.helpers.levels import need, not_executed


@pytest.mark.parametrize(
    ("forced", "level", "runs", "reason"),
    [
        (None, "amx", True, None),
        (None, "amx", False, "this processor has no amx"),
        (None, "avx512_bf16", False, "this processor has no avx512bf16"),
        ("avx2", "avx2", True, None),
        ("avx2", "avx2", False, "this processor has no avx2"),
        ("avx2", "avx512", True, "SPARSIFY_CPU_LEVEL=avx2 rules out avx512"),
        ("amx", "avx512", True, None),
        ("portable", "avx2", True, "SPARSIFY_CPU_LEVEL=portable rules out avx2"),
    ],
)
def test_what_cannot_run_is_skipped_by_name(
    forced: str | None, level: str, runs: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levels, "FORCED", forced)
    told = None
    try:
        need(level, runs)
    except pytest.skip.Exception as skipped:
        told = skipped.msg
    assert told == reason
    counted = "not executed here: " + level.replace("_", "") + " (2 tests)"
    assert not_executed([f"Skipped: {told}"] * 2) == (None if told is None else counted)


def test_levels_are_listed_slowest_first() -> None:
    reasons = ["Skipped: no C++ compiler", "Skipped: SPARSIFY_CPU_LEVEL=avx2 rules out amx"]
    reasons += ["Skipped: this processor has no avx512bf16"] * 3
    assert not_executed(reasons) == "not executed here: avx512bf16 (3 tests), amx (1 test)"
    assert not_executed(reasons[:1]) is None


@pytest.mark.parametrize("processes", [0, 2])
def test_a_run_ends_with_what_it_did_not_execute(processes: int, repository: Path, tmp_path: Path) -> None:
    """With this repository's conftest, in one process and in several; the forced level makes it the same on every machine."""
    few = tmp_path / "test_few.py"
    few.write_text(
        "import pytest\nfrom tests.helpers.levels import need\n"
        f"@pytest.fixture(params={LEVELS[1:]!r})\ndef level(request):\n    need(request.param, True)\n"
        "def test_one(level):\n    pass\ndef test_another(level):\n    pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", str(few)]
    command += ["--rootdir", str(tmp_path), "--numprocesses", str(processes)]
    environment = os.environ | {FORCE: LEVELS[0], "PYTHONPATH": os.pathsep.join([str(repository), *sys.path])}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    absent = ", ".join(f"{level} (2 tests)" for level in LEVELS[1:])
    assert f"not executed here: {absent}\n" in run.stdout, run.stdout
