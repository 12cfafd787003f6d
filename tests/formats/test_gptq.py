"""gptq: what is written and read, and what is refused. The packages themselves load it in tests/peers."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsify.compiler.apply import apply
from sparsify.compiler.convert import export
from sparsify.errors import CheckpointError, RecipeError
from sparsify.formats import ModuleScheme, get_format
from sparsify.formats.gptq import GptqConfig
from sparsify.formats.inspect import inspect
from sparsify.formats.reader import open_compressed
from sparsify.formats.scheme import Label
from sparsify.model.checkpoint import open_checkpoint
from sparsify.recipe import parse_recipe

FORMAT = get_format("gptq")
KINDS: list[dict[str, Any]] = [
    {"n": 32, "k": 128, "bits": 4, "group_size": 32},
    {"n": 64, "k": 128, "bits": 4, "group_size": 128, "pattern": "dense"},
    {"n": 32, "k": 96, "bits": 4, "group_size": 96, "pattern": "dense", "dtype": torch.float16},
    {"n": 32, "k": 64, "bits": 8, "group_size": 64, "bias": True},
]


def dequantized(tensors: dict[str, Tensor], bits: int) -> np.ndarray:
    """As AutoGPTQ's description has it: scales[g] * (q - (z + 1)), number by number. Returns [N, K]."""
    words, zeros = (tensors[name].numpy().view(np.uint32) for name in ("qweight", "qzeros"))
    scales, g_idx, mask = tensors["scales"].float().numpy(), tensors["g_idx"].tolist(), (1 << bits) - 1
    per = 32 // bits
    weight = np.zeros((words.shape[1], words.shape[0] * per), dtype=np.float32)
    for n in range(weight.shape[0]):
        for k, group in enumerate(g_idx):
            q = int(words[k // per, n]) >> bits * (k % per) & mask
            z = int(zeros[group, n // per]) >> bits * (n % per) & mask
            weight[n, k] = scales[group, n] * (q - (z + 1))
    return weight


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_weights_are_those_of_autogptqs_description(make_linear, same, kind: dict[str, Any]) -> None:
    linear = make_linear(**kind)
    tensors = FORMAT.encode(linear)
    assert np.array_equal(dequantized(tensors, linear.bits), linear.dense(torch.float32).numpy())
    assert same(FORMAT.decode("m", tensors, ModuleScheme.of(linear)), linear)


@pytest.mark.parametrize(
    ("suffix", "change", "says"),
    [
        ("qweight", lambda t: t[1:], "expected int32 [16, 32], found int32 [15, 32]"),
        ("qzeros", lambda t: t + 1, "expected symmetric weights"),
        ("qzeros", lambda t: t[:, 1:], "expected int32 [4, 4]"),
        ("scales", lambda t: t * float("nan"), "NaN or Inf"),
        ("scales", lambda t: None, "is missing"),
        ("g_idx", lambda t: t.flip(0), "expected inputs in order, found activation order"),
        ("g_idx", lambda t: t.long(), "expected int32 [128]"),
    ],
)
def test_a_damaged_tensor_is_refused_by_name(
    make_linear, suffix: str, change: Callable[[Tensor], Tensor | None], says: str
) -> None:
    linear = make_linear(**KINDS[0])
    tensors = FORMAT.encode(linear)
    changed = change(tensors.pop(suffix))
    tensors |= {} if changed is None else {suffix: changed}
    with pytest.raises(CheckpointError) as caught:
        FORMAT.decode("model.layers.0.up", tensors, ModuleScheme.of(linear))
    assert f"model.layers.0.up.{suffix}" in str(caught.value) and says in str(caught.value)


def test_what_the_format_cannot_hold(make_linear) -> None:
    assert FORMAT.supports(make_linear(n=32)) is None
    assert "not quantized" in FORMAT.supports(make_linear(n=32, bits=16))
    assert "multiples of 32 outputs and inputs, not 24 x 128" in FORMAT.supports(make_linear())


MIXED = {
    "model.layers.0.self_attn.v_proj": {"bits": 8, "pattern": "dense"},
    "model.layers.1.mlp.down_proj": {"bits": 4, "group_size": 192},
    "model.layers.2.self_attn.o_proj": None,
    "lm_head": {"bits": 8, "pattern": "dense", "group_size": 64},
}


@pytest.mark.parametrize("recipe", [{}, MIXED], ids=["uniform", "mixed"])
def test_a_checkpoint_is_written_read_and_exported_without_loss(llama, compress, same, tmp_path, recipe) -> None:
    original, linears = compress(llama(tied=not recipe), tmp_path / "original", "sparse24", recipe)
    there = export(original, "gptq", tmp_path / "there", quiet=True)
    config = json.loads((there / "config.json").read_text())["quantization_config"]
    assert json.loads((there / "quantize_config.json").read_text()) == config
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 32, True, False)
    assert config["lm_head"] is bool(recipe) and ("dynamic" in config) is bool(recipe)
    opened = open_compressed(there)
    assert opened.format == "gptq" and all(same(opened.linear(module), linear) for module, linear in linears.items())
    found = inspect(there, quiet=True).totals()
    assert found["two_four_linears"] == sum(linear.pattern == "2:4" for linear in linears.values())
    back = export(there, "sparse24", tmp_path / "back", quiet=True)
    assert (back / "model.safetensors").read_bytes() == (original / "model.safetensors").read_bytes()
    assert not (back / "quantize_config.json").exists()
    assert json.loads((back / "config.json").read_text()) == json.loads((original / "config.json").read_text())


def test_other_settings_are_rules_that_gptqmodel_and_vllm_look_up(llama, compress, tmp_path) -> None:
    out, linears = compress(llama(tied=False), tmp_path / "out", "gptq", MIXED)
    dynamic = json.loads((out / "config.json").read_text())["quantization_config"]["dynamic"]

    def looked_up(module: str) -> dict[str, Any] | None:
        for pattern, settings in dynamic.items():  # GPTQModel's `dynamic_get`: the first that matches
            if re.match(pattern[2:], module):
                return None if pattern.startswith("-:") else settings
        return {"bits": 4, "group_size": 32}

    for module, linear in linears.items():
        size = linear.group_size
        channel = size == linear.shape[1] and size not in (32, 64, 128)
        assert looked_up(module) == {"bits": linear.bits, "group_size": -1 if channel else size}
    assert looked_up("model.layers.2.self_attn.o_proj") is None


def test_a_recipe_writes_gptq(tmp_path, llama) -> None:
    recipe = "version: 1\npasses:\n  - quantize: {method: rtn, bits: 4, group_size: 32}\nexport: {format: gptq}\n"
    result = apply(parse_recipe(recipe), str(llama()), tmp_path / "out", quiet=True)
    assert result.metrics["format"] == "gptq" and len(result.metrics["layers"]) == 21
    opened = open_compressed(tmp_path / "out")
    assert len(opened.modules) == 21 and {scheme.bits for scheme in opened.modules.values()} == {4}
    dense = open_checkpoint(export(tmp_path / "out", "dense", tmp_path / "dense", quiet=True))
    name = "model.layers.1.mlp.up_proj"
    before = open_checkpoint(llama()).tensor(f"{name}.weight").float()
    assert (dense.tensor(f"{name}.weight").float() - before).abs().max() < before.abs().max() / 7
    with pytest.raises(RecipeError, match="gptq stores integers but no pass quantizes"):
        parse_recipe("version: 1\npasses:\n  - prune: {method: magnitude}\nexport: {format: gptq}\n")


def edited(directory: Path, **config: Any) -> Path:
    """Change quantization_config in config.json."""
    found = json.loads((directory / "config.json").read_text())
    found["quantization_config"] |= config
    (directory / "config.json").write_text(json.dumps(found))
    return directory


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"bits": 8}, "down_proj.weight has shape [64, 96], but config.json asks for [64, 192]"),
        ({"group_size": 64}, "down_proj.qzeros: expected int32 [3, 8], found int32 [6, 8]"),
        ({"bits": 3}, "down_proj.qweight: expected int32 [18, 64], found int32 [24, 64]"),
        ({"checkpoint_format": "marlin"}, "'marlin'"),
        ({"dynamic": {"-:.*up_proj": {}}}, "up_proj"),
    ],
)
def test_config_and_tensors_that_disagree_are_refused(llama, compress, tmp_path, config, says) -> None:
    out, _ = compress(llama(), tmp_path / "out", "gptq")
    with pytest.raises(CheckpointError) as caught:
        export(edited(out, **config), "dense", tmp_path / "refused", quiet=True)
    assert says in str(caught.value) and not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"sym": False}, "expected sym: true"),
        ({"desc_act": True}, "expected desc_act: false"),
        ({"bits": 3}, "expected bits 4 or 8"),
        ({"group_size": 0}, "group_size as a number or -1"),
        ({"checkpoint_format": "marlin"}, "expected checkpoint_format gptq or gptq_v2, found 'marlin'"),
        ({"dynamic": {"-:.*up_proj": {}}}, "up_proj is packed, but `dynamic` in config.json excludes it"),
        ({"dynamic": {"+:(": {}}}, "is no regular expression"),
        ({"dynamic": ["up_proj"]}, "dynamic must map regular expressions to settings"),
    ],
)
def test_settings_that_the_format_does_not_hold(config: dict[str, Any], says: str) -> None:
    """Then the checkpoint is dequantized, where `formats.foreign` reads it, or refused."""
    own = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    shapes = {"model.layers.0.mlp.up_proj.qweight": (8, 192)}
    assert FORMAT.schemes(own, shapes) == {"model.layers.0.mlp.up_proj": ModuleScheme(4, 32, "dense", (192, 64))}
    with pytest.raises(CheckpointError) as caught:
        FORMAT.schemes(own | config, shapes)
    assert says in str(caught.value)
    with pytest.raises(CheckpointError, match="but no tensor is"):
        FORMAT.schemes(own, {"lm_head.weight": (96, 64)})


def test_version_2_and_missing_versions_are_read(llama, compress, same, tmp_path) -> None:
    out, linears = compress(llama(), tmp_path / "out", "gptq")
    tensors = load_file(out / "model.safetensors")
    for name in [name for name in tensors if name.endswith("qzeros")]:
        assert (tensors[name] == 0x77777777).all()
        tensors[name] = torch.full_like(tensors[name], 0x88888888 - (1 << 32))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (out / "config.json").write_text(json.dumps(config))
    opened = open_compressed(out)
    assert all(same(opened.linear(module), linear) for module, linear in linears.items())
    assert GptqConfig.from_dict({"bits": 4, "group_size": -1}).label("m") == Label(4, "channel", "dense")
