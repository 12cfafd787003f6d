"""gpt-oss in vLLM: its class reads the experts of a layer in one tensor only, and passes over those of sparse24, one linear each.
These go to vLLM's layer, which knows them by its common names.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from vllm.model_executor.layers.fused_moe import RoutedExperts

from sparsify.model.experts import is_expert
from sparsify.runtime.vllm_methods import wrap_method

MODULE = "vllm.model_executor.models.gpt_oss"
Weights = Iterable[tuple[str, Tensor]]


def hand_over_experts() -> None:
    """Let gpt-oss's class, where this process has it, hand over what it would pass over."""
    wrap_method(MODULE, "GptOssForCausalLM", "load_weights", _handing_over)


def _handing_over(own: Any) -> Any:
    @functools.wraps(own)
    def load_weights(self: Any, weights: Weights) -> set[str]:
        layers = {m.layer_name: (path, m) for path, m in self.named_modules() if isinstance(m, RoutedExperts)}
        loaded: set[str] = set()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, group in itertools.groupby(weights, lambda weight: _layer_of(weight[0])):
                if name in layers:  # of this rank
                    path, layer = layers[name]
                    of_layer = ((tensor_name.removeprefix(f"{name}."), tensor) for tensor_name, tensor in group)
                    loaded.update(f"{path}.{parameter}" for parameter in layer.load_weights(of_layer))
                else:
                    yield from group

        return own(self, others()) | loaded

    return load_weights


def _layer_of(tensor: str) -> str:
    """The name of the experts that a tensor of one of them belongs to; empty for any other tensor."""
    linear = tensor.rpartition(".")[0]
    return linear.rsplit(".", 2)[0] if is_expert(linear) else ""
