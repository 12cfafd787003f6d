"""Tensors of one product lie on one device; torch checks that only where a kernel runs."""

from torch import Tensor


def refuse_two_devices(x: Tensor, *others: Tensor | None) -> None:
    """RuntimeError, as torch raises it, where the weight or the bias is elsewhere than the activations, or on `meta` without them."""
    for other in others:
        if other is not None and other.device != x.device:
            raise RuntimeError(
                f"sparse24_linear: all tensors must be on one device, found activations on {x.device} and a weight or bias "
                f"on {other.device}"
            )
