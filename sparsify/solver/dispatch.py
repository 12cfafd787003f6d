"""Which way an inner loop runs: in PyTorch, where it reads like the paper; in C++ on a CPU; in Triton on a GPU."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

from sparsify.errors import SparsifyError
from sparsify.native import build

WAYS = ("torch", "native", "triton")


def faster_way(variable: str, source: str, device: torch.device) -> ctypes.CDLL | ModuleType | None:
    """The C++ library of `source` for tensors in main memory, `triton_sweep` for those of a GPU, None for PyTorch.

    variable: of the environment, forces one of WAYS; source: as `build.load` takes it
    """
    forced = os.environ.get(variable, "")
    if forced not in ("", *WAYS):
        raise SparsifyError(f"{variable}={forced} is unknown; choose {', '.join(WAYS[:-1])} or {WAYS[-1]}")
    if forced == "triton" or (not forced and device.type == "cuda"):
        return _triton(forced == "triton")
    if forced == "torch" or device.type != "cpu":
        return None
    library = build.load(source)
    if library is None and forced:
        raise SparsifyError(f"{variable}=native needs the native kernel, which cannot be had here; the log says why")
    return library


@cache
def _triton(forced: bool) -> ModuleType | None:
    if find_spec("triton") is None:
        if forced:
            raise SparsifyError("the inner loops in Triton need the package triton: pip install triton")
        logging.getLogger(__name__).warning("without the package triton, pruning on a GPU is many times slower")
        return None
    from sparsify.solver import triton_sweep

    return triton_sweep
