"""Which kernel runs an inner loop: PyTorch, where it reads like the paper; C++ on a CPU; Triton on a GPU."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

from sparsify.errors import SparsifyError
from sparsify.native import build

KERNELS = ("torch", "native", "triton")


def kernel_for(variable: str, source: str, device: torch.device) -> ModuleType | None:
    """`native_sweep` for tensors in main memory, `triton_sweep` for those of a GPU, None for PyTorch.

    variable: of the environment, forces one of KERNELS; source: the native kernel, as `build.load` takes it.
    Raises SparsifyError where the forced kernel is unknown or cannot be had.
    """
    forced = os.environ.get(variable, "")
    if forced not in ("", *KERNELS):
        raise SparsifyError(f"{variable}={forced} is unknown; choose {', '.join(KERNELS[:-1])} or {KERNELS[-1]}")
    if forced == "triton" or (not forced and device.type == "cuda"):
        return _triton(forced == "triton")
    if forced == "torch" or device.type != "cpu":
        return None
    if build.load(source) is None:
        if forced:
            raise SparsifyError(
                f"{variable}=native needs the native kernel, which cannot be had here; the log says why"
            )
        return None
    from sparsify.solver import native_sweep

    return native_sweep


@cache
def _triton(forced: bool) -> ModuleType | None:
    if find_spec("triton") is None:
        if forced:
            raise SparsifyError("the inner loops in Triton need the package triton: pip install triton")
        logging.getLogger(__name__).warning("without the package triton, pruning on a GPU is many times slower")
        return None
    from sparsify.solver import triton_sweep

    return triton_sweep
