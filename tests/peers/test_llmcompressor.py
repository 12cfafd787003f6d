"""Recipes of llm-compressor against llm-compressor itself, in its own environment: which linears, which settings, which weights."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from sparsify import api
from sparsify.compiler.llmcompressor import peer_python
from sparsify.errors import MissingDependency
from sparsify.evaluation.load import load_model
from sparsify.formats.foreign import open_dense
from sparsify.formats.reader import open_compressed
from sparsify.model.checkpoint import open_checkpoint
from sparsify.recipe import parse_recipe, settings_of
from tests.compiler.test_llmcompressor import QUANTIZATION, dequantized, recipe, tokens
from tests.helpers.tiny import save_tiny
from tests.peers.conftest import Peer
from tests.recipe.test_llmcompressor_list import ENTRIES

pytestmark = pytest.mark.peers
SCRIPT = Path(__file__).with_name("llmcompressor_schemes.py")
CONFIG = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, vocab_size=128)
PARTS = [f"self_attn.{leaf}_proj" for leaf in "qkvo"] + [f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")]
LINEARS = [f"model.layers.{layer}.{part}" for layer in range(3) for part in PARTS]

W = {"num_bits": 4, "strategy": "group", "group_size": 32}
MORE: list[list[dict[str, Any]]] = [
    [{"GPTQModifier": {"scheme": "W4A16"}}],
    [{"GPTQModifier": {"scheme": "W4A16_ASYM"}}],
    [{"GPTQModifier": {"scheme": {"W4A16": ["re:.*self_attn.*"], "W8A16": ["Linear"]}, "ignore": ["lm_head"]}}],
    [
        {
            "GPTQModifier": {
                "ignore": ["re:.*lm_head", "re:model.layers.1.*"],
                "config_groups": {
                    "a": {"targets": ["Linear"], "weights": {**W, "actorder": "static"}},
                    "b": {"targets": ["re:.*v_proj", "re:.*down_proj$"], "weights": {**W, "num_bits": 8}},
                    "c": {"targets": ["re:.*[qkv]_proj"], "weights": {"num_bits": 8, "group_size": -1}},
                    "d": {"targets": ["model.layers.2.mlp.down_proj"], "weights": {**W, "group_size": 64}},
                },
            }
        }
    ],
    [
        {"QuantizationModifier": {"targets": ["re:.*self_attn.*_proj$"], "scheme": "W4A16", "ignore": ["lm_head"]}},
        {"GPTQModifier": {"targets": ["re:.*mlp.*_proj$"], "scheme": "W8A16", "actorder": None, "ignore": ["lm_head"]}},
    ],
    [
        {
            "QuantizationModifier": {
                "ignore": ["lm_head"],
                "config_groups": {"a": {"targets": ["Linear"], "weights": W}},
            }
        },
        {"GPTQModifier": {"block_size": 64}},
    ],
    [
        {
            "QuantizationModifier": {
                "ignore": ["lm_head"],
                "config_groups": {"a": {"targets": ["Linear"], "weights": {**W, "actorder": "weight"}}},
            }
        },
        {"GPTQModifier": {"block_size": 64}},
    ],
]


@pytest.fixture(scope="module")
def python() -> str:
    try:
        return peer_python(["the modifiers of this test"])
    except MissingDependency as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense")
    save_tiny(directory, dtype=torch.bfloat16)
    return directory


def stage_of(modifiers: list[dict[str, Any]]) -> dict[str, Any]:
    return {"quant_stage": {f"{index}_modifiers": entry for index, entry in enumerate(modifiers)}}


def ours(data: dict[str, Any]) -> dict[str, list[Any]]:
    recipe = parse_recipe(yaml.safe_dump(data, sort_keys=False))
    found = {}
    for name in LINEARS:
        if (step := settings_of(recipe, name).quantize) is not None:
            ordered = step.activation_order and step.method == "gptq"
            found[name] = [step.method, step.bits, step.group_size, ordered, step.symmetric]
    if (head := recipe.export.head) is not None:
        found["lm_head"] = [head.method, head.bits, head.group_size, head.symmetric]
    return found


def test_linears_and_settings_are_those_of_llm_compressor(python: str, tmp_path: Path) -> None:
    listed = [e["modifiers"] for e in ENTRIES if "becomes" in e and "handed_over" not in e]
    recipes = [stage_of(modifiers) for modifiers in [*listed, *MORE]]
    CONFIG.save_pretrained(tmp_path)
    job = json.dumps({"recipes": recipes, "model": str(tmp_path)})
    ended = subprocess.run(
        [python, "-I", str(SCRIPT)], input=job, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    theirs = json.loads(ended.stdout.strip().splitlines()[-1])
    assert len(theirs) == len(recipes) and any(theirs)
    for data, expected in zip(recipes, theirs, strict=True):
        if "lm_head" in expected:
            expected["lm_head"] = [*expected["lm_head"][:3], expected["lm_head"][4]]
        if any(other in str(data) for other in ("language_model.lm_head", "proj_out")):  # heads of other classes
            del expected["lm_head"]
        assert ours(data) == expected, data


# ------------------------------------------------------------------------------------------------------------ weights


WHOLE = """
import json, sys, torch, transformers
from compressed_tensors.quantization import fake_quantize
from llmcompressor import oneshot
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.recipe import Recipe
from safetensors.torch import load_file, save_file
source, rows, stages, output = sys.argv[1:]
if not torch.accelerator.is_available():
    IntermediatesCache.pin_memory = lambda *_: None
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
data = [{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in load_file(rows)["tokens"]]
loader = torch.utils.data.DataLoader(data, batch_size=1)
oneshot(model=model, processor=object(), dataset=loader, recipe=Recipe.from_dict(json.loads(stages)),
        num_calibration_samples=len(data), max_seq_length=16)
found = {}
for name, module in model.named_modules():
    if getattr(module, "quantization_scheme", None) is not None:
        found[name] = fake_quantize(module.weight.float(), module.weight_scale.float(), module.weight_zero_point,
                                    module.quantization_scheme.weights).contiguous()
save_file(found, output)
"""


def whole(python: str, model: Path, modifiers: list[dict], scratch: Path) -> dict[str, Tensor]:
    """Every quantized weight, dequantized, of a recipe that llm-compressor runs from end to end."""
    save_file({"tokens": tokens()}, scratch / "rows.safetensors")
    stages = {"s_stage": {f"{index}_modifiers": entry for index, entry in enumerate(modifiers)}}
    arguments = [str(model), str(scratch / "rows.safetensors"), json.dumps(stages), str(scratch / "theirs")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [python, "-I", "-c", WHOLE, *arguments], capture_output=True, env=environment, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return load_file(scratch / "theirs")


def test_awq_and_rounding_give_the_weights_of_llm_compressor(python: str, model: Path, tmp_path: Path) -> None:
    modifiers = [{"AWQModifier": {"n_grid": 4}}, {"QuantizationModifier": QUANTIZATION}]
    theirs = whole(python, model, modifiers, tmp_path)
    api.apply(recipe(*modifiers), model, tmp_path / "ours", calibration=tokens(), quiet=True)
    ours = dequantized(tmp_path / "ours")
    assert set(ours) == set(theirs) and len(ours) == 21
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


@pytest.mark.parametrize("strategy", [{"strategy": "group", "group_size": 32}, {"strategy": "channel"}], ids=str)
def test_rounding_with_zero_points_is_that_of_llm_compressor(
    python: str, model: Path, tmp_path: Path, strategy: dict[str, Any]
) -> None:
    """It computes ranges and scales in bfloat16, which we round once: scales may differ by that, and few codes do."""
    weights = {"num_bits": 4, "symmetric": False, "observer": "minmax", **strategy}
    modifier = {
        "QuantizationModifier": {
            "ignore": ["lm_head"],
            "config_groups": {"g": {"targets": ["Linear"], "weights": weights}},
        }
    }
    theirs = whole(python, model, [modifier], tmp_path)
    api.apply(stage_of([modifier]), model, tmp_path / "ours", calibration=tokens(), quiet=True)
    opened, dense = open_compressed(tmp_path / "ours"), open_checkpoint(model)
    assert set(opened.modules) == set(theirs) and len(theirs) == 21
    lost: dict[str, float] = {"ours": 0.0, "theirs": 0.0}
    for name, weight in theirs.items():
        linear, W = opened.linear(name), dense.tensor(f"{name}.weight").float()
        assert linear.scale is not None and linear.zero_point is not None and linear.zero_point.any()
        ours = linear.dense(torch.float32)
        step = linear.scale.float().repeat_interleave(linear.group_size, 1)
        apart = (ours - weight).abs() / step
        assert apart.max() < 1.2 and (apart < 0.1).float().mean() > 0.9, name
        lost["ours"] += float((ours - W).square().sum())
        lost["theirs"] += float((weight - W).square().sum())
    assert lost["ours"] <= 1.01 * lost["theirs"]


def test_gptq_without_an_order_is_static_there(python: str, model: Path, tmp_path: Path) -> None:
    """The linears whose inputs no compressed linear has touched: the same Hessian there and here. Sums differ in their last bits,
    so a few codes do; with the columns in stored order most codes are others."""
    theirs = whole(python, model, [{"GPTQModifier": QUANTIZATION}], tmp_path)
    equal = {}
    for order in (True, False):
        asked = recipe(method="gptq", activation_order=order)
        del asked["llm_compressor"]
        api.apply(asked, model, tmp_path / str(order), calibration=tokens(), quiet=True)
        ours = dequantized(tmp_path / str(order))
        names = [name for name in ours if name.startswith("model.layers.0.self_attn.") and "o_proj" not in name]
        assert len(names) == 3
        equal[order] = float(torch.cat([(ours[name] == theirs[name]).flatten() for name in names]).float().mean())
    assert equal[True] > 0.9 and equal[False] < 0.6, equal


# ------------------------------------------------------------------------------------------------------ whole recipes

SAVED = """
import json, sys, torch, transformers
from llmcompressor import oneshot
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.recipe import Recipe
from safetensors.torch import load_file
source, rows, jobs, output = sys.argv[1:]
if not torch.accelerator.is_available():
    IntermediatesCache.pin_memory = lambda *_: None
data = [{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in load_file(rows)["tokens"]]
for name, stages in json.loads(jobs).items():
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    oneshot(model=model, processor=object(), dataset=torch.utils.data.DataLoader(data, batch_size=1),
            recipe=Recipe.from_dict(stages), num_calibration_samples=len(data), max_seq_length=16)
    model.save_pretrained(f"{output}/{name}")
"""
LAYER = {"targets": ["re:.*model.layers.0$"], "dampening_frac": 0.01, "mask_structure": "0:0"}


def groups(targets: list[str], **weights: object) -> dict[str, Any]:
    return {"ignore": ["lm_head"], "config_groups": {"g": {"targets": targets, "weights": {**W, **weights}}}}


WHOLE_RECIPES: dict[str, list[dict[str, Any]]] = {
    "learned rounding": [{"AutoRoundModifier": {"iters": 2, "enable_torch_compile": False, **groups(["Linear"])}}],
    "two bits": [{"AutoRoundModifier": {"iters": 0, **groups(["Linear"], num_bits=2)}}],
    "imatrix": [{"QuantizationModifier": groups(["Linear"], observer="imatrix_mse", observer_kwargs={"norm": 2.4})}],
    "one scale": [
        {"QuantizationModifier": groups(["Linear", "Embedding"], num_bits=8, strategy="tensor", group_size=None)},
        {"GPTQModifier": {"block_size": 128}},
    ],
    "zeros, then 8 bits": [
        {"SparseGPTModifier": {"sparsity": 0.7, "preserve_sparsity_mask": True, **LAYER}},
        {"GPTQModifier": groups(["re:.*model.layers.0.self_attn.q_proj"], num_bits=8, strategy="channel", group_size=None)},
    ],
    "zeros": [{"SparseGPTModifier": {"sparsity": 0.5, "targets": [r"re:model.layers.\d+$"]}}],
}  # fmt: skip
ORDERED = {"ordered groups": [{"GPTQModifier": groups(["Linear"], actorder="group")}]}


def saved_by(python: str, recipes: dict[str, list[dict[str, Any]]], model: Path, scratch: Path) -> Path:
    """What llm-compressor saves of recipes that it runs from end to end, a directory each."""
    save_file({"tokens": tokens()}, scratch / "rows.safetensors")
    jobs = json.dumps({name: stage_of(modifiers) for name, modifiers in recipes.items()})
    arguments = [str(model), str(scratch / "rows.safetensors"), jobs, str(scratch)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [python, "-I", "-c", SAVED, *arguments], capture_output=True, env=environment, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return scratch


def same_files(theirs: Path, ours: Path) -> None:
    expected, found = load_file(theirs / "model.safetensors"), load_file(ours / "model.safetensors")
    assert set(expected) == set(found)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


@pytest.fixture(scope="module")
def saved(python: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_by(python, WHOLE_RECIPES, model, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("name", WHOLE_RECIPES)
def test_a_whole_recipe_gives_the_tensors_that_llm_compressor_saves(
    name: str, saved: Path, model: Path, tmp_path: Path
) -> None:
    """Codes and scales bit for bit, whether they are written again as pack-quantized or taken over."""
    recipe = parse_recipe(yaml.safe_dump(stage_of(WHOLE_RECIPES[name])))
    assert recipe.whole
    result = api.apply(recipe, model, tmp_path / "ours", calibration=tokens(), quiet=True)
    same_files(saved / name, tmp_path / "ours")
    theirs, ours = open_dense(saved / name), open_dense(tmp_path / "ours")
    assert all(torch.equal(theirs.tensor(name), ours.tensor(name)) for name in theirs.names())
    assert result.metrics["llm_compressor"]["whole"] and load_model(tmp_path / "ours").model is not None


def test_groups_in_an_order_of_their_own_are_those_of_llm_compressor_0_13(
    peer: Peer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = str(peer("llmcompressor013"))
    monkeypatch.setenv("SPARSIFY_LLMCOMPRESSOR_PYTHON", python)
    saved_by(python, ORDERED, model, tmp_path)
    recipe = parse_recipe(yaml.safe_dump(stage_of(ORDERED["ordered groups"])))
    api.apply(recipe, model, tmp_path / "ours", calibration=tokens(), quiet=True)
    same_files(tmp_path / "ordered groups", tmp_path / "ours")
    assert any(name.endswith("weight_g_idx") for name in load_file(tmp_path / "ours" / "model.safetensors"))
