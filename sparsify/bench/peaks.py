"""The machine's own peaks, measured: bytes read per second and floating-point operations per second.

A kernel's figure means little without them. The probes are native code (kernels/cpu/peaks.cpp) on the same OpenMP
threads that the kernels use; the fastest of several read patterns and of several rounds counts as the peak.

Levels are those of `sparsify.processor`; one that SPARSIFY_CPU_LEVEL forces rules here, too: kernels held down to AVX2 are
compared with what AVX2 can do.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from sparsify.bench.machine import memory_bytes
from sparsify.errors import SparsifyError
from sparsify.native import build
from sparsify.processor import LEVELS, forced_level

KERNEL = "cpu/peaks"
KINDS = ("float32", "bfloat16")
# Read patterns: parallel runs per thread, bytes prefetched. Which is fastest depends on the processor's prefetchers.
READING = ((1, 0), (4, 0), (1, 2048), (2, 2048), (4, 2048), (1, 8192))
LARGEST_ARRAY = 2**30
BURST_SECONDS = 1e-3  # of one run of arithmetic
GLANCE_SECONDS = 0.01
_int64 = ctypes.c_int64


@dataclass(frozen=True)
class Peaks:
    """Bytes per second and floating-point operations per second, of `threads` threads together.

    read: from memory; read_l3: from the last cache, None where its size is not known. float32, bfloat16: arithmetic
    (a multiply-add counts as two); float32_level, bfloat16_level: the instruction sets that reached them.
    """

    threads: int
    l3_bytes: int | None
    read: float
    read_l3: float | None
    float32: float
    float32_level: str
    bfloat16: float
    bfloat16_level: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Glance:
    """Peaks of one moment. read: bytes per second, from memory or from the last cache; arithmetic: operations per second."""

    read: float
    arithmetic: float


def cache_bytes(level: int, root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int | None:
    """Size of the first core's data cache of a level as the kernel reports it, None when it does not."""
    for index in sorted(root.glob("index*")):
        try:
            fields = {name: (index / name).read_text().strip() for name in ("level", "type", "size")}
        except OSError:
            continue
        number, unit = fields["size"][:-1], fields["size"][-1:]
        if fields["level"] == str(level) and fields["type"] in ("Data", "Unified") and number.isdigit():
            return int(number) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(unit, 1)
    return None


class Probes:
    """The C interface of kernels/cpu/peaks.cpp; SparsifyError when it cannot be built here."""

    def __init__(self) -> None:
        self.library = build.open_library(KERNEL)

    def levels(self) -> list[int]:
        """Numbers of the instruction sets that this machine can run and SPARSIFY_CPU_LEVEL allows, ascending.

        Those with something to measure: avxvnni, which multiplies integers only, is never among them.
        """
        forced = forced_level()
        allowed = LEVELS if forced is None else LEVELS[: LEVELS.index(forced) + 1]
        return [i for i in range(len(allowed)) if self.library.sparsify_peaks_available(i)]

    def fill(self, address: int, nbytes: int, word: int, threads: int) -> None:
        """Write a 64-bit word over and over, each thread into its own part."""
        pointer, value = ctypes.c_void_p(address), ctypes.c_uint64(word)
        self._check(self.library.sparsify_peaks_fill(pointer, _int64(nbytes), value, threads))

    def read(
        self, address: int, nbytes: int, threads: int, level: int, passes: int = 1, streams: int = 1, ahead: int = 0
    ) -> tuple[int, float]:
        """Returns (sum of all 64-bit words read, modulo 2^64; seconds)."""
        total, seconds = ctypes.c_uint64(), ctypes.c_double()
        self._check(self.library.sparsify_peaks_read(
            ctypes.c_void_p(address), _int64(nbytes), _int64(passes), streams, _int64(ahead), threads, level,
            ctypes.byref(total), ctypes.byref(seconds),
        ))  # fmt: skip
        return total.value, seconds.value

    def multiply(self, kind: str, repeats: int, threads: int, level: int) -> tuple[float, float, float] | None:
        """Returns (multiply-adds, what they added up to, seconds); None where `level` has no instruction for `kind`."""
        count, total, seconds = ctypes.c_double(), ctypes.c_double(), ctypes.c_double()
        status = self.library.sparsify_peaks_multiply(
            KINDS.index(kind), _int64(repeats), threads, level,
            ctypes.byref(count), ctypes.byref(total), ctypes.byref(seconds),
        )  # fmt: skip
        if status == 2:
            return None
        self._check(status)
        return count.value, total.value, seconds.value

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise SparsifyError(f"the probe of the machine's peaks refuses its arguments (status {status})")


def arithmetic_peak(kind: str, threads: int, seconds: float = 0.05, probes: Probes | None = None) -> float:
    """Operations per second of `threads` threads together, a multiply-add counting two: a quick look, not a full measurement.

    kind: "float32" or "bfloat16"; the latter is float32's peak where no instruction multiplies bfloat16. threads: no more
    than there are cores. seconds: how long it takes, roughly; a busy machine changes little. It is the peak of the highest
    instruction set that the machine has, SPARSIFY_CPU_LEVEL allows, and multiplies `kind`. SparsifyError where the probes
    cannot be built (no compiler, SPARSIFY_NATIVE=0).
    """
    if kind not in KINDS or threads < 1:
        raise SparsifyError(f"no peak of {kind!r} with {threads} threads: the kinds are {', '.join(KINDS)}")
    probes = probes or Probes()
    for level in reversed(probes.levels()):
        if (speed := arithmetic_speed(probes, kind, threads, level, seconds)) is not None:
            return speed
    return arithmetic_peak("float32", threads, seconds, probes)


class ReadArray:
    """An array that is filled once and read over and over, by whichever pattern of READING is fastest."""

    def __init__(self, probes: Probes, nbytes: int, threads: int, level: int) -> None:
        self.probes, self.threads, self.level = probes, threads, level
        self.nbytes = nbytes // 4096 * 4096
        self.memory = mmap.mmap(-1, self.nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory.madvise(mmap.MADV_HUGEPAGE)  # address translation must not be what is measured
        self.view = (ctypes.c_char * self.nbytes).from_buffer(self.memory)
        self.address = ctypes.addressof(self.view)
        probes.fill(self.address, self.nbytes, 1, threads)
        _, self.once = probes.read(self.address, self.nbytes, threads, level)
        self.patterns = list(READING)

    def speed(self, seconds: float, rounds: int) -> float:
        """Bytes per second of the fastest pattern; `glance` uses the two fastest from then on."""
        best: dict[tuple[int, int], float] = {}
        for _ in range(rounds):
            for pattern in READING:
                best[pattern] = max(best.get(pattern, 0.0), self._read(pattern, seconds))
        self.patterns = sorted(READING, key=lambda pattern: -best[pattern])
        return max(best.values())

    def glance(self) -> float:
        """Bytes per second now, by the two fastest patterns: quick enough to be asked between measurements."""
        return max(self._read(pattern, GLANCE_SECONDS) for pattern in self.patterns[:2])

    def _read(self, pattern: tuple[int, int], seconds: float) -> float:
        passes = max(1, int(seconds / max(self.once, 1e-9)))
        _, took = self.probes.read(self.address, self.nbytes, self.threads, self.level, passes, *pattern)
        self.once = min(self.once, took / passes)
        return passes * self.nbytes / max(took, 1e-9)

    def close(self) -> None:
        del self.view  # a map with a view on it cannot be closed
        self.memory.close()


class Meter:
    """Measures the machine's peaks: `peaks` thoroughly, then `glance` again and again beside other measurements.

    Holds an array of several times the last cache, 1 GiB at most; to be used in a `with` statement.
    """

    def __init__(self, threads: int, probes: Probes | None = None) -> None:
        self.threads, self.probes = threads, probes or Probes()
        self.levels = self.probes.levels()
        self.l3 = cache_bytes(3)
        large = min(max(2**28, 4 * (self.l3 or 0)), LARGEST_ARRAY, memory_bytes() // 8)
        self.memory = self._array(large)
        self.cache: ReadArray | None = None
        if self.l3:
            # Beyond the caches of the single cores, inside the one they share.
            beyond = 3 * threads * (cache_bytes(2) or 0)
            self.cache = self._array(min(max(self.l3 // 4, beyond), self.l3 * 3 // 4))

    def _array(self, nbytes: int) -> ReadArray:
        return ReadArray(self.probes, nbytes, self.threads, self.levels[-1])

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.memory.close()
        if self.cache:
            self.cache.close()

    def peaks(self, seconds: float = 0.15, rounds: int = 3) -> Peaks:
        """The best of several rounds. seconds: how long one round of one pattern takes, roughly; all of it takes some 10 s."""
        in_cache = self.cache.speed(seconds, rounds) if self.cache else None
        speeds: dict[str, dict[int, float]] = {kind: {} for kind in KINDS}
        for kind, level in product(KINDS, self.levels):
            if (speed := arithmetic_speed(self.probes, kind, self.threads, level, seconds * rounds)) is not None:
                speeds[kind][level] = speed
        # Where no instruction multiplies bf16, it is widened and multiplied in fp32.
        speeds["bfloat16"] = speeds["bfloat16"] or speeds["float32"]
        best = {kind: max(found, key=found.__getitem__) for kind, found in speeds.items()}
        return Peaks(
            threads=self.threads,
            l3_bytes=self.l3,
            read=self.memory.speed(seconds, rounds),
            read_l3=in_cache,
            float32=speeds["float32"][best["float32"]],
            float32_level=LEVELS[best["float32"]],
            bfloat16=speeds["bfloat16"][best["bfloat16"]],
            bfloat16_level=LEVELS[best["bfloat16"]],
        )

    def glance(self, kind: str, from_memory: bool) -> Glance:
        """What the machine does right now. kind: of KINDS; from_memory: else from the last cache, where its size is known."""
        array = self.memory if from_memory or self.cache is None else self.cache
        return Glance(array.glance(), arithmetic_peak(kind, self.threads, GLANCE_SECONDS, self.probes))


def measure_peaks(threads: int, seconds: float = 0.15, rounds: int = 3, probes: Probes | None = None) -> Peaks:
    """The machine's peaks with some threads; see `Meter.peaks`."""
    with Meter(threads, probes) as meter:
        return meter.peaks(seconds, rounds)


def arithmetic_speed(probes: Probes, kind: str, threads: int, level: int, seconds: float) -> float | None:
    """Operations per second of the fastest of many short runs, which take `seconds` in all; None without an instruction.

    Short, because a core that other programs use, too, is ours for some milliseconds at a time.
    """
    best, ends = 0.0, time.perf_counter() + seconds
    first = probes.multiply(kind, 1, threads, level)
    if first is None:
        return None
    single = first[2]
    while best == 0 or time.perf_counter() < ends:
        repeats = max(1, int(BURST_SECONDS / max(single, 1e-9)))
        found = probes.multiply(kind, repeats, threads, level)
        assert found is not None
        best, single = max(best, 2 * found[0] / found[2]), min(single, found[2] / repeats)
    return best
