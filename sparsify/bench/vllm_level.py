"""SPARSIFY_CPU_LEVEL for vLLM, too: its CPU build brings a library for each instruction set and asks torch which one to load.

Called in every process that is going to import vLLM, before it does. What vLLM's own `vllm` command starts is not reached.
"""

from __future__ import annotations

import os
from pathlib import Path

from sparsify.files import cache_directory
from sparsify.processor import LEVELS, forced_level

# What vLLM asks torch.cpu, and the lowest level at which the answer may be yes.
QUESTIONS = {
    "_is_avx512_supported": "avx512",
    "_is_avx512_bf16_supported": "avx512bf16",
    "_is_vnni_supported": "avx512bf16",
    "_is_amx_tile_supported": "amx",
    "_is_amx_fp16_supported": "amx",
}

INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"
DEFAULT_CACHE = "torchinductor_"  # how the directory begins that torch itself puts into the variable


def hold_vllm_down() -> None:
    """Makes vLLM take this processor for one of the level that SPARSIFY_CPU_LEVEL names; without it nothing changes.

    What torch.compile made for another level must not be used again: Inductor does not tell them apart, and a kernel made
    for AVX-512 then gives wrong indices. So each forced level has a cache of its own.
    """
    forced = forced_level()
    if forced is None:
        return
    if Path(os.environ.get(INDUCTOR_CACHE, DEFAULT_CACHE)).name.startswith(DEFAULT_CACHE):
        os.environ[INDUCTOR_CACHE] = str(cache_directory() / "inductor" / forced)
    import torch

    for question, level in QUESTIONS.items():
        if LEVELS.index(forced) < LEVELS.index(level) and hasattr(torch.cpu, question):
            setattr(torch.cpu, question, _no)


def _no() -> bool:
    return False
