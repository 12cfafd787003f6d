"""The reference back end: plain PyTorch, any device; what every other back end is compared with.

It decodes once, at load time, to a dense weight in the dtype of the activations (computed in float32, rounded once),
and multiplies with PyTorch's own dense kernel. So it gives the very numbers of the `dense` export, at dense speed and
in dense memory. Decoding per call would save that memory and cost more than the product itself.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.formats import ModuleScheme, get_format


class Reference:
    """Decode at load, multiply densely."""

    name = "reference"

    def reason_unavailable(self) -> str | None:
        return None

    def supports(self, scheme: ModuleScheme, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype.is_floating_point else f"activations must be floating point, not {dtype}"

    def prepare(self, tensors: Mapping[str, Tensor], scheme: ModuleScheme, dtype: torch.dtype) -> list[Tensor]:
        """One tensor: the weight [N, K], in oneDNN's blocked layout where that gives the same bits sooner."""
        weight = get_format("sparse24").decode("reference", tensors, scheme).dense(dtype)
        if _onednn_prefers_blocked(weight):
            return [torch.ops.mkldnn._reorder_linear_weight(weight, None)]
        return [weight]

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, scheme: ModuleScheme) -> Tensor:
        (weight,) = prepared
        if weight.layout == torch.strided:
            return functional.linear(x, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _onednn_prefers_blocked(weight: Tensor) -> bool:
    """Whether PyTorch would hand this product to oneDNN anyway, which then blocks the weight anew in every call.

    True for 16-bit floats on CPUs that multiply them natively: up to 3 times faster for one token, bit for bit the
    same result (tests/runtime/test_op.py). float32 gains nothing and would change its summation order.
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not weight.numel():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return False
