"""Instruction sets of the processor: their names and order, and the one variable that forces a lower one everywhere.

The native kernels (`kernels/cpu/`) count levels as `LEVELS` does; the two have to be changed together.
"""

from __future__ import annotations

import os

from sparsify.errors import SparsifyError

FORCE = "SPARSIFY_CPU_LEVEL"
LEVELS = ("portable", "avx2", "avxvnni", "avx512", "avx512bf16", "amx")  # slowest first


def forced_level() -> str | None:
    """The level that SPARSIFY_CPU_LEVEL names, None where it is not set. SparsifyError for an unknown name."""
    forced = os.environ.get(FORCE, "")
    if forced not in ("", *LEVELS):
        raise SparsifyError(f"{FORCE}={forced}: expected one of {', '.join(LEVELS)}")
    return forced or None
