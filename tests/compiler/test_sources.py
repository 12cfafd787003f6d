"""Recipes on quantized checkpoints: what comes out is what the dense model of the same weights gives."""

import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsify.compiler.apply import apply
from sparsify.compiler.convert import convert
from sparsify.compiler.planning import make_plan
from sparsify.compiler.summary import summary
from sparsify.errors import CheckpointError
from sparsify.evaluation import load_model
from sparsify.formats.foreign import open_dense
from sparsify.formats.inspect import inspect, render
from sparsify.formats.reader import open_compressed
from sparsify.model.linear import is_two_four
from sparsify.recipe import parse_recipe
from tests.helpers import bitmask
from tests.helpers.compressed import compress
from tests.helpers.foreign import change_config, compressed_tensors, fp8, gptq, quantized_checkpoint
from tests.helpers.tiny import save_tiny, tiny_text, tiny_tokenizer

GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True}
FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
ROUNDED = "version: 1\npasses:\n  - quantize: {method: rtn, bits: 4, group_size: 32}\n"
PRUNED = "version: 1\npasses:\n  - prune: {method: magnitude}\n"


def on_text(tmp_path, *passes, source=None):
    text = tiny_text(tmp_path / "text.txt")
    listed = "".join(f"  - {one}\n" for one in passes)
    source = source or f"file:{text}"
    head = f'version: 1\ncalibration: {{source: "{source}", samples: 8, sequence_length: 32}}\npasses:\n'
    return parse_recipe(head + listed)


def sources(directory):
    """A GPTQ checkpoint and the dense model of the same weights, written by transformers."""
    expected = quantized_checkpoint(directory / "gptq", GPTQ_CONFIG, gptq(order=True))
    opened = open_dense(directory / "gptq")
    save_tiny(directory / "dense", dtype=torch.bfloat16, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(directory / "dense", dtype=torch.bfloat16)
    state = {name: expected[name].bfloat16() if name in expected else opened.tensor(name) for name in opened.names()}
    model.load_state_dict(state, strict=False)
    model.save_pretrained(directory / "dense")
    return directory / "gptq", directory / "dense"


def same_tensors(one, other):
    first, second = (load_file(directory / "model.safetensors") for directory in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(
    "passes", [["prune: {method: sparsegpt}", "quantize: {method: gptq, bits: 4, group_size: 32}"], None]
)
def test_a_recipe_on_a_quantized_source(tmp_path, passes):
    quantized, dense = sources(tmp_path)
    recipe = on_text(tmp_path, *passes) if passes else parse_recipe(PRUNED)
    plan = make_plan(recipe, str(quantized))
    assert "dequantized on reading" in str(plan.table().caption)
    assert plan.to_json()["source"]["weights"] == 14
    result = apply(recipe, str(quantized), tmp_path / "out", quiet=True)
    apply(recipe, str(dense), tmp_path / "same", quiet=True)
    same_tensors(tmp_path / "out", tmp_path / "same")
    source, sizes = result.metrics["source"], result.metrics["sizes"]
    assert source["quantization"].startswith("GPTQ 4-bit symmetric, groups of 32, in activation order")
    assert source["stored_bytes"] == sum(t.nbytes for t in load_file(quantized / "model.safetensors").values())
    assert source["dense_bytes"] == sizes["dense_bytes"] == open_dense(dense).nbytes()
    assert "quantized: GPTQ 4-bit" in (tmp_path / "out" / "README.md").read_text()
    rows = [str(cell) for column in summary(result.metrics, "").columns for cell in column.cells]
    assert any("dequantized on reading" in row for row in rows)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "sparse24"
    assert not (tmp_path / "out" / "quantize_config.json").exists()


def test_a_quantized_source_writes_its_own_text_and_teaches(tmp_path):
    """What loads the whole model through transformers loads the dequantized weights."""
    quantized, dense = sources(tmp_path)
    distill = "distill: {tokens: 512, sequence_length: 32, batch_size: 2, source: self}"
    recipe = on_text(
        tmp_path,
        "prune: {method: sparsegpt}",
        "quantize: {method: gptq, bits: 4, group_size: 32}",
        distill,
        source="self",
    )
    result = apply(recipe, str(quantized), tmp_path / "out", quiet=True)
    apply(recipe, str(dense), tmp_path / "same", quiet=True)
    same_tensors(tmp_path / "out", tmp_path / "same")
    assert result.metrics["training"][0]["teacher"] == str(quantized)


@pytest.mark.parametrize("rest", [[], ["prune: {method: magnitude}"]])
def test_layers_of_a_quantized_source_are_removed(tmp_path, rest):
    quantized, dense = sources(tmp_path)
    recipe = on_text(tmp_path, "depth: {method: deepest, drop: 1, protect_first: 0}", *rest)
    if not rest:
        recipe = recipe.model_copy(update={"export": recipe.export.model_copy(update={"format": "dense"})})
    result = apply(recipe, str(quantized), tmp_path / "out", quiet=True)
    apply(recipe, str(dense), tmp_path / "same", quiet=True)
    same_tensors(tmp_path / "out", tmp_path / "same")
    assert result.metrics["source"]["weights"] == 14 and result.metrics["depth"]["layers_after"] == 1


def shown(report):
    console = Console(width=200)
    with console.capture() as text:
        console.print(render(report))
    return text.get()


def test_export_and_inspect_of_a_quantized_source(tmp_path):
    config, write = compressed_tensors(
        "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16
    )
    expected = quantized_checkpoint(tmp_path / "fp4", config, write)
    convert(tmp_path / "fp4", "dense", tmp_path / "out", quiet=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in expected.items():
        assert torch.equal(written[name].float(), weight), name
    report = inspect(tmp_path / "fp4", quiet=True)
    stored = load_file(tmp_path / "fp4" / "model.safetensors")
    totals = report.totals()
    assert totals["nbytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert {t.floating for t in report.tensors if t.compressed} == {True} and "float4 g16" in shown(report)
    assert totals["compressed_linears"] == 14 and report.format.startswith("compressed-tensors nvfp4")
    # 4 bits, an 8-bit scale for 16 weights, and the float32 scale of each matrix
    weights = sum(weight.numel() for weight in expected.values())
    assert totals["bits_per_weight"] == pytest.approx(4.5 + 32 * 14 / weights)


@pytest.mark.parametrize(
    "kind", ["sparse24", "sparse24 4", "sparse24 8", "marlin-24 4", "marlin-24 8", "stored dense", "pack-quantized", "gptq",
             "bitmask none", "bitmask float8", "bitmask int8"],
)  # fmt: skip
@pytest.mark.parametrize("passes", [["quantize: {method: gptq, bits: 4, group_size: 32}"], None])
def test_zeros_of_a_compressed_source_stay(tmp_path, kind, passes):
    """Sparse-Llama's layout, 16 bits with 2:4 zeros, and quantized ones: a later 4-bit recipe keeps every zero."""
    dense = save_tiny(tmp_path / "dense", dtype=torch.bfloat16, num_hidden_layers=2, num_key_value_heads=4)
    format = "dense" if kind == "stored dense" else kind.split()[0]
    bits = {"bits": 4, "group_size": 32} if kind in ("pack-quantized", "gptq") else {"bits": 16}
    if kind.endswith((" 4", " 8")):
        bits = {"bits": int(kind[-1]), "group_size": 0}  # marlin-24 wants 64 outputs, and one scale for 64 inputs
    source = tmp_path / "source"
    if kind.startswith("bitmask"):
        bitmask.checkpoint(dense, source, kind.split()[1])
        tiny_tokenizer().save_pretrained(source)
    else:
        compress(dense, source, format, **bits)
    if kind == "stored dense":
        sparsity = {"format": "dense", "sparsity_structure": "2:4", "global_sparsity": 0.5, "targets": ["Linear"]}
        change_config(source, compression_config={"config_groups": {}, "format": "dense", "sparsity_config": sparsity})
    opened = open_dense(source)
    recipe = on_text(tmp_path, *passes) if passes else parse_recipe(ROUNDED)
    result = apply(recipe, str(source), tmp_path / "out", quiet=True)
    out = open_compressed(tmp_path / "out")
    assert len(out.modules) == 14 and out.format == "sparse24"
    for module, scheme in out.modules.items():
        before, after = opened.tensor(f"{module}.weight"), out.linear(module)
        assert scheme.pattern == "2:4" and is_two_four(before)
        assert not after.dense(torch.float32)[before == 0].any(), module
    assert len(result.metrics["kept_zeros"]) == 14
    begins = {
        "sparse24": "sparse24, 16-bit 2:4",
        **{f"{name} {bits}": f"{name}, {bits}-bit 2:4" for name in ("sparse24", "marlin-24") for bits in (4, 8)},
        "stored dense": "compressed-tensors, stored dense",
        "gptq": "GPTQ 4-bit",
    }
    begins |= {"pack-quantized": "compressed-tensors pack-quantized 4-bit"}
    assert result.metrics["source"]["quantization"].startswith(begins.get(kind, "sparse-24-bitmask"))


def test_fp8_of_deepseek_is_read_block_by_block(tmp_path):
    expected = quantized_checkpoint(tmp_path / "fp8", FP8_CONFIG, fp8((32, 32)))
    recipe = parse_recipe(ROUNDED.replace("group_size: 32", "group_size: 32, scale_search: false"))
    result = apply(recipe, str(tmp_path / "fp8"), tmp_path / "out", quiet=True)
    assert {layer["pattern"] for layer in result.metrics["layers"]} == {"dense"}
    out = open_compressed(tmp_path / "out")
    for name, weight in expected.items():
        linear = out.linear(name.removesuffix(".weight"))
        step = linear.scale.float().repeat_interleave(32, 1)
        assert ((linear.dense(torch.float32) - weight).abs() <= 0.51 * step + 0.01 * weight.abs()).all()


def test_experts_of_a_quantized_source_are_assembled(tmp_path):
    """Stored one by one, as published models have them, and fused in the class."""
    quantized_checkpoint(tmp_path / "fp8", FP8_CONFIG, fp8((32, 32)), family="mixtral", num_hidden_layers=1)
    result = apply(parse_recipe(ROUNDED), str(tmp_path / "fp8"), tmp_path / "out", quiet=True)
    source = result.metrics["source"]
    assert source["weights"] == 11 and source["stored_bytes"] < source["dense_bytes"]
    before, after = open_dense(tmp_path / "fp8"), open_compressed(tmp_path / "out")
    for name in after.other_names():
        assert torch.equal(after.tensor(name), before.tensor(name)), name
    logits = load_model(tmp_path / "fp8").model(torch.arange(4, 20)[None]).logits
    assert torch.isfinite(logits).all()


def test_gptq_is_trained_with_its_codes(tmp_path):
    """Recovery of a model that GPTQModel quantized: its codes and groups stay, distilled from the dense one."""
    teacher = save_tiny(tmp_path / "teacher", dtype=torch.bfloat16, num_hidden_layers=2)
    quantized_checkpoint(tmp_path / "gptq", {**GPTQ_CONFIG, "desc_act": False}, gptq())
    distill = f"distill: {{tokens: 512, sequence_length: 32, batch_size: 2, teacher: {teacher}}}"
    result = apply(on_text(tmp_path, distill), str(tmp_path / "gptq"), tmp_path / "out", quiet=True)
    assert {(layer["bits"], layer["group_size"]) for layer in result.metrics["layers"]} == {(4, 32)}
    assert len(open_compressed(tmp_path / "out").modules) == 14 and result.metrics["training"][0]["steps"] == 8


def test_gptq_in_an_activation_order_cannot_only_be_trained(tmp_path):
    quantized, dense = sources(tmp_path)
    distill = f"distill: {{tokens: 512, sequence_length: 32, batch_size: 2, teacher: {dense}}}"
    with pytest.raises(CheckpointError, match="holds no compressed linear, and this recipe only trains"):
        make_plan(on_text(tmp_path, distill), str(quantized))
