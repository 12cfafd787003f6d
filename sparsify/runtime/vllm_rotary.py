"""Llama 4 in vLLM: its class reorders the outputs of q and k while it loads them, for its own kind of rotation, but knows the
tensors of a weight by their names in other formats only.
"""

import functools
from typing import Any

from torch import Tensor

from sparsify.runtime.vllm_methods import wrap_method

MODULE = "vllm.model_executor.models.llama4"
REORDER = "permute_qk_weight_for_rotary"
UNKNOWN = ("weight_meta", "weight_values", "weight_zero_point")  # it reorders weight_packed and weight_scale itself


def reorder_all() -> None:
    """Let Llama 4's class, where this process has it, reorder every tensor of a compressed q or k alike."""
    wrap_method(MODULE, "Llama4ForCausalLM", REORDER, _of_all)


def _of_all(own: Any) -> Any:
    @functools.wraps(own)
    def reorder(self: Any, name: str, loaded_weight: Tensor) -> tuple[str, Tensor]:
        module, _, suffix = name.rpartition(".")
        if suffix not in UNKNOWN:
            found: tuple[str, Tensor] = own(self, name, loaded_weight)
            return found
        return name, own(self, f"{module}.weight", loaded_weight)[1]

    return reorder
