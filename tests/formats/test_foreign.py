"""Foreign checkpoints as sources: the weights are those that the software that wrote them gives back."""

from typing import Any

import pytest
import torch

from sparsify.errors import CheckpointError
from sparsify.formats.foreign import open_dense
from sparsify.formats.tensor_file import read_tensor
from tests.helpers.foreign import (
    awq,
    change_config,
    change_tensors,
    compressed_tensors,
    fp8,
    gptq,
    quantized_checkpoint,
)

INT = {"type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
COMPRESSED_TENSORS = {
    "pack 4-bit": ("pack-quantized", {**INT, "num_bits": 4}),
    "pack 8-bit": ("pack-quantized", {**INT, "num_bits": 8}),
    "pack 3-bit": ("pack-quantized", {**INT, "num_bits": 3}),
    "pack 5-bit channel": ("pack-quantized", {"num_bits": 5, "type": "int", "strategy": "channel"}),
    "pack asymmetric": ("pack-quantized", {**INT, "num_bits": 4, "symmetric": False}),
    "pack asymmetric channel": ("pack-quantized", {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "channel"}),
    "pack ordered": ("pack-quantized", {**INT, "num_bits": 4, "actorder": "group"}),
    "pack ordered asymmetric": ("pack-quantized", {**INT, "num_bits": 4, "actorder": "group", "symmetric": False}),
    "int": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int tensor": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "tensor"}),
    "int asymmetric": ("int-quantized", {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel"}),
    "naive 4-bit": ("naive-quantized", {**INT, "num_bits": 4}),
    "float": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "float tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "float block": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]}),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
    "mxfp8": (
        "mxfp8-quantized",
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
}  # fmt: skip


def decoded(directory: Any) -> dict[str, torch.Tensor]:
    """Every weight in float32 as it is dequantized, before it is rounded."""
    opened = open_dense(directory)
    found = {}
    for module, one in opened.modules.items():
        tensors = {s: read_tensor(opened.stored.info(f"{module}.{s}").file, f"{module}.{s}") for s in one.stored}
        found[f"{module}.weight"] = one.decode(module, tensors)
    return found


def same_weights(directory: Any, expected: dict[str, torch.Tensor], exact: bool = True) -> None:
    """Bit for bit in float32, and rounded once to the type of the model; the first rows alone are the same."""
    opened = open_dense(directory)
    found = decoded(directory)
    assert set(found) == set(expected) and found
    for name, weight in expected.items():
        if exact:
            assert torch.equal(found[name], weight), name
        assert torch.equal(opened.tensor(name).float(), weight.to(opened.dtype(name)).float()), name
        assert opened.shape(name) == tuple(weight.shape) and opened.dtype(name) == torch.bfloat16
        assert torch.equal(opened.first_rows(name, 32), opened.tensor(name)[:32])
    assert "quantization_config" not in opened.config
    assert opened.nbytes() == sum(opened.tensor(name).nbytes for name in opened.names())
    assert opened.stored_nbytes() < opened.nbytes()


@pytest.mark.parametrize("kind", COMPRESSED_TENSORS)
def test_compressed_tensors(kind, tmp_path):
    format, weights = COMPRESSED_TENSORS[kind]
    config, write = compressed_tensors(format, **weights)
    expected = quantized_checkpoint(tmp_path / "m", config, write)
    # FP4 and MX formats are decompressed to bfloat16 there
    same_weights(tmp_path / "m", expected, exact=not format.startswith(("nvfp4", "mxfp")))


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    "config, write",
    [
        ({**FP8, "weight_block_size": [128, 128]}, fp8()),
        ({**FP8, "weight_block_size": [48, 32]}, fp8((48, 32))),  # the last block of a column is not full
        (FP8, fp8(None, per_output=False)),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, fp8(None)),
    ],
)
def test_fp8(config, write, tmp_path):
    same_weights(tmp_path / "m", quantized_checkpoint(tmp_path / "m", config, write))


GPTQ_CONFIG = {"quant_method": "gptq", "group_size": 32, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
GPTQMODEL = {"quantizer": ["gptqmodel:7.7.0"]}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "config, settings",
    [
        ({}, {}),
        ({"sym": False}, {"symmetric": False}),
        ({"sym": False, "meta": GPTQMODEL}, {"symmetric": False, "by_word": True}),
        ({"sym": False, "checkpoint_format": "gptq_v2"}, {"symmetric": False, "version": 2}),
        ({"desc_act": True}, {"order": True}),
        ({"group_size": -1}, {"group_size": -1}),
    ],
)
def test_gptq(bits, config, settings, tmp_path):
    config = {**GPTQ_CONFIG, "bits": bits, **config}
    same_weights(tmp_path / "m", quantized_checkpoint(tmp_path / "m", config, gptq(bits, **settings)))


def test_gptq_of_autogptq_directory(tmp_path):
    """No quantization_config, the file named by bits and groups: what AutoGPTQ 0.7.1 writes."""
    beside = {
        "quantize_config.json": {"bits": 4, "group_size": 32, "sym": True, "desc_act": True, "quant_method": "gptq"}
    }
    expected = quantized_checkpoint(
        tmp_path / "m", None, gptq(order=True), beside, file="gptq_model-4bit-32g.safetensors"
    )
    same_weights(tmp_path / "m", expected)
    (tmp_path / "m" / "quantize_config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"down_proj\.g_idx, a tensor of a quantized weight.*no quantization_config"
    ):
        open_dense(tmp_path / "m")


def test_gptq_bits_of_each_module(tmp_path):
    """GPTQModel's `dynamic`: other bits for one module, another one dense."""
    dynamic = {r"+:.*\.1\.mlp\.up_proj": {"bits": 8, "group_size": 64}, r"-:.*\.1\.mlp\.down_proj": {}}
    config = {**GPTQ_CONFIG, "bits": 4, "dynamic": dynamic}
    expected = quantized_checkpoint(tmp_path / "m", config, gptq())
    one, other = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
    dense = torch.randn(64, 128).bfloat16()
    new, weight = gptq(8, 64)(torch.randn(128, 64))

    def change(tensors):
        for module in (one, other):
            for suffix in ("qweight", "qzeros", "scales", "g_idx"):
                del tensors[f"{module}.{suffix}"]
        tensors |= {f"{one}.{suffix}": tensor.contiguous() for suffix, tensor in new.items()}
        tensors[f"{other}.weight"] = dense

    change_tensors(tmp_path / "m", change)
    del expected[f"{other}.weight"]
    same_weights(tmp_path / "m", {**expected, f"{one}.weight": weight})
    assert torch.equal(open_dense(tmp_path / "m").tensor(f"{other}.weight"), dense)


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def test_awq(tmp_path):
    same_weights(tmp_path / "m", quantized_checkpoint(tmp_path / "m", AWQ_CONFIG, awq()))


def test_type_of_the_model_decides_the_rounding(tmp_path):
    expected = quantized_checkpoint(tmp_path / "m", {**GPTQ_CONFIG, "bits": 4}, gptq())
    change_config(tmp_path / "m", dtype="float16")
    name = next(iter(expected))
    assert torch.equal(open_dense(tmp_path / "m").tensor(name), expected[name].half())
