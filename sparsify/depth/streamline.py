"""LLM-Streamline: drop the consecutive layers across which hidden states stay most similar, put a light network in their place.

Chen et al. 2024, "Streamlining Redundant Layers to Compress Large Language Models" (arXiv 2403.19135), section 3.1: the cosine
similarity of the hidden state that enters layer l with the one that leaves layer l+n-1, averaged over all tokens, says how
little n layers do; the n layers of greatest similarity go. What is trained in their place is in `replacement.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cosine_matrix(states: Tensor) -> Tensor:
    """Similarity across every block of layers. states: [L + 1, tokens, d], hidden states that enter each of the L layers, and
    that leave the last. Returns float64 [L, L]: row l, column n - 1 for n layers from l on; NaN where l + n > L.
    """
    layers = states.shape[0] - 1
    similarity = torch.full((layers, layers), torch.nan, dtype=torch.float64)
    for n in range(1, layers + 1):
        for first in range(layers - n + 1):  # one by one: all tokens of all layers at once would double the memory
            cosine = torch.cosine_similarity(states[first].double(), states[first + n].double(), dim=-1)
            similarity[first, n - 1] = float(cosine.mean())
    return similarity
