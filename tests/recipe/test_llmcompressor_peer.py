"""Recipes of llm-compressor against llm-compressor itself, in its own environment (`make peers`): which linears, which settings."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from sparsify.compiler.llmcompressor import peer_python
from sparsify.errors import MissingDependency
from sparsify.recipe import parse_recipe, settings_of
from tests.recipe.test_llmcompressor_list import ENTRIES

pytestmark = pytest.mark.peers
SCRIPT = Path(__file__).parents[1] / "helpers" / "llmcompressor_schemes.py"
CONFIG = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, vocab_size=128)
PARTS = [f"self_attn.{leaf}_proj" for leaf in "qkvo"] + [f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")]
LINEARS = [f"model.layers.{layer}.{part}" for layer in range(3) for part in PARTS]

W = {"num_bits": 4, "strategy": "group", "group_size": 32}
MORE: list[list[dict[str, Any]]] = [
    [{"GPTQModifier": {"scheme": "W4A16"}}],
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


def stage_of(modifiers: list[dict[str, Any]]) -> dict[str, Any]:
    return {"quant_stage": {f"{index}_modifiers": entry for index, entry in enumerate(modifiers)}}


def ours(data: dict[str, Any]) -> dict[str, list[Any]]:
    recipe = parse_recipe(yaml.safe_dump(data, sort_keys=False))
    found = {}
    for name in LINEARS:
        if (step := settings_of(recipe, name).quantize) is not None:
            found[name] = [step.method, step.bits, step.group_size, step.activation_order and step.method == "gptq"]
    if (head := recipe.export.head) is not None:
        found["lm_head"] = [head.method, head.bits, head.group_size]
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
            expected["lm_head"] = expected["lm_head"][:3]
        if any(other in str(data) for other in ("language_model.lm_head", "proj_out")):  # heads of other classes
            del expected["lm_head"]
        assert ours(data) == expected, data
