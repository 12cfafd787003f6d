"""CUDA kernels: `kernels/cuda/*.cu`, compiled by nvcc into the same cache as the C++ ones, one file for any set of GPUs.

On first use a kernel is built for the GPU at hand; `sparsify kernels build --arch 80,86,89,90,100,120` makes one fat
binary ahead of time, for images and for machines without nvcc. The CUDA runtime is linked statically: the driver is all
that such a build needs, whatever CUDA torch was built with.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sparsify._version import __version__
from sparsify.errors import MissingDependency, SparsifyError
from sparsify.native import build as cxx
from sparsify.native.build import NativeBuildError

FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static", "--threads", "0")
COMPILE_SECONDS = 600  # per architecture
OLDEST = 80  # 2:4 tensor cores begin with Ampere
GET_NVCC = (
    "install the CUDA toolkit (nvcc 12.8 or newer builds for every GPU from Ampere to Blackwell) or set NVCC to the "
    "command of one; without it the Triton back end serves"
)


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler that runs. `version` is its release, as in 13.0.88, and part of a build's name."""

    command: tuple[str, ...]
    version: str


def known_kernels() -> list[str]:
    """Names that `build` takes: `cuda/sparse24` for kernels/cuda/sparse24.cu."""
    return sorted(f"cuda/{path.stem}" for path in (cxx.kernels_directory() / "cuda").glob("*.cu"))


def find_nvcc() -> Nvcc | None:
    """`$NVCC`, else nvcc of `$CUDA_HOME`, of the search path, of NVIDIA's wheels or of /usr/local/cuda: the first that runs."""
    for command in _candidates():
        if not command or shutil.which(command[0]) is None:
            continue
        try:
            run = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        version = re.search(r"\bV(\d[\d.]*)", run.stdout)
        return Nvcc(tuple(command), version[1] if version else run.stdout.strip().splitlines()[-1])
    return None


def _candidates() -> list[list[str]]:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    wheels = find_spec("nvidia")  # NVIDIA's compiler as a Python package
    folders = [Path(place) for place in (wheels.submodule_search_locations or [])] if wheels else []
    installed = [str(file) for folder in folders for file in sorted(folder.glob("*/bin/nvcc"), reverse=True)]
    return [
        shlex.split(os.environ.get("NVCC", "")),
        *([str(Path(home) / "bin" / "nvcc")] for home in homes),
        ["nvcc"],
        *([file] for file in installed),
        ["/usr/local/cuda/bin/nvcc"],
    ]


def parse_archs(text: str) -> tuple[int, ...]:
    """80,86,9.0,sm_120 -> (80, 86, 90, 120), ascending and each once."""
    archs = set()
    for part in text.split(","):
        number = part.strip().lower().removeprefix("sm_").replace(".", "")
        if not re.fullmatch("[0-9]{2,4}", number) or int(number) < OLDEST:
            raise SparsifyError(
                f"--arch {part.strip()[:100]!r} is no GPU architecture that has 2:4 tensor cores: write numbers from 80, as in "
                "80,86,89,90,100,120"
            )
        archs.add(int(number))
    return tuple(sorted(archs))


def arch_flags(archs: Sequence[int]) -> list[str]:
    """Machine code for each architecture, and PTX of the newest for those that come after it."""
    pairs = [(arch, f"sm_{arch}") for arch in archs] + [(max(archs), f"compute_{max(archs)}")]
    return [part for arch, code in pairs for part in ("-gencode", f"arch=compute_{arch},code={code}")]


def archs_at_hand() -> tuple[int, ...]:
    """The architectures of the GPUs here that have 2:4 tensor cores: (80, 90). None where torch is not installed."""
    if find_spec("torch") is None:
        return ()
    import torch

    if torch.version.hip or not torch.cuda.is_available():
        return ()
    capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return tuple(sorted({major * 10 + minor for major, minor in capabilities if major >= 8}))


def build(name: str, archs: Sequence[int]) -> Path:
    """The shared library of a kernel for all of `archs`, compiled now unless the cache has it.

    A ready build that holds more architectures than asked for serves too, and so does one by another nvcc where this
    machine has none, or where the build was made ahead of time. Raises MissingDependency without nvcc, NativeBuildError
    with the compiler's output.
    """
    source = cxx.kernels_directory() / f"{name}.cu"
    if not source.is_file():
        known = ", ".join(known_kernels()) or "none in this installation"
        raise SparsifyError(f"unknown CUDA kernel {name!r}; known CUDA kernels: {known}")
    ahead = _fewest_first(cxx.ahead_of_time(_builds_of(source)))
    if found := _serving(_has, ahead, archs):
        return found
    ready = _fewest_first([*ready_builds(name), *ahead])
    nvcc = find_nvcc()
    if nvcc is None:
        if found := _serving(_has, ready, archs) or _serving(_runs, ready, archs):
            return found
        wanted = ", ".join(f"sm_{arch}" for arch in archs)
        raise MissingDependency(f"no CUDA compiler found to build {name} for {wanted}: {GET_NVCC}")
    made_by = cxx.digest(nvcc.version)
    for path in ready:
        if path.stem.endswith(f"-{made_by}") and all(_has(_archs_of(path), arch) for arch in archs):
            return path
    held = "_".join(str(arch) for arch in sorted(set(archs)))
    library = cxx.build_folder() / f"{cxx.build_stem(name)}-{source_key(source)}-sm_{held}-{made_by}.so"
    command = [*nvcc.command, *FLAGS, *arch_flags(sorted(set(archs))), str(source)]
    cxx.compile_once(name, command, f"nvcc {nvcc.version}", library, COMPILE_SECONDS * len(set(archs)))
    return library


def ready_builds(name: str) -> list[Path]:
    """Builds of the present sources in the cache, those for the fewest architectures first."""
    source = cxx.kernels_directory() / f"{name}.cu"
    return _fewest_first(cxx.build_folder().glob(_builds_of(source)))


def _builds_of(source: Path) -> str:
    """What the files of all builds of a CUDA source as it is now are called."""
    return f"{cxx.build_stem(f'cuda/{source.stem}')}-{source_key(source)}-sm_*-*.so"


def _fewest_first(builds: Iterable[Path]) -> list[Path]:
    return sorted(builds, key=lambda path: (len(_archs_of(path)), path.name))


def _serving(serves: Callable[[Sequence[int], int], bool], builds: Sequence[Path], archs: Sequence[int]) -> Path | None:
    """The first of `builds` that serves all of `archs`, in the sense of `_has` or `_runs`."""
    return next((path for path in builds if all(serves(_archs_of(path), arch) for arch in archs)), None)


def source_key(source: Path) -> str:
    """Changes with everything that changes the library, save the architectures and the compiler."""
    headers = sorted([*source.parent.glob("*.h"), *source.parent.glob("*.cuh")])
    texts = [part for file in (source, *headers) for part in (file.name, file.read_bytes())]
    return cxx.digest(__version__, platform.machine(), *FLAGS, *texts)


def _archs_of(path: Path) -> tuple[int, ...]:
    """The architectures in the name of a build."""
    held = path.stem.rsplit("-", 2)[1].removeprefix("sm_")
    return tuple(int(arch) for arch in held.split("_"))


def _has(archs: Sequence[int], arch: int) -> bool:
    return arch in archs


def _runs(archs: Sequence[int], arch: int) -> bool:
    """Machine code runs on later minor versions of its own major one, and the newest's PTX on everything after it."""
    return any(held // 10 == arch // 10 and held <= arch for held in archs) or max(archs) <= arch


@functools.cache
def open_library(name: str, archs: tuple[int, ...]) -> ctypes.CDLL:
    """A kernel for some architectures, built if need be, and loaded; a SparsifyError says why it cannot be had."""
    if os.environ.get(cxx.DISABLE) == "0":
        raise SparsifyError(f"native kernels are switched off by {cxx.DISABLE}=0")
    library = build(name, archs)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        message = f"cannot load the CUDA kernel {library} ({error}); delete that file to build it again"
        raise NativeBuildError(message) from error
