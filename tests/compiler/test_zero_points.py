"""`quantize: {symmetric: false}` from the recipe to the directory: what is planned, solved, trained, written and refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsify.compiler.apply import apply
from sparsify.compiler.convert import export
from sparsify.compiler.planning import make_plan
from sparsify.errors import RecipeError
from sparsify.formats.reader import open_compressed
from sparsify.model.checkpoint import open_checkpoint
from sparsify.model.linear import is_two_four
from sparsify.recipe import Recipe, parse_recipe
from sparsify.report.figures import read_layers, stored_bits
from tests.helpers.tiny import save_tiny, tiny_text

HEAD = 'version: 1\ncalibration: {{source: "file:{text}", samples: 8, sequence_length: 32}}\n'
SOLVED = (
    HEAD
    + "passes:\n  - prune: {{method: sparsegpt}}\n  - quantize: {{method: gptq, bits: 4, group_size: 32, symmetric: false}}\n"
)
DENSE = HEAD + "passes:\n  - quantize: {{method: gptq, bits: 4, group_size: 32, symmetric: false}}\n"
ROUNDED = "version: 1\npasses:\n  - quantize: {method: rtn, bits: 8, group_size: channel, symmetric: false}\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model whose weights lean to one side, as those that gain by zero points do."""
    directory = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.add_(parameter.abs().mean() * torch.randn(parameter.shape[0], 1))
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    text = tiny_text(tmp_path / "text.txt", 2000)

    def make(template: str = SOLVED, *overrides: str, more: str = "") -> Recipe:
        return parse_recipe(template.format(text=text) + more, "r.yaml", overrides)

    return make


def test_pruned_and_quantized_together(source: Path, recipe: Any, tmp_path: Path) -> None:
    head = "export: {head: {bits: 8, group_size: 32, symmetric: false}}\n"
    plan = make_plan(recipe(more=head), str(source))
    assert plan.table() and "2:4 sparsegpt + asymmetric 4-bit gptq, groups of 32" in str(plan.to_json()["linears"])
    result = apply(recipe(more=head), str(source), tmp_path / "out", quiet=True)
    opened = open_compressed(tmp_path / "out")
    assert len(opened.modules) == len(result.metrics["layers"]) + 1
    for module, scheme in opened.modules.items():
        linear = opened.linear(module)
        assert not scheme.symmetric and linear.zero_point is not None and linear.zero_point.any()
        weight = linear.dense(torch.float32)
        assert module == "lm_head" or (is_two_four(weight) and (weight == 0).float().mean() >= 0.5)
    sizes = result.metrics["sizes"]
    assert sizes["compressed_bytes"] == plan.estimate().output_bytes
    assert sizes["bits_per_weight"] == 3 + (16 + 8) / 32
    assert not any(layer["symmetric"] for layer in result.metrics["layers"]) and not result.metrics["head"]["symmetric"]
    layers = read_layers(result.metrics)
    assert {stored_bits(layer, "sparse24") for layer in layers} == {sizes["bits_per_weight"]}
    assert {layer["sparsity"] >= 0.5 for layer in result.metrics["layers"]} == {True}


def test_zero_points_help_weights_that_lean_to_one_side(source: Path, recipe: Any, tmp_path: Path) -> None:
    errors = {}
    for symmetric in ("true", "false"):
        asked = recipe(DENSE, f"passes.quantize.symmetric={symmetric}")
        metrics = apply(asked, str(source), tmp_path / symmetric, quiet=True).metrics
        errors[symmetric] = sum(layer["relative_error"] for layer in metrics["layers"])
    assert errors["false"] < 0.8 * errors["true"]


@pytest.mark.parametrize("format", ["pack-quantized", "gptq", "dense", "sparse24"])
def test_without_data_into_every_format(source: Path, tmp_path: Path, format: str) -> None:
    asked = parse_recipe(ROUNDED, "r.yaml", [f"export.format={format}"])
    plan = make_plan(asked, str(source))
    result = apply(asked, str(source), tmp_path / "out", quiet=True)
    assert result.metrics["sizes"]["compressed_bytes"] == plan.estimate().output_bytes
    dense = open_checkpoint(export(tmp_path / "out", "dense", tmp_path / "dense", quiet=True))
    before = open_checkpoint(source)
    for layer in result.metrics["layers"]:
        name = f"{layer['module']}.weight"
        W, found = before.tensor(name).double(), dense.tensor(name).double()
        step = (W.amax(1).clamp(min=0) - W.amin(1).clamp(max=0)) / 255
        assert ((found - W).abs() <= 1.2 * step[:, None] + W.abs() / 128).all(), name


def test_an_override_of_one_linear(source: Path, recipe: Any, tmp_path: Path) -> None:
    more = "overrides: [{match: down_proj, quantize: {symmetric: true, bits: 8}}]\n"
    apply(recipe(more=more), str(source), tmp_path / "out", quiet=True)
    modules = open_compressed(tmp_path / "out").modules
    kinds = {module.rpartition(".")[2]: (scheme.bits, scheme.symmetric) for module, scheme in modules.items()}
    assert kinds == {
        **dict.fromkeys([f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up")], (4, False)),
        "down_proj": (8, True),
    }
    with pytest.raises(RecipeError, match="gptq stores the zero points of a whole checkpoint in one way"):
        make_plan(recipe(DENSE, "export.format=gptq", more=more), str(source))
    head = "export: {format: gptq, head: {bits: 8, group_size: 32}}\n"
    with pytest.raises(RecipeError, match="lm_head is symmetric; make all linears alike"):
        make_plan(recipe(DENSE, more=head), str(source))


def test_linears_that_vllm_merges_must_agree(source: Path, recipe: Any) -> None:
    more = "overrides: [{match: q_proj, quantize: {symmetric: true}}]\n"
    with pytest.raises(RecipeError, match="vLLM merges .*q_proj.* asymmetric 4-bit gptq"):
        make_plan(recipe(more=more), str(source))


TUNE = "  - tune: {epochs: 1, learning_rate: 0.02, batch_size: 2, holdout: 0.25}\n"
TRAINING = "sequence_length: 16, batch_size: 4, precision: float32, learning_rate: 0.02"
DISTILL = f"  - distill: {{tokens: 640, samples: 40, {TRAINING}, scale_learning_rate: 0.005}}\n"
LORA = f"  - lora: {{rank: 4, tokens: 640, samples: 40, {TRAINING}, export: merge}}\n"


@pytest.mark.parametrize("steps", [TUNE, DISTILL, LORA], ids=["tune", "distill", "lora"])
def test_training_keeps_masks_and_zero_points(source: Path, recipe: Any, tmp_path: Path, steps: str) -> None:
    apply(recipe(), str(source), tmp_path / "before", quiet=True)
    result = apply(recipe(more=steps), str(source), tmp_path / "after", quiet=True)
    before, after = open_compressed(tmp_path / "before"), open_compressed(tmp_path / "after")
    changed = 0
    for module in before.modules:
        one, other = before.linear(module), after.linear(module)
        assert other.zero_point is not None and is_two_four(other.dense(torch.float32))
        if steps != TUNE:  # tuning one block changes what the next one is solved on
            assert torch.equal(one.zero_point, other.zero_point), module
        changed += not torch.equal(one.codes, other.codes)
    assert changed and (steps == TUNE or result.metrics["training"])


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    source: Path, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sparsify.compiler.calibrate as calibrate

    whole = apply(recipe(), str(source), tmp_path / "whole", quiet=True).output
    solve, calls = calibrate.solve_layer, []

    def killed(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return solve(*arguments, **settings)

    monkeypatch.setattr(calibrate, "solve_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        apply(recipe(), str(source), tmp_path / "out", quiet=True)
    monkeypatch.undo()
    resumed = apply(recipe(), str(source), tmp_path / "out", resume=True, quiet=True)
    assert resumed.record["resumed_after_blocks"] == 1
    assert (resumed.output / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_checkpoint_that_has_zero_points_is_trained_on_them(source: Path, recipe: Any, tmp_path: Path) -> None:
    """A recipe that only trains, from the format of others: what comes out has the masks and zero points that went in."""
    before = apply(recipe(DENSE, "export.format=pack-quantized"), str(source), tmp_path / "before", quiet=True).output
    steps = DISTILL.replace("tokens: 640", f"teacher: {source}, tokens: 640")
    asked = recipe(HEAD + "passes:\n", more=steps)
    plan = make_plan(asked, str(before))
    assert {linear.describe() for linear in plan.linears.values()} == {
        "is dense asymmetric 4-bit, groups of 32, trained"
    }
    apply(asked, str(before), tmp_path / "after", quiet=True)
    one, other = open_compressed(before), open_compressed(tmp_path / "after")
    assert one.format == "pack-quantized" and other.format == "sparse24" and one.modules.keys() == other.modules.keys()
    assert any(not torch.equal(one.linear(m).codes, other.linear(m).codes) for m in one.modules)
    assert all(torch.equal(one.linear(m).zero_point, other.linear(m).zero_point) for m in one.modules)
