"""Llama 4's order of q and k in vLLM: every tensor of a compressed linear is reordered as the weight is."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; make setup installs it")

from vllm.model_executor.models.llama4 import Llama4ForCausalLM

from sparsify.formats import ModuleScheme, get_format
from sparsify.runtime.vllm_rotary import REORDER, reorder_all
from tests.helpers.compressed import round_linear

SIZES: Any = SimpleNamespace(config=SimpleNamespace(num_attention_heads=4, num_key_value_heads=2))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize(("leaf", "heads"), [("q_proj", 4), ("k_proj", 2)])
def test_all_tensors_are_reordered_as_the_weight_is(
    leaf: str, heads: int, bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Llama4ForCausalLM, REORDER, getattr(Llama4ForCausalLM, REORDER))  # as it was, at the end
    weight = torch.randn(heads * 16, 64, generator=torch.Generator().manual_seed(0))
    linear = round_linear(weight, bits=bits, group_size=32, symmetric=symmetric)
    name, format = f"model.layers.0.self_attn.{leaf}", get_format("sparse24")
    _, wanted = Llama4ForCausalLM.permute_qk_weight_for_rotary(SIZES, f"{name}.weight", linear.dense())
    reorder_all()
    reorder_all()  # once for every layer
    kind: Any = Llama4ForCausalLM
    tensors = {}
    for suffix, tensor in format.encode(linear).items():
        told, tensors[suffix] = kind.permute_qk_weight_for_rotary(SIZES, f"{name}.{suffix}", tensor)
        assert told == f"{name}.{suffix}"
    found = format.decode(name, tensors, ModuleScheme.of(linear)).dense()
    assert torch.equal(found, wanted) and not torch.equal(found, linear.dense())
    _, other = kind.permute_qk_weight_for_rotary(SIZES, "model.layers.0.self_attn.v_proj.weight_meta", tensor)
    assert torch.equal(other, tensor)
