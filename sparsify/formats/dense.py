"""`dense`: an ordinary Hugging Face checkpoint, with the zeros in place and the codes dequantized."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsify.formats.scheme import Format, ModuleScheme, take_bias, take_tensor, with_bias
from sparsify.model.linear import LinearWeights


class Dense(Format):
    """Weights as any software reads them. Codes and scales are not kept: the way back to a packed format is closed."""

    name = "dense"
    suffixes: frozenset[str] = frozenset()
    holds = "every linear"

    def problem(self, scheme: ModuleScheme, dtype: torch.dtype) -> str | None:
        return None

    def supports(self, linear: LinearWeights) -> str | None:
        return None

    def encode(self, linear: LinearWeights) -> dict[str, Tensor]:
        return with_bias({"weight": linear.dense()}, linear)

    def decode(self, module: str, tensors: Mapping[str, Tensor], scheme: ModuleScheme) -> LinearWeights:
        """The dense matrix as 16-bit values; its pattern is that of `scheme`."""
        weight = tensors.get("weight")
        dtypes = (weight.dtype,) if weight is not None and weight.is_floating_point() else ()
        weight = take_tensor(module, tensors, "weight", scheme.shape, dtypes)
        bias = take_bias(module, tensors, scheme.shape[0])
        return LinearWeights(16, scheme.pattern, scheme.shape[1], values=weight, bias=bias).validate(module)

    def quantization_config(self, modules: Mapping[str, ModuleScheme], ignore: list[str]) -> dict[str, Any] | None:
        return None

    def recognises(self, quantization_config: Mapping[str, Any] | None) -> bool:
        return quantization_config is None

    def schemes(
        self, quantization_config: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, ModuleScheme]:
        return {}
