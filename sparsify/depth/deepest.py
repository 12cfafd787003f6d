"""The deepest layers: the plain baseline of "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887, section 4.4).

Drop the n layers before the last one, which stays: without it, and without healing, nothing of a model's output is left.
No text is looked at.
"""

from __future__ import annotations


def deepest_block(layers: int, drop: int, protect_last: int) -> int:
    """The first of the layers that go."""
    return layers - protect_last - drop
