"""Tensors in memory of malloc: what is freed between tensors that stay is taken again."""

import ctypes
import subprocess
import sys

import pytest
import torch

from sparsify.errors import MissingDependency
from sparsify.native import tensor_memory
from sparsify.native.tensor_memory import reusable_tensor_memory

# In a process of its own: what other tests have left of the heap would hide it.
HOLES = """
import ctypes, sys
import torch
from sparsify import memory
from sparsify.native.tensor_memory import reusable_tensor_memory

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e used free f".split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Heap
memory.keep_freed({})
with reusable_tensor_memory() as reuses:
    size = 1 << 18
    some, others = [], []
    for _ in range(32):
        some.append(torch.empty(size))
        others.append(torch.empty(size))
    before = mallinfo().arena
    for _ in range(4):
        some.clear()
        some.extend(torch.empty(size) for _ in range(32))
    print(int(reuses), (mallinfo().arena - before) / (32 * 4 * size))
"""


def test_tensors_take_the_places_of_others() -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("another C library")
    ran = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    reuses, grown = ran.stdout.split()
    assert reuses == "1"
    assert float(grown) < 0.05  # of what is taken each time


def test_tensors_are_aligned_and_outlive_it() -> None:
    with reusable_tensor_memory() as outer:
        assert outer
        with reusable_tensor_memory():
            pass
        tensors = [torch.arange(length) for length in range(1, 200)]  # the inner one has not ended it
        empty = torch.empty(0)
        grown = torch.zeros(3).resize_(1000)
        with pytest.raises(RuntimeError, match=r"bad_alloc|allocate"):
            torch.empty(1 << 60)
    after = torch.arange(5)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in [*tensors, grown, after])
    assert all(torch.equal(tensor, torch.arange(len(tensor))) for tensor in tensors)
    assert empty.numel() == 0 and torch.equal(after, torch.arange(5))


def test_without_a_compiler_tensors_lie_where_torch_puts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise MissingDependency("no C++ compiler found")

    monkeypatch.setattr(tensor_memory, "open_library", missing)
    with reusable_tensor_memory() as reuses:
        assert not reuses and torch.ones(3).sum() == 3
