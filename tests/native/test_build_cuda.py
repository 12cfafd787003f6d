"""Building CUDA kernels: architectures, the cache, and builds made ahead of time. A script stands in for nvcc; one test runs it."""

import os
import stat
from pathlib import Path

import pytest

from sparsify import cli
from sparsify.errors import MissingDependency, SparsifyError
from sparsify.native import build, build_cuda, builds

ANSWER = '#include "tiny.h"\nextern "C" int answer() { return ANSWER; }\n'
REAL_NVCC = build_cuda.find_nvcc()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with one CUDA kernel that is plain C++, and a cache that is empty."""
    folder = tmp_path / "kernels" / "cuda"
    folder.mkdir(parents=True)
    (folder / "tiny.cu").write_text(ANSWER)
    (folder / "tiny.h").write_text("#define ANSWER 42\n")
    monkeypatch.setattr(build, "kernels_directory", lambda: folder.parent)
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build_cuda, "archs_at_hand", lambda: ())
    build_cuda.open_library.cache_clear()
    return folder


@pytest.fixture
def compiled(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts an nvcc in place that is a C++ compiler in truth; gives the file with the arguments of each compilation."""
    return use_nvcc(tmp_path, monkeypatch, "13.0.88")


def use_nvcc(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> Path:
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    log, script = folder / f"compiled-{version}", folder / f"nvcc-{version}"
    log.touch()
    script.write_text(
        f"""#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release {version[:4]}, V{version}"; exit ;; esac
echo "$@" >> {log}
for part; do case $part in *.cu) source=$part ;; esac; last=$part; done
exec {" ".join(compiler.command)} -x c++ -shared -fPIC "$source" -o "$last"
"""
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("NVCC", str(script))
    return log


def without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_cuda, "_candidates", lambda: [["no-such-nvcc"], []])


def test_the_repository_has_cuda_kernels() -> None:
    assert "cuda/sparse24_torch" in build.known_kernels(), "what calls them needs no nvcc"
    with pytest.raises(SparsifyError, match="unknown CUDA kernel 'cuda/none'"):
        build_cuda.build("cuda/none", (80,))


@pytest.mark.parametrize(
    ("text", "archs"), [("80", (80,)), ("90,80,sm_86,8.0", (80, 86, 90)), (" 120 , 100", (100, 120))]
)
def test_architectures(text: str, archs: tuple[int, ...]) -> None:
    assert build_cuda.parse_archs(text) == archs


@pytest.mark.parametrize("text", ["75", "ampere", "", "80,,90", "90a"])
def test_other_architectures_are_refused(text: str) -> None:
    with pytest.raises(SparsifyError, match="write numbers from 80"):
        build_cuda.parse_archs(text)


def test_one_file_for_all_architectures(compiled: Path) -> None:
    library = build_cuda.build("cuda/tiny", (90, 80, 120))
    assert library.name.startswith("cuda_tiny-") and "-sm_80_90_120-" in library.name
    [arguments] = compiled.read_text().splitlines()
    for code in ("sm_80", "sm_90", "sm_120", "compute_120"):
        assert f"-gencode arch=compute_{code.rpartition('_')[2]},code={code}" in arguments
    assert "compute_90,code=compute" not in arguments and "-cudart static" in arguments
    assert build_cuda.build("cuda/tiny", (80, 90, 120)) == library
    assert build_cuda.build("cuda/tiny", (90,)) == library, "what holds more serves too"
    assert build_cuda.open_library("cuda/tiny", (90,)).answer() == 42
    assert compiled.read_text().count("\n") == 1


def test_built_again_when_sources_architectures_or_nvcc_change(
    compiled: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_cuda.build("cuda/tiny", (80,))
    assert build_cuda.build("cuda/tiny", (86,)) != first, "not made for that GPU, and nvcc is here"
    (sources / "tiny.h").write_text("#define ANSWER 43\n")
    assert build_cuda.open_library("cuda/tiny", (80,)).answer() == 43
    assert compiled.read_text().count("\n") == 3
    other = use_nvcc(tmp_path, monkeypatch, "12.8.93")
    build_cuda.build("cuda/tiny", (80,))
    assert other.read_text().count("\n") == 1


def test_builds_made_ahead_serve_without_nvcc(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fat, one = build_cuda.build("cuda/tiny", (80, 90)), build_cuda.build("cuda/tiny", (89,))
    without_nvcc(monkeypatch)
    assert build_cuda.build("cuda/tiny", (80,)) == fat
    assert build_cuda.build("cuda/tiny", (89,)) == one
    assert build_cuda.build("cuda/tiny", (86,)) == fat, "machine code for sm_80 runs on sm_86"
    assert build_cuda.build("cuda/tiny", (103,)) in (fat, one), "by the driver, from PTX"
    assert build_cuda.open_library("cuda/tiny", (90,)).answer() == 42


def test_builds_of_an_image_serve_whatever_nvcc_is_there(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build_cuda.build("cuda/tiny", (80, 90))
    ahead = tmp_path / "ahead"
    made.parent.rename(ahead)
    monkeypatch.setenv("SPARSIFY_KERNELS", str(ahead))
    newer = use_nvcc(tmp_path, monkeypatch, "14.0.1")
    assert build_cuda.build("cuda/tiny", (90,)) == ahead / made.name
    listed = next(one for one in builds.list_all() if one.name == "cuda/tiny")
    assert listed.library == str(ahead / made.name)
    assert newer.read_text() == ""
    assert build_cuda.build("cuda/tiny", (100,)).parent == tmp_path / "cache" / "native", "built for what it lacks"
    without_nvcc(monkeypatch)
    assert build_cuda.build("cuda/tiny", (86,)) == ahead / made.name, "sm_80 code runs on it"


def test_older_gpus_are_not_given_newer_code(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_cuda.build("cuda/tiny", (90,))
    without_nvcc(monkeypatch)
    with pytest.raises(MissingDependency, match=r"no CUDA compiler found to build cuda/tiny for sm_89: .*NVCC.*Triton"):
        build_cuda.build("cuda/tiny", (89,))


def test_what_nvcc_complains_about_is_said(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvcc(tmp_path, monkeypatch, "11.8.89")
    script = Path(os.environ["NVCC"])
    complaint = "nvcc fatal: Unsupported gpu architecture error 'compute_120'"
    script.write_text(script.read_text().replace("exec ", f'echo "{complaint}" >&2; exit 1 #'))
    with pytest.raises(build.NativeBuildError, match=r"\(nvcc 11.8.89\) refuses tiny.cu: .*compute_120"):
        build_cuda.build("cuda/tiny", (120,))


def test_switched_off(compiled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(build.DISABLE, "0")
    with pytest.raises(SparsifyError, match="switched off"):
        build_cuda.open_library("cuda/tiny", (80,))
    assert not (tmp_path / "cache").exists()


def test_commands(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kernels", "build"]) == 0
    assert "no GPU here" in capsys.readouterr().out and not compiled.read_text()
    assert cli.main(["kernels", "build", "cuda/tiny"]) == 1
    assert "name architectures, as in --arch 80,90" in capsys.readouterr().err
    assert cli.main(["kernels", "build", "--arch", "80,90", "--json"]) == 0
    shown = capsys.readouterr()
    assert "building the native kernel cuda/tiny with" in shown.err and "built cuda/tiny after 0:0" in shown.err
    assert "sm_80_90" in shown.out
    assert cli.main(["kernels", "list", "--json"]) == 0
    assert "sm_80_90" in capsys.readouterr().out
    assert cli.main(["kernels", "build", "--arch", "70"]) == 1
    assert "no GPU architecture that has 2:4 tensor cores" in capsys.readouterr().err


def test_a_gpu_here_is_built_for(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_cuda, "archs_at_hand", lambda: (86,))
    [build] = builds.build_all()
    assert build.library and "-sm_86-" in build.library and build.source.endswith("tiny.cu")


@pytest.mark.skipif(REAL_NVCC is None, reason="no nvcc")
def test_the_real_compiler(sources: Path) -> None:
    """Needs no GPU: the CUDA runtime is inside the library."""
    kernel = '__global__ void nothing() {}\nextern "C" void launch() { nothing<<<1, 1>>>(); }\n'
    (sources / "tiny.cu").write_text(ANSWER + kernel)
    assert build_cuda.open_library("cuda/tiny", (80, 90)).answer() == 42
