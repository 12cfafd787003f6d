"""`sparsify kernels build` and `list`: every kernel ahead of time, and a clear word where that fails."""

import json
import os
from pathlib import Path

import pytest

from sparsify import cli
from sparsify.native import build

GOOD, BAD = 'extern "C" int answer() { return 42; }\n', "int main( {\n"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two kernels that compile in no time, and a cache that is empty."""
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path / "kernels" / "cpu"
    folder.mkdir(parents=True)
    for name in ("one", "two"):
        (folder / f"{name}.cpp").write_text(GOOD)
    monkeypatch.setattr(build, "kernels_directory", lambda: folder.parent)
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    return folder


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, list[dict]]:
    status = cli.main(["kernels", *argv, "--json"])
    out = capsys.readouterr().out
    return status, json.loads(out)["kernels"] if out else []


def test_everything_is_built_and_found_again(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, before = run(capsys, "list")
    assert status == 0 and [(k["name"], k["library"]) for k in before] == [("cpu/one", None), ("cpu/two", None)]
    status, built = run(capsys, "build")
    assert status == 0 and [k["name"] for k in built] == ["cpu/one", "cpu/two"]
    for kernel in built:
        assert Path(kernel["library"]).is_file() and Path(kernel["source"]).is_file()
        assert build.open_library(kernel["name"]).answer() == 42
    assert run(capsys, "list") == (0, built)
    assert run(capsys, "build") == (0, built), "what is there is not built again"
    assert cli.main(["kernels", "build"]) == 0
    assert "cpu/two" in capsys.readouterr().out


def test_some_by_name(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, built = run(capsys, "build", "cpu/two")
    assert status == 0 and [k["name"] for k in built] == ["cpu/two"]
    assert [bool(k["library"]) for k in run(capsys, "list")[1]] == [False, True]
    assert cli.main(["kernels", "build", "cpu/three"]) == 1
    assert "unknown kernel 'cpu/three'; known kernels: cpu/one, cpu/two" in capsys.readouterr().err


def test_the_newest_build_is_listed(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [old] = run(capsys, "build", "cpu/one")[1]
    (sources / "one.cpp").write_text(GOOD.replace("42", "43"))
    [new] = run(capsys, "build", "cpu/one")[1]
    assert new["library"] != old["library"]
    os.utime(old["library"], (1, 1))
    assert run(capsys, "list")[1][0]["library"] == new["library"]


def test_one_that_is_refused_keeps_no_other_from_being_built(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sources / "one.cpp").write_text(BAD)
    status, built = run(capsys, "build")
    assert status == 1
    assert built[0]["library"] is None and "refuses one.cpp" in built[0]["problem"]
    assert built[1]["library"] and built[1]["problem"] is None


def test_without_a_compiler(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = run(capsys, "build", "cpu/one")[1]
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(capsys, "build", "cpu/one") == (0, built), "a build from before serves"
    assert cli.main(["kernels", "build"]) == 1
    assert "no C++ compiler found: install g++" in capsys.readouterr().err
