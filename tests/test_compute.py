"""Which type this machine computes in: what decides, what is measured and kept, and what a run that goes on does."""

import json
import subprocess
import sys

import pytest
import torch

from sparsify import compute
from sparsify.compute import Choice, Rates, choose, for_model, for_precision, judge, rates, using
from sparsify.errors import SparsifyError
from sparsify.processor import LEVELS

SLOW, FAST = Rates(3e9, 80e9), Rates(600e9, 130e9)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A cache of its own, nothing known yet, no variable set, a CPU."""
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compute, "_known", {})
    monkeypatch.setattr(compute, "device", lambda: "cpu")
    for variable in (compute.FORCE, *compute.FORCING):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def measurements(monkeypatch):
    """Instead of measuring: the list of what was asked for."""
    asked: list[Rates] = []

    def measured() -> Rates:
        asked.append(SLOW)
        return SLOW

    monkeypatch.setattr(compute, "_measured", measured)
    return asked


@pytest.mark.parametrize(
    "found, measured, expected",
    [
        ([], None, "float32"),
        (["amx_bf16"], None, "bfloat16"),
        ([], SLOW, "float32"),
        (["avx512_bf16", "amx_bf16"], FAST, "bfloat16"),
        (["avx512_bf16"], SLOW, "float32"),  # the instructions are there, and PyTorch is kept from them
        ([], FAST, "bfloat16"),  # instructions that nobody knew of
        (["avx512_bf16"], Rates(100e9, 110e9), "bfloat16"),  # a close call is left to the instructions
        ([], Rates(110e9, 100e9), "float32"),
    ],
)
def test_instructions_decide_unless_the_measurement_is_clear(found, measured, expected):
    choice = judge(found, measured)
    assert choice.name == expected
    if measured is not None:
        assert f"{measured.bfloat16 / 1e9:.0f} GFLOP/s" in choice.describe()


def test_a_variable_forces_the_type(monkeypatch):
    for name in ("float32", "bfloat16"):
        monkeypatch.setenv(compute.FORCE, name)
        assert choose().name == name and compute.FORCE in choose().why
    for name in ("", "auto"):
        monkeypatch.setenv(compute.FORCE, name)
        assert choose().why == judge(compute.instructions(), None).why
    monkeypatch.setenv(compute.FORCE, "half")
    with pytest.raises(SparsifyError, match="SPARSIFY_COMPUTE=half is unknown; choose bfloat16, float32 or auto"):
        choose()


@pytest.mark.parametrize("level", LEVELS)
def test_a_forced_level_computes_as_that_processor_would(monkeypatch, level):
    monkeypatch.setattr(compute, "instructions", lambda: ["avx512_bf16"])
    monkeypatch.setenv("SPARSIFY_CPU_LEVEL", level)
    assert choose().name == ("bfloat16" if level in ("avx512bf16", "amx") else "float32")
    assert (level in choose().why) == (level not in ("avx512bf16", "amx"))


def test_a_gpu_computes_in_bfloat16_unmeasured(monkeypatch, measurements):
    monkeypatch.setattr(compute, "device", lambda: "cuda")
    monkeypatch.setenv("SPARSIFY_CPU_LEVEL", "avx2")
    assert choose(measure=True).name == "bfloat16" and not measurements


def test_checkpoints_without_bfloat16_are_computed_in_float32(monkeypatch):
    monkeypatch.setenv(compute.FORCE, "bfloat16")
    assert for_model({torch.float16, torch.int64}).dtype == torch.float32
    assert for_model({torch.float32, torch.bfloat16}).dtype == torch.bfloat16


def test_measured_once_and_kept(monkeypatch, measurements, tmp_path):
    assert rates() is None and not measurements  # nobody asked to measure
    assert rates(measure=True) == SLOW and len(measurements) == 1
    assert choose(measure=True).why.endswith("3 GFLOP/s per core, float32 at 80")
    monkeypatch.setattr(compute, "_known", {})  # another process
    assert rates() == SLOW and rates(measure=True) == SLOW and len(measurements) == 1
    (file,) = (tmp_path / "cache" / "compute").iterdir()
    assert json.loads(file.read_text())["key"]["torch"] == torch.__version__
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # another machine, in effect
    assert rates() is None
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    file.write_text("{")
    monkeypatch.setattr(compute, "_known", {})
    assert rates() is None and rates(measure=True) == SLOW and len(measurements) == 2


def test_a_forced_type_is_measured_all_the_same(monkeypatch, measurements):
    """`plan` shows a time after the first run, whatever that run was told to compute in."""
    monkeypatch.setenv(compute.FORCE, "bfloat16")
    assert choose(measure=True).name == "bfloat16" and len(measurements) == 1


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, measurements, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "file" / "cache"))
    assert rates(measure=True) == SLOW
    assert rates() == SLOW and len(measurements) == 1


def test_what_is_measured_are_speeds():
    threads = torch.get_num_threads()
    found = rates(measure=True)
    assert found is not None and torch.get_num_threads() == threads
    assert 1e6 < found.bfloat16 < 1e14 and 1e6 < found.float32 < 1e14


def test_a_run_keeps_its_type(monkeypatch):
    monkeypatch.setenv(compute.FORCE, "float32")
    with using(Choice(torch.bfloat16, "begun so")):
        assert for_precision("auto") == torch.bfloat16 and for_precision("float32") == torch.float32
        with using(Choice(torch.float32, "inside")):
            assert choose().why == "inside"
        assert choose(measure=True).why == "begun so"
        assert compute.for_this_machine().name == "float32"
    assert choose().name == "float32"


def test_importing_measures_nothing(tmp_path):
    code = (
        "import sparsify, sparsify.compute as c, sparsify.cli, sparsify.compiler.apply\n"
        "assert not c._known, 'measured at import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
