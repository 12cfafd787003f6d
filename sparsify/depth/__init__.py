"""Depth pruning methods. To add one: its file here, its line in METHODS or in the recipe's, a recipe, a test.

A method for whole layers scores every block of consecutive layers by the hidden states that enter and leave it; the one of
least (or greatest) score goes. FinerCut searches sublayer by sublayer and has its own loop.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.depth.angular import angular_matrix
from sparsify.depth.streamline import cosine_matrix


@dataclass(frozen=True)
class BlockMethod:
    """How a method chooses a block of consecutive layers.

    score:    hidden states [L + 1, P, d] -> [L, L], row l and column n - 1 for the n layers from l on
    measure:  what the score is, in words
    greatest: the greatest score goes, else the least
    last_token: it looks at the last token of a sequence only
    """

    score: Callable[[Tensor], Tensor]
    measure: str
    greatest: bool
    last_token: bool


METHODS = {
    "angular": BlockMethod(angular_matrix, "angular distance", greatest=False, last_token=True),
    "streamline": BlockMethod(cosine_matrix, "cosine similarity", greatest=True, last_token=False),
}


def best_block(scores: Tensor, count: int, protect_first: int, protect_last: int, greatest: bool) -> int:
    """The first of the `count` consecutive layers that go. scores: [L, L] as a method gives them."""
    layers = scores.shape[0]
    allowed = scores[protect_first : layers - protect_last - count + 1, count - 1]
    return protect_first + int(torch.argmax(allowed) if greatest else torch.argmin(allowed))
