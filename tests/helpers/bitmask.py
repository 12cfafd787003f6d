"""sparse-24-bitmask as compressed-tensors wrote it, in a few lines made from its layout: tensors, configs, checkpoints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsify.model.checkpoint import open_checkpoint

FLOAT8 = torch.float8_e4m3fn
Given = dict[str, Tensor]


def two_four(n: int = 24, k: int = 64, seed: int = 0) -> Tensor:
    """A 2:4 matrix, with quads of one weight and of none."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(n, k // 4, 4, generator=generator).argsort(2)
    some = torch.rand(n, k // 4, 4, generator=generator) < 0.2
    return torch.randn(n, k, generator=generator).masked_fill(((order >= 2) | some).reshape(n, k), 0)


def given(kind: str, dtype: torch.dtype, scales: int = 0, seed: int = 0, n: int = 24, k: int = 64) -> Given:
    """What is compressed: a weight, and scales where it is quantized first."""
    weight = two_four(n, k, seed)
    if kind == "none":
        return {"weight": weight.to(dtype)}
    top = 127 if kind == "int8" else 448
    scale = (weight.abs().amax(1, keepdim=True) if scales > 1 else weight.abs().max().reshape(1)) / top
    return {"weight": weight.to(dtype), "weight_scale": scale.to(dtype)}


def packed(tensors: Given, kind: str) -> Given:
    """The tensors of the format: written from its layout alone."""
    weight = tensors["weight"]
    if kind != "none":
        weight = weight.float() / tensors["weight_scale"].float()
        weight = weight.round().clamp(-128, 127) if kind == "int8" else weight.to(FLOAT8).float()
    mask = np.zeros(weight.shape, dtype=bool)
    values = []
    for n, row in enumerate(weight.float().tolist()):
        for start in range(0, len(row), 4):
            kept = sorted(sorted(range(4), key=lambda i: -abs(row[start + i]))[:2])
            mask[n, [start + i for i in kept]] = True
            values += [row[start + i] for i in kept]
    stored = torch.tensor(values).reshape(weight.shape[0], -1)
    stored = stored.to({"none": tensors["weight"].dtype, "int8": torch.int8, "float8": FLOAT8}[kind])
    bits = torch.from_numpy(np.packbits(mask, axis=-1, bitorder="little"))
    found = {"shape": torch.tensor(weight.shape).reshape(-1, 1), "compressed": stored, "bitmask": bits}
    return found | {name: tensor for name, tensor in tensors.items() if name != "weight"}


def expected(tensors: Given, kind: str) -> Tensor:
    """The weight in float32: codes times scale."""
    if kind == "none":
        return tensors["weight"].float()
    scale = tensors["weight_scale"].float()
    weight = tensors["weight"].float() / scale
    return (weight.round().clamp(-128, 127) if kind == "int8" else weight.to(FLOAT8).float()) * scale


def config_of(kind: str, strategy: str = "channel") -> dict[str, Any]:
    """As llm-compressor 0.9 wrote it."""
    sparsity = {
        "format": "sparse-24-bitmask", "global_sparsity": 0.49, "ignore": ["lm_head"],
        "registry_requires_subclass": False, "sparsity_structure": "2:4", "targets": ["Linear"],
    }  # fmt: skip
    config = {
        "quant_method": "compressed-tensors",
        "version": "0.12.2",
        "sparsity_config": sparsity,
        "transform_config": {},
    }
    if kind == "none":
        return config
    weights = {"num_bits": 8, "type": "int" if kind == "int8" else "float", "symmetric": True, "strategy": strategy,
               "group_size": None, "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax",
               "observer_kwargs": {}}  # fmt: skip
    activations = {**weights, "strategy": "token", "dynamic": True, "observer": None}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return config | {
        "format": f"{'int' if kind == 'int8' else 'float'}-quantized", "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed",
        "global_compression_ratio": None,
    }  # fmt: skip


def checkpoint(dense: Path, directory: Path, kind: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Compress every linear in the blocks of a dense model, pruned to the two largest of four. Returns what is meant."""
    source, tensors, meant = open_checkpoint(dense), {}, {}
    for name in source.names():
        tensor = source.tensor(name)
        if ".layers." in name and tensor.dim() == 2:
            quads = tensor.float().reshape(-1, 4)
            kept = torch.zeros_like(quads, dtype=torch.bool).scatter_(1, quads.abs().topk(2, 1).indices, True)
            weight = (quads * kept).reshape(tensor.shape)
            scale = weight.abs().amax(1, keepdim=True) / (127 if kind == "int8" else 448)
            given = {"weight": weight.to(dtype)} | ({} if kind == "none" else {"weight_scale": scale.to(dtype)})
            meant[name] = expected(given, kind)
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{suffix}": t for suffix, t in packed(given, kind).items()}
        else:
            tensors[name] = tensor
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {**source.config, "quantization_config": config_of(kind)}
    (directory / "config.json").write_text(json.dumps(config))
    return meant
