"""Angular distance: the block of layers across which the last token's hidden state turns least.

Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887), section 3: with x(l) the hidden
state that enters layer l, d(l, n) = arccos(x(l) . x(l+n) / (|x(l)| |x(l+n)|)) / pi at the last token of a sequence, averaged
over sequences. To drop n layers, drop l*, ..., l*+n-1 with l* the least d(l, n); what leaves layer l*-1 then enters layer l*+n.
"""

from __future__ import annotations

import torch
from torch import Tensor


def angular_distance(a: Tensor, b: Tensor) -> Tensor:
    """The angle between vectors as a share of a half turn, in [0, 1]. a, b: [..., d]. Returns [...].

    arccos loses small angles to rounding; here the angle comes from the chord between the directions, 2 sin(angle / 2).
    """
    length, other = a.norm(dim=-1), b.norm(dim=-1)
    chord = ((a - b * (length / other)[..., None]).norm(dim=-1) / length).clamp(max=2)
    return 2 / torch.pi * torch.atan2(chord, ((2 - chord) * (2 + chord)).sqrt())


def angular_matrix(states: Tensor) -> Tensor:
    """d(l, n) for every l and n. states: [L + 1, P, d], hidden states of P sequences' last tokens: entering each of the L
    layers, and leaving the last. Returns float64 [L, L]; column n - 1 is for n layers, NaN where l + n > L.
    """
    layers = states.shape[0] - 1
    distances = torch.full((layers, layers), torch.nan, dtype=torch.float64)
    for n in range(1, layers + 1):
        distances[: layers - n + 1, n - 1] = angular_distance(states[:-n].double(), states[n:].double()).mean(1).cpu()
    return distances
