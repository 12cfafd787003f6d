"""The demo around its steps: which are kept, what it tells, and that a model which vLLM cannot run ends nothing.

The steps themselves are tested where they are made; here directories stand for models.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import sparsify.cli as cli
import sparsify.demo as demo
from sparsify.bench.peaks import Probes
from sparsify.errors import SparsifyError
from sparsify.evaluation import EvaluationResult, TextScore
from sparsify.failure import Failure
from tests.bench.conftest import fake_vllm, write_checkpoint

__all__ = ["fake_vllm"]

OPERATIONS = {"forward": 30 * 10**12, "sweep": 10 * 10**12}
CONFIG = {"max_position_embeddings": 2048, "vocab_size": 49152}


def scored(models, *, labels, **rest) -> list[EvaluationResult]:
    failed = Failure("too little memory", "pack-quantized: out of memory")
    return [
        EvaluationResult(
            label,
            label,
            1,
            {
                "self": TextScore(
                    "self", "self", 8, 1, 7, 9.5, kl=0.5, top1_agreement=0.8,
                    failure=failed if label == "pack-quantized" else None,
                )
            },
        )
        for label in labels
    ]  # fmt: skip


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, fake_vllm):
    """Stand-ins for the long steps; the list says what was made."""
    made: list[str] = []

    def make(name: str, directory: Path) -> None:
        directory.parent.mkdir(exist_ok=True)
        write_checkpoint(directory, 8, CONFIG)
        made.append(name)

    def apply(recipe, model, output, **rest):
        make("apply", output)
        return SimpleNamespace(record={"resumed_after_blocks": 0})

    estimate = SimpleNamespace(operations=OPERATIONS)
    plan = SimpleNamespace(estimate=lambda: estimate, model=SimpleNamespace(dtype="torch.float32"))
    monkeypatch.setattr(demo, "require_vllm", lambda: None)
    monkeypatch.setattr(demo, "export", lambda source, format, output, **rest: make(format, output))
    monkeypatch.setattr(demo, "apply", apply)
    monkeypatch.setattr(demo, "make_plan", lambda recipe, model: plan)
    monkeypatch.setattr(demo, "evaluate_all", scored)
    monkeypatch.setattr(demo, "arithmetic_peak", lambda kind, threads, seconds: 100e9)
    monkeypatch.setattr(demo, "report_on", lambda *arguments, **rest: made.append("report"))
    return made


def test_a_model_that_cannot_run_is_a_row(steps, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FAKE_BROKEN", "pack-quantized")
    assert cli.main(["demo", "--output", str(tmp_path / "demo")]) == 0
    shown, said = capsys.readouterr()
    assert "vLLM lacks it" in shown and "cpu_gemm_wna16" in shown and "too little memory" in shown
    assert "min: unpack" in shown and "sparse24 says" in shown
    assert [line for line in said.splitlines() if line[:4] in ("1/4 ", "2/4 ", "3/4 ", "4/4 ")].__len__() == 4
    assert steps == ["dense", "apply", "pack-quantized", "report"]
    told = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert [row["failure"] is None for row in told["bench"]["models"]] == [True, False, True]
    assert set(told["steps"]) == {"unpack", "compile", "export", "accuracy", "speed"}
    assert told["compile"]["total_operations"] == 40 * 10**12 and told["compile"]["peaks"] == {"float32": 100e9}
    assert told["dtype"] in ("float32", "bfloat16") and f"({told['dtype']})" in shown


def test_finished_steps_are_kept(steps, tmp_path, capsys):
    assert cli.main(["demo", "--output", str(tmp_path / "demo"), "--json"]) == 0
    steps.clear()
    capsys.readouterr()
    assert cli.main(["demo", "--output", str(tmp_path / "demo"), "--json"]) == 0
    assert steps == ["report"]
    assert json.loads(capsys.readouterr().out)["compile"] is None, "its time belongs to the first run"
    (tmp_path / "demo" / "sparse24" / "config.json").unlink()
    with pytest.raises(SparsifyError, match="exists and is no checkpoint"):
        demo.run_demo(tmp_path / "demo", quiet=True)


def test_without_the_dense_model_there_are_no_ratios(steps, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FAKE_BROKEN", "dense")
    assert cli.main(["demo", "--output", str(tmp_path / "demo")]) == 1
    shown = capsys.readouterr().out
    assert "No ratios: dense did not run." in shown and "sparse24 says" in shown


def test_cost_is_held_against_the_peak():
    cost = demo.CompileCost(seconds=300, operations=OPERATIONS, dtype="float32", threads=2, peaks={"float32": 200e9})
    assert cost.ratio == pytest.approx(300 / (40e12 / (0.8 * 200e9))) == pytest.approx(1.2)
    assert "300 s for 40 TFLOP in float32, 1.20 times as long as at 80% of the 200 GFLOP/s" in cost.sentence()
    mixed = demo.CompileCost(
        3, {"forward": 8 * 10**12, "sweep": 10**12}, "bfloat16", 2, {"bfloat16": 8e12, "float32": 1e12}
    )
    assert mixed.ratio == pytest.approx(3 * 0.8 / 2), "the solver is held against the float32 peak"
    assert "8 TFLOP in bfloat16 and 1 TFLOP in float32" in mixed.sentence()
    unknown = demo.CompileCost(300, OPERATIONS, "float32", 2, {})
    assert unknown.ratio is None and "could not be measured" in unknown.sentence()


def test_the_probe_has_what_the_demo_asks_for(monkeypatch):
    """Without a compiler the demo goes on without the peak."""
    monkeypatch.setattr(Probes, "__init__", lambda self: (_ for _ in ()).throw(SparsifyError("no compiler")))
    with pytest.raises(SparsifyError):
        demo.arithmetic_peak("float32", 1, 0.01)
