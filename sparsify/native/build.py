"""Native kernels: compiled from `kernels/` on first use, kept in a cache, loaded with ctypes.

A kernel is one C++ file with a C interface that depends on nothing but the compiler and OpenMP; a file that includes
`torch/` is built against the headers in torch's wheel, of which only the stable ABI is used (but by `cpu/tensor_memory`, whose
builds serve one version of torch). One build serves any processor of the architecture (kernels choose their instruction set at
run time), so a build made ahead of time, in an image for instance, is found again on machines that have no compiler. CUDA
sources are built by `build_cuda`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from sparsify._version import __version__
from sparsify.errors import MissingDependency, SparsifyError
from sparsify.files import PACKAGE, cache_directory
from sparsify.progress import duration, say
from sparsify.threads import usable_cores

DISABLE = "SPARSIFY_NATIVE"  # set to 0: no native code is built or loaded
AHEAD = "SPARSIFY_KERNELS"  # a folder with builds made ahead of time, which is only read: an image has one
FOLDERS = ("cpu", "cuda")  # of kernels/; in the second, C++ files that call the CUDA kernels
COMPILERS = ("c++", "g++", "clang++")
# --as-needed: of two libraries that offer OpenMP's symbols only the first, torch's own, becomes a dependency.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-Wl,--as-needed")
COMPILE_SECONDS = 600

logger = logging.getLogger(__name__)


class NativeBuildError(SparsifyError):
    """The compiler refused a kernel."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that runs. `version` is the first line it prints, and part of a build's name."""

    command: tuple[str, ...]
    version: str


def kernels_directory() -> Path:
    """The kernel sources: inside an installed package, else at the root of the source tree."""
    for candidate in (PACKAGE / "_kernels", PACKAGE.parent / "kernels"):
        if candidate.is_dir():
            return candidate
    raise MissingDependency(
        "this installation of sparsify lacks the kernel sources; install it from a wheel or its source tree"
    )


def known_kernels() -> list[str]:
    """Names that `load` and `build` take: `cpu/gram` for kernels/cpu/gram.cpp."""
    root = kernels_directory()
    return sorted(f"{folder}/{path.stem}" for folder in FOLDERS for path in (root / folder).glob("*.cpp"))


def build_stem(name: str) -> str:
    """What the files of a kernel's builds begin with: `gram` for cpu/gram, `cuda_sparse24` for cuda/sparse24."""
    return name.removeprefix("cpu/").replace("/", "_")


def find_compiler() -> Compiler | None:
    """`$CXX`, else the first of c++, g++ and clang++ that is there and runs."""
    for candidate in (shlex.split(os.environ.get("CXX", "")), *([name] for name in COMPILERS)):
        if not candidate or shutil.which(candidate[0]) is None:
            continue
        try:
            run = subprocess.run([*candidate, "--version"], capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return Compiler(tuple(candidate), run.stdout.partition("\n")[0].strip())
    return None


def openmp_library() -> Path | None:
    """The OpenMP runtime that torch carries in its wheel, None when torch uses the system's.

    Kernels are linked to this one: a second runtime beside it would start threads of its own on the same cores. Where a
    runtime is preloaded (vLLM does so on CPUs), its symbols take precedence for torch and for kernels alike.
    """
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    package = Path(torch.origin).parent
    folders = (package / "lib", package.parent / "torch.libs")
    return next((file for folder in folders for file in sorted(folder.glob("libgomp*.so*"))), None)


def torch_flags(source: Path) -> list[str]:
    """What a source that includes torch's headers needs; nothing for all others."""
    spec = find_spec("torch")
    if b"#include <torch/" not in source.read_bytes() or spec is None or spec.origin is None:
        return []
    package = Path(spec.origin).parent
    return [f"-I{package / 'include'}", f"-L{package / 'lib'}", "-ltorch_cpu", "-lc10"]


def build(name: str) -> Path:
    """The shared library of a kernel, compiled now unless the cache has it. Safe in many processes at once.

    A build of the present sources that was made ahead of time serves whatever compiler is here.
    Raises MissingDependency without a compiler, NativeBuildError with the compiler's output.
    """
    source = kernels_directory() / f"{name}.cpp"
    if not source.is_file():
        raise SparsifyError(f"unknown kernel {name!r}; known kernels: {', '.join(known_kernels())}")
    openmp = openmp_library()
    stem = f"{build_stem(name)}-{_source_key(source, openmp)}"
    if ahead := ahead_of_time(f"{stem}-*.so"):
        return ahead[0]
    folder = build_folder()
    compiler = find_compiler()
    if compiler is None:
        if ready := sorted(folder.glob(f"{stem}-*.so")):
            return ready[0]
        raise MissingDependency("no C++ compiler found: install g++ (or clang++), or set CXX to the command of one")
    library = folder / f"{stem}-{digest(compiler.version)}.so"
    runtime = [str(openmp)] if openmp else []
    command = [*compiler.command, *FLAGS, str(source), *torch_flags(source), *runtime]
    compile_once(name, command, compiler.version, library)
    return library


def build_folder() -> Path:
    """Where builds are kept."""
    return cache_directory() / "native"


def ahead_of_time(pattern: str) -> list[Path]:
    """Builds with such names in the folder that SPARSIFY_KERNELS names; none where it is not set."""
    folder = os.environ.get(AHEAD)
    return sorted(Path(folder).glob(pattern)) if folder else []


def compile_once(
    name: str, command: Sequence[str], version: str, library: Path, seconds: float = COMPILE_SECONDS
) -> None:
    """Run a compiler unless `library` is there already. Safe in many processes at once: a lock, then a rename.

    It takes a minute, so stderr shows it (`sparsify.progress`), also while another process builds it.
    command: everything but the output; version: of the compiler, for its error message; seconds: the most it may take.
    """
    if library.exists():
        return
    folder = library.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{build_stem(name)}.lock", f"waiting for another process that builds {name}"):
            if not library.exists():  # another process may have built it while this one waited
                started = time.monotonic()
                say(f"building the native kernel {name} with {Path(command[0]).name} (once; kept in {_short(folder)})")
                _compile(name, command, version, library, seconds)
                say(f"built {name} after {duration(time.monotonic() - started)}")
    except OSError as error:
        message = f"cannot write the native kernel {name} to {folder} ({error}); set SPARSIFY_CACHE to a folder you own"
        raise NativeBuildError(message) from error


def build_ahead(names: Sequence[str]) -> None:
    """Build several kernels side by side, as many as there are cores. One that cannot be built is left to `load`, which
    says why: a command that calls this in time waits once instead of at every first use."""

    def build_one(name: str) -> None:
        with contextlib.suppress(SparsifyError):
            build(name)

    if os.environ.get(DISABLE) != "0":
        with ThreadPoolExecutor(usable_cores()) as pool:
            list(pool.map(build_one, names))


def open_library(name: str) -> ctypes.CDLL:
    """Build a kernel if need be and load it. Raises a SparsifyError that says why it cannot be had."""
    if os.environ.get(DISABLE) == "0":
        raise SparsifyError(f"native kernels are switched off by {DISABLE}=0")
    library = build(name)
    try:
        if (openmp := openmp_library()) is not None:
            ctypes.CDLL(str(openmp))  # the linker's search would find another one, or none
        return ctypes.CDLL(str(library))
    except OSError as error:
        message = f"cannot load the native kernel {library} ({error}); delete that file to build it again"
        raise NativeBuildError(message) from error


@functools.cache
def load(name: str) -> ctypes.CDLL | None:
    """A kernel's library, or None after one line in the log that says why and what is used instead."""
    try:
        return open_library(name)
    except SparsifyError as error:
        quiet = os.environ.get(DISABLE) == "0"
        logger.log(
            logging.INFO if quiet else logging.WARNING, "kernel %s: %s; slower PyTorch code is used", name, error
        )
        return None


def digest(*parts: str | bytes) -> str:
    """A short name for contents: 16 hexadecimal digits."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()[:16]


def _source_key(source: Path, openmp: Path | None) -> str:
    """Changes with everything that changes the library, save the compiler."""
    headers = sorted(source.parent.glob("*.h"))
    texts = [part for file in (source, *headers) for part in (file.name, file.read_bytes())]
    runtime = openmp.name if openmp else ""
    release = metadata.version("torch") if torch_flags(source) else ""
    return digest(__version__, platform.machine(), runtime, release, *FLAGS, *texts)


def _short(folder: Path) -> str:
    """A folder as people write it: ~/.cache/sparsify/native."""
    home = os.path.expanduser("~")  # noqa: PTH111 (raises nothing for a user without a home)
    return f"~/{folder.relative_to(home)}" if folder.is_relative_to(home) else str(folder)


@contextlib.contextmanager
def _locked(path: Path, waiting: str) -> Iterator[None]:
    """Hold an exclusive lock; on file systems without locks nothing but some time is lost, because the rename is atomic.

    waiting: shown when another process holds it
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(waiting)
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield  # closing the file releases the lock, and so does the death of the process


def _compile(name: str, command: Sequence[str], version: str, library: Path, seconds: float) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=f".{build_stem(name)}-") as folder:
        aside = Path(folder) / library.name
        source = next(Path(part).name for part in command if Path(part).suffix in (".cpp", ".cu"))
        try:
            run = subprocess.run([*command, "-o", str(aside)], capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise NativeBuildError(f"{command[0]} did not finish {source} in {seconds:.0f} s") from None
        if run.returncode:
            lines = run.stderr.strip().splitlines()
            first = next(
                (line for line in lines if "error" in line), lines[0] if lines else f"exit status {run.returncode}"
            )
            raise NativeBuildError(f"{command[0]} ({version}) refuses {source}: {first}")
        os.replace(aside, library)
