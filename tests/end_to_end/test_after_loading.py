"""What a vLLM engine is asked for once it has loaded: adapters, other weights in place, attention that dequantizes.

In float32, where a wrong weight has no rounding to hide behind; against transformers on the sparse24 directory itself.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config

import sparsify  # noqa: F401  the reference reads sparse24
from sparsify.runtime.module import Sparse24Linear
from tests.end_to_end.engine import assert_follows, assert_same, distances, serve
from tests.helpers.compressed import MIXED, compress, make_dense
from tests.helpers.tiny import tiny_tokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("needs_vllm")]

NOISE = 2e-3


def test_adapters_on_compressed_linears(tmp_path: Path) -> None:
    """On every linear, merged ones and dense ones too: what peft computes with the same adapter."""
    peft = pytest.importorskip("peft", reason="peft is not installed; pip install 'sparsify-24[train]'")
    make_dense("llama", tmp_path / "model")
    model = compress(tmp_path / "model", tmp_path / "sparse24", "sparse24", MIXED)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    answers = serve(
        model, tmp_path, adapter=tmp_path / "adapter", dtype="float32", enable_lora=True, max_lora_rank=8,
    )  # fmt: skip
    assert answers.adapted is not None and "sparse24: back end" in answers.log
    assert_follows(answers, model, NOISE)
    assert_follows(answers.adapted, model, NOISE, adapter=tmp_path / "adapter")
    assert distances(answers.adapted, model)[0].max() > 20 * NOISE  # the adapter does something


def test_other_weights_into_a_running_engine(tmp_path: Path) -> None:
    """`reload_weights`, as trainers of policies call it, and as level 2 of sleep needs it after waking up."""
    models = []
    for seed in (0, 1):
        make_dense("llama", tmp_path / f"dense-{seed}", seed=seed)
        models.append(compress(tmp_path / f"dense-{seed}", tmp_path / f"sparse24-{seed}", "sparse24", MIXED))
    answers = serve(models[0], tmp_path, reload=[models[1], models[0], models[0]], dtype="float32")
    assert_follows(answers, models[0], NOISE)
    for found, model in zip(answers.reloaded, (models[1], models[0], models[0]), strict=True):
        assert_follows(found, model, NOISE)
    assert distances(answers.reloaded[0], models[0])[0].max() > 20 * NOISE


def test_a_sparse_draft_of_speculative_decoding(tmp_path: Path) -> None:
    """It proposes, the dense model decides: the tokens are those of the dense model, whatever the draft says."""
    make_dense("llama", tmp_path / "model")
    for format in ("sparse24", "dense"):
        compress(tmp_path / "model", tmp_path / format, format, MIXED)
    draft = {"model": str(tmp_path / "sparse24"), "num_speculative_tokens": 3, "method": "draft_model"}
    answers = serve(tmp_path / "dense", tmp_path, dtype="float32", speculative_config=draft)
    assert "sparse24: back end" in answers.log
    assert_follows(answers, tmp_path / "dense", NOISE)


def test_multi_head_latent_attention(tmp_path: Path) -> None:
    """DeepSeek's: vLLM takes the dense weight of kv_b_proj apart once it is loaded."""
    config = DeepseekV3Config(
        vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, q_lora_rank=64, kv_lora_rank=512, qk_rope_head_dim=64,
        qk_nope_head_dim=32, v_head_dim=32, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
        moe_intermediate_size=64, first_k_dense_replace=2, n_group=2, topk_group=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "topk_method": "noaux_tc"}))
    for format in ("sparse24", "dense"):
        compress(tmp_path / "model", tmp_path / format, format, {"lm_head": None}, group_size=32)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse24", dtype=torch.float32)
    assert isinstance(reference.model.layers[0].self_attn.kv_b_proj, Sparse24Linear)
    # vLLM's own choice on processors with AMX takes bfloat16 only
    engine = {"dtype": "float32", "attention_backend": "CPU_MLA"}
    answers = serve(tmp_path / "sparse24", tmp_path, **engine)
    assert "sparse24: back end" in answers.log
    # against vLLM on the dense export, not transformers: only that is claimed for this attention
    assert_same(answers, serve(tmp_path / "dense", tmp_path, **engine))
