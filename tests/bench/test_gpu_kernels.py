"""`sparsify kernels check`: that a wrong kernel is found, and that what was measured is reported. No GPU is needed.

The kernel's library is the stand-in of tests/runtime, and the clock of the GPU a table.
"""

import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify import cli
from sparsify.bench import gpu_correctness, gpu_kernels, gpu_timing
from sparsify.bench.baselines import TORCH, error_of
from sparsify.bench.gpu_correctness import check_backend, errors, float64_product
from sparsify.bench.gpu_report import Correctness, merge_times
from sparsify.bench.gpu_timing import CheckOptions
from sparsify.bench.marlin import first_outputs
from sparsify.bench.missing import PeerMissing
from sparsify.bench.shapes import Linear
from sparsify.errors import MissingDependency
from sparsify.formats import ModuleScheme, get_format
from sparsify.runtime.backends import cuda, get_backend, measured_choice
from sparsify.runtime.backends.cuda import Cuda
from tests.runtime.test_cuda import SM_COUNT, library  # noqa: F401

CPU = torch.device("cpu")
SMALL = ((64, 64, 64), (128, 192, 32), (64, 192, 192))
GPU = {
    "name": "Test GPU", "capability": "9.0", "multiprocessors": SM_COUNT, "l2_bytes": 1000, "memory_bytes": 10**9,
    "torch": "2", "cuda": "13",
}  # fmt: skip
MICROSECONDS = {"cuda": 10.0, TORCH: 25.0}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_correctness, "CHECKED", SMALL)
    monkeypatch.setattr(gpu_correctness, "QUICK_CHECKED", SMALL)
    monkeypatch.setattr(gpu_correctness, "CHECKED_ROWS", (1, 3, 8))


@pytest.fixture
def gpu(library: ctypes.CDLL, small: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:  # noqa: F811
    """A GPU that multiplies on the processor, in the times of a table."""

    def no_marlin(*args: Any) -> None:
        raise PeerMissing("not installed", "vLLM Marlin: not here")

    def time_calls(baselines: Any, device: torch.device, report: Any, rounds: int = 3) -> dict[str, float]:
        for baseline, x in baselines:
            assert error_of(baseline, x) <= baseline.tolerance, f"{baseline.name} multiplies wrongly"
            products = [call(x) for call in baseline.calls]
            assert len(products) > 1 and all(torch.equal(y, products[0]) for y in products), "copies of one weight"
        return {baseline.name: MICROSECONDS[baseline.name] * (1 + x.shape[0]) / 2 for baseline, x in baselines}

    with cuda.emulated(library, SM_COUNT):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(cuda, "_gpus", lambda: [CPU])
        monkeypatch.setattr(gpu_kernels, "current_gpu", lambda: CPU)
        monkeypatch.setattr(gpu_kernels, "describe_gpu", lambda device: GPU)
        monkeypatch.setattr(gpu_timing, "time_calls", time_calls)
        monkeypatch.setattr(gpu_timing, "marlin_linear", no_marlin)
        monkeypatch.setattr(gpu_kernels, "copy_bandwidth", lambda device: 1e12)
        monkeypatch.setattr(
            gpu_kernels,
            "check_streams_and_graphs",
            lambda backend, device: Correctness(backend.name, cases=1),
        )
        yield


def options(**changes: Any) -> CheckOptions:
    return CheckOptions(**{"linears": [Linear("a", 64, 128), Linear("b", 128, 64)], "rows": (1, 3), **changes})


def test_everything_is_checked_and_measured(gpu: None, tmp_path: Path) -> None:
    output = tmp_path / "check.json"
    report = gpu_kernels.check_gpu(options(only=["cuda"]), output)
    assert report.right and [check.config for check in report.correctness] == ["", "zero", "one", "decoded", ""]
    # 3 shapes, 2 types, once also with the other type of scales; 3 numbers of rows
    assert [check.cases for check in report.correctness] == [24, 24, 24, 24, 1]
    assert all(0 < check.worst <= 1 for check in report.correctness[:4])
    assert [(row.n, row.k, row.m) for row in report.rows] == [(64, 128, 1), (64, 128, 3), (128, 64, 1), (128, 64, 3)]
    first, second = report.rows[:2]
    assert first.microseconds == {"cuda": 10, TORCH: 25} and second.microseconds["cuda"] == 20
    assert first.ratios == {"cuda": {TORCH: 2.5}} and first.configs == {
        "zero": 10,
        "one": 10,
        "decoded": 10,
    }
    packed = 64 * 128 * 3 // 8 + 64 * 2 * 2
    assert first.nbytes["cuda"] == packed + (128 + 64) * 2
    assert first.bandwidth_share["cuda"] == pytest.approx(first.nbytes["cuda"] / 10e-6 / 1e12)
    assert "vLLM Marlin: not here" in report.notes
    written = json.loads(output.read_text())
    assert written["right"] and written["rows"][0]["microseconds"]["cuda"] == 10 and written["copy_bandwidth"] == 1e12


def test_a_wrong_configuration_is_named(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    product = gpu_correctness.sparse24_linear
    forced = [-1]
    monkeypatch.setattr(cuda, "force_config", lambda config: forced.append(config))

    def wrong(x: Tensor, *rest: Any) -> Tensor:
        y = product(x, *rest)
        if forced[-1] == 1 and x.shape[0] == 3:
            y[1, 2] *= 1.02
        return y

    monkeypatch.setattr(gpu_correctness, "sparse24_linear", wrong)
    plain, zero, one, decoded = check_backend(Cuda(), CPU, 1e12, quick=False)
    assert not plain.failures and not zero.failures
    assert one.failures and all("M 3: error" in failure for failure in one.failures) and one.worst > 1
    monkeypatch.setattr(gpu_correctness, "sparse24_linear", lambda x, *rest: product(x, *rest) * float("nan"))
    assert len(check_backend(Cuda(), CPU, 1e12, quick=True)[0].failures) == 24


def test_an_error_does_not_end_the_check(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Tensor:
        raise RuntimeError("an illegal memory access was encountered\nmore")

    monkeypatch.setattr(gpu_correctness, "sparse24_linear", fails)
    monkeypatch.setattr(gpu_kernels, "copy_bandwidth", fails)
    report = gpu_kernels.check_gpu(options(only=["cuda"]))
    assert not report.right and "illegal memory access" in report.correctness[0].failures[0]
    assert "nothing could be timed" in report.notes[-1] and not report.rows


def test_what_is_out_of_time_is_said(gpu: None) -> None:
    report = gpu_kernels.check_gpu(options(only=["cuda"], seconds=-1.0))
    assert report.correctness[0].cases == 0 and report.correctness[0].left_out == 24
    assert not report.rows[0].microseconds and any("out of time" in note for note in report.notes)


def test_errors_are_measured_in_roundings() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(5, 256, generator=generator).bfloat16() for _ in range(2))
    exact, magnitude = float64_product(x, weight.double(), None)
    rounded = exact.bfloat16()
    share, rms = errors(rounded, exact, magnitude, 256, strict=True)
    assert 0.5 < share <= 1 and 0 < rms < 2**-8
    next_to = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    assert errors(next_to, exact, magnitude, 256, strict=True)[0] > 1
    assert errors(rounded * torch.nan, exact, magnitude, 256, strict=False) == (torch.inf, torch.inf)


def test_first_outputs_of_marlin_words() -> None:
    """GPTQ's order: the eight inputs of a word ascend from the low bits; a code stands for itself less 8."""
    codes = torch.randint(0, 16, (64, 96), generator=torch.Generator().manual_seed(0))  # [K, N]
    words = torch.zeros(8, 96, dtype=torch.int64)
    for inner in range(8):
        words |= codes[inner::8] << 4 * inner
    words = (words - (words >> 31 << 32)).int()  # the same bits, signed
    scales = torch.rand(2, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    dense = ((codes - 8) * scales.double().repeat_interleave(32, 0)).T
    assert torch.equal(first_outputs(words, scales, 32), dense[:48])


def test_cpu_back_ends_and_a_broken_one(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    report = gpu_kernels.check_cpu(options())
    assert {check.backend for check in report.correctness} >= {"reference"} and report.right
    reference = get_backend("reference")
    monkeypatch.setattr(type(reference), "linear", lambda self, x, prepared, bias, scheme: x @ prepared[0].T)
    monkeypatch.setattr("sparsify.runtime.backends.reference._onednn_prefers_blocked", lambda weight: False)
    [check] = check_backend(reference, CPU, 1e12, quick=False)
    assert check.failures and all("M 3" in failure for failure in check.failures), "those with a bias"


def test_times_are_merged_for_the_choice_of_back_ends(gpu: None, tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    file.write_text(json.dumps({"Another GPU": {}}))
    merge_times(gpu_kernels.check_gpu(options(only=["cuda"])), file)
    merged = json.loads(file.read_text())
    assert merged["Another GPU"] == {}
    assert merged["Test GPU"] == {
        "2:4 4-bit": {"64x128": {"cuda": {"1": 10, "3": 20}}, "128x64": {"cuda": {"1": 10, "3": 20}}}
    }
    report = gpu_kernels.check_gpu(options(only=["cuda"]))
    report.rows[0].microseconds["triton 16-bit"] = 7.0
    merge_times(report, file)
    kept = json.loads(file.read_text())["Test GPU"]
    assert kept["2:4 16-bit"] == {"64x128": {"triton": {"1": 7.0}}}
    del report.rows[0].microseconds["cuda"]  # a run of other back ends keeps what is known of this one
    report.rows[1].microseconds["cuda"] = 25.0
    merge_times(report, file)
    kept["2:4 4-bit"][f"{report.rows[1].n}x{report.rows[1].k}"]["cuda"][str(report.rows[1].m)] = 25.0
    assert json.loads(file.read_text())["Test GPU"] == kept
    times = merged["Test GPU"]["2:4 4-bit"]
    times["64x128"]["triton"] = {"1": 5, "3": 9}
    assert measured_choice.fastest_of(times, ["cuda", "triton"], (64, 128)) == "triton"


def test_command(gpu: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["kernels", "check", "--gpu", "--backend", "cuda", "--shape", "64x128", "--rows", "1,3"]
    assert cli.main([*command, "--output", str(tmp_path / "a.json"), "--times", str(tmp_path / "t.json")]) == 0
    out = capsys.readouterr().out
    assert "Test GPU (sm_90" in out and "2.50x" in out and "right" in out
    assert "Test GPU" in json.loads((tmp_path / "t.json").read_text())
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["right"] is True
    assert cli.main([*command, "--backend", "warp"]) == 1
    assert "unknown back end 'warp'; known back ends: cpu, cuda" in capsys.readouterr().err


class InTheEmulator:
    """What check_emulated calls of emulator.Sparse24, by a dense product."""

    c = SimpleNamespace(sparse24_cuda_rounds_weights=lambda *shape: 0)
    wrong = 1.0

    def configs(self) -> list[str]:
        return ["zero", "one"]

    def pack(self, tensors: dict[str, Tensor], group_size: int) -> Tensor:
        n, k = tensors["weight_meta"].shape[0], tensors["weight_meta"].shape[1] * 8
        scheme = ModuleScheme(4, group_size, "2:4", (n, k))
        return get_format("sparse24").decode("t", tensors, scheme).dense(torch.float32).double()

    def linear(
        self, x: Tensor, packed: Tensor, n: int, group_size: int, scale_type: torch.dtype, *, bias: Tensor, config: int
    ) -> Tensor:
        y = x.double() @ packed.T + (0 if bias is None else bias.double())
        return (y * (self.wrong if config else 1.0)).to(x.dtype)


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(gpu_kernels, "Sparse24", InTheEmulator)
    assert cli.main(["kernels", "check", "--gpu"]) == 0
    out = capsys.readouterr().out
    assert "torch sees no GPU here: nothing was run on one" in out and "emulated cuda" in out
    monkeypatch.setattr(InTheEmulator, "wrong", 1.02)
    assert cli.main(["kernels", "check", "--gpu", "--quick", "--json"]) == 1
    zero, one = json.loads(capsys.readouterr().out)["correctness"]
    assert not zero["failures"] and len(one["failures"]) == one["cases"] == 4

    def no_compiler() -> None:
        raise MissingDependency("no C++ compiler found")

    monkeypatch.setattr(gpu_kernels, "Sparse24", no_compiler)
    assert cli.main(["kernels", "check", "--gpu"]) == 1
    assert "emulator: no C++ compiler found" in capsys.readouterr().out
