"""Quantized checkpoints are scored on any machine, with the weights that their files stand for."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsify.errors import CheckpointError
from sparsify.evaluation import evaluate, load_model
from tests.helpers.foreign import awq, compressed_tensors, fp8, gptq, quantized_checkpoint
from tests.helpers.tiny import tiny_text

FP4 = {"num_bits": 4, "type": "float"}
KINDS = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True}, gptq(order=True)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq()),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [32, 32]}, fp8((32, 32))),
    "nvfp4": compressed_tensors("nvfp4-pack-quantized", strategy="tensor_group", group_size=16, **FP4),
    "mxfp4": compressed_tensors("mxfp4-pack-quantized", strategy="group", group_size=32, **FP4),
    "pack": compressed_tensors("pack-quantized", num_bits=4, strategy="group", group_size=32),
    "pack asymmetric": compressed_tensors("pack-quantized", num_bits=4, symmetric=False, strategy="group", group_size=32),
    "int": compressed_tensors("int-quantized", num_bits=8, strategy="channel"),
    "float": compressed_tensors("float-quantized", num_bits=8, type="float", strategy="channel"),
}  # fmt: skip


def reference(directory, expected):
    """The dense model of the weights, in float32: everything else comes from the files by transformers' own rules."""
    config = json.loads((directory / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (directory / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with torch.no_grad():
        for name, weight in expected.items():
            model.get_parameter(name).copy_(weight.bfloat16())
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_is_that_of_the_dequantized_weights(kind, tmp_path):
    config, write = KINDS[kind]
    expected = quantized_checkpoint(tmp_path / "m", config, write)
    text = tiny_text(tmp_path / "text.txt")
    found = evaluate(tmp_path / "m", text=text, sequence_length=32, chunks=4, quiet=True)
    model = reference(tmp_path / "m", expected)
    tokens = torch.tensor(load_tokens(tmp_path / "m", text))[: 4 * 32].reshape(4, 32)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].log_softmax(-1)
    wanted = math.exp(-logits.gather(2, tokens[:, 1:, None]).mean().item())
    assert found.perplexity == pytest.approx(wanted, rel=2e-3)
    assert found.format in (config["quant_method"], config.get("format"))


def load_tokens(directory, text):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)(text.read_text(), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["gptq", "fp8", "int"])
def test_a_directory_without_its_quantization_config_is_refused(kind, tmp_path):
    """transformers would leave the weights random that it has no tensors for."""
    quantized_checkpoint(tmp_path / "m", None, KINDS[kind][1])
    with pytest.raises(CheckpointError, match="a tensor of a quantized weight, but its config.json has no"):
        load_model(tmp_path / "m")


def test_gptq_is_explained_by_its_own_file(tmp_path):
    beside = {"quantize_config.json": {"bits": 4, "group_size": 32, "sym": True, "desc_act": True}}
    expected = quantized_checkpoint(tmp_path / "m", None, gptq(order=True), beside)
    loaded = load_model(tmp_path / "m")
    assert loaded.format == "gptq" and loaded.directory == tmp_path / "m"
    for name, weight in expected.items():
        assert torch.equal(loaded.model.get_parameter(name), weight.bfloat16().float())
