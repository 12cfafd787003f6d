"""pack-quantized against compressed-tensors itself, to the bit."""

from dataclasses import replace

import pytest
import torch

from sparsify.errors import CheckpointError
from sparsify.formats import ModuleScheme, get_format

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig

FORMAT = get_format("pack-quantized")
KINDS = [
    dict(bits=4, group_size=32),
    dict(bits=4, group_size=64, pattern="dense"),
    dict(bits=4, k=208, group_size=208, pattern="dense", dtype=torch.float16),
    dict(bits=8, group_size=128),
    dict(bits=8, k=48, group_size=48, pattern="dense", bias=True),
    dict(bits=4, group_size=32, symmetric=False),
    dict(bits=4, n=27, k=208, group_size=208, pattern="dense", dtype=torch.float16, symmetric=False),
    dict(bits=8, n=26, group_size=128, symmetric=False, bias=True),
]


def oracle_scheme(linear):
    config = FORMAT.quantization_config({"model.layers.0.up": ModuleScheme.of(linear)}, ["lm_head"])
    parsed = QuantizationConfig.model_validate(config)
    return next(iter(parsed.config_groups.values()))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_oracle_packs_the_same_bytes(make_linear, kind):
    linear = make_linear(**kind)
    ours = FORMAT.encode(linear)
    # float32 weights and scales, so that the oracle's own rounding finds our codes again
    state = {"weight": linear.dense(torch.float32), "weight_scale": linear.scale.float()}
    state |= {} if linear.symmetric else {"weight_zero_point": linear.zero_point}
    theirs = PackedQuantizationCompressor.compress(state, oracle_scheme(linear))
    assert torch.equal(ours["weight_packed"], theirs["weight_packed"])
    assert torch.equal(ours["weight_shape"], theirs["weight_shape"]) and ours["weight_shape"].dtype == torch.int64
    assert set(ours) - {"bias"} == set(theirs)
    if not linear.symmetric:
        assert torch.equal(ours["weight_zero_point"], theirs["weight_zero_point"])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_oracle_reads_our_bytes(make_linear, same, kind):
    linear = make_linear(**kind)
    encoded = FORMAT.encode(linear)
    theirs = PackedQuantizationCompressor.decompress(dict(encoded), oracle_scheme(linear))
    assert torch.equal(theirs["weight"], linear.dense(theirs["weight"].dtype))
    assert same(FORMAT.decode("m", encoded, ModuleScheme.of(linear)), linear)


def test_pattern_is_read_off_the_codes(make_linear, same):
    sparse, dense = make_linear(), make_linear(pattern="dense")
    plain = ModuleScheme(4, 64, "dense", (24, 128))
    assert same(FORMAT.decode("m", FORMAT.encode(sparse), plain), sparse)
    assert FORMAT.decode("m", FORMAT.encode(dense), plain).pattern == "dense"
    with pytest.raises(CheckpointError, match="m.weight_packed: expected 2:4 codes"):
        FORMAT.decode("m", FORMAT.encode(dense), ModuleScheme(4, 64, "2:4", (24, 128)))


def test_unquantized_linears_are_not_supported(make_linear):
    assert "not quantized" in FORMAT.supports(make_linear(bits=16))
    assert FORMAT.supports(make_linear()) is None


@pytest.mark.parametrize(
    ("suffix", "value", "says"),
    [
        ("weight_packed", torch.zeros(24, 15, dtype=torch.int32), "expected int32 [24, 16]"),
        ("weight_packed", torch.zeros(24, 16, dtype=torch.int64), "found int64"),
        ("weight_scale", torch.full((24, 2), float("nan"), dtype=torch.bfloat16), "NaN or Inf"),
        ("weight_scale", torch.ones(24, 4, dtype=torch.bfloat16), "expected bfloat16 or float16 [24, 2]"),
        ("weight_shape", torch.tensor([24, 127]), "expected [24, 128], found [24, 127]"),
        ("weight_shape", torch.tensor([24, 128, 1]), "expected int64 or int32 [2]"),
        ("weight_zero_point", torch.zeros(3, 2, dtype=torch.int32), "expected symmetric codes in input order, found"),
        ("weight_g_idx", torch.zeros(128, dtype=torch.int32), "in input order"),
    ],
)
def test_a_damaged_tensor_is_refused_by_name(make_linear, suffix, value, says):
    linear = make_linear()
    with pytest.raises(CheckpointError) as caught:
        FORMAT.decode("model.layers.0.up", {**FORMAT.encode(linear), suffix: value}, ModuleScheme.of(linear))
    assert f"model.layers.0.up.{suffix}" in str(caught.value) and says in str(caught.value)


def test_zero_points_are_known_words(make_linear):
    """-8, -7 ... 7 along the outputs, eight to a word, the first lowest; what is over in the last word is zero bits."""
    linear = make_linear(n=18, k=32, group_size=32, pattern="dense", symmetric=False)
    linear.zero_point[:, 0] = torch.tensor([*range(-8, 8), 7, -8])
    words = FORMAT.encode(linear)["weight_zero_point"]
    assert [word % 2**32 for word in words[:, 0].tolist()] == [0x76543210, 0xFEDCBA98, 0x0000000F]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "is missing, expected int32 [3, 2]"),
        (torch.zeros(3, 2, dtype=torch.int8), "expected int32 [3, 2], found int8 [3, 2]"),
        (torch.zeros(24, 2, dtype=torch.int32), "expected int32 [3, 2], found int32 [24, 2]"),
    ],
)
def test_damaged_zero_points_are_refused_by_name(make_linear, value, says):
    linear = make_linear(symmetric=False)
    tensors = {**FORMAT.encode(linear), "weight_zero_point": value}
    tensors = {suffix: tensor for suffix, tensor in tensors.items() if tensor is not None}
    with pytest.raises(CheckpointError) as caught:
        FORMAT.decode("model.layers.0.up", tensors, ModuleScheme.of(linear))
    assert "model.layers.0.up.weight_zero_point" in str(caught.value) and says in str(caught.value)


def test_config_groups_tell_of_every_linear_how_it_is_compressed():
    modules = {f"model.layers.{i}.mlp.up": ModuleScheme(4, 64, "2:4", (32, 192)) for i in range(3)}
    modules["model.layers.1.mlp.down"] = ModuleScheme(8, 192, "2:4", (32, 192))
    modules["model.layers.2.mlp.down"] = ModuleScheme(8, 192, "dense", (32, 192))
    modules["model.layers.2.mlp.gate"] = ModuleScheme(4, 64, "2:4", (32, 192), symmetric=False)
    config = FORMAT.quantization_config(modules, ["lm_head"])
    QuantizationConfig.model_validate(config)
    assert config["ignore"] == ["lm_head"]
    assert [g["targets"] for g in config["config_groups"].values()] == [
        ["Linear"], ["model.layers.1.mlp.down", "model.layers.2.mlp.down"], ["model.layers.2.mlp.gate"],
    ]  # fmt: skip
    shapes = {f"{n}.weight_packed": (s.shape[0], s.shape[1] * s.bits // 32) for n, s in modules.items()}
    plain = {n: replace(s, pattern="dense") for n, s in modules.items()}
    assert FORMAT.schemes(config, shapes) == plain


def test_regular_expressions_and_presence_in_foreign_configs():
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    config = {"config_groups": {"a": {"targets": [r"re:.*up$"], "weights": weights}}}
    shapes = {"model.layers.0.up.weight_packed": (8, 8)}
    assert FORMAT.schemes(config, shapes) == {"model.layers.0.up": ModuleScheme(4, 32, "dense", (8, 64))}
    with pytest.raises(CheckpointError, match="model.layers.0.down is packed, but no group"):
        FORMAT.schemes(config, {"model.layers.0.down.weight_packed": (8, 8)})
    config["config_groups"]["a"]["targets"].append("model.layers.7.up")
    with pytest.raises(CheckpointError, match="lists model.layers.7.up as compressed"):
        FORMAT.schemes(config, shapes)
    config["config_groups"]["a"]["targets"] = ["re:("]
    with pytest.raises(CheckpointError, match="no regular expression"):
        FORMAT.schemes(config, shapes)


@pytest.mark.parametrize(
    "change",
    [{"symmetric": None}, {"num_bits": 3}, {"num_bits": None}, {"type": "float"}, {"strategy": "tensor"},
     {"strategy": "group", "group_size": None}],
    ids=str,
)  # fmt: skip
def test_unreadable_groups_are_refused(change):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **change}
    with pytest.raises(CheckpointError, match="group_0: expected 4- or 8-bit"):
        FORMAT.schemes({"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}, {})
