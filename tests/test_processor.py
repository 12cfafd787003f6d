"""Levels: found without a kernel as the kernels find them, forced by one variable, named when they are not there."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify import doctor, processor
from sparsify.errors import SparsifyError
from sparsify.native import build
from sparsify.processor import FORCE, LEVELS, NEEDED

# What detect_cpu (kernels/cpu/cpu_features.h) has to find for a level; AMX is asked for, too.
IN_CPP = {
    "portable": "true",
    "avx2": "cpu.avx2",
    "avxvnni": "cpu.avx_vnni",
    "avx512": "cpu.avx512",
    "avx512bf16": "cpu.avx512_bf16 && cpu.avx512_vbmi && cpu.avx512_vnni",
    "amx": "cpu.avx512_bf16 && cpu.avx512_vbmi && cpu.avx512_vnni && cpu.amx_bf16 && cpu.amx_int8 && request_amx()",
}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("sse2 avx", ("portable",)),
        ("avx2", ("portable",)),  # without FMA
        ("avx2 fma", ("portable", "avx2")),
        ("avx2 fma avx_vnni", ("portable", "avx2", "avxvnni")),
        ("avx2 fma avx512f avx512bw avx512dq avx512vl avx512_vnni", ("portable", "avx2", "avx512")),
        ("avx2 fma avx512f avx512bw avx512dq avx512vl avx512_bf16", ("portable", "avx2", "avx512")),  # without VBMI
        (" ".join(sorted(NEEDED["avx512bf16"])), ("portable", "avx2", "avx512", "avx512bf16")),
        (" ".join(sorted({*NEEDED["amx"], "avx_vnni"})), LEVELS),
        ("asimd asimddp bf16", ("portable",)),
    ],
)
def test_levels_of_a_processor(flags: str, expected: tuple[str, ...]) -> None:
    found = processor.cpu_flags(f"processor : 0\nflags\t\t: {flags}\n\nprocessor : 1\nflags : \n")
    assert processor.levels_of(found) == expected


def test_the_name_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, name in (
        ("processor : 0\nmodel name\t: Some  CPU @ 2 GHz\nmodel name : other\n", "Some CPU @ 2 GHz"),
        ("processor : 0\nCPU part\t: 0xd0c\n", "0xd0c"),
        ("", platform.processor() or platform.machine()),
    ):
        monkeypatch.setattr(processor, "cpu_info", lambda text=text: text)
        assert processor.cpu_name() == name
    assert processor.cpu_flags() == frozenset()


def test_python_and_the_kernels_find_the_same_levels(tmp_path: Path) -> None:
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, program = tmp_path / "levels.cpp", tmp_path / "levels"
    lines = [f'if ({condition}) std::puts("{name}");' for name, condition in IN_CPP.items()]
    body = "using namespace sparsify; const CpuFeatures cpu = detect_cpu(); (void)cpu; " + " ".join(lines)
    source.write_text(f'#include <cstdio>\n#include "cpu_features.h"\nint main() {{ {body} }}\n')
    folder = build.kernels_directory() / "cpu"
    subprocess.run([*compiler.command, "-std=c++17", f"-I{folder}", str(source), "-o", str(program)], check=True)
    found = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
    assert processor.available_levels() == tuple(found)


def test_one_variable_forces_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "available_levels", lambda: ("portable", "avx2"))
    monkeypatch.delenv(FORCE, raising=False)
    assert (processor.level(), processor.kernel_level()) == ("avx2", -1)
    monkeypatch.setenv(FORCE, "portable")
    assert (processor.level(), processor.kernel_level()) == ("portable", 0)
    monkeypatch.setenv(FORCE, "avx512")
    with pytest.raises(SparsifyError, match="SPARSIFY_CPU_LEVEL=avx512: this processor lacks it; the fastest.* avx2"):
        processor.level()
    monkeypatch.setenv(FORCE, "sse9")
    with pytest.raises(SparsifyError, match="expected one of portable, avx2, .*amx"):
        processor.level()


def test_what_else_forces_a_level_is_obeyed_by_torch() -> None:
    assert processor.other_variables("avx2") == {
        "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }  # fmt: skip
    assert processor.other_variables("avxvnni")["ONEDNN_MAX_CPU_ISA"] == "AVX2_VNNI"
    assert processor.other_variables("amx") == {}
    environment = {**os.environ, **processor.other_variables("portable")}
    command = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert told.strip() in ("DEFAULT", "NO AVX")


def test_the_doctor_says_what_else_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_levels", lambda: ("portable", "avx2", "avx512"))
    monkeypatch.delenv(FORCE, raising=False)
    assert "avx512, the fastest here" in doctor.level_finding({}).detail
    monkeypatch.setenv(FORCE, "avx2")
    finding = doctor.level_finding({"ATEN_CPU_CAPABILITY": "AVX2"})
    assert finding.status == "note"
    assert finding.fix == "export ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2"
    assert doctor.level_finding(processor.other_variables("avx2")).status == "ok"
    monkeypatch.setenv(FORCE, "avx512")
    assert doctor.level_finding({}).status == "ok"
    monkeypatch.setenv(FORCE, "amx")
    assert doctor.level_finding({}).fix == "unset SPARSIFY_CPU_LEVEL"
    monkeypatch.setenv(FORCE, "sse9")
    assert doctor.level_finding({}).status == "broken"


@pytest.mark.skipif(processor.available_levels()[-1] == "amx", reason="this processor has every level")
def test_a_level_that_is_not_here_is_not_found_by_the_kernel_either() -> None:
    library = build.load("cpu/gram")
    if library is None:
        pytest.skip("no C++ compiler")
    assert isinstance(library, ctypes.CDLL)
    assert library.sparsify_gram_level(LEVELS.index("amx")) < 0
