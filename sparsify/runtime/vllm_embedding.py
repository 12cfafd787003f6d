"""Dense embeddings and heads in vLLM on a CPU, held once.

vLLM packs every matrix of vocabulary size for oneDNN while it loads and keeps the unpacked one beside it: the embedding is
packed though it is only looked up, the head is kept though only its packed copy is multiplied. With a small model in 4 bits these
matrices are most of what is held (Llama-3.1-8B: 1.05 GB each), so each is held in the one form in which it is used.
"""

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.platforms import current_platform

from sparsify import memory
from sparsify.runtime.dequantized import DequantizedWeight

PACKED = "cpu_linear"  # where vLLM keeps the product with the packed weight


def embedding_method(prefix: str) -> UnquantizedEmbeddingMethod | None:
    """For a dense embedding or head on a CPU; None where vLLM's own is as good."""
    if not current_platform.is_cpu() or not hasattr(utils, "dispatch_cpu_unquantized_gemm"):
        return None
    config = get_current_vllm_config_or_none()
    if config is None or config.model_config is None or config.model_config.head_dtype != config.model_config.dtype:
        return None  # such a head is cast in every step, so its weight has to be there
    return HeldOnce(prefix)


class HeldOnce(UnquantizedEmbeddingMethod):
    """An embedding stays as it is, a head only packed."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if hasattr(layer, PACKED):  # other weights in place of the first ones
            delattr(layer, PACKED)
        if isinstance(layer, ParallelLMHead):
            self._pack_head(layer)

    def _pack_head(self, layer: nn.Module) -> None:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        shape, dtype, device = weight.shape, weight.dtype, weight.device
        utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        if layer.weight is weight:
            return  # vLLM multiplies with the weight itself
        del layer.weight, weight
        memory.return_freed()  # what loading took on the way: vLLM finishes the head last

        def dense() -> Tensor:
            return self.apply(layer, torch.eye(shape[1], dtype=dtype, device=device)).T

        layer.weight = DequantizedWeight(self.prefix, shape, dtype, device, dense)  # LoRA asks for it

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not hasattr(layer, PACKED):  # an embedding that is a model's head too
            utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
        return super().apply(layer, x, bias)
