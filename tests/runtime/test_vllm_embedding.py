"""Dense embeddings and heads on vLLM's own layers: each is held once and gives what a dense product gives."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("vllm", reason="vLLM is not installed; make setup installs it")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import utils, vocab_parallel_embedding
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from sparsify.formats import get_format
from sparsify.runtime import vllm_embedding, vllm_plugin

ROWS, K = 128, 64


@pytest.fixture(autouse=True, params=[torch.bfloat16, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """What the engine computes in."""
    settings = SimpleNamespace(model_config=SimpleNamespace(dtype=request.param, head_dtype=request.param))
    monkeypatch.setattr(vllm_embedding, "get_current_vllm_config_or_none", lambda: settings)
    for name, value in (("rank", 0), ("world_size", 1)):
        monkeypatch.setattr(vocab_parallel_embedding, f"get_tensor_model_parallel_{name}", lambda value=value: value)
    vllm_plugin.register()
    with set_current_vllm_config(VllmConfig()):
        yield request.param


def make(kind: type[VocabParallelEmbedding], dtype: torch.dtype, prefix: str) -> VocabParallelEmbedding:
    described = get_format("sparse24").quantization_config({}, [prefix])
    config = get_quantization_config("sparse24").from_config(described)
    return kind(ROWS, K, params_dtype=dtype, quant_config=config, prefix=prefix)


def draw(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(ROWS, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def load(layer: nn.Module, weight: Tensor) -> None:
    layer.weight.weight_loader(layer.weight, weight)


def finish(layer: nn.Module) -> None:
    layer.quant_method.process_weights_after_loading(layer)


def assert_multiplies(layer: nn.Module, weight: Tensor) -> None:
    x = torch.randn(5, K).to(weight.dtype)
    exact = functional.linear(x.double(), weight.double())
    found = layer.quant_method.apply(layer, x)
    assert found.dtype == weight.dtype
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(weight.dtype).eps, atol=1e-5)


def tensors_of(layer: nn.Module) -> list[str]:
    return [name for name, _ in (*layer.named_parameters(), *layer.named_buffers())]


def held_of_a_head(dtype: torch.dtype) -> list[str]:
    """Nothing beside the packed copy, but the weight where vLLM has no packed product: oneDNN has none in bfloat16 with AVX2 alone."""
    layer = nn.Module()
    layer.weight = nn.Parameter(draw(0, dtype), requires_grad=False)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return ["weight"] if layer.weight.numel() else []


def test_a_head_is_held_once(dtype: torch.dtype) -> None:
    """Its dense weight can still be had, and others can take its place."""
    held = held_of_a_head(dtype)
    head = make(ParallelLMHead, dtype, "lm_head")
    record_metadata_for_reloading(head)
    load(head, draw(0, dtype))
    finish(head)
    assert_multiplies(head, draw(0, dtype))
    assert tensors_of(head) == held
    assert torch.equal(head.weight.clone(), draw(0, dtype))
    for seed in (1, 2):
        initialize_layerwise_reload(head)
        load(head, draw(seed, dtype))
        finalize_layerwise_reload(head, None)
        assert_multiplies(head, draw(seed, dtype))
        assert torch.equal(head.weight.clone(), draw(seed, dtype)) and tensors_of(head) == held


def test_an_embedding_is_not_packed(dtype: torch.dtype) -> None:
    layer = make(VocabParallelEmbedding, dtype, "model.embed_tokens")
    record_metadata_for_reloading(layer)
    load(layer, draw(0, dtype))
    finish(layer)
    ids = torch.tensor([3, 1, ROWS - 1])
    assert torch.equal(layer(ids), draw(0, dtype)[ids])
    assert not hasattr(layer, vllm_embedding.PACKED)
    assert_multiplies(layer, draw(0, dtype))  # models whose head is the embedding
    assert hasattr(layer, vllm_embedding.PACKED)
    initialize_layerwise_reload(layer)
    load(layer, draw(1, dtype))
    finalize_layerwise_reload(layer, None)
    assert torch.equal(layer(ids), draw(1, dtype)[ids])
    assert_multiplies(layer, draw(1, dtype))


def test_a_tied_head_leaves_the_embedding_alone(dtype: torch.dtype) -> None:
    embedding, head = make(VocabParallelEmbedding, dtype, "model.embed_tokens"), make(ParallelLMHead, dtype, "lm_head")
    head = head.tie_weights(embedding)
    load(embedding, draw(0, dtype))
    for layer in (embedding, head):
        finish(layer)
    assert_multiplies(head, draw(0, dtype))
    assert torch.equal(embedding(torch.arange(ROWS)), draw(0, dtype))
    assert torch.equal(head.weight.clone(), draw(0, dtype))


def test_vllms_own_where_the_head_is_cast_and_on_other_devices(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = torch.float64
    settings = SimpleNamespace(model_config=SimpleNamespace(dtype=dtype, head_dtype=other))
    with monkeypatch.context() as patch:
        patch.setattr(vllm_embedding, "get_current_vllm_config_or_none", lambda: settings)
        assert vllm_embedding.embedding_method("lm_head") is None
    assert vllm_embedding.embedding_method("lm_head") is not None
    monkeypatch.setattr(vllm_embedding.current_platform, "is_cpu", lambda: False)
    assert vllm_embedding.embedding_method("lm_head") is None
