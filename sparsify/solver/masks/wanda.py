"""Wanda (arXiv 2306.11695): a weight matters as much as its magnitude times the norm of its input."""

from torch import Tensor

from sparsify.solver.masks.magnitude import keep_two_of_four


def wanda_mask(W: Tensor, H: Tensor | None = None) -> Tensor:
    """Importance |w[n, k]| * ||x_k||, equation 1 of the paper. W: [N, K]; H = X'X / tokens: [K, K], only its diagonal."""
    assert H is not None
    return keep_two_of_four(W.abs() * H.diagonal().sqrt())
