"""`sparsify kernels`: the native kernels, built ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from sparsify import native
from sparsify.errors import SparsifyError
from sparsify.files import cache_directory


@dataclass(frozen=True)
class KernelBuild:
    """One kernel. library: its newest build in the cache, or None; problem: why it could not be built."""

    name: str
    source: str
    library: str | None
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def list_all() -> list[KernelBuild]:
    """Every kernel with its newest build in the cache; builds nothing."""
    return [KernelBuild(name, _source(name), _newest(name)) for name in native.known_kernels()]


def build_all(names: Sequence[str] = ()) -> list[KernelBuild]:
    """Build some kernels, or all. A kernel that the compiler refuses does not keep the others from being built.

    Raises SparsifyError for an unknown name, and when there is neither a compiler nor a build from before.
    """
    known = native.known_kernels()
    if unknown := [name for name in names if name not in known]:
        raise SparsifyError(f"unknown kernel {unknown[0]!r}; known kernels: {', '.join(known)}")
    builds = []
    for name in names or known:
        try:
            builds.append(KernelBuild(name, _source(name), str(native.build(name))))
        except native.NativeBuildError as error:
            builds.append(KernelBuild(name, _source(name), None, str(error)))
    return builds


def table(builds: Sequence[KernelBuild]) -> Table:
    """The kernels for people."""
    view = Table("kernel", "source", "library")
    for build in builds:
        # Text, not str: a compiler's message may hold brackets
        where = Text(build.problem, style="red") if build.problem else Text(build.library or "built on first use")
        view.add_row(build.name, Text(build.source), where)
    return view


def _source(name: str) -> str:
    return str(native.kernels_directory() / f"{name}.cpp")


def _newest(name: str) -> str | None:
    stem = name.rpartition("/")[2]
    # STEM-SOURCES-COMPILER.so: both are digests without a dash
    builds = [file for file in (cache_directory() / "native").glob(f"{stem}-*-*.so") if file.stem.count("-") == 2]
    return str(max(builds, key=lambda file: file.stat().st_mtime)) if builds else None
