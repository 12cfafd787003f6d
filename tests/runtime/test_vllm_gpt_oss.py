"""gpt-oss in vLLM: its class hands the tensors of single experts to their layer, and reads all others as before."""

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm", reason="vLLM is not installed; make setup installs it")

from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.models import gpt_oss
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM

from sparsify.formats import get_format
from sparsify.formats.sparse24 import Sparse24Config as ConfigOnDisk
from sparsify.runtime.vllm_plugin import Sparse24Config
from tests.runtime.test_vllm_experts import (  # noqa: F401
    PREFIX,
    apply,
    close,
    expected,
    make_layer,
    make_mixture,
    routed,
    vllm_config,
)

OF_GPT_OSS = getattr(gpt_oss, "GptOssRoutedExperts", RoutedExperts)  # which not every vLLM has


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.experts = layer


def test_experts_arrive_in_their_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def own(self: Any, weights: Any) -> set[str]:
        seen.extend(name for name, _ in weights)
        return {"head"}

    monkeypatch.setattr(GptOssForCausalLM, "load_weights", own)
    mixture = make_mixture(biases=True)
    for _ in range(2):  # once for every layer
        layer = make_layer(
            mixture, cls=OF_GPT_OSS, has_bias=True, activation=MoEActivation.SWIGLUOAI
        )  # fmt: skip
    tensors = {"model.embed_tokens.weight": torch.ones(1), f"{PREFIX}.gate_up_proj_bias": torch.ones(1)}
    for name, weights in mixture.items():
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in get_format("sparse24").encode(weights).items()}
    other = f"{PREFIX.replace('.0.', '.1.')}.0.up_proj.bias"  # of another rank
    tensors |= {other: torch.ones(1), "lm_head.weight": torch.ones(1)}
    loaded = GptOssForCausalLM.load_weights(Model(layer), iter(tensors.items()))  # type: ignore[arg-type]
    assert seen == ["model.embed_tokens.weight", f"{PREFIX}.gate_up_proj_bias", other, "lm_head.weight"]
    assert loaded == {"head", *(f"experts.{name}" for name, _ in layer.named_parameters())}
    layer.quant_method.process_weights_after_loading(layer)
    close(apply(layer, *routed(5)), expected(mixture, *routed(5), clamp=(7.0, 1.702, 1.0)))


def test_settings_of_single_experts_keep_their_names() -> None:
    names = ["model.layers.0.self_attn.q_proj", *(f"{PREFIX}.0.{leaf}" for leaf in ("gate_proj", "down_proj"))]
    modules = {name: {"bits": 8} for name in names}
    on_disk = {
        "quant_method": "sparse24",
        "version": 1,
        "bits": 4,
        "group_size": 32,
        "ignore": ["lm_head"],
        "modules": modules,
    }
    config = Sparse24Config(ConfigOnDisk.from_dict(on_disk))
    config.apply_vllm_mapper(GptOssForCausalLM.hf_to_vllm_mapper)
    assert isinstance(config.on_disk, ConfigOnDisk)
    assert list(config.on_disk.modules) == ["model.layers.0.attn.q_proj", *names[1:]]
    assert config.on_disk.ignore == {"lm_head"}
