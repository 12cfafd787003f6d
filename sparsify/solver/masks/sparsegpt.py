"""SparseGPT (arXiv 2301.00774): the mask is decided during the column sweep, where the loss of each removal is known."""

import torch
from torch import Tensor


def sparsegpt_select(quad: Tensor, d: Tensor) -> Tensor:
    """Keep the two of 4 weights whose removal costs most, w^2 / [H^-1]_kk of the remaining inputs (section 3.2).

    quad: [4, N], the weights as the sweep has updated them; d: [4], the diagonal of U, so d^2 = [H^-1]_kk.
    Returns bool [4, N].
    """
    loss = (quad / d[:, None]) ** 2
    dropped = loss.topk(2, dim=0, largest=False).indices
    return torch.ones_like(quad, dtype=torch.bool).scatter_(0, dropped, False)
