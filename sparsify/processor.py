"""Instruction sets of the processor: their names and order, which are here, and the one variable that forces a lower one.

The native kernels (`kernels/cpu/`) count levels as `LEVELS` does; the two have to be changed together. Nothing here needs
a kernel or torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from pathlib import Path

from sparsify.errors import SparsifyError

FORCE = "SPARSIFY_CPU_LEVEL"
LEVELS = ("portable", "avx2", "avxvnni", "avx512", "avx512bf16", "amx")  # slowest first

# What /proc/cpuinfo must list for each level. Linux leaves out what it does not save the registers of.
_AVX2 = ("avx2", "fma")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_AVX512BF16 = (*_AVX512, "avx512_bf16", "avx512vbmi", "avx512_vnni")
NEEDED: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx2": _AVX2,
    "avxvnni": (*_AVX2, "avx_vnni"),
    "avx512": _AVX512,
    "avx512bf16": _AVX512BF16,
    "amx": (*_AVX512BF16, "amx_tile", "amx_bf16", "amx_int8"),
}

# How the libraries that torch computes with are kept from anything above a level. AMX is the last: nothing to keep from.
OTHER_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
_VALUES = {
    "portable": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avxvnni": ("avx2", "AVX2_VNNI", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512bf16": ("avx512", "AVX512_CORE_BF16", "AVX512_E3"),
}


def forced_level() -> str | None:
    """The level that SPARSIFY_CPU_LEVEL names, None where it is not set. SparsifyError for an unknown name."""
    forced = os.environ.get(FORCE, "")
    if forced not in ("", *LEVELS):
        raise SparsifyError(f"{FORCE}={forced}: expected one of {', '.join(LEVELS)}")
    return forced or None


@functools.cache
def cpu_info() -> str:
    """The text of /proc/cpuinfo, "" on a system without it."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def cpu_name() -> str:
    """The processor's name as the operating system knows it (x86: model name, Arm: CPU part)."""
    for line in cpu_info().splitlines():
        if line.startswith(("model name", "CPU part")):
            return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()


def cpu_flags(cpuinfo: str | None = None) -> frozenset[str]:
    """The feature flags of the first core (x86: flags, Arm: Features). cpuinfo: another text than that of this machine."""
    for line in (cpu_info() if cpuinfo is None else cpuinfo).splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return frozenset()


def levels_of(flags: frozenset[str]) -> tuple[str, ...]:
    """The levels that a processor with these flags of /proc/cpuinfo has, slowest first."""
    return tuple(name for name in LEVELS if flags.issuperset(NEEDED[name]))


@functools.cache
def available_levels() -> tuple[str, ...]:
    """The levels that this machine can run, slowest first. A system without /proc/cpuinfo has the portable one."""
    found = levels_of(cpu_flags())
    return found if "amx" not in found or _grants_amx() else found[:-1]


def level() -> str:
    """The level in use: the one that SPARSIFY_CPU_LEVEL names, else the fastest. SparsifyError where it is not there."""
    here = available_levels()
    forced = forced_level()
    if forced is not None and forced not in here:
        raise lacking(forced, here[-1])
    return forced or here[-1]


def lacking(forced: str, fastest: str) -> SparsifyError:
    """The error for a level that SPARSIFY_CPU_LEVEL names and this processor has not."""
    return SparsifyError(f"{FORCE}={forced}: this processor lacks it; the fastest here is {fastest}")


def kernel_level() -> int:
    """The number of the level that SPARSIFY_CPU_LEVEL names, -1 for the fastest: what native kernels take."""
    return -1 if forced_level() is None else LEVELS.index(level())


def other_variables(level: str) -> dict[str, str]:
    """The environment that keeps torch's own libraries to a level; they read it when they are loaded."""
    return dict(zip(OTHER_VARIABLES, _VALUES[level], strict=True)) if level in _VALUES else {}


def _grants_amx() -> bool:
    """Whether Linux hands this process the tile registers; asking twice is harmless (kernels/cpu/cpu_features.h)."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    try:
        return int(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data)) == 0
    except (OSError, AttributeError):
        return False
