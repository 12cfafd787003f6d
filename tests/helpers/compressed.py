"""Tiny compressed checkpoints, for tests of loading and serving.

The compression here is magnitude pruning and rounding to nearest in a few lines of its own: these tests are about
bytes and products, not about accuracy, and must not depend on the passes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sparsify.formats.writer import CheckpointWriter
from sparsify.model.checkpoint import open_checkpoint
from sparsify.model.linear import LinearWeights
from tests.helpers.tiny import tiny_model, tiny_tokenizer

# Large enough for groups of 64 on each of two ranks and for vLLM's attention; 96 words make vLLM pad the vocabulary.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
IN_BLOCK = re.compile(r"\.\d+\.")


def make_dense(family: str, directory: Path, **changes: Any) -> Path:
    """Save a random bfloat16 model of `family`, biases included, small enough in its weights not to be chaotic."""
    sizes = dict(SIZES)
    if family in ("opt", "gpt_neox"):
        del sizes["head_dim"]
    if family == "opt":
        del sizes["intermediate_size"]
        sizes |= {"ffn_dim": 256, "word_embed_proj_dim": 128}
    model = tiny_model(family, **{**sizes, **changes})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(0.5)
                if module.bias is not None:
                    module.bias.normal_(0, 0.5)
    model.to(torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def round_linear(
    weight: Tensor,
    bias: Tensor | None = None,
    bits: int = 4,
    group_size: int = 64,
    pattern: str = "2:4",
    scale_dtype: torch.dtype = torch.bfloat16,
    symmetric: bool = True,
) -> LinearWeights:
    """The two largest of every four, rounded to nearest. weight: [N, K]; group_size: 0 for one scale per channel.

    symmetric: False rounds between the smallest and the largest weight of a group, with a zero point
    """
    n, k = weight.shape
    if pattern == "2:4":
        quads = weight.reshape(n, k // 4, 4)
        kept = torch.zeros_like(quads, dtype=torch.bool).scatter_(2, quads.abs().topk(2, 2).indices, True)
        weight = weight * kept.reshape(n, k)
    if bits == 16:
        return LinearWeights(16, pattern, k, values=weight.to(scale_dtype), bias=bias)
    grouped = weight.float().reshape(n, -1, group_size or k)
    top = (1 << (bits - 1)) - 1
    if not symmetric:
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scale = ((high - low) / (2 * top + 1)).clamp(min=1e-6).to(scale_dtype)
        zero = (-top - 1 - low / scale.float()).round().clamp(-top - 1, top)
        steps = (grouped / scale.float()[:, :, None]).round()
        codes = (steps + zero[:, :, None]).clamp(-top - 1, top).to(torch.int8).reshape(n, k)
        return LinearWeights(
            bits, pattern, group_size or k, codes=codes, scale=scale, bias=bias, zero_point=zero.to(torch.int8)
        )
    scale = (grouped.abs().amax(2) / top).clamp(min=1e-6).to(scale_dtype)
    codes = (grouped / scale.float()[:, :, None]).round().clamp(-top - 1, top).to(torch.int8).reshape(n, k)
    return LinearWeights(bits, pattern, group_size or k, codes=codes, scale=scale, bias=bias)


def compress(
    dense: Path,
    output: Path,
    format: str = "sparse24",
    schemes: Mapping[str, Mapping[str, Any] | None] | None = None,
    **default: Any,
) -> Path:
    """Compress the linears of a saved model and write them in `format`.

    default: keywords of `round_linear` for the linears of blocks. schemes: other ones by regular expression on the
    module's name, inside and outside of the blocks; None leaves a linear dense.
    """
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    linears: dict[str, LinearWeights] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        keywords: Mapping[str, Any] | None = default if IN_BLOCK.search(name) else None
        for pattern, scheme in (schemes or {}).items():
            keywords = scheme if re.search(pattern, name) else keywords
        if keywords is not None:
            bias = None if module.bias is None else module.bias.detach()
            linears[name] = round_linear(module.weight.detach(), bias, **keywords)
    source = open_checkpoint(dense)
    writer = CheckpointWriter(output, format, source)
    taken = {f"{name}.{suffix}" for name in linears for suffix in ("weight", "bias")}
    writer.write_part("all", linears, {name: source.tensor(name) for name in source.names() if name not in taken})
    return writer.finish()


# Every kind of linear that sparse24 knows, in places where tensor parallelism splits them by outputs and by inputs.
MIXED: dict[str, dict[str, Any] | None] = {
    r"0\.self_attn\.o_proj": {"bits": 16},
    r"1\.self_attn\.o_proj": None,
    r"0\.mlp\.down_proj": {"bits": 8, "group_size": 128, "pattern": "dense"},
    r"1\.mlp\.down_proj": {"bits": 8, "group_size": 0},
    r"0\.mlp\.(gate|up)_proj": {"pattern": "dense"},
    r"1\.mlp\.(gate|up)_proj": {"group_size": 32},
    r"lm_head": {"bits": 8, "pattern": "dense"},
}
