"""How the results of a back end are compared with those of the dense weights."""

from collections.abc import Callable

import torch
from torch import Tensor

Agree = Callable[[Tensor, Tensor], None]


def bits(ours: Tensor, dense: Tensor) -> None:
    """The reference back end multiplies the dense weights themselves, so it gives their bits."""
    assert ours.dtype == dense.dtype and torch.equal(ours, dense)


def close(ours: Tensor, dense: Tensor) -> None:
    """The CPU kernels do not round the weights before they multiply: they may differ by what the dense product loses."""
    assert ours.dtype == dense.dtype and ours.shape == dense.shape
    share = 0.02 if dense.dtype == torch.bfloat16 else 1e-5
    assert (ours.double() - dense.double()).abs().max() <= share * dense.double().abs().max()
