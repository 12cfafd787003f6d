"""Keep: the zeros of a weight that is 2:4 already stay, and nothing else is removed."""

from torch import Tensor


def keep_mask(W: Tensor, H: Tensor | None = None) -> Tensor:
    """What is not zero. W: [N, K] as the dense model has it, at most two non-zero of every 4 consecutive inputs."""
    return W != 0
