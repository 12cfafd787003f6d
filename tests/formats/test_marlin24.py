"""marlin-24 to the bit: our bytes, and those of compressed-tensors 0.12.2, the last release but two that wrote the format.

Its wheel cannot stand beside the current one. So the digests of what it packs are written down here, and where the wheel
lies in a folder (SPARSIFY_ORACLE) it packs again: pip download --no-deps --dest FOLDER compressed-tensors==0.12.2
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.formats import ModuleScheme, get_format
from sparsify.model.linear import LinearWeights

FORMAT = get_format("marlin-24")
WHEEL = "compressed_tensors-0.12.2-py3-none-any.whl"
# bits, N, K, group (0: one scale per channel) -> digest of what the wheel packs. 256 inputs in groups of 128 are two groups
# whose scales the wheel leaves in plain order.
PACKED = {
    (4, 128, 512, 128): "593d858cd4094850e1502dd4e1d542ba2a617849b343ff155f4281f96c6e87f4",
    (4, 64, 256, 0): "773f16726518899f1e4a45566c82ffe606b1226757ce2f2cd0d0baff9008e65f",
    (
        4,
        64,
        256,
        128,
    ): "dc8e057b6dc433e23c73b4c487cdcb42697a98388fb2f48d1da208611af3299b",
    (4, 192, 96, 0): "298de13681e47071a04a06ff5cb353458ebeecbd2bc861393b6e3f79cfbae785",
    (8, 128, 512, 128): "1989674e9abca6ef635437c0a42c7ace4a80bfd327c1a187bcf4957813bdd0b0",
    (8, 64, 384, 0): "944da92417d655f737ca10d7f4ae17cec675ec4bc3524b68e37ba2d3e198e7a1",
}
kinds = pytest.mark.parametrize("kind", list(PACKED), ids=str)
Kind = tuple[int, int, int, int]


def numbers(count: int, limit: int, seed: int) -> Tensor:
    """Numbers below `limit`: no generator of torch, whose numbers may change with its release."""
    state = torch.arange(1, count + 1, dtype=torch.int64) * 6364136223846793005 + seed * 1442695040888963407
    state = (state ^ state >> 29 & 0x7FFFFFFFF) * 0x2545F4914F6CDD1D
    return (state >> 33 & 0x7FFFFFFF) % limit


def linear_of(kind: Kind) -> LinearWeights:
    """Two codes in every quad, none of them 0 (then every writer keeps the same two), scales that float16 holds."""
    bits, n, k, group = kind
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])[numbers(n * k // 4, 6, 1)]
    codes = numbers(n * k // 2, (1 << bits) - 1, 2).view(-1, 2) - (1 << bits - 1)
    codes += codes >= 0
    dense = torch.zeros(n * k // 4, 4, dtype=torch.int64).scatter_(1, pairs, codes).view(n, k)
    scale = (numbers(n * k // (group or k), 900, 3) + 100).view(n, -1) / 2**14
    return LinearWeights(bits, "2:4", group or k, codes=dense.to(torch.int8), scale=scale.to(torch.float16))


def digest(tensors: Mapping[str, Tensor]) -> str:
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(
            f"{name} {tensor.dtype} {list(tensor.shape)}".encode()
            + tensor.contiguous().view(torch.uint8).numpy().tobytes()
        )
    return state.hexdigest()


@kinds
def test_bytes_are_those_of_the_old_wheel(kind: Kind) -> None:
    assert digest(FORMAT.encode(linear_of(kind))) == PACKED[kind]


def test_the_old_wheel_packs_what_is_written_down(tmp_path: Path) -> None:
    wheel = Path(os.environ.get("SPARSIFY_ORACLE", "")) / WHEEL
    if not wheel.is_file():
        pytest.skip(f"no {WHEEL} in the folder that SPARSIFY_ORACLE names; pip download --no-deps gets it")
    arguments = []
    for i, kind in enumerate(PACKED):
        linear = linear_of(kind)
        assert linear.scale is not None
        save_file({"weight": linear.dense(torch.float32), "weight_scale": linear.scale.float()}, tmp_path / f"given{i}")
        arguments += [tmp_path / f"given{i}", kind[0], kind[3], tmp_path / f"packed{i}"]
    program = Path(__file__).with_name("marlin24_oracle.py")
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    command = [sys.executable, str(program), *map(str, arguments)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    for i, (kind, expected) in enumerate(PACKED.items()):
        assert digest(load_file(tmp_path / f"packed{i}")) == expected, kind


@kinds
def test_what_was_packed_is_read_again(kind: Kind, same) -> None:
    linear = linear_of(kind)
    assert same(FORMAT.decode("m", FORMAT.encode(linear), ModuleScheme.of(linear)), linear)


@pytest.mark.parametrize("bits", [4, 8])
def test_quads_with_fewer_than_two_codes_and_biases(make_linear, same, bits: int) -> None:
    linear = make_linear(n=128, k=512, bits=bits, group_size=128, bias=True, dtype=torch.float16)
    assert same(FORMAT.decode("m", FORMAT.encode(linear), ModuleScheme.of(linear)), linear)


def test_what_the_format_cannot_hold(make_linear) -> None:
    assert FORMAT.supports(make_linear(n=64, k=256, group_size=128)) is None
    assert FORMAT.supports(make_linear(n=64, k=96, group_size=96)) is None
    for reason, options in {
        "2:4 sparse linears only": dict(n=64, k=256, group_size=128, pattern="dense"),
        "4- or 8-bit codes": dict(n=64, k=256, bits=16),
        "multiples of 64 outputs": dict(n=48, k=256, group_size=128),
        "groups of 128 inputs or one per channel, not of 64": dict(n=64, k=256, group_size=64),
    }.items():
        assert reason in FORMAT.supports(make_linear(**options))
    tiny = make_linear(n=64, k=128, group_size=128)
    tiny.scale.fill_(2.0**-30)
    assert "float16" in FORMAT.supports(tiny)


@pytest.mark.parametrize(
    ("suffix", "value", "says"),
    [
        ("weight_packed", torch.zeros(8, 127, dtype=torch.int32), "expected int32 [8, 128]"),
        ("meta", torch.zeros(8, 128, dtype=torch.int16), "expected two ascending positions"),
        ("meta", torch.zeros(8, 64, dtype=torch.int16), "expected int16 [8, 128]"),
        ("scale_packed", torch.full((2, 64), float("inf"), dtype=torch.float16), "NaN or Inf"),
        ("scale_packed", torch.ones(64, 2, dtype=torch.float16), "expected bfloat16 or float16 [2, 64]"),
    ],
)
def test_a_damaged_tensor_is_refused_by_name(suffix: str, value: Tensor, says: str) -> None:
    linear = linear_of((4, 64, 256, 128))
    with pytest.raises(CheckpointError) as caught:
        FORMAT.decode("model.layers.0.up", {**FORMAT.encode(linear), suffix: value}, ModuleScheme.of(linear))
    assert f"model.layers.0.up.{suffix}: " in str(caught.value) and says in str(caught.value)


def test_a_config_as_llm_compressor_wrote_it_names_the_schemes() -> None:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 128,
        "observer": "minmax",
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    config = {
        "quant_method": "compressed-tensors",
        "format": "marlin-24",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    shapes = {
        "model.layers.0.up.weight_packed": (16, 256),
        "model.layers.0.up.meta": (16, 256),
        "lm_head.weight": (96, 64),
    }
    assert FORMAT.recognises(config)
    assert not get_format("pack-quantized").recognises(config)
    assert FORMAT.schemes(config, shapes) == {"model.layers.0.up": ModuleScheme(4, 128, "2:4", (128, 512))}
    assert FORMAT.schemes(
        FORMAT.quantization_config(FORMAT.schemes(config, shapes), ["lm_head"]), shapes
    ) == FORMAT.schemes(config, shapes)
