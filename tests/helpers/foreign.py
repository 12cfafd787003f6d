"""Tiny quantized checkpoints as other software writes them, with the weights that this software gives back for them.

compressed-tensors is installed and writes and reads its own; AutoGPTQ, GPTQModel and AutoAWQ are written here in NumPy from
their published packing, one number at a time, independently of what reads them in sparsify.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.tiny import save_tiny

Written = tuple[dict[str, Tensor], Tensor]
"""The tensors of one linear by suffix, and the weight that they stand for, in float32."""


def quantized_checkpoint(
    directory: Path,
    config: Mapping[str, Any] | None,
    write: Callable[[Tensor], Written],
    beside: Mapping[str, Any] | None = None,
    family: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    file: str = "model.safetensors",
    **changes: Any,
) -> dict[str, Tensor]:
    """Write a tiny model whose block linears `write` quantized; returns the weights that they stand for by name.

    config: quantization_config; beside: other JSON files by name
    """
    save_tiny(directory, family, dtype, **{"num_hidden_layers": 2, **changes})
    tensors = load_file(directory / "model.safetensors")
    expected: dict[str, Tensor] = {}
    for name, weight in list(tensors.items()):
        if weight.dim() == 2 and ".layers." in name:
            module = name.removesuffix(".weight")
            new, expected[name] = write(tensors.pop(name).float())
            tensors |= {f"{module}.{suffix}": tensor.contiguous() for suffix, tensor in new.items()}
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / file, metadata={"format": "pt"})
    if config is not None:
        change_config(directory, quantization_config=dict(config))
    for name, content in (beside or {}).items():
        (directory / name).write_text(json.dumps(content))
    return expected


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(
    directory: Path, change: Callable[[dict[str, Tensor]], None], file: str = "model.safetensors"
) -> None:
    """Read all tensors, let `change` alter the dictionary, write them again."""
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / file).items()}
    change(tensors)
    save_file(tensors, directory / file, metadata={"format": "pt"})


def bit_fields(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned numbers one after the other as bits, then cut into 32-bit words. values: [C] -> uint32 [C * bits / 32]"""
    text = np.concatenate([(values.astype(np.uint64) >> i & 1)[:, None] for i in range(bits)], axis=1).reshape(-1)
    words = text.reshape(-1, 32)
    return (words.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)


def as_int32(words: np.ndarray) -> Tensor:
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def rounded_groups(
    weight: Tensor, bits: int, group: np.ndarray, symmetric: bool, low: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], float16 scales [N, G] and zero points [N, G]; group: of each input. low: the least zero point."""
    w, top = weight.double().numpy(), 2**bits - 1
    groups = int(group.max()) + 1
    scale, zero = np.zeros((len(w), groups)), np.zeros((len(w), groups))
    for g in range(groups):
        part = w[:, group == g]
        least, most = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            most = np.maximum(-least, most)
            least = -most
        scale[:, g] = (most - least) / top
        zero[:, g] = 2 ** (bits - 1) if symmetric else np.clip(np.round(-least / scale[:, g]), low, top)
    scale = scale.astype(np.float16).astype(np.float64)
    codes = np.clip(np.round(w / scale[:, group] + zero[:, group]), 0, top)
    return codes.astype(np.int64), scale, zero.astype(np.int64)


def gptq(
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    version: int = 1,
    order: bool = False,
    by_word: bool = False,
) -> Callable[[Tensor], Written]:
    """AutoGPTQ's and GPTQModel's packing. order: inputs in an activation order. by_word: GPTQModel's way to take 1 off."""
    generator = np.random.default_rng(0)

    def write(weight: Tensor) -> Written:
        n, k = weight.shape
        size = k if group_size == -1 else group_size
        group = np.arange(k) // size
        if order:
            group = group[generator.permutation(k)]
        codes, scale, zero = rounded_groups(
            weight, bits, group, symmetric, low=1 if version == 1 and not by_word else 0
        )
        qweight = np.stack([bit_fields(codes[row], bits) for row in range(n)], axis=1)
        if version == 2:
            stored = [bit_fields(zero[:, g], bits) for g in range(zero.shape[1])]
        elif by_word and bits != 3:
            ones = bit_fields(np.ones(32 // bits, dtype=np.int64), bits)[0]
            stored = [(bit_fields(zero[:, g], bits).astype(np.int64) - int(ones)) % 2**32 for g in range(zero.shape[1])]
        else:
            stored = [bit_fields((zero[:, g] - 1) % 2**bits, bits) for g in range(zero.shape[1])]
        tensors = {
            "qweight": as_int32(qweight),
            "qzeros": as_int32(np.stack(stored)),
            "scales": torch.from_numpy(scale.T.astype(np.float16)),
            "g_idx": torch.from_numpy(group.astype(np.int32)),
        }
        return tensors, torch.from_numpy(scale[:, group] * (codes - zero[:, group])).float()

    return write


def awq(group_size: int = 32) -> Callable[[Tensor], Written]:
    """AutoAWQ's packing `gemm`."""

    def write(weight: Tensor) -> Written:
        n, k = weight.shape
        group = np.arange(k) // group_size
        codes, scale, zero = rounded_groups(weight, 4, group, False)
        order = [0, 2, 4, 6, 1, 3, 5, 7]

        def packed(values: np.ndarray) -> Tensor:
            words = np.zeros((len(values), n // 8), dtype=np.uint64)
            for column in range(n // 8):
                for place in range(8):
                    words[:, column] |= values[:, column * 8 + order[place]].astype(np.uint64) << np.uint64(4 * place)
            return as_int32(words.astype(np.uint32))

        tensors = {
            "qweight": packed(codes.T),
            "qzeros": packed(zero.T),
            "scales": torch.from_numpy(scale.T.astype(np.float16)),
        }
        return tensors, torch.from_numpy(scale[:, group] * (codes - zero[:, group])).float()

    return write


def fp8(block: tuple[int, int] | None = (128, 128), per_output: bool = True) -> Callable[[Tensor], Written]:
    """DeepSeek's blocks as weight_scale_inv, or weight_scale per output or for all."""

    def write(weight: Tensor) -> Written:
        n, k = weight.shape
        a, b = block or ((1, k) if per_output else (n, k))
        scale = torch.stack([
            torch.stack([weight[i : i + a, j : j + b].abs().max() / 448 for j in range(0, k, b)]) for i in range(0, n, a)
        ])  # fmt: skip
        codes = torch.empty(n, k, dtype=torch.float8_e4m3fn)
        dense = torch.empty(n, k)
        for i in range(n):
            for j in range(0, k, b):
                one = scale[i // a, j // b]
                codes[i, j : j + b] = (weight[i, j : j + b] / one).to(torch.float8_e4m3fn)
                dense[i, j : j + b] = codes[i, j : j + b].float() * one
        stored = scale if block or per_output else scale.reshape(1)
        return {"weight": codes, "weight_scale_inv" if block else "weight_scale": stored}, dense

    return write


def compressed_tensors(format: str, **weights: Any) -> tuple[dict[str, Any], Callable[[Tensor], Written]]:
    """quantization_config and writer of one scheme, by the compressors of compressed-tensors. weights: QuantizationArgs."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    ordered = weights.get("actorder") == "group"
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(format)
    generator = torch.Generator().manual_seed(0)

    def write(weight: Tensor) -> Written:
        n, k = weight.shape
        state = {"weight": weight, **parameters(weight, args)}
        if ordered:
            size = weights["group_size"]
            state["weight_g_idx"] = (torch.arange(k) // size)[torch.randperm(k, generator=generator)].int()
        stored = fp4_state(state, format) if "fp4" in format else compressor.compress(state, scheme)
        decoded = compressor.decompress({name: tensor.clone() for name, tensor in stored.items()}, scheme)["weight"]
        return {name: tensor for name, tensor in stored.items() if torch.is_tensor(tensor)}, decoded.float()

    config = {
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": {**json.loads(scheme.model_dump_json()), "targets": ["Linear"]}},
    }  # fmt: skip
    return config, write


def fp4_state(state: dict[str, Tensor], format: str) -> dict[str, Tensor]:
    """What the compressors of FP4 write. Theirs compile a kernel first, for a minute; what they read back is compared."""
    weight, scale = state.pop("weight"), state["weight_scale"]
    whole = state.get("weight_global_scale", torch.ones(1))
    scaled = weight / (scale / whole).repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    steps = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    nibbles = (scaled.abs()[:, :, None] - steps).abs().argmin(2) | (scaled < 0).long() << 3
    state["weight_packed"] = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
    state["weight_scale"] = (scale.log2() + 127).to(torch.uint8) if "mx" in format else scale.to(torch.float8_e4m3fn)
    return state


def parameters(weight: Tensor, args: Any) -> dict[str, Tensor]:
    """Float32 scales and zero points of a weight: the largest magnitude of each group, or its range."""
    n, k = weight.shape
    blocks = {"tensor": (n, k), "channel": (1, k), "block": tuple(args.block_structure or ())}
    a, b = blocks.get(args.strategy, (1, args.group_size))
    parts = torch.nn.functional.pad(weight, (0, -k % b, 0, -n % a)).unflatten(1, (-1, b)).unflatten(0, (-1, a))
    top = {"float": {8: 448.0, 4: 6.0}.get(args.num_bits), "int": 2.0 ** (args.num_bits - 1) - 1}[args.type]
    most = parts.abs().amax((1, 3))
    if not args.symmetric:
        low, high = parts.amin((1, 3)).clamp(max=0), parts.amax((1, 3)).clamp(min=0)
        scale = (high - low) / (2**args.num_bits - 1)
        zero = (-low / scale - 2 ** (args.num_bits - 1)).round().clamp(-(2 ** (args.num_bits - 1)), top)
        return {"weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    scale = most / top
    if args.strategy == "tensor_group":
        whole = torch.tensor([6.0 * 448.0]) / weight.abs().max()
        return {"weight_scale": (scale * whole).to(torch.float8_e4m3fn).float(), "weight_global_scale": whole}
    if args.type == "float" and args.group_size == 32:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    return {"weight_scale": scale.reshape(1) if args.strategy == "tensor" else scale}
