"""A decoder with random weights of a given shape, written block by block, and random token ids to calibrate it on.

    python benchmarks/random_model.py out/8b-2 --hidden 4096 --intermediate 14336 --heads 32 8 --blocks 2

Llama's architecture with an output head of its own. Writes the checkpoint directory and `tokens.safetensors` in it. Needs as
much memory as one block.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def block_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Names of a block's tensors inside the block and their shapes."""
    hidden, wide = config.hidden_size, config.intermediate_size
    head = hidden // config.num_attention_heads
    keys = head * config.num_key_value_heads
    return {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Gains are one; the rows of a matrix have length one."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(shape[-1] ** -0.5).to(dtype)


def write_model(directory: Path, config: LlamaConfig, dtype: torch.dtype, seed: int) -> None:
    """One shard for each block and one for what lies outside."""
    generator = torch.Generator().manual_seed(seed)
    outside = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    outside |= {"model.norm.weight": (config.hidden_size,), "lm_head.weight": (config.vocab_size, config.hidden_size)}
    shards = [outside]
    for index in range(config.num_hidden_layers):
        shards.append({f"model.layers.{index}.{name}": shape for name, shape in block_shapes(config).items()})
    index_of: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: random_tensor(shape, dtype, generator) for name, shape in shapes.items()}
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, directory / file, {"format": "pt"})
        index_of |= dict.fromkeys(tensors, file)
        del tensors
    index = {"metadata": {"total_size": total}, "weight_map": index_of}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=4096)
    parser.add_argument("--heads", type=int, nargs=2, default=(16, 4), metavar=("QUERY", "KEY_VALUE"))
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--type", choices=TYPES, default="bfloat16")
    parser.add_argument("--samples", type=int, default=128, help="rows of token ids")
    parser.add_argument("--length", type=int, default=512, help="token ids of a row")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.directory.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_attention_heads=args.heads[0], num_key_value_heads=args.heads[1], num_hidden_layers=args.blocks,
        max_position_embeddings=max(2048, args.length), tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype=args.type,
    )  # fmt: skip
    write_model(args.directory, config, TYPES[args.type], args.seed)
    generator = torch.Generator().manual_seed(args.seed + 1)
    tokens = torch.randint(0, args.vocabulary, (args.samples, args.length), generator=generator)
    save_file({"tokens": tokens}, args.directory / "tokens.safetensors")


if __name__ == "__main__":
    main()
