"""The probes of the machine's peaks: their work is checked by its result, their speed is not asserted."""

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsify.bench import peaks
from sparsify.bench.peaks import (
    KINDS,
    READING,
    Meter,
    Probes,
    ReadArray,
    arithmetic_peak,
    cache_bytes,
    measure_peaks,
)
from sparsify.errors import MissingDependency, SparsifyError
from sparsify.processor import FORCE, LEVELS
from tests.helpers.levels import need

# multiply-adds of one instruction times the accumulators that it keeps busy
STEP = {
    ("portable", "float32"): 8 * 4,
    ("avx2", "float32"): 12 * 8,
    ("avx512", "float32"): 16 * 16,
    ("avx512bf16", "bfloat16"): 16 * 16 * 2,
    ("amx", "bfloat16"): 4 * 16 * 16 * 32,
}
STEPS = 8192
MEASURED = [name for name in LEVELS if name != "avxvnni"]  # which multiplies integers only


@pytest.fixture(scope="module")
def probes() -> Probes:
    try:
        return Probes()
    except MissingDependency as error:
        pytest.skip(str(error))


@pytest.fixture(params=MEASURED)
def level(request: pytest.FixtureRequest, probes: Probes, monkeypatch: pytest.MonkeyPatch) -> int:
    number = LEVELS.index(request.param)
    need(request.param, number in probes.levels())
    monkeypatch.delenv(FORCE, raising=False)
    return number


@pytest.mark.parametrize("lines", [0, 1, 2, 7, 64, 1003])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_word_is_read_once_per_pass(probes: Probes, level: int, lines: int, threads: int) -> None:
    words = torch.randint(-(2**63), 2**63 - 1, (8 * lines + 8,), generator=torch.Generator().manual_seed(lines))
    expected = sum(words[: 8 * lines].tolist()) % 2**64
    for streams, ahead in READING:
        total, seconds = probes.read(words.data_ptr(), 64 * lines, threads, level, 3, streams, ahead)
        assert total == 3 * expected % 2**64
        assert seconds >= 0


def test_filled_by_parts_is_filled_whole(probes: Probes) -> None:
    words = torch.zeros(8 * 37 + 8, dtype=torch.int64)
    probes.fill(words.data_ptr(), 64 * 37, 2**63 + 5, threads=5)
    assert (words[: 8 * 37] == 5 - 2**63).all() and (words[8 * 37 :] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 3])
def test_arithmetic_is_done_and_counted(probes: Probes, level: int, kind: str, threads: int) -> None:
    """Ones times ones: the accumulators hold the number of multiply-adds, which follows from the instruction set."""
    found = probes.multiply(kind, 2, threads, level)
    step = STEP.get((LEVELS[level], kind))
    if step is None:
        assert found is None
        return
    assert found is not None
    count, total, seconds = found
    assert count == total == step * STEPS * 2 * threads
    assert seconds > 0


def test_bad_arguments_are_refused(probes: Probes) -> None:
    words = torch.zeros(16, dtype=torch.int64)
    for nbytes, threads, streams in ((65, 1, 1), (64, 0, 1), (64, 1, 3), (-64, 1, 1)):
        with pytest.raises(SparsifyError, match="refuses"):
            probes.read(words.data_ptr(), nbytes, threads, 0, 1, streams)
    with pytest.raises(SparsifyError, match="refuses"):
        probes.fill(words.data_ptr(), 64, 0, 0)
    with pytest.raises(SparsifyError, match="refuses"):
        probes.read(words.data_ptr(), 64, 1, len(LEVELS))
    assert probes.multiply("float32", 1, 1, -1) is None
    numbers = [ctypes.byref(ctypes.c_double()) for _ in range(3)]
    assert probes.library.sparsify_peaks_multiply(2, ctypes.c_int64(1), 1, 0, *numbers) == 1


class FakeProbes:
    """A machine of known speeds: 8 GB/s from memory, 32 GB/s from its cache, slower without streams."""

    def __init__(self, bfloat16: bool) -> None:
        self.bfloat16 = bfloat16
        self.noise = 0

    def levels(self) -> list[int]:
        return [0, LEVELS.index("avx512"), LEVELS.index("amx")]

    def fill(self, address: int, nbytes: int, word: int, threads: int) -> None:
        pass

    def read(
        self, address: int, nbytes: int, threads: int, level: int, passes: int = 1, streams: int = 1, ahead: int = 0
    ) -> tuple[int, float]:
        speed = (8e9 if nbytes > 2**25 else 32e9) / (1 if streams == 4 else 2)
        self.noise += 1
        # every third read is disturbed
        return 0, passes * nbytes / speed * (2 if self.noise % 3 == 0 else 1)

    def multiply(self, kind: str, repeats: int, threads: int, level: int) -> tuple[float, float, float] | None:
        if kind == "bfloat16" and not self.bfloat16:
            return None
        if kind == "float32" and level == LEVELS.index("amx"):
            return None
        return 1e6 * repeats, 0.0, 1e6 * repeats / (1e9 * (1 + level))


def test_the_best_of_all_ways_is_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {2: 2**20, 3: 2**24}
    monkeypatch.setattr(peaks, "cache_bytes", sizes.get)
    monkeypatch.setattr(peaks, "memory_bytes", lambda: 2**29)
    found = measure_peaks(2, probes=FakeProbes(bfloat16=True))  # type: ignore[arg-type]
    assert (found.threads, found.l3_bytes) == (2, 2**24)
    assert found.read == pytest.approx(8e9) and found.read_l3 == pytest.approx(32e9)
    assert (found.float32, found.float32_level) == (pytest.approx(8e9), "avx512")
    assert (found.bfloat16, found.bfloat16_level) == (pytest.approx(12e9), "amx")
    # no instruction for bf16, no cache that is known: fp32 is what can be had, and there is no figure for the cache
    monkeypatch.setattr(peaks, "cache_bytes", lambda level: None)
    without = measure_peaks(2, probes=FakeProbes(bfloat16=False))  # type: ignore[arg-type]
    assert (without.bfloat16, without.bfloat16_level) == (without.float32, "avx512")
    assert replace(without, l3_bytes=1).read_l3 is None


def test_a_quick_peak_is_that_of_the_highest_level() -> None:
    quick = FakeProbes(bfloat16=True)
    assert arithmetic_peak("float32", 2, probes=quick) == pytest.approx(8e9)  # type: ignore[arg-type]
    assert arithmetic_peak("bfloat16", 2, probes=quick) == pytest.approx(12e9)  # type: ignore[arg-type]
    without = FakeProbes(bfloat16=False)
    assert arithmetic_peak("bfloat16", 1, probes=without) == pytest.approx(8e9)  # type: ignore[arg-type]
    for kind, threads in (("int8", 1), ("float32", 0)):
        with pytest.raises(SparsifyError, match="no peak of"):
            arithmetic_peak(kind, threads)


def test_a_quick_peak_is_measured(probes: Probes) -> None:
    assert arithmetic_peak("float32", 1, seconds=1e-3, probes=probes) > 0
    assert arithmetic_peak("bfloat16", 2, seconds=1e-3) > 0


@pytest.mark.parametrize("forced", LEVELS)
def test_a_forced_level_rules_the_peaks(forced: str, probes: Probes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FORCE, raising=False)
    able = probes.levels()
    assert LEVELS.index("avxvnni") not in able
    monkeypatch.setenv(FORCE, forced)
    assert probes.levels() == [level for level in able if level <= LEVELS.index(forced)]
    monkeypatch.setenv(FORCE, "sse9")
    with pytest.raises(SparsifyError, match="expected one of portable, avx2"):
        probes.levels()


def test_a_real_array_is_read(probes: Probes) -> None:
    array = ReadArray(probes, 2**22 + 5, 1, 0)
    assert array.nbytes == 2**22 and array.speed(seconds=1e-4, rounds=1) > 0
    assert sorted(array.patterns) == sorted(READING) and array.glance() > 0
    array.close()


def test_a_glance_reads_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "cache_bytes", {2: 2**20, 3: 2**24}.get)
    monkeypatch.setattr(peaks, "memory_bytes", lambda: 2**29)
    with Meter(2, FakeProbes(bfloat16=True)) as meter:  # type: ignore[arg-type]
        meter.peaks(seconds=1e-3, rounds=2)
        assert meter.memory.patterns[0][0] == 4  # streams: the fast ones
        found = {place: meter.glance("float32", from_memory=place) for place in (True, False)}
        assert found[True].read == pytest.approx(8e9) and found[False].read == pytest.approx(32e9)
        assert found[True].arithmetic == pytest.approx(8e9)
        assert meter.glance("bfloat16", from_memory=True).arithmetic == pytest.approx(12e9)
    monkeypatch.setattr(peaks, "cache_bytes", lambda level: None)
    with Meter(2, FakeProbes(bfloat16=True)) as meter:  # type: ignore[arg-type]
        assert meter.glance("float32", from_memory=False).read > 0  # no cache is known: memory


def test_cache_sizes_as_the_kernel_reports_them(tmp_path: Path) -> None:
    for index, (level, kind, size) in enumerate(
        [("1", "Instruction", "32K"), ("1", "Data", "48K"), ("2", "Unified", "2048K"), ("3", "Unified", "105M")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(text + "\n")
    assert [cache_bytes(level, tmp_path) for level in (1, 2, 3, 4)] == [48 * 2**10, 2**21, 105 * 2**20, None]
    assert cache_bytes(3, tmp_path / "absent") is None
