"""Foreign checkpoints as sources: the weights are those that the software that wrote them gives back."""

from typing import Any

import pytest
import torch

from sparsify.errors import CheckpointError
from sparsify.formats.foreign import open_dense, open_described_dense
from sparsify.formats.reader import open_compressed
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
from tests.helpers.tiny import save_tiny

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


def same_as_described(directory: Any) -> None:
    """What config.json alone says of the files is what their writer wrote: names and shapes, and types but for those of scales,
    which a writer may choose."""
    stored = open_dense(directory).stored.infos
    found = open_described_dense(directory).stored.infos
    assert {name: info.shape for name, info in found.items()} == {name: info.shape for name, info in stored.items()}
    for name, info in found.items():
        assert info.dtype == stored[name].dtype or name.endswith(("scale", "scales", "scale_inv", "weight_shape")), name


@pytest.mark.parametrize("kind", COMPRESSED_TENSORS)
def test_compressed_tensors(kind, tmp_path):
    format, weights = COMPRESSED_TENSORS[kind]
    config, write = compressed_tensors(format, **weights)
    expected = quantized_checkpoint(tmp_path / "m", config, write)
    if "ordered" not in kind and kind != "pack 5-bit channel":  # of these, the files say how many inputs there are
        same_as_described(tmp_path / "m")
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
    same_as_described(tmp_path / "m")


def test_fp8_blocks_are_what_transformers_dequantizes(tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    quantized_checkpoint(tmp_path / "m", {**FP8, "weight_block_size": [32, 32]}, fp8((32, 32)))
    opened = open_dense(tmp_path / "m")
    found = decoded(tmp_path / "m")
    for module in opened.modules:
        weight, scale = (opened.stored.tensor(f"{module}.{suffix}") for suffix in ("weight", "weight_scale_inv"))
        theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
        assert torch.equal(found[f"{module}.weight"], theirs), module


@pytest.mark.parametrize("kind", ["e8m0", "bytes"])
def test_fp8_scales_that_are_exponents(kind, tmp_path):
    """DeepSeek's scale_fmt ue8m0: powers of two, one byte each."""
    expected = quantized_checkpoint(tmp_path / "m", {**FP8, "weight_block_size": [32, 32]}, fp8((32, 32)))

    def change(tensors):
        for name, scale in tensors.items():
            if name.endswith("weight_scale_inv"):
                power = scale.log2().round()
                weight = name.replace("weight_scale_inv", "weight")
                spread = power.exp2().repeat_interleave(32, 0).repeat_interleave(32, 1)
                expected[weight] = tensors[weight].float() * spread
                tensors[name] = (power + 127).to(torch.uint8)
                if kind == "e8m0":
                    tensors[name] = tensors[name].view(torch.float8_e8m0fnu)

    change_tensors(tmp_path / "m", change)
    same_weights(tmp_path / "m", expected)


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
    same_as_described(tmp_path / "m")
    assert torch.equal(open_dense(tmp_path / "m").tensor(f"{other}.weight"), dense)


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def test_awq(tmp_path):
    same_weights(tmp_path / "m", quantized_checkpoint(tmp_path / "m", AWQ_CONFIG, awq()))
    same_as_described(tmp_path / "m")


def test_type_of_the_model_decides_the_rounding(tmp_path):
    expected = quantized_checkpoint(tmp_path / "m", {**GPTQ_CONFIG, "bits": 4}, gptq())
    change_config(tmp_path / "m", dtype="float16")
    name = next(iter(expected))
    assert torch.equal(open_dense(tmp_path / "m").tensor(name), expected[name].half())


def damaged(tensor_name, change):
    """Alters one tensor; None takes it away."""

    def alter(tensors):
        changed = change(tensors[tensor_name]) if change else None
        if changed is None:
            del tensors[tensor_name]
        else:
            tensors[tensor_name] = changed.contiguous()

    return alter


def put(value, place=(0, 0)):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


UP = "model.layers.0.mlp.up_proj"
BAD_GPTQ = [
    (f"{UP}.scales", None, r"scales is missing"),
    (f"{UP}.qzeros", None, r"qzeros is missing"),
    (f"{UP}.qweight", lambda t: t[:-1], r"qweight: expected int32 \[8, 128\], found int32 \[7, 128\]"),
    (f"{UP}.qweight", lambda t: t.to(torch.int64), r"qweight: expected int32 \[8, 128\], found int64"),
    (f"{UP}.scales", put(float("nan")), r"scales: expected finite scales that are not negative, found nan"),
    (f"{UP}.scales", put(-0.5), r"scales: expected finite scales that are not negative, found -0.5"),
    (f"{UP}.g_idx", put(2, 5), r"g_idx: expected groups from 0 to 1 in activation order, found 0 to 2"),
    (f"{UP}.g_idx", put(-1, 5), r"g_idx: expected groups from 0 to 1 in activation order, found -1 to 1"),
    (f"{UP}.qzeros", put(0x77777776), r"qzeros: the config says symmetric, which is a zero point of 8, found 7"),
    (f"{UP}.qzeros", put(-1), r"qzeros: expected zero points of 4 bits, found 16: AutoGPTQ overwrites"),
]  # fmt: skip


@pytest.mark.parametrize("name, change, says", BAD_GPTQ)
def test_damaged_gptq_is_refused_by_tensor(name, change, says, tmp_path):
    quantized_checkpoint(tmp_path / "m", {**GPTQ_CONFIG, "bits": 4, "desc_act": True}, gptq(order=True))
    change_tensors(tmp_path / "m", damaged(name, change))
    with pytest.raises(CheckpointError, match=rf"model\.layers\.0\.mlp\.up_proj\.{says}"):
        open_dense(tmp_path / "m").tensor(f"{UP}.weight")


def test_an_order_that_the_config_denies_is_refused(tmp_path):
    quantized_checkpoint(tmp_path / "m", {**GPTQ_CONFIG, "bits": 4}, gptq(order=True))
    with pytest.raises(CheckpointError, match=rf"{UP}.g_idx: the config says desc_act false"):
        open_dense(tmp_path / "m").tensor(f"{UP}.weight")


ASYMMETRIC = {**INT, "num_bits": 4, "symmetric": False}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
BAD_TENSORS = [
    ("pack-quantized", ASYMMETRIC, "weight_scale", None, "weight_scale is missing"),
    ("pack-quantized", ASYMMETRIC, "weight_zero_point", None, "weight_zero_point is missing"),
    ("pack-quantized", ASYMMETRIC, "weight_packed", lambda t: t[:, :-1], r"weight_packed: expected int32 \[128, 8\], found"),
    ("pack-quantized", ASYMMETRIC, "weight_shape", put(65, 1), r"weight_shape: expected \[128, 64\], found \[128, 65\]"),
    ("pack-quantized", {**ASYMMETRIC, "actorder": "group"}, "weight_g_idx", put(9, 0), "weight_g_idx: expected groups from 0"),
    ("pack-quantized", {**ASYMMETRIC, "actorder": "group"}, "weight_g_idx", torch.zeros_like, "expected 32 inputs in every group"),
    ("naive-quantized", ASYMMETRIC, "weight_zero_point", put(8), "weight_zero_point: expected numbers of 4 bits, -8 to 7, found 8"),
    ("int-quantized", {"num_bits": 8, "strategy": "channel"}, "weight_scale", put(-1.0), "weight_scale: expected finite scales"),
    ("int-quantized", {"num_bits": 8, "strategy": "channel"}, "weight", lambda t: t.bfloat16(), "weight: expected int8"),
    ("nvfp4-pack-quantized", NVFP4, "weight_global_scale", put(0.0, 0), "weight_global_scale is 0"),
    ("nvfp4-pack-quantized", NVFP4, "weight_packed", lambda t: t[:-1], r"weight_scale: expected .* \[127, 4\]"),
    ("nvfp4-pack-quantized", NVFP4, "weight_scale", lambda t: (t.float() * float("nan")).to(t.dtype), "found nan"),
]  # fmt: skip


@pytest.mark.parametrize("format, weights, suffix, change, says", BAD_TENSORS)
def test_damaged_compressed_tensors_is_refused_by_tensor(format, weights, suffix, change, says, tmp_path):
    config, write = compressed_tensors(format, **weights)
    quantized_checkpoint(tmp_path / "m", config, write)
    change_tensors(tmp_path / "m", damaged(f"{UP}.{suffix}", change))
    with pytest.raises(CheckpointError, match=rf"model\.layers\.0\.mlp\.up_proj\..*{says}|{UP}.{says}"):
        open_dense(tmp_path / "m").tensor(f"{UP}.weight")


BAD_FP8 = [
    ("weight_scale_inv", None, "weight_scale_inv is missing"),
    ("weight_scale_inv", lambda t: t[:-1], r"weight_scale_inv: expected .* \[4, 2\], found float32 \[3, 2\]"),
    ("weight_scale_inv", put(float("inf")), "weight_scale_inv: expected finite scales"),
    ("weight_scale_inv", put(-1.0), "weight_scale_inv: expected finite scales"),
    ("weight", lambda t: t.float().mul(float("nan")).to(t.dtype), "weight: expected finite numbers"),
    ("weight", lambda t: t.bfloat16(), "weight_scale_inv belongs to no FP8 weight"),
]


@pytest.mark.parametrize("suffix, change, says", BAD_FP8)
def test_damaged_fp8_is_refused_by_tensor(suffix, change, says, tmp_path):
    quantized_checkpoint(tmp_path / "m", {**FP8, "weight_block_size": [32, 32]}, fp8((32, 32)))
    change_tensors(tmp_path / "m", damaged(f"{UP}.{suffix}", change))
    with pytest.raises(CheckpointError, match=rf"model\.layers\.0\.mlp\.up_proj\.{says}"):
        open_dense(tmp_path / "m").tensor(f"{UP}.weight")


PACKED_CONFIG, PACKED_WRITE = compressed_tensors("pack-quantized", num_bits=4, strategy="group", group_size=32)
BAD_CONFIG = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "with bitsandbytes, which .* transformers with bitsandbytes reads it"),
    ({"quant_method": "mxfp4"}, r"with mxfp4, .* transformers \(Mxfp4Config\(dequantize=True\)\) reads it"),
    ({"quant_method": "new"}, "with new, which sparsify cannot read; start from the dense model"),
    ({**GPTQ_CONFIG, "bits": 4, "checkpoint_format": "marlin"}, "checkpoint format 'marlin' is not read"),
    ({**GPTQ_CONFIG, "bits": 4, "is_marlin_format": True}, "checkpoint format 'marlin' is not read"),
    ({**GPTQ_CONFIG, "bits": 6}, "GPTQ with 6 bits is not read"),
    ({**GPTQ_CONFIG, "bits": 8}, r"up_proj.qweight|k_proj.qweight|down_proj.qweight"),
    ({**GPTQ_CONFIG, "bits": 4, "group_size": 64}, r"expected int32 \[2, \d+\], found int32 \[4, \d+\]"),
    ({**GPTQ_CONFIG, "bits": 4, "group_size": 0}, "group_size must be positive or -1"),
    ({**GPTQ_CONFIG, "bits": 4, "dynamic": {r"-:.*up_proj": {}}}, "up_proj.qweight is quantized, but dynamic"),
    ({**AWQ_CONFIG, "version": "gemv"}, "AWQ in the layout 'gemv' is not read, only gemm"),
    ({**AWQ_CONFIG, "version": "gemv_fast"}, "AWQ in the layout 'gemv_fast' is not read, only gemm"),
    ({**AWQ_CONFIG, "backend": "llm-awq"}, "AWQ in the layout 'llm-awq' is not read"),
    ({**AWQ_CONFIG, "bits": 8}, "AWQ with 8 bits is not read"),
    ({**PACKED_CONFIG, "format": "int-quantized"}, "but no tensor is quantized"),
    ("4 bits", "must be an object"),
]  # fmt: skip


@pytest.mark.parametrize("config, says", BAD_CONFIG)
def test_a_scheme_that_is_not_read_is_named(config, says, tmp_path):
    quantized_checkpoint(tmp_path / "m", {**GPTQ_CONFIG, "bits": 4}, gptq())
    change_config(tmp_path / "m", quantization_config=config)
    with pytest.raises(CheckpointError, match=says) as error:
        open_dense(tmp_path / "m")
    assert str(error.value).startswith(str(tmp_path / "m")) and "\n" not in str(error.value)


def test_a_config_of_other_tensors_is_refused(tmp_path):
    quantized_checkpoint(tmp_path / "m", PACKED_CONFIG, PACKED_WRITE)
    for change, says in [
        ({"ignore": ["re:.*up_proj"]}, f"{UP} is stored quantized, but the config ignores it"),
        ({"config_groups": {"group_0": {**PACKED_CONFIG["config_groups"]["group_0"], "targets": ["re:.*q_proj"]}}}, "no group of"),
        (
            {"format": "nvfp4-pack-quantized", "config_groups": {"g": {"targets": ["Linear"], "weights": NVFP4}}},
            "weight_global_scale is missing",
        ),
    ]:  # fmt: skip
        change_config(tmp_path / "m", quantization_config={**PACKED_CONFIG, **change})
        with pytest.raises(CheckpointError, match=says):
            open_dense(tmp_path / "m").tensor(f"{UP}.weight")


def test_scales_whose_sign_autoround_turns_are_read(tmp_path):
    config, write = compressed_tensors("pack-quantized", num_bits=3, strategy="group", group_size=32)
    expected = quantized_checkpoint(tmp_path / "m", config, write)
    change_tensors(tmp_path / "m", damaged(f"{UP}.weight_scale", torch.neg))
    assert torch.equal(decoded(tmp_path / "m")[f"{UP}.weight"], -expected[f"{UP}.weight"])


@pytest.mark.parametrize("bits", [4, 3])
def test_a_quantized_embedding_is_dequantized(bits, tmp_path):
    """4 bits in groups of 32 are what our own pack-quantized holds, of linears."""
    config, write = compressed_tensors("pack-quantized", num_bits=bits, strategy="group", group_size=32)
    expected = quantized_checkpoint(tmp_path / "m", config, write)
    group = {**config["config_groups"]["group_0"], "targets": ["Linear", "Embedding"]}
    change_config(tmp_path / "m", quantization_config={**config, "config_groups": {"group_0": group}})
    name = "model.embed_tokens.weight"

    def quantize(tensors):
        new, expected[name] = write(tensors.pop(name).float())
        tensors |= {f"model.embed_tokens.{suffix}": tensor for suffix, tensor in new.items()}

    change_tensors(tmp_path / "m", quantize)
    same_weights(tmp_path / "m", expected)
    assert open_compressed(tmp_path / "m").format == "dense"


def test_what_turns_activations_while_the_model_runs_is_refused(tmp_path):
    """As compressed-tensors writes the transforms of QuIP and of SpinQuant: those of weights are applied already."""
    expected = quantized_checkpoint(tmp_path / "m", PACKED_CONFIG, PACKED_WRITE)

    def apply(*locations):
        entries = [{"targets": ["Linear"], "location": place, "inverse": False, "ignore": []} for place in locations]
        transforms = {"config_groups": {"R": {"type": "hadamard", "apply": entries}}}
        change_config(tmp_path / "m", quantization_config={**PACKED_CONFIG, "transform_config": transforms})

    apply("weight_input", "weight_output")
    assert torch.equal(decoded(tmp_path / "m")[f"{UP}.weight"], expected[f"{UP}.weight"])
    for online in ("input", "output", "k_cache"):
        apply("weight_input", online)
        for opens in (open_dense, open_compressed):
            with pytest.raises(CheckpointError, match=rf"turns activations while the model runs \(R: {online}\)"):
                opens(tmp_path / "m")


def test_a_config_without_any_quantized_tensor_is_refused(tmp_path):
    save_tiny(tmp_path / "m", dtype=torch.bfloat16)
    for config in (PACKED_CONFIG, {**GPTQ_CONFIG, "bits": 4}, AWQ_CONFIG):
        change_config(tmp_path / "m", quantization_config=config)
        with pytest.raises(CheckpointError, match="the config says .*, but no"):
            open_dense(tmp_path / "m")


def test_scales_of_activations_and_caches_are_left_out_and_counted(tmp_path):
    config, write = compressed_tensors("float-quantized", num_bits=8, type="float", strategy="tensor")
    quantized_checkpoint(tmp_path / "m", config, write)
    extra = {f"{UP}.input_scale": torch.ones(1), "model.layers.0.self_attn.k_scale": torch.ones(1)}
    change_tensors(tmp_path / "m", lambda tensors: tensors.update(extra))
    opened = open_dense(tmp_path / "m")
    assert not set(extra) & set(opened.names()) and opened.to_json()["left_out"] == sorted(extra)
