"""Checkpoints of asymmetric linears: from format to format and back, what is refused, and what others wrote."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparsify.compiler.convert import export
from sparsify.errors import CheckpointError
from sparsify.formats import get_format
from sparsify.formats.foreign import open_dense
from sparsify.formats.inspect import inspect
from sparsify.formats.reader import open_compressed
from sparsify.formats.writer import CheckpointWriter
from sparsify.model.checkpoint import open_checkpoint
from tests.helpers.foreign import change_tensors, compressed_tensors, gptq, quantized_checkpoint

LAYERS = [f"model.layers.{block}" for block in range(3)]
MODULES = [f"{layer}.self_attn.{leaf}_proj" for layer in LAYERS for leaf in "qkvo"]
MODULES += [f"{layer}.mlp.{leaf}_proj" for layer in LAYERS for leaf in ("gate", "up", "down")]
ASYMMETRIC: dict[str, Any] = {module: {"symmetric": False} for module in MODULES}
KINDS = {
    **ASYMMETRIC,
    "model.layers.0.self_attn.v_proj": {"bits": 8, "pattern": "dense", "symmetric": False},
    "model.layers.1.mlp.down_proj": {"group_size": 192, "symmetric": False},
    "model.layers.2.self_attn.o_proj": None,
}
SYMMETRIC_TOO = {
    **KINDS,
    "model.layers.1.mlp.up_proj": {},
    "lm_head": {"bits": 8, "pattern": "dense", "group_size": 64},
}


@pytest.mark.parametrize("format", ["pack-quantized", "gptq"])
@pytest.mark.parametrize("kinds", ["all", "some"])
def test_a_checkpoint_is_exported_and_read_back_without_loss(llama, compress, same, tmp_path, format, kinds) -> None:
    recipe = KINDS if kinds == "all" else SYMMETRIC_TOO
    original, linears = compress(llama(tied=kinds == "all"), tmp_path / "original", "sparse24", recipe)
    if format == "gptq" and kinds == "some":
        with pytest.raises(CheckpointError, match=r"has them and .* is symmetric; make all linears alike"):
            export(original, format, tmp_path / "there", quiet=True)
        assert not (tmp_path / "there").exists()
        return
    there = export(original, format, tmp_path / "there", quiet=True)
    config = json.loads((there / "config.json").read_text())["quantization_config"]
    if format == "gptq":
        assert (config["sym"], config["checkpoint_format"]) == (False, "gptq_v2")
    else:
        groups = [group["weights"]["symmetric"] for group in config["config_groups"].values()]
        assert False in groups and (True in groups) is (kinds == "some")
    opened = open_compressed(there)
    assert opened.format == format and all(same(opened.linear(module), linear) for module, linear in linears.items())
    dense = open_dense(there)  # the same weights as the reader of foreign checkpoints has them
    for module, linear in linears.items():
        assert torch.equal(dense.tensor(f"{module}.weight"), linear.dense(torch.bfloat16)), module
    back = export(there, "sparse24", tmp_path / "back", quiet=True)
    assert (back / "model.safetensors").read_bytes() == (original / "model.safetensors").read_bytes()
    assert json.loads((back / "config.json").read_text()) == json.loads((original / "config.json").read_text())


def test_the_dense_export_is_scale_times_code_less_zero_point(llama, compress, tmp_path) -> None:
    original, linears = compress(llama(), tmp_path / "original", "sparse24", KINDS)
    dense = open_checkpoint(export(original, "dense", tmp_path / "dense", quiet=True))
    for module, linear in linears.items():
        zeros, scale = (t.double().repeat_interleave(linear.group_size, 1) for t in (linear.zero_point, linear.scale))
        expected = scale * (linear.codes.double() - zeros)
        assert torch.equal(dense.tensor(f"{module}.weight"), expected.float().bfloat16())
        source = open_dense(original)  # as the source of another recipe
        assert torch.equal(source.tensor(f"{module}.weight"), expected.float().bfloat16())
        assert torch.equal(source.first_rows(f"{module}.weight", 5), expected[:5].float().bfloat16())


def test_what_holds_no_zero_points_refuses_them_before_it_writes(llama, compress, make_linear, tmp_path) -> None:
    kind = {"group_size": 64, "symmetric": False}
    original, _ = compress(llama(), tmp_path / "original", "sparse24", dict.fromkeys(MODULES, kind))
    with pytest.raises(CheckpointError, match="marlin-24 holds symmetric codes only, and this linear has zero points"):
        export(original, "marlin-24", tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
    linear = make_linear(n=64, k=128, group_size=128, symmetric=False)
    assert "symmetric codes only" in get_format("marlin-24").supports(linear)


def test_inspect_counts_zero_points(llama, compress, tmp_path) -> None:
    from rich.console import Console

    from sparsify.formats.inspect import render

    original, _ = compress(llama(), tmp_path / "original", "sparse24", ASYMMETRIC)
    found = inspect(original, quiet=True)
    totals = found.totals()
    assert totals["two_four_linears"] == totals["compressed_linears"] == 21
    assert totals["bits_per_weight"] == 3 + (16 + 8) / 32
    with (console := Console(width=200)).capture() as shown:
        console.print(render(found))
    assert "int4 asym g32 2:4" in shown.get()
    assert not any(t["symmetric"] for t in found.to_json()["tensors"] if t["compressed"])


def test_a_resumed_run_has_the_zero_points_of_a_linear_written_dense(llama, make_linear, same, tmp_path) -> None:
    writer = CheckpointWriter(tmp_path / "out", "dense", open_checkpoint(llama()))
    linear = make_linear(symmetric=False)
    writer.write_part("block.0", {"model.layers.0.up": linear}, {})
    linears, _ = writer.read_part("block.0")
    assert same(linears["model.layers.0.up"], linear)
    assert set(writer.tensor_bytes()) == {"model.layers.0.up.weight"}


def test_a_hostile_zero_point_in_a_file_is_refused_by_name(llama, compress, tmp_path) -> None:
    original, _ = compress(llama(), tmp_path / "original", "sparse24", ASYMMETRIC)
    checkpoint = open_checkpoint(original)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    tensors["model.layers.1.mlp.up_proj.weight_zero_point"][3, 1] = 100
    save_file(tensors, original / "model.safetensors", {"format": "pt"})
    for act in (lambda: inspect(original, quiet=True), lambda: export(original, "dense", tmp_path / "out", quiet=True)):
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight_zero_point.*-8 to 7, found 100"):
            act()
    assert not (tmp_path / "out").exists()


INT = {"type": "int", "symmetric": False, "strategy": "group", "group_size": 32, "num_bits": 4}
GPTQ = {"quant_method": "gptq", "group_size": 32, "bits": 4, "sym": False, "desc_act": False}


@pytest.mark.parametrize(
    ("format", "config", "write"),
    [
        ("pack-quantized", *compressed_tensors("pack-quantized", **INT)),
        ("gptq", {**GPTQ, "checkpoint_format": "gptq_v2"}, gptq(4, symmetric=False, version=2)),
    ],
    ids=["pack-quantized", "gptq_v2"],
)
def test_codes_that_others_wrote_with_zero_points_stay_codes(tmp_path, format, config, write) -> None:
    expected = quantized_checkpoint(tmp_path / "m", config, write)
    if format == "pack-quantized":  # llm-compressor stores scales in the type of the model, this helper in float32
        assert open_compressed(tmp_path / "m").format == "dense"
        change_tensors(tmp_path / "m", lambda tensors: expected.update(with_bfloat16_scales(tensors)))
    opened = open_compressed(tmp_path / "m")
    assert opened.format == format and {f"{module}.weight" for module in opened.modules} == set(expected)
    there = open_compressed(export(tmp_path / "m", "sparse24", tmp_path / "out", quiet=True))
    for name, weight in expected.items():
        linear = there.linear(name.removesuffix(".weight"))
        assert not linear.symmetric and linear.bits == 4
        assert torch.equal(linear.dense(torch.float32), weight), name


def with_bfloat16_scales(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Round the scales in place; the weights as compressed-tensors then has them, in float32."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme, found = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**INT)), {}
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        tensors[name] = tensors[name].bfloat16()
        module = name.removesuffix(".weight_scale")
        state = {s: tensors[f"{module}.{s}"] for s in ("weight_packed", "weight_shape", "weight_zero_point")}
        state["weight_scale"] = tensors[name].float()
        found[f"{module}.weight"] = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    return found


@pytest.mark.parametrize("size", [16, -1])
def test_asymmetric_groups_that_no_kernel_has_are_dequantized_as_before(tmp_path, size) -> None:
    strategy = {"strategy": "channel", "group_size": None} if size < 0 else {"group_size": size}
    config, write = compressed_tensors("pack-quantized", **{**INT, **strategy})
    quantized_checkpoint(tmp_path / "m", config, write)
    change_tensors(tmp_path / "m", lambda t: t.update({n: s.bfloat16() for n, s in t.items() if n.endswith("_scale")}))
    opened = open_compressed(tmp_path / "m")
    assert opened.format == ("pack-quantized" if size < 0 else "dense")
    assert all(opened.linear(module).group_size == scheme.shape[1] for module, scheme in opened.modules.items())


def test_gptq_zero_points_of_version_1_are_dequantized_as_before(tmp_path) -> None:
    config = {**GPTQ, "checkpoint_format": "gptq"}
    quantized_checkpoint(tmp_path / "m", config, gptq(4, symmetric=False))
    assert open_compressed(tmp_path / "m").format == "dense"
