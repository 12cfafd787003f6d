"""One digest of every byte, and when what was hashed before is believed."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsify import fingerprint
from sparsify.errors import CheckpointError
from sparsify.files import cache_directory
from sparsify.fingerprint import combined, file_digest, file_digests

SIZE = fingerprint.WORTH_REMEMBERING


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose bytes were read, once per part."""
    found: list[Path] = []
    real = fingerprint._part_digest

    def note(path: Path, start: int) -> bytes:
        found.append(path)
        return real(path, start)

    monkeypatch.setattr(fingerprint, "_part_digest", note)
    return found


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str = "model.safetensors", content: bytes = b"a" * SIZE) -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every file had been written long ago."""
    monkeypatch.setattr(fingerprint, "UNSETTLED_SECONDS", -1e9)


def test_every_byte_and_the_length_count(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "PART", 1000)
    content = bytearray(os.urandom(4500))
    first = file_digest(make(content=content))
    assert file_digest(make("copy", content)) == first and len(first) == 64
    seen = {first}
    for place in (0, 999, 1000, 2500, 4499):
        changed = bytearray(content)
        changed[place] ^= 1
        seen.add(file_digest(make(content=changed)))
    seen.add(file_digest(make(content=content + b"\0")))
    seen.add(file_digest(make(content=content[1000:2000] + content[:1000] + content[2000:])))
    seen.add(file_digest(make(content=b"")))
    assert len(seen) == 9


def test_what_was_hashed_is_not_read_again(make: Callable[..., Path], reads: list[Path], settled: None) -> None:
    path = make()
    first = file_digest(path)
    assert file_digest(path) == first and len(reads) == 1
    link = path.with_name("link")
    link.symlink_to(path)
    assert file_digest(link) == first and len(reads) == 1, "the same inode"
    small = make("config.json", b"{}")
    file_digest(small), file_digest(small)
    assert reads[1:] == [small, small], "hashed as fast as looked up"


def test_the_same_size_and_time_do_not_hide_a_change(
    make: Callable[..., Path], tmp_path: Path, reads: list[Path], settled: None
) -> None:
    path = make()
    first, stamp = file_digest(path), path.stat()
    with path.open("r+b") as file:  # in place: inode and size stay
        file.write(b"b")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # touch -r
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (stamp.st_ino, stamp.st_size, stamp.st_mtime_ns)
    assert file_digest(path) != first
    shutil.copy2(make("other", b"c" * SIZE), tmp_path / "new")
    os.replace(tmp_path / "new", path)  # another inode
    assert file_digest(path) not in (first, file_digest(make("b", b"b" + b"a" * (SIZE - 1))))


def test_a_file_written_just_now_is_hashed_each_time(make: Callable[..., Path], reads: list[Path]) -> None:
    """Two writes may have got one stamp, so what was hashed in between says nothing."""
    path = make()
    file_digest(path), file_digest(path)
    assert len(reads) == 2


def test_a_damaged_memory_is_not_believed(make: Callable[..., Path], reads: list[Path], settled: None) -> None:
    path = make()
    first = file_digest(path)
    (entry,) = (cache_directory() / "digests").iterdir()
    whole = entry.read_text()
    for damaged in (
        "",
        whole[:40],
        "[]",
        "null",
        whole.replace(first[:8], "0" * 8),
        "\xff",
        whole.replace("check", "c"),
    ):
        entry.write_text(damaged, encoding="latin-1")
        assert file_digest(path) == first
    assert len(reads) == 8 and entry.read_text() == whole


def test_a_cache_that_cannot_be_written_costs_time_only(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settled: None
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "file"))
    assert file_digest(make()) == file_digest(make("copy"))


def test_a_file_that_is_written_to_meanwhile_is_refused(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make()
    real = fingerprint._part_digest

    def written(path: Path, start: int) -> bytes:
        with path.open("ab") as file:
            file.write(b"more")
        return real(path, start)

    monkeypatch.setattr(fingerprint, "_part_digest", written)
    with pytest.raises(CheckpointError, match="model.safetensors is being written to"):
        file_digest(path)
    with pytest.raises(CheckpointError, match="gone is missing"):
        file_digest(path.with_name("gone"))


def test_threads_and_their_number_do_not_matter(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "PART", 1 << 18)
    files = {f"{i}": make(f"{i}", os.urandom(SIZE + i)) for i in range(3)}
    found = file_digests(files)
    monkeypatch.setattr(fingerprint, "usable_cores", lambda: 7)
    assert file_digests(files) == found and list(found) == list(files)
    same: list[dict[str, str]] = []
    others = [threading.Thread(target=lambda: same.append(file_digests(files))) for _ in range(4)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert same == [found] * 4
    assert combined(found) == combined(dict(reversed(found.items()))) != combined({**found, "0": found["1"]})
