"""What the solver and training call native kernels with."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from sparsify.native import build

if TYPE_CHECKING:
    from torch import Tensor


def loaded(name: str) -> ctypes.CDLL:
    """A kernel's library that the caller knows to be there, since `build.load` gave it before."""
    library = build.load(name)
    assert library is not None, f"{name} was loaded before"
    return library


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor's first value; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
