"""The bytes of sparse24: layout, exact round trip, and refusal of every damaged tensor by name."""

from dataclasses import replace

import pytest
import torch

from sparsify.errors import CheckpointError
from sparsify.formats import ModuleScheme, get_format
from sparsify.formats.sparse24 import Sparse24Config, all_zero, tensor_layout

FORMAT = get_format("sparse24")
KINDS = [
    dict(bits=4, group_size=32),
    dict(bits=4, group_size=64, bias=True),
    dict(bits=4, group_size=128, dtype=torch.float16),
    dict(bits=4, k=208, group_size=208),
    dict(bits=8, group_size=64, bias=True),
    dict(bits=8, k=48, group_size=48),
    dict(bits=16),
    dict(bits=16, dtype=torch.float16, bias=True),
    dict(bits=4, group_size=64, pattern="dense"),
    dict(bits=8, group_size=128, pattern="dense", bias=True),
    dict(bits=4, group_size=32, symmetric=False, bias=True),
    dict(bits=4, k=208, group_size=208, symmetric=False, dtype=torch.float16),
    dict(bits=8, group_size=64, symmetric=False),
    dict(bits=4, group_size=64, pattern="dense", symmetric=False),
    dict(bits=8, k=48, group_size=48, pattern="dense", symmetric=False),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_round_trip_is_exact_and_tensors_follow_the_layout(make_linear, same, kind):
    linear = make_linear(**kind)
    assert FORMAT.supports(linear) is None
    encoded = FORMAT.encode(linear)
    scheme = ModuleScheme.of(linear)
    layout = tensor_layout(scheme, linear.dtype)
    found = {suffix: (tuple(t.shape), t.dtype) for suffix, t in encoded.items() if suffix != "bias"}
    assert found == layout
    assert same(FORMAT.decode("m", encoded, scheme), linear)
    again = FORMAT.encode(FORMAT.decode("m", encoded, scheme))
    assert all(torch.equal(again[suffix], tensor) for suffix, tensor in encoded.items())


def test_four_bit_layout_matches_a_reference_written_with_loops(make_linear):
    """Reads the bytes as the design's table says, weight by weight."""
    linear = make_linear(n=3, k=64, group_size=32)
    encoded = FORMAT.encode(linear)
    weight = torch.zeros(3, 64)
    for n in range(3):
        for quad in range(16):
            nibble = int(encoded["weight_meta"][n, quad // 2]) >> 4 * (quad % 2) & 15
            for slot, position in enumerate((nibble & 3, nibble >> 2)):
                index = 2 * quad + slot
                word = int(encoded["weight_packed"][n, index // 8]) % 2**32
                code = (word >> 4 * (index % 8) & 15) - 8
                column = 4 * quad + position
                weight[n, column] = float(encoded["weight_scale"][n, column // 32]) * code
    assert torch.equal(weight, linear.dense(torch.float32))


def test_zero_points_match_a_reference_written_with_loops(make_linear):
    """scale * (code - zero point) where a weight is kept, 0 elsewhere, whatever code zero has."""
    linear = make_linear(n=3, k=64, group_size=32, symmetric=False)
    encoded = FORMAT.encode(linear)
    weight = torch.zeros(3, 64)
    for n in range(3):
        for quad in range(16):
            nibble = int(encoded["weight_meta"][n, quad // 2]) >> 4 * (quad % 2) & 15
            for slot, position in enumerate((nibble & 3, nibble >> 2)):
                index, column = 2 * quad + slot, 4 * quad + position
                code = (int(encoded["weight_packed"][n, index // 8]) % 2**32 >> 4 * (index % 8) & 15) - 8
                zero = int(encoded["weight_zero_point"][n, column // 32])
                weight[n, column] = float(encoded["weight_scale"][n, column // 32]) * (code - zero)
    assert torch.equal(weight, linear.dense(torch.float32))
    assert (weight == 0).float().mean() >= 0.5
    assert torch.equal(FORMAT.decode("m", encoded, ModuleScheme.of(linear)).dense(torch.float32), weight)


def test_all_zero_weights_are_known_whatever_their_codes(make_linear):
    linear = make_linear(symmetric=False)
    zeros = linear.zero_point.repeat_interleave(64, 1)
    for nothing in (linear.zeroed(), replace(linear, codes=zeros)):
        assert nothing.is_zero() and not nothing.symmetric
        assert all_zero(FORMAT.encode(nothing), ModuleScheme.of(nothing))
    assert not all_zero(FORMAT.encode(linear), ModuleScheme.of(linear))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: None, "is missing, expected int8 [24, 2]"),
        (lambda t: t[:, :1], "expected int8 [24, 2], found int8 [24, 1]"),
        (lambda t: t.to(torch.int32), "expected int8 [24, 2], found int32"),
        (lambda t: t.to(torch.bfloat16), "found bfloat16"),
        (lambda t: t.index_fill(0, torch.tensor(5), 8), "expected zero points of 4 bits, -8 to 7, found 8"),
        (lambda t: t.index_fill(0, torch.tensor(5), -9), "expected zero points of 4 bits, -8 to 7, found -9"),
    ],
)
def test_a_hostile_zero_point_is_refused_by_name(make_linear, bits, change, says):
    linear = make_linear(bits=bits, symmetric=False)
    tensors = FORMAT.encode(linear)
    changed = change(tensors.pop("weight_zero_point"))
    tensors |= {} if changed is None else {"weight_zero_point": changed}
    if bits == 8 and "of 4 bits" in says:  # every int8 is a code of 8 bits
        assert torch.equal(FORMAT.decode("m", tensors, ModuleScheme.of(linear)).zero_point, changed)
        return
    with pytest.raises(CheckpointError) as caught:
        FORMAT.decode("model.layers.0.up", tensors, ModuleScheme.of(linear))
    assert "model.layers.0.up.weight_zero_point" in str(caught.value) and says in str(caught.value)


def test_zero_points_of_symmetric_codes_are_refused(make_linear):
    linear = make_linear()
    tensors = {**FORMAT.encode(linear), "weight_zero_point": torch.zeros(24, 2, dtype=torch.int8)}
    with pytest.raises(
        CheckpointError, match="m.weight_zero_point: expected no such tensor in symmetric codes, a 4-bit"
    ):
        FORMAT.decode("m", tensors, ModuleScheme.of(linear))
    with pytest.raises(CheckpointError, match="m: 16-bit values have no zero points"):
        FORMAT.decode("m", {}, ModuleScheme(16, 96, "2:4", (4, 96), symmetric=False))


def test_config_says_which_linears_have_zero_points():
    modules = {f"model.layers.{i}.mlp.up_proj": scheme(symmetric=False) for i in range(3)}
    modules["model.layers.1.mlp.down_proj"] = scheme()
    modules["lm_head"] = scheme(bits=8, pattern="dense")
    modules["model.layers.0.mlp.down_proj"] = scheme(bits=8, symmetric=False)
    config = FORMAT.quantization_config(modules, [])
    assert config["symmetric"] is False and config["version"] == 2  # readers of version 1 must refuse it
    assert (
        config["modules"]["lm_head"]["symmetric"]
        is config["modules"]["model.layers.1.mlp.down_proj"]["symmetric"]
        is True
    )
    assert "symmetric" not in config["modules"]["model.layers.0.mlp.down_proj"]
    read = Sparse24Config.from_dict(config)
    assert {name: read.scheme(name, s.shape) for name, s in modules.items()} == modules
    assert "symmetric" not in str(FORMAT.quantization_config({"model.layers.0.up": scheme()}, []))


def test_three_bits_per_weight_and_nine_when_sparse_only(make_linear):
    def bits(linear, drop=()):
        return sum(8 * t.nbytes for s, t in FORMAT.encode(linear).items() if s not in drop) / (24 * 128)

    assert bits(make_linear(bits=4), drop={"weight_scale"}) == 3
    assert bits(make_linear(bits=16)) == 9


def test_negative_zero_becomes_zero(make_linear):
    linear = make_linear(bits=16)
    linear.values[linear.values == 0] = -0.0
    decoded = FORMAT.decode("m", FORMAT.encode(linear), ModuleScheme.of(linear))
    assert torch.equal(decoded.values, linear.values)
    assert not torch.signbit(decoded.values[decoded.values == 0]).any()


def damage(encoded, suffix, change):
    return {**encoded, suffix: change(encoded[suffix].clone())}


def set_first(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("bits", "suffix", "change", "says"),
    [
        (4, "weight_packed", lambda t: t[:, :-1], "expected int32 [24, 8], found int32 [24, 7]"),
        (4, "weight_packed", lambda t: t[:-1], "expected int32 [24, 8], found int32 [23, 8]"),
        (4, "weight_packed", lambda t: t.long(), "found int64 [24, 8]"),
        (4, "weight_packed", lambda t: t.view(-1), "found int32 [192]"),
        (4, "weight_meta", lambda t: t[:, :-1], "expected uint8 [24, 16]"),
        (4, "weight_meta", lambda t: t.to(torch.int8), "found int8"),
        (4, "weight_meta", set_first(0x45), "first >= second"),
        (4, "weight_meta", set_first(0x14), "first >= second"),
        (4, "weight_meta", set_first(0x00), "first >= second"),
        (4, "weight_scale", lambda t: t.float(), "expected bfloat16 or float16 [24, 2], found float32"),
        (4, "weight_scale", lambda t: t[:, :1], "found bfloat16 [24, 1]"),
        (4, "weight_scale", set_first(float("nan")), "NaN or Inf"),
        (4, "weight_scale", set_first(float("-inf")), "NaN or Inf"),
        (4, "bias", set_first(float("nan")), "NaN or Inf"),
        (4, "bias", lambda t: t[:-1], "found bfloat16 [23]"),
        (8, "weight_packed", lambda t: t[:, ::2].contiguous(), "expected int32 [24, 16]"),
        (16, "weight_values", set_first(float("inf")), "NaN or Inf"),
        (16, "weight_values", lambda t: t.to(torch.float32), "found float32"),
        (16, "weight_meta", set_first(0xFF), "first >= second"),
    ],
)
def test_a_damaged_tensor_is_refused_by_name(make_linear, bits, suffix, change, says):
    linear = make_linear(bits=bits, bias=True)
    encoded = damage(FORMAT.encode(linear), suffix, change)
    with pytest.raises(CheckpointError) as caught:
        FORMAT.decode("model.layers.0.mlp.up_proj", encoded, ModuleScheme.of(linear))
    assert f"model.layers.0.mlp.up_proj.{suffix}" in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize("bits", [4, 16])
def test_missing_and_extra_tensors_are_refused(make_linear, bits):
    linear = make_linear(bits=bits)
    encoded = FORMAT.encode(linear)
    for suffix in encoded:
        with pytest.raises(CheckpointError, match=f"m.{suffix} is missing"):
            FORMAT.decode("m", {s: t for s, t in encoded.items() if s != suffix}, ModuleScheme.of(linear))
    other = "weight_values" if bits == 4 else "weight_packed"
    with pytest.raises(CheckpointError, match=f"m.{other}: expected no such tensor"):
        FORMAT.decode("m", {**encoded, other: torch.zeros(1)}, ModuleScheme.of(linear))


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        (ModuleScheme(4, 8, "2:4", (4, 72)), "no multiple of 16"),
        (ModuleScheme(4, 64, "2:4", (4, 96)), "no multiple of the group size 64"),
        (ModuleScheme(4, 16, "2:4", (4, 96)), "group size 16 is none of"),
        (ModuleScheme(4, 0, "2:4", (4, 96)), "no multiple of the group size 0"),
        (ModuleScheme(5, 32, "2:4", (4, 96)), "5 bits"),
        (ModuleScheme(4, 32, "1:4", (4, 96)), "pattern '1:4'"),
        (ModuleScheme(16, 96, "dense", (4, 96)), "plain dense"),
        (ModuleScheme(4, 32, "2:4", (0, 96)), "multiple"),
    ],
)
def test_impossible_schemes_are_refused(scheme, says):
    with pytest.raises(CheckpointError, match=says):
        FORMAT.decode("m", {}, scheme)


def test_linears_that_stay_dense_say_why(make_linear):
    assert "no multiple of 16" in FORMAT.supports(make_linear(k=72, group_size=72))
    assert "none of 32, 64, 128" in FORMAT.supports(make_linear(k=96, group_size=48))
    assert "float32" in FORMAT.supports(make_linear(bits=16, dtype=torch.float32))
    assert "plain dense" in FORMAT.supports(make_linear(bits=16, pattern="dense"))


def scheme(bits=4, group_size=64, pattern="2:4", shape=(32, 192), symmetric=True):
    return ModuleScheme(bits, group_size, pattern, shape, symmetric)


def test_config_tells_of_every_linear_how_it_is_compressed():
    modules = {f"model.layers.{i}.mlp.{n}": scheme() for i in range(3) for n in ("up_proj", "gate_proj")}
    modules["model.layers.1.mlp.down_proj"] = scheme(bits=8, group_size=32)
    modules["model.layers.2.mlp.down_proj"] = scheme(bits=16, group_size=192)
    modules["lm_head"] = scheme(bits=8, pattern="dense")
    config = FORMAT.quantization_config(modules, ["model.layers.0.mlp.down_proj", "model.embed_tokens"])
    assert (config["quant_method"], config["version"], config["bits"], config["group_size"]) == ("sparse24", 1, 4, 64)
    assert set(config["modules"]) == {"lm_head", "model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"}
    read = Sparse24Config.from_dict(config)
    assert {name: read.scheme(name, s.shape) for name, s in modules.items()} == modules
    for dense in ("model.layers.0.mlp.down_proj", "model.embed_tokens", "embed_out", "score"):
        assert read.scheme(dense, (32, 192)) is None


def test_channel_scales_need_no_overrides_when_rows_differ_in_length():
    modules = {f"h.{i}.fc": scheme(group_size=k, shape=(32, k)) for i, k in enumerate((192, 64, 448))}
    config = FORMAT.quantization_config(modules, [])
    assert config["group_size"] == "channel" and config["modules"] == {}
    read = Sparse24Config.from_dict(config)
    assert {name: read.scheme(name, s.shape) for name, s in modules.items()} == modules


def test_overrides_inherit_what_they_do_not_say():
    config = {"quant_method": "sparse24", "version": 1, "bits": 4, "group_size": 64, "ignore": [],
              "modules": {"lm_head": {"pattern": "dense", "bits": 8}}}  # fmt: skip
    read = Sparse24Config.from_dict(config)
    assert read.scheme("lm_head", (32, 192)) == scheme(bits=8, pattern="dense")
    assert read.scheme("model.layers.0.q_proj", (32, 192)) == scheme()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 3}, "version 1 or 2, config.json says 3"),
        ({"symmetric": False}, "expected version 2, which has zero points, or symmetric true, found version 1"),
        ({"modules": {"lm_head": {"symmetric": False}}}, "expected version 2"),
        ({"bits": 3}, "bits 4, 8 or 16"),
        ({"bits": "4"}, "bits 4, 8 or 16"),
        ({"bits": None}, "bits 4, 8 or 16"),
        ({"group_size": -1}, "group_size"),
        ({"group_size": True}, "group_size"),
        ({"group_size": "64"}, "group_size"),
        ({"pattern": ["2:4"]}, "pattern"),
        ({"symmetric": "no"}, "symmetric true or false, found 'no'"),
        ({"modules": {"lm_head": {"symmetric": 0}}}, "modules.lm_head: expected symmetric"),
        ({"ignore": "lm_head"}, "ignore must be a list"),
        ({"modules": ["lm_head"]}, "modules must map"),
        ({"modules": {"lm_head": 8}}, "modules must map"),
        ({"modules": {"lm_head": {"bits": 2}}}, "modules.lm_head"),
        ({"quant_method": "awq"}, "quant_method sparse24"),
    ],
    ids=str,
)
def test_a_wrong_config_is_refused(change, says):
    config = {"quant_method": "sparse24", "version": 1, "bits": 4, "group_size": 64, "ignore": [], "modules": {}}
    with pytest.raises(CheckpointError, match=says):
        Sparse24Config.from_dict({**config, **change})
