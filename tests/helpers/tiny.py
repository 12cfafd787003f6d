"""Tiny random models of the families that must work, and a tokenizer for them. Shared by tests of several folders."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 96
CHARACTERS = [chr(code) for code in range(33, 33 + VOCABULARY - 4)]
COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
FAMILIES: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 16},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    "phi3": {"original_max_position_embeddings": 128},
    "opt": {
        "ffn_dim": 128,
        "word_embed_proj_dim": 64,
        "num_key_value_heads": None,
        "head_dim": None,
        "intermediate_size": None,
    },
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
}
MIXTURES: dict[str, dict] = {  # of experts, stored one by one or fused, with shared experts, biases, interleaved outputs
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 32,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": None, "num_key_value_heads": 4,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
}  # fmt: skip


def tiny_mixture(directory: Path, family: str, **changes: object) -> Path:
    """Write a tiny mixture of experts of two layers with its tokenizer; returns the directory."""
    return save_tiny(directory, family, **{"num_hidden_layers": 2, **MIXTURES[family], **changes})


def tiny_model(family: str = "llama", seed: int = 0, **changes: object) -> torch.nn.Module:
    """A random model of a few thousand weights, float32, large enough weights that its layers do something."""
    settings = {k: v for k, v in {**COMMON, **FAMILIES.get(family, {}), **changes}.items() if v is not None}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character: a byte-level BPE without merges, which every family's tokenizer class accepts."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def save_tiny(
    directory: Path, family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object
) -> Path:
    """Write a tiny checkpoint with its tokenizer; returns the directory."""
    tiny_model(family, seed, **changes).to(dtype).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def tiny_text(file: Path, characters: int = 4000, seed: int = 0) -> Path:
    """Random text in the tiny tokenizer's characters."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, len(CHARACTERS), (characters,), generator=generator).tolist()
    file.write_text("".join(CHARACTERS[n] for n in numbers))
    return file
