"""`plan --config-only`: what config.json alone says of a model is what a plan with its weights says."""

import json
import re
from pathlib import Path

import pytest
import torch

from sparsify import compute, memory
from sparsify.cli import main
from sparsify.compiler import memory as compiler_memory
from sparsify.compiler.apply import apply
from sparsify.compiler.memory import Limits, walk_memory
from sparsify.compiler.planning import make_plan
from sparsify.errors import CheckpointError, RecipeError
from sparsify.formats.foreign import open_described_dense
from sparsify.formats.inspect import inspect
from sparsify.recipe import load_recipe, parse_recipe
from tests.helpers.foreign import fp8, quantized_checkpoint
from tests.helpers.tiny import MIXTURES, save_tiny, tiny_mixture, tiny_model, tiny_text

CONFIGS = Path(__file__).resolve().parents[2] / "benchmarks" / "configs"
PUBLISHED = {  # billions of parameters, linears, and one linear with its shape; sources in benchmarks/configs/README.md
    "llama-3.1-8b": (8.03, 32 * 7, "model.layers.31.mlp.down_proj", [4096, 14336]),
    "llama-3.3-70b": (70.6, 80 * 7, "model.layers.79.self_attn.k_proj", [1024, 8192]),
    "qwen3-32b": (32.8, 64 * 7, "model.layers.63.self_attn.o_proj", [5120, 8192]),
    "qwen3-30b-a3b": (30.5, 48 * (4 + 3 * 128), "model.layers.47.mlp.experts.127.down_proj", [2048, 768]),
    "gpt-oss-120b": (116.83, 36 * (4 + 3 * 128), "model.layers.35.mlp.experts.127.gate_proj", [2880, 2880]),
    "deepseek-v3": (671, 61 * 5 + 3 * 3 + 58 * 3 * 257, "model.layers.60.mlp.experts.255.up_proj", [2048, 7168]),
    "mixtral-8x7b": (46.7, 32 * (4 + 3 * 8), "model.layers.31.mlp.experts.7.up_proj", [14336, 4096]),
    "llama-4-scout": (
        109,
        48 * (4 + 3 * 17),
        "language_model.model.layers.47.feed_forward.experts.15.up_proj",
        [8192, 5120],
    ),
}
RECIPE = """
version: 1
calibration: {{source: "file:{text}", samples: 8, sequence_length: 32}}
solver: {{error_propagation: 0.5}}
passes:
  - prune: {{method: {method}}}
  - quantize: {{method: gptq, bits: 4, group_size: 32}}
export: {{head: {{bits: 8, group_size: 32, method: rtn}}}}
"""
PLAIN = "version: 1\npasses: [{prune: {method: magnitude}}, {quantize: {method: rtn, bits: 4, group_size: 32}}]\n"


@pytest.fixture
def recipe(tmp_path):
    return parse_recipe(RECIPE.format(text=tiny_text(tmp_path / "text.txt"), method="alps"))


def planned(capsys, *arguments: str) -> dict:
    assert main(["plan", *arguments, "--config-only", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_planned_from_their_figures(name, capsys, monkeypatch):
    monkeypatch.setattr(compute, "rates", lambda measure=False: compute.Rates(1e11, 1e11))
    monkeypatch.setattr("sparsify.compiler.estimate.rates", compute.rates)
    found = planned(capsys, "2of4-w4a16", "--model", str(CONFIGS / f"{name}.json"))
    billions, linears, one, shape = PUBLISHED[name]
    assert found["parameters"] == pytest.approx(1e9 * billions, rel=0.01)
    compressed = {module: linear for module, linear in found["linears"].items() if linear["scheme"]}
    assert len(compressed) == linears and compressed[one]["shape"] == shape
    assert compressed[one]["scheme"].startswith("2:4 alps + 4-bit gptq, groups of 64")
    cost = found["estimate"]
    assert cost["dense_bytes"] == pytest.approx(2 * found["parameters"], rel=1e-3)
    # 3.25 bits for what is compressed (a scale for 64 weights), 8.25 for the output head, and 16 for the rest
    weights = sum(n * k for n, k in (linear["shape"] for linear in compressed.values()))
    n, k = found["head"]["shape"]
    saved = weights * (16 - 3.25) / 8 + n * k * (16 - 8.25) / 8
    assert cost["output_bytes"] == pytest.approx(cost["dense_bytes"] - saved, rel=1e-6)
    walk = cost["memory"]
    assert walk["peak"] == sum(walk["host"].values()) and walk["disk"]["output"] == cost["output_bytes"]
    assert walk["host"]["block"] > 0 and cost["seconds"] > 60
    assert found["bits_per_weight"] == pytest.approx(3.25, abs=0.06) and not found["config_only"]["other_parts"]
    if name == "deepseek-v3":
        assert found["source"]["weights"] == linears and "blocks of 128 x 128" in found["source"]["quantization"]
        assert found["source"]["stored_bytes"] == pytest.approx(
            671e9 + 1.8e9, rel=0.01
        )  # embedding and head have 16 bits
    assert (found["config_only"]["unread"] is not None) == (name == "gpt-oss-120b")


def test_the_table_says_what_is_not_known(tmp_path, capsys):
    model = described(
        tmp_path, "gpt_oss", quantization_config={"quant_method": "mxfp4"}, vision_config={"hidden_size": 8}
    )
    assert main(["plan", "2of4-w4a16", "--model", model, "--config-only"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "planned from config.json alone" in said and "bits per weight" in said
    assert (
        "quantized with mxfp4, which sparsify cannot read; transformers (Mxfp4Config(dequantize=True)) reads it" in said
    )
    assert "this is the plan of the dense model" in said and "not planned: vision_config. GptOssForCausalLM" in said


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_the_plan_is_the_same_without_weights(family, tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(memory, "anonymous", lambda: 0)
    monkeypatch.setattr(memory, "free", lambda: 10**9)
    save = save_tiny if family in ("llama", "gemma2") else tiny_mixture
    source = save(tmp_path / "model", family)
    (tmp_path / "described").mkdir()
    (tmp_path / "described/config.json").write_bytes((source / "config.json").read_bytes())
    whole = make_plan(recipe, str(source)).to_json()
    assert whole.pop("config_only") is None
    for place in (tmp_path / "described", source / "config.json"):
        alone = make_plan(recipe, str(place), config_only=True).to_json()
        assert alone.pop("config_only") == {"unread": None, "other_parts": []}
        assert alone == {**whole, "model": str(place)}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_bits_per_weight_are_those_of_the_files(family, tmp_path):
    """Linears of another size stay dense, and so does one that is named; routers count as matrices."""
    save = save_tiny if family == "llama" else tiny_mixture
    source = save(tmp_path / "model", family, intermediate_size=136, dtype=torch.bfloat16)
    text = PLAIN + "overrides: [{match: '*.q_proj', quantize: {bits: 8}}, {match: '*.k_proj', quantize: {bits: 8}}, "
    recipe = parse_recipe(text + "{match: '*.v_proj', quantize: {bits: 8}}]\nignore: ['*layers.0.self_attn.o_proj']\n")
    made = make_plan(recipe, str(source))
    assert {"model.layers.0.self_attn.o_proj"} < made.dense_modules().keys()
    found = made.to_json()["bits_per_weight"]
    apply(recipe, str(source), tmp_path / "out", quiet=True)
    assert found == pytest.approx(inspect(tmp_path / "out", quiet=True).totals()["bits_per_weight"], abs=1e-4)
    assert 3.5 < found < 16 and f"the linears {found:.3g} bits per weight" in str(made.table().caption)


def test_a_quantized_source_is_planned_as_its_files_are(tmp_path):
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 32]}
    quantized_checkpoint(tmp_path / "m", config, fp8((48, 32)))
    whole = make_plan(parse_recipe(PLAIN), str(tmp_path / "m"))
    alone = make_plan(parse_recipe(PLAIN), str(tmp_path / "m/config.json"), config_only=True)
    assert alone.to_json()["source"] == whole.to_json()["source"] is not None
    assert alone.checkpoint.infos.keys() == whole.checkpoint.infos.keys()
    assert "dequantized on reading" in str(alone.table().caption)
    with pytest.raises(CheckpointError, match=r"is a config\.json alone.*give the whole model"):
        alone.checkpoint.stored.tensor("model.norm.weight")


def test_what_is_left_out_of_a_quantized_source_stays_dense(tmp_path):
    config = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.mlp", "k_proj"]}
    found = open_described_dense(described(tmp_path, quantization_config=config)).modules
    assert len(found) == 3 * 7 - 3 - 3
    assert not any("layers.0.mlp" in name or name.endswith("k_proj") for name in found)
    inside = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "modules_in_block_to_quantize": [["self_attn.q_proj"]],
    }
    found = open_described_dense(described(tmp_path, quantization_config=inside)).modules
    assert set(found) == {f"model.layers.{index}.self_attn.q_proj" for index in range(3)}
    plain = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "dynamic": {"-:.*down_proj": {}, ".*o_proj": {"bits": 8}},
    }
    found = open_described_dense(described(tmp_path, quantization_config=plain)).modules
    assert {one.bits for name, one in found.items() if name.endswith("o_proj")} == {8} and len(found) == 3 * 6


def described(directory: Path, family: str = "llama", **changes: object) -> str:
    """The config.json of a tiny model in a file of another name."""
    config = json.loads(tiny_model(family, **MIXTURES.get(family, {})).config.to_json_string(use_diff=False))
    file = directory / "described.json"
    file.write_text(json.dumps({**config, **changes}))
    return str(file)


AUTO_MAP = {"AutoConfig": "configuration_new.NewConfig", "AutoModelForCausalLM": "modeling_new.NewForCausalLM"}
BAD = {
    "unknown": ({"model_type": "new_thing"}, "new_thing.*does not recognize this architecture"),
    "code": ({"model_type": "new_thing", "auto_map": AUTO_MAP}, r"configuration_new\.py.*--trust-remote-code"),
    "foreign code": (
        {"auto_map": {"AutoConfig": "org/name--code.Config"}},
        "Python code of another repository, org/name",
    ),
    "outside": ({"auto_map": {"AutoConfig": "../code.Config"}}, "code outside of the directory"),
    "encoder-decoder": ({"model_type": "t5"}, "t5 has an encoder and a decoder"),
    "vision": ({"model_type": "vit"}, "transformers cannot build this model.*ViTConfig"),
    "layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers 1000000, and no model has as many"),
    "experts": ({"num_experts": 10**6}, "num_experts 1000000, and no model has as many experts"),
    "kind": ({"hidden_size": "many"}, "described.json"),
    "quantization": ({"quantization_config": [1]}, "quantization_config in config.json must be an object"),
    "own": (
        {"quantization_config": {"quant_method": "sparse24", "version": 1, "bits": 4, "group_size": 32}},
        "compressed as sparse24.*does not tell the tensors of its files",
    ),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 5}}, "GPTQ with 5 bits is not read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configs_are_one_sentence(name, tmp_path, capsys):
    changes, said = BAD[name]
    refused(capsys, described(tmp_path, **changes), said)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_experts": 3}, "num_experts 3 and num_local_experts 4, and a layer has one number of experts"),
        (
            {"num_experts_per_tok": 5},
            r"chooses 5 experts for a token \(num_experts_per_tok\) of 4 \(num_local_experts\)",
        ),
    ],
)
def test_numbers_of_experts_that_disagree_are_refused(changes, said, tmp_path, capsys):
    refused(capsys, described(tmp_path, "mixtral", **changes), said)
    source = tiny_mixture(tmp_path / "whole", "mixtral")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=said):
        make_plan(parse_recipe(PLAIN), str(source))


@pytest.mark.parametrize(
    "content, said", [("[1, 2]", "must hold a JSON object"), ("{", "described.json"), (None, "holds no config")]
)
def test_files_that_are_no_config_are_one_sentence(content, said, tmp_path, capsys):
    if content is not None:
        (tmp_path / "described.json").write_text(content)
    refused(capsys, str(tmp_path / "described.json"), said)


def test_a_hub_id_is_looked_up(capsys):
    refused(capsys, "org/Model2.5-7B", r"org/Model2\.5-7B is not in the local cache and the Hub is out of reach")


def test_code_of_a_model_that_transformers_knows_is_not_needed(tmp_path):
    """As in the config.json of DeepSeek-V3."""
    made = make_plan(parse_recipe(PLAIN), described(tmp_path, auto_map=AUTO_MAP), config_only=True)
    assert type(made.model.model).__name__ == "LlamaForCausalLM" and len(made.schemes) == 21


def refused(capsys, model: str, said: str) -> None:
    assert main(["plan", "2of4-w4a16", "--model", model, "--config-only"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and re.search(said, error) and "Traceback" not in error


def test_recipes_that_need_the_files_are_refused(tmp_path):
    healing = parse_recipe("version: 1\npasses: [distill: {tokens: 512, sequence_length: 32, teacher: x/y}]\n")
    with pytest.raises(RecipeError, match="--config-only plans a recipe with prune or quantize"):
        make_plan(healing, described(tmp_path), config_only=True)


def test_zeros_that_the_recipe_keeps_are_believed(tmp_path):
    keep = parse_recipe(
        "version: 1\npasses: [{prune: {method: keep}}, {quantize: {method: rtn, bits: 4, group_size: 32}}]\n"
    )
    made = make_plan(keep, described(tmp_path), config_only=True)
    assert {scheme.prune for scheme in made.schemes.values()} == {"keep"} and len(made.schemes) == 21


def test_a_budget_that_is_too_small_names_settings_that_need_less(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(memory, "anonymous", lambda: 0)
    monkeypatch.setattr(compiler_memory, "LATER", 0)
    made = make_plan(recipe, described(tmp_path, hidden_size=512, num_attention_heads=8, head_dim=64), config_only=True)
    small = walk_memory(made, Limits("1kB"))
    one, other = "passes.prune.method=sparsegpt", "solver.error_propagation=0"
    assert set(small.instead) == {one, other, f"{other} --set {one}"}
    for name, least in small.instead.items():
        changed = load_recipe(recipe.model_dump(mode="json"), name.split(" --set "))
        assert walk_memory(make_plan(changed, made.checkpoint.spec, config_only=True), Limits()).least == least
        assert f"GB with --set {name}" in (small.problem() or "") and least < small.least
    assert walk_memory(made, Limits("1TB")).instead == {}
    assert set(walk_memory(made, Limits(str(small.instead[one]))).instead) == {one, other}  # one of them is enough
