"""The SHA-256 of every file of a directory, in the file `SHA256SUMS` inside it, which `sha256sum --check` reads too.

In a finished directory it is the last file that is written, and lists all others. While a run goes on, every folder of its
work directory has one of its own; there the digest of a file is entered before the file gets its name, so that a kill never
leaves a finished file that is not listed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from sparsify.errors import CheckpointError
from sparsify.files import PARTIAL, atomic_write, kind_problem, named, path_problem, publish, written_json
from sparsify.progress import progress, quietly
from sparsify.threads import usable_cores

MANIFEST = "SHA256SUMS"
VARIABLE = "SPARSIFY_VERIFY"
VERIFIED = (
    "SPARSIFY_VERIFIED"  # the directory that `sparsify serve --verify` has compared, for the server that it becomes
)
LATER = {"report.html"}  # what commands put into a finished directory
FOREIGN = {".git", ".gitattributes", ".gitignore", ".cache", ".huggingface"}  # what git and the Hub's client put there
LARGEST = 1 << 26  # bytes of a manifest: half a million files
HEX = frozenset("0123456789abcdef")
ESCAPES = (("\\", "\\\\"), ("\n", "\\n"), ("\r", "\\r"))
UNSEALED = "final"  # the folder of a work directory in which the output is put together
SHOWN = 20  # names of a kind in the words for people


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. CheckpointError where it cannot be read."""
    if problem := kind_problem(path):
        raise CheckpointError(f"{path} {problem}")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def read_manifest(directory: Path) -> dict[str, set[str]]:
    """The digests by the path of the file in the directory; nothing where there is no manifest.

    A file that a run was replacing when it was killed has two. CheckpointError for what no manifest looks like.
    """
    file = directory / MANIFEST
    if problem := kind_problem(file):
        raise CheckpointError(f"{file} {problem}")
    try:
        if file.stat().st_size > LARGEST:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes and is no list of digests; {_again(file)}")
        *lines, rest = os.fsdecode(file.read_bytes()).split("\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    found: dict[str, set[str]] = {}
    for number, line in enumerate(lines, 1):
        escaped = line.startswith("\\")
        digest, between, name = (line := line[escaped:])[:64], line[64:66], line[66:]
        if escaped:
            name = _unescaped(name)
        if len(digest) < 64 or not HEX.issuperset(digest) or between != "  " or not _lies_inside(name):
            raise CheckpointError(f"{file} is damaged in line {number}; {_again(file)}")
        found.setdefault(name, set()).add(digest)
    if rest:
        raise CheckpointError(f"{file} is cut off in line {len(lines) + 1}; {_again(file)}")
    return found


def _again(file: Path) -> str:
    if work := next((str(parent) for parent in file.parents if parent.name.endswith(PARTIAL)), None):
        return f"remove {work} and start again"
    return "download or create the checkpoint again"


def _lies_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and path_problem(name) is None


def _line(name: str, digest: str) -> str:
    """A line as coreutils write it: with a backslash before it where some were needed in the name."""
    escaped = name
    for plain, written in ESCAPES:
        escaped = escaped.replace(plain, written)
    mark = "" if escaped == name else "\\"
    return f"{mark}{digest}  {escaped}\n"


def _unescaped(name: str) -> str:
    pieces = name.split("\\\\")
    for plain, written in ESCAPES[1:]:
        pieces = [piece.replace(written, plain) for piece in pieces]
    return "\\".join(pieces)


def write_manifest(directory: Path, digests: Mapping[str, set[str]]) -> None:
    """Write the manifest of a directory, in order of name."""
    atomic_write(directory / MANIFEST, os.fsencode(manifest_text(digests)))


def manifest_text(digests: Mapping[str, set[str]]) -> str:
    """A manifest, in order of name."""
    return "".join(_line(name, digest) for name in sorted(digests) for digest in sorted(digests[name]))


def seal(directory: Path, known: Mapping[str, str] | None = None, sealed: Iterable[Path] = ()) -> None:
    """Write the manifest of a finished directory, whose files do not change any more.

    known: the digests of files that were hashed while they were written; sealed: folders inside, which have theirs
    """
    digests = {name: {digest} for name, digest in (known or {}).items()}
    for inner in sealed:
        folder = inner.relative_to(directory).as_posix()
        digests |= {f"{folder}/{name}": entered for name, entered in read_manifest(inner).items()}
    for name in _files(directory):
        if name not in digests:
            digests[name] = {file_sha256(directory / name)}
    write_manifest(directory, digests)


# ------------------------------------------------------------------------------------------------ while a run goes on


def keep(aside: Path, file: Path, digest: str | None = None) -> None:
    """Publish a finished file of a work directory, its digest entered before. digest: where it is known already."""
    folder, name = file.parent, file.name
    digests = read_manifest(folder)
    before = digests.get(name, set()) if file.exists() else set()
    digest = digest or file_sha256(aside)
    if before != {digest}:
        write_manifest(folder, {**digests, name: {*before, digest}})
    publish(aside, file)
    if before - {digest}:
        write_manifest(folder, {**digests, name: {digest}})


def keep_json(file: Path, value: Any) -> None:
    """Write a JSON file of a work directory and enter it."""
    aside = file.with_name(f".{file.name}.{os.getpid()}{PARTIAL}")
    try:
        with named(file):
            aside.write_text(written_json(value), encoding="utf-8")
        keep(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def unsound(folder: Path, pattern: str) -> list[Path]:
    """The files in a folder that match a pattern and are not, or not any more, those that were entered."""
    digests = read_manifest(folder)
    files = sorted(folder.glob(pattern))
    return [
        file for file, digest in zip(files, _hashed(files), strict=True) if digest not in digests.get(file.name, ())
    ]


def missing(folder: Path) -> list[Path]:
    """The files that were entered in a folder and are not there."""
    return [folder / name for name in sorted(read_manifest(folder)) if not (folder / name).exists()]


def refuse_damaged(folder: Path, names: Collection[str] | None = None) -> None:
    """CheckpointError for a file that was entered in a folder of a work directory and is another one now.

    names: the files to look at; default all of them
    """
    digests = read_manifest(folder)
    asked = sorted(digests if names is None else digests.keys() & names)
    there = [name for name in asked if (folder / name).exists()]
    for name, digest in zip(there, _hashed([folder / name for name in there]), strict=True):
        if digest not in digests[name]:
            raise CheckpointError(
                f"{folder / name} is damaged: it is not what the run has written; {_again(folder / name)}"
            )


def _hashed(files: list[Path]) -> Iterator[str | None]:
    """The digests of files, in their order; None for what is no file."""
    with ThreadPoolExecutor(usable_cores()) as threads:
        yield from threads.map(lambda file: None if kind_problem(file) else file_sha256(file), files)


# -------------------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Verification:
    """What became of the files of a directory since its manifest was written; names are relative to the directory.

    unfinished: a work directory, whose files are compared as far as they are there
    files: how many are as they were written
    """

    directory: str
    unfinished: bool
    files: int
    differing: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def good(self) -> bool:
        return not (self.differing or self.missing or self.extra)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        lists = {"differing": self.differing, "missing": self.missing, "extra": self.extra}
        found = {"directory": self.directory, "good": self.good, "unfinished": self.unfinished, "files": self.files}
        return {**found, **{kind: [_readable(name) for name in names] for kind, names in lists.items()}}

    def describe(self) -> str:
        """A line for each file that is not as it should be, and one for the rest."""
        kinds = (
            ("differs from what was written", self.differing), ("is missing", self.missing),
            ("is not in the manifest", self.extra),
        )  # fmt: skip
        lines = [f"{_readable(name)} {what}" for what, names in kinds for name in names[:SHOWN]]
        hidden = sum(len(names[SHOWN:]) for _, names in kinds)
        lines += [f"and {hidden} more"] if hidden else []
        of_run = " of an unfinished run" if self.unfinished else ""
        return "\n".join([*lines, f"{self.directory}: {self.files} files{of_run} are as they were written"])


def _readable(name: str) -> str:
    return os.fsencode(name).decode(errors="backslashreplace")


@quietly
def verify(directory: str | Path, quiet: bool = False) -> Verification:
    """Compare every file of a directory that sparsify wrote with its manifest.

    Of a work directory (OUT.partial) what is finished is compared. Raises CheckpointError where there is no manifest.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; give one that sparsify has written")
    unfinished = directory.name.endswith(PARTIAL)
    digests = _of_work(directory) if unfinished else read_manifest(directory)
    if not digests and not (directory / MANIFEST).exists():
        raise CheckpointError(
            f"{directory} has no {MANIFEST}, so that nothing says what its files should be; sparsify inspect checks its tensors"
        )
    there = set(_files(directory))
    asked = sorted(name for name in digests if name in there)
    files = [directory / name for name in asked]
    found = list(progress(_hashed(files), "verifying", total=len(files)))
    good = [digest in digests[name] for name, digest in zip(asked, found, strict=True)]
    return Verification(
        str(directory),
        unfinished,
        sum(good),
        tuple(name for name, same in zip(asked, good, strict=True) if not same),
        () if unfinished else tuple(sorted(digests.keys() - there)),
        () if unfinished else tuple(sorted(name for name in there - digests.keys() if not _comes_later(name))),
    )


def damage(directory: Path) -> str | None:
    """The first thing that is wrong with a finished directory, in words; None where it is as its manifest says."""
    try:
        found = verify(directory)
    except CheckpointError as error:
        return str(error)
    return None if found.good else found.describe().splitlines()[0]


def refuse_changed(directory: str | Path) -> None:
    """CheckpointError where a directory is not as its manifest says, or has none. For whoever is about to load it.

    Of a snapshot in the Hub's cache files may be missing: the client downloads those that are asked for.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} cannot be verified: it is no directory; download it first and load that")
    found = verify(directory)
    if found.missing and directory.parent.name == "snapshots":
        found = replace(found, missing=())
    if not found.good:
        what = found.describe().splitlines()[0]
        raise CheckpointError(f"{directory}: {what}; download or create it again (sparsify verify names everything)")


def verifies_on_loading() -> bool:
    """Whether the loaders of transformers and vLLM are to compare a checkpoint with its manifest first."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def state(directory: str | Path) -> str:
    """Of a checkpoint that is loaded: verified, unchecked (there is a manifest, nobody asked), or none."""
    if verifies_on_loading() or os.environ.get(VERIFIED) == str(directory):
        return "verified"
    return "unchecked" if (Path(directory) / MANIFEST).is_file() else "none"


def _of_work(work: Path) -> dict[str, set[str]]:
    """The digests of all folders of a work directory that have a manifest; one that is listed itself is a file like others."""
    digests: dict[str, set[str]] = {}
    for file in sorted(work.rglob(MANIFEST), key=lambda file: len(file.parts)):
        folder = file.parent.relative_to(work)
        if (folder / MANIFEST).as_posix() in digests or folder.parts[:1] == (UNSEALED,):
            continue
        digests |= {(folder / name).as_posix(): entered for name, entered in read_manifest(file.parent).items()}
    return digests


def _files(directory: Path) -> list[str]:
    """The paths of all files below a directory but its manifest; links count as what they lead to."""
    found = []
    for folder, _, names in os.walk(directory):
        inside = Path(folder).relative_to(directory)
        found += [(inside / name).as_posix() for name in names if (inside / name) != Path(MANIFEST)]
    return sorted(found)


def _comes_later(name: str) -> bool:
    return name in LATER or PurePosixPath(name).parts[0] in FOREIGN
