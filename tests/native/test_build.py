"""Building and loading native kernels: the cache, several processes, no compiler, a broken one, one OpenMP runtime."""

import logging
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsify.errors import MissingDependency, SparsifyError
from sparsify.native import build

TINY = 'extern "C" int answer() { return ANSWER; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tree of kernels with one that compiles in no time, and a cache that is empty."""
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path / "kernels" / "cpu"
    folder.mkdir(parents=True)
    (folder / "tiny.cpp").write_text('#include "tiny.h"\n' + TINY)
    (folder / "tiny.h").write_text("#define ANSWER 42\n")
    monkeypatch.setattr(build, "kernels_directory", lambda: folder.parent)
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    build.load.cache_clear()
    yield folder
    build.load.cache_clear()


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def counting_compiler(folder: Path) -> tuple[str, Path]:
    """A compiler that leaves a line in a file for every kernel it compiles."""
    compiler = build.find_compiler()
    assert compiler is not None
    log = folder / "compiled"
    log.touch()
    real = " ".join(compiler.command)
    count = f'case "$*" in *--version*) ;; *) echo compiled >> {log} ;; esac\n'
    return script(folder / "counting-c++", f'{count}exec {real} "$@"\n'), log


def cached(cache: Path) -> list[str]:
    """What a build leaves in the cache, other than the lock."""
    return sorted(p.name for p in (cache / "native").glob("*") if p.suffix != ".lock")


def test_the_repository_has_kernels() -> None:
    assert "cpu/gram" in build.known_kernels()
    with pytest.raises(SparsifyError, match="unknown kernel 'cpu/none'; known kernels: .*cpu/gram"):
        build.build("cpu/none")


def test_builds_once_and_again_when_a_header_or_the_compiler_changes(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, log = counting_compiler(tmp_path)
    monkeypatch.setenv("CXX", compiler)
    first = build.build("cpu/tiny")
    assert build.build("cpu/tiny") == first
    assert log.read_text().count("compiled") == 1
    library = build.load("cpu/tiny")
    assert library is not None and library.answer() == 42

    (sources / "tiny.h").write_text("#define ANSWER 43\n")
    build.load.cache_clear()
    changed = build.load("cpu/tiny")
    assert changed is not None and changed.answer() == 43
    assert log.read_text().count("compiled") == 2

    other = script(
        tmp_path / "other-c++", f'case "$*" in *--version*) echo other 1.0; exit ;; esac\nexec {compiler} "$@"\n'
    )
    monkeypatch.setenv("CXX", other)
    build.build("cpu/tiny")
    assert len(cached(tmp_path / "cache")) == log.read_text().count("compiled") == 3


def test_many_processes_build_once(sources: Path, tmp_path: Path) -> None:
    compiler, log = counting_compiler(tmp_path)
    code = (
        "import pathlib, sys; from sparsify.native import build; "
        "build.kernels_directory = lambda: pathlib.Path(sys.argv[1]); print(build.load('cpu/tiny').answer())"
    )
    command = [sys.executable, "-c", code, str(sources.parent)]
    environment = os.environ | {"CXX": compiler}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=900)[0].strip() for process in processes] == ["42"] * 3
    assert log.read_text().count("compiled") == 1
    assert len(cached(tmp_path / "cache")) == 1


def test_without_a_compiler(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.find_compiler() is None
    with pytest.raises(MissingDependency, match=r"no C\+\+ compiler found: install g\+\+"):
        build.build("cpu/tiny")
    with caplog.at_level(logging.INFO, logger="sparsify"):
        assert build.load("cpu/tiny") is None
        assert build.load("cpu/tiny") is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "install g++" in caplog.text and "PyTorch" in caplog.text

    # Built ahead of time, as in an image: found without a compiler, whichever compiler made it.
    monkeypatch.setenv("PATH", path)
    made = build.build("cpu/tiny")
    monkeypatch.setenv("PATH", str(tmp_path))
    build.load.cache_clear()
    assert build.build("cpu/tiny") == made
    library = build.load("cpu/tiny")
    assert library is not None and library.answer() == 42


def test_a_build_made_ahead_serves_where_the_cache_is_empty_and_the_compiler_another(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image has its builds outside the cache, which a volume hides."""
    made = build.build("cpu/tiny")
    ahead = tmp_path / "ahead"
    made.parent.rename(ahead)
    monkeypatch.setenv("SPARSIFY_KERNELS", str(ahead))
    compiler, log = counting_compiler(tmp_path)
    monkeypatch.setenv(
        "CXX", script(tmp_path / "newer-c++", f'[ "$1" = --version ] && echo newer || exec {compiler} "$@"\n')
    )
    assert build.build("cpu/tiny") == ahead / made.name
    library = build.load("cpu/tiny")
    assert library is not None and library.answer() == 42
    assert log.read_text() == "" and not (tmp_path / "cache" / "native").exists()

    (sources / "tiny.h").write_text("#define ANSWER 43\n")  # of other sources: not what was built ahead
    assert build.build("cpu/tiny").parent == tmp_path / "cache" / "native"


def test_cxx_may_hold_arguments_and_an_absent_one_is_passed_over(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = build.find_compiler()
    assert plain is not None
    monkeypatch.setenv("CXX", f"{plain.command[0]} -DEXTRA=1")
    found = build.find_compiler()
    assert found is not None and found.command == (plain.command[0], "-DEXTRA=1")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.find_compiler() == plain


def test_a_compiler_that_fails_halfway_leaves_nothing(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing = (
        'case "$*" in *--version*) echo failing 1.0; exit ;; esac\n'
        'for last; do :; done; echo half > "$last"; echo "tiny.cpp:1: error: boom" >&2; exit 1\n'
    )
    monkeypatch.setenv("CXX", script(tmp_path / "failing-c++", failing))
    with pytest.raises(build.NativeBuildError, match=r"failing 1.0\) refuses tiny.cpp: tiny.cpp:1: error: boom"):
        build.build("cpu/tiny")
    assert cached(tmp_path / "cache") == []
    assert build.load("cpu/tiny") is None
    assert "boom" in caplog.text


def test_a_damaged_library_is_named(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build.build("cpu/tiny")
    library.write_bytes(library.read_bytes()[:100])
    with pytest.raises(build.NativeBuildError, match=f"{library.name}.*delete that file"):
        build.open_library("cpu/tiny")


def test_a_cache_that_cannot_be_written_is_named(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(build.NativeBuildError, match="set SPARSIFY_CACHE to a folder"):
        build.build("cpu/tiny")


def test_switched_off(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(build.DISABLE, "0")
    with caplog.at_level(logging.WARNING, logger="sparsify"):
        assert build.load("cpu/tiny") is None
    assert not caplog.records and not (tmp_path / "cache").exists()


def test_gram_works_without_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from sparsify.solver.gram import FORCE, gram

    monkeypatch.setenv(build.DISABLE, "0")
    monkeypatch.delenv(FORCE, raising=False)  # for the whole run: a level that is asked for must be had
    build.load.cache_clear()
    try:
        x = torch.arange(-6, 6).reshape(4, 3).bfloat16()
        assert torch.equal(gram([x]), x.float().t() @ x.float())
        monkeypatch.setenv(FORCE, "portable")
        with pytest.raises(SparsifyError, match="needs the native kernel"):
            gram([x])
    finally:
        build.load.cache_clear()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime_serves_torch_and_kernels() -> None:
    """Two would each start threads of their own on the same cores."""
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    code = (
        "import re, torch; from sparsify.solver.gram import gram\n"
        "def runtimes(): return {line.split()[-1] for line in open('/proc/self/maps') if re.search(r'lib(g|i)?omp[^/]*$', line)}\n"
        "torch.randn(64, 64) @ torch.randn(64, 64); before = runtimes()\n"
        "gram([torch.randn(64, 64).bfloat16()]); print(len(before), len(runtimes() - before))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1", "0"]
