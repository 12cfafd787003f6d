"""`sparsify kernels`: the native kernels, built ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from sparsify.errors import SparsifyError
from sparsify.native import build as cxx
from sparsify.native import build_cuda
from sparsify.threads import usable_cores


@dataclass(frozen=True)
class KernelBuild:
    """One kernel. library: its newest build in the cache, or None; problem: why it could not be built.

    note: why it was not built where that is no failure.
    """

    name: str
    source: str
    library: str | None
    problem: str | None = None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def list_all() -> list[KernelBuild]:
    """Every kernel with its newest build in the cache; builds nothing."""
    names = [*cxx.known_kernels(), *build_cuda.known_kernels()]
    return [KernelBuild(name, _source(name), _newest(name)) for name in names]


def build_all(names: Sequence[str] = (), archs: Sequence[int] = ()) -> list[KernelBuild]:
    """Build some kernels, or all. A kernel that the compiler refuses does not keep the others from being built.

    archs: GPU architectures for the CUDA kernels; without any, those of the GPUs here, and where there are none, CUDA
    kernels are passed over unless named. Raises SparsifyError for an unknown name, and when there is neither a compiler
    nor a build from before.
    """
    known = [*cxx.known_kernels(), *build_cuda.known_kernels()]
    if unknown := [name for name in names if name not in known]:
        raise SparsifyError(f"unknown kernel {unknown[0]!r}; known kernels: {', '.join(known)}")
    wanted = list(names or known)
    for_gpu = [name for name in wanted if name in build_cuda.known_kernels()]
    if for_gpu and not archs:
        archs = build_cuda.archs_at_hand()
        if not archs and names:
            raise SparsifyError(
                f"there is no GPU here to build {for_gpu[0]} for: name architectures, as in --arch 80,90"
            )
    with ThreadPoolExecutor(usable_cores()) as pool:  # compilers are processes of their own
        return list(pool.map(lambda name: _build(name, archs if name in for_gpu else None), wanted))


def _build(name: str, archs: Sequence[int] | None) -> KernelBuild:
    """archs: None for a kernel of the CPU."""
    if archs is not None and not archs:
        note = "no GPU here: built on first use on one, or with --arch 80,86,89,90,100,120"
        return KernelBuild(name, _source(name), _newest(name), note=note)
    try:
        library = cxx.build(name) if archs is None else build_cuda.build(name, archs)
        return KernelBuild(name, _source(name), str(library))
    except cxx.NativeBuildError as error:
        return KernelBuild(name, _source(name), None, str(error))


def table(builds: Sequence[KernelBuild]) -> Table:
    """The kernels for people."""
    view = Table("kernel", "source", "library")
    for build in builds:
        # Text, not str: a compiler's message may hold brackets
        where = Text(build.library or build.note or "built on first use")
        if build.problem:
            where = Text(build.problem, style="red")
        view.add_row(build.name, Text(build.source), where)
    return view


def _source(name: str) -> str:
    suffix = "cu" if name in build_cuda.known_kernels() else "cpp"
    return str(cxx.kernels_directory() / f"{name}.{suffix}")


def _newest(name: str) -> str | None:
    # STEM-SOURCES-COMPILER.so, of CUDA STEM-SOURCES-ARCHITECTURES-COMPILER.so: no part holds a dash
    dashes = 3 if name in build_cuda.known_kernels() else 2
    pattern = f"{cxx.build_stem(name)}-*-*.so"
    files = [*cxx.ahead_of_time(pattern), *cxx.build_folder().glob(pattern)]
    builds = [file for file in files if file.stem.count("-") == dashes]
    return str(max(builds, key=lambda file: file.stat().st_mtime)) if builds else None
