"""Sizes as users write them, and what the kernel says of this process."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify import memory
from sparsify.errors import SparsifyError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("16GB", 16 * 10**9),
        ("1.5 gb", 15 * 10**8),
        ("500MB", 5 * 10**8),
        ("2GiB", 2**31),
        ("64k", 64000),
        ("4096", 4096),
    ],
)
def test_sizes(text, nbytes):
    assert memory.parse_size(text, "--memory") == nbytes


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "16 apples", "1e9", "16XB"])
def test_what_is_no_size_is_refused_by_the_option(text):
    with pytest.raises(SparsifyError, match=r"--memory .*16GB"):
        memory.parse_size(text, "--memory")


# Run in a process of its own: what other tests left in this one, freed or allocated meanwhile, would count too.
COUNTED = """
import sys
import torch
from sparsify import memory

size, path = int(sys.argv[1]), sys.argv[2]
before = memory.anonymous()
if before is None:
    sys.exit()
mapped = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
mapped.fill_(1)
counts = [memory.anonymous() - before]
with memory.peak_anonymous() as peak:
    held = torch.ones(size, dtype=torch.uint8)
    peak.sample()
    del held
print(*counts, memory.anonymous() - before, peak.nbytes - before)
"""


def test_anonymous_memory_counts_the_heap_and_no_mapped_file(tmp_path):
    size = 200_000_000
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, str(size), str(tmp_path / "file")], capture_output=True, text=True, check=True
    )
    if not done.stdout.strip():
        pytest.skip("the system does not say what a process has")
    mapped, freed, peak = map(int, done.stdout.split())
    assert mapped < size / 4
    assert freed < size / 4
    assert size <= peak < 1.25 * size


def test_a_budget_is_what_was_asked_for_or_nine_tenths_of_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "free", lambda: 10**9)
    monkeypatch.setattr(memory, "anonymous", lambda: 10**8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert memory.budget("3GB") == 3 * 10**9
    assert memory.budget(None) == 10**8 + 9 * 10**8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert memory.budget(None) == 10**8 + 3 * 10**8
    monkeypatch.setattr(memory, "free", lambda: None)
    assert memory.budget(None) is None


def test_a_container_has_what_its_limit_leaves(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 150000\nactive_file 50000\n")
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    assert memory.free() == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    if Path("/proc/meminfo").exists():
        assert memory.free() > 500_000


glibc = pytest.mark.skipif(memory._of_glibc("mallopt") is None, reason="another C library than glibc")


@glibc
def test_the_users_settings_of_malloc_win():
    assert not memory.keep_freed({"MALLOC_TRIM_THRESHOLD_": "1000"})
    assert memory.keep_freed({})


@glibc
def test_freed_memory_is_returned() -> None:
    """What is freed below a piece that is still in use stays with the C library until it is asked."""
    pieces = [ctypes.create_string_buffer(b"x" * 60_000, 60_000) for _ in range(3000)]
    last = pieces.pop()
    pieces.clear()
    before = memory.anonymous()
    memory.return_freed()
    after = memory.anonymous()
    assert before is not None and after is not None and before - after > 100e6
    assert last.raw[0] == ord("x")
