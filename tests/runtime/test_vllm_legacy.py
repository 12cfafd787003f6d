"""marlin-24 and sparse-24-bitmask on vLLM's own layers: claimed, decoded as they arrive, merged and split as sparse24."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("vllm", reason="vLLM is not installed; make setup installs it")

from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.models.utils import WeightsMapper

from sparsify.errors import CheckpointError
from sparsify.formats import ModuleScheme, get_format
from sparsify.runtime.vllm_plugin import LegacyMethod, Sparse24Config
from tests.helpers.bitmask import config_of, expected, given, packed
from tests.runtime.test_vllm_plugin import FUSED, K, Rank, make_linear, rank, vllm_config  # noqa: F401

Loads = list[tuple[Any, dict[str, Tensor], Tensor]]  # shard, the tensors of the checkpoint, the weight that they mean
KINDS = ["4 bits", "4 bits, channel", "8 bits", "none", "int8", "float8"]
MARLIN: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "group_size": 128},
    "4 bits, channel": {"bits": 4, "group_size": 0},
    "8 bits": {"bits": 8, "group_size": 128},
}


def stored(kind: str, n: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """A linear of N outputs and K inputs in its format, and its weight in float32."""
    if kind in MARLIN:
        linear = make_linear(n, seed, scale_dtype=torch.float16, **MARLIN[kind])
        return get_format("marlin-24").encode(linear), linear.dense(torch.float32)
    tensors = given(kind, torch.bfloat16, n, seed, n, K)
    weight = expected(tensors, kind)
    return packed(tensors, kind), weight if kind == "int8" else weight.to(torch.bfloat16).float()


def config_for(kind: str, ignore: list[str] | None = None) -> Sparse24Config:
    if kind in MARLIN:
        scheme = ModuleScheme.of(make_linear(64, scale_dtype=torch.float16, **MARLIN[kind]))
        described = get_format("marlin-24").quantization_config({"model.layers.0.x": scheme}, ignore or [])
        described["sparsity_config"] = {"format": "dense", "targets": ["Linear"]}  # llm-compressor left one there
    else:
        described = config_of(kind)
        described["sparsity_config"]["ignore"] = ignore or []
    found = get_quantization_config("sparse24")
    assert found.override_quantization_method(described, None) == "sparse24"
    config = found.from_config(described)
    config.packed_modules_mapping = FUSED
    assert isinstance(config, Sparse24Config)
    return config


def load(layer: nn.Module, loads: Loads) -> None:
    """Do with the tensors of a checkpoint what vLLM's models do: by name, part after part, in the order of the file."""
    parameters = dict(layer.named_parameters())
    for shard, tensors, _ in loads:
        for suffix, tensor in sorted(tensors.items()):
            target = parameters[suffix]
            target.weight_loader(target, tensor, *([] if shard is None else [shard]))
    layer.quant_method.process_weights_after_loading(layer)


def product(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.quant_method.apply(layer, x)


def close(y: Tensor, loads: Loads, x: Tensor, atol: float = 1e-4) -> None:
    exact = functional.linear(x, torch.cat([weight for _, _, weight in loads]))
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2])
def test_merged_heads(kind: str, world: int, rank: Rank) -> None:  # noqa: F811
    """4 query heads and 2 key-value heads of 64: each part is decoded whole, then cut."""
    head = 64
    loads: Loads = [
        (shard, *stored(kind, n, seed)) for seed, (shard, n) in enumerate({"q": 256, "k": 128, "v": 128}.items())
    ]
    x, parts = torch.randn(3, K), []
    for r in range(world):
        rank(r, world)
        prefix = "model.layers.0.self_attn.qkv_proj"
        layer = QKVParallelLinear(K, head, 4, 2, bias=False, quant_config=config_for(kind), prefix=prefix)
        assert isinstance(layer.quant_method, LegacyMethod)
        load(layer, loads)
        assert not [n for n, _ in layer.named_parameters()]
        parts.append(product(layer, x).split([256 // world, 128 // world, 128 // world], 1))
    close(torch.cat([part[i] for i in range(3) for part in parts], 1), loads, x)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_what_is_fused_on_disk(kind: str, rank: Rank) -> None:  # noqa: F811
    x, total = torch.randn(3, K), torch.zeros(3, 64)
    loads: Loads = [(None, *stored(kind, 64))]
    fused: Loads = [(None, *stored(kind, 256))]
    pieces = []
    for r in range(2):
        rank(r, 2)
        layer = RowParallelLinear(
            K, 64, bias=False, reduce_results=False, quant_config=config_for(kind), prefix="model.layers.0.o_proj"
        )
        load(layer, loads)
        total += product(layer, x[:, r * K // 2 : (r + 1) * K // 2])
        config = config_for(kind)
        config.packed_modules_mapping = {}
        both = MergedColumnParallelLinear(
            K, [128, 128], bias=False, quant_config=config, prefix="model.layers.0.mlp.gate_up_proj"
        )
        load(both, fused)
        pieces.append(product(both, x).reshape(3, 2, 64))
    close(total, loads, x)
    close(torch.cat(pieces, 2).reshape(3, 256), fused, x)


def test_only_sparse_checkpoints_are_claimed() -> None:
    claim = get_quantization_config("sparse24").override_quantization_method
    for other in (
        {"quant_method": "fp8"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}},
        {"quant_method": "sparse24", "version": 1},
        {},
    ):
        assert claim(other, None) is None and claim(other, "awq", hf_config=None) is None


@pytest.mark.parametrize("kind", ["4 bits", "float8"])
def test_what_is_ignored_stays_dense_and_names_follow(kind: str, rank: Rank) -> None:  # noqa: F811
    kept = "model.layers.1.mlp.down_proj"
    config = config_for(kind, [kept, "re:.*router$"])
    for name in (kept, "model.layers.1.router"):
        assert isinstance(
            ReplicatedLinear(K, 64, quant_config=config, prefix=name).quant_method, UnquantizedLinearMethod
        )
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert config.on_disk.label(f"language_model.{kept}") is None
    assert config.on_disk.label("language_model.model.layers.2.mlp.down_proj") is not None
    assert pickle.loads(pickle.dumps(config)).on_disk == config.on_disk
    with pytest.raises(CheckpointError, match=r"must be compressed alike.*writes such a checkpoint as dense"):
        MergedColumnParallelLinear(
            K, [64, 64], quant_config=config_for(kind, ["model.m.up_proj"]), prefix="model.m.gate_up_proj"
        )


@pytest.mark.parametrize(
    ("kind", "suffix", "says"),
    [
        ("4 bits", "meta", r"qkv_proj \(k\)\.meta: the checkpoint does not hold it"),
        ("float8", "weight_scale", r"qkv_proj \(k\)\.weight_scale: the checkpoint does not hold it"),
        ("none", "shape", r"qkv_proj \(k\)\.shape: the checkpoint does not hold it"),
        ("none", None, r"holds 2 of the 3 tensors"),
    ],
)
def test_missing_tensors_are_named(kind: str, suffix: str | None, says: str, rank: Rank) -> None:  # noqa: F811
    loads: Loads = [(shard, *stored(kind, 128)) for shard in "qkv"]
    layer = QKVParallelLinear(K, 64, 2, 2, bias=False, quant_config=config_for(kind), prefix="model.layers.0.qkv_proj")
    tensors = loads[1][1]
    for name in [suffix] if suffix else list(tensors):
        del tensors[name]
    with pytest.raises(CheckpointError, match=says):
        load(layer, loads)


def test_damaged_tensors_are_refused_by_name(rank: Rank) -> None:  # noqa: F811
    def layer(kind: str) -> nn.Module:
        return ReplicatedLinear(K, 64, bias=False, quant_config=config_for(kind), prefix="model.layers.0.up")

    tensors, weight = stored("4 bits", 64)
    tensors["meta"] = torch.zeros_like(tensors["meta"])
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.up\.meta: expected two ascending positions"):
        load(layer("4 bits"), [(None, tensors, weight)])
    tensors, weight = stored("int8", 64)
    tensors["weight_zero_point"] = torch.ones(64, 1, dtype=torch.int8)
    with pytest.raises(CheckpointError, match=r"up\.weight_zero_point: expected symmetric codes"):
        load(layer("int8"), [(None, tensors, weight)])
    tensors["weight_zero_point"].zero_()
    tensors["input_scale"] = torch.ones(1)
    loads: Loads = [(None, tensors, weight)]
    served = layer("int8")
    load(served, loads)
    x = torch.randn(2, K)
    close(product(served, x), loads, x)
    with pytest.raises(CheckpointError, match=r"up: sparse-24-bitmask cannot be loaded into a running engine"):
        served.quant_method.process_weights_after_loading(served)


def test_a_quantized_cache_is_refused() -> None:
    described = config_of("float8") | {"kv_cache_scheme": {"num_bits": 8}}
    with pytest.raises(CheckpointError, match="quantizes its key-value cache"):
        get_quantization_config("sparse24").from_config(described)
