"""2:4 masks that move while the model is trained, and stand still for the last part of it.

The rule of AST (Huang et al. 2024, arXiv 2407.20584): every few steps the mask becomes the two largest |W| of every four of
all weights, dropped ones included. The forward pass multiplies with the kept ones, the gradient passes straight through to
all, and a decay that grows with the steps pulls the dropped ones to zero, so that fewer and fewer masks change. There the
decay is a term of the gradient; here it is decoupled as in AdamW (arXiv 1711.05101) and relative to the learning rate,
because gradients are of any size and our rates are relative to the weights.

CAST (Huang et al. 2025, arXiv 2509.25996) is the continuous form: the forward pass is dense, and an L1 decay takes the
dropped weights to zero before the mask stands still. Its scaling of the kept weights is left out: our scales learn.

Dropped weights start at zero, not at their values in the dense model. The kept ones were moved by the one-shot solver to
make up for the others; beside them the dense values would win by size alone, the first update would put the magnitude
mask in the place of the one that was solved for, and the training would start from the worse of the two models. From
zero, training starts with the compressed model, and a dropped weight returns when its gradient has made it the larger.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsify.formats.packing import pack_bits, unpack_bits
from sparsify.recipe import MaskLearning
from sparsify.training.qat_linear import TrainableLinear


@torch.no_grad()
def two_of_four(score: Tensor, mask: Tensor) -> Tensor:
    """The mask of the two largest of every four consecutive inputs; of equal ones those that `mask` keeps stay.

    score: float32 [N, K], none negative; mask: bool [N, K]. Returns bool [N, K]
    """
    ahead = torch.where(mask, torch.nextafter(score, torch.full_like(score, torch.inf)), score)
    best = ahead.view(-1, 4).topk(2, dim=1).indices
    return torch.zeros(best.shape[0], 4, dtype=torch.bool, device=mask.device).scatter_(1, best, True).view_as(mask)


class LearnedMasks:
    """The masks of the 2:4 linears of a model over the steps of a training.

    linears: by name; those of another pattern are left alone. steps: of the whole training.
    Attributes: last: the last step (from 1) after which masks may change; norms: by name float32 [K], the norm of each input
    over the first step, where masks are chosen by |W| times it, else empty
    """

    def __init__(self, linears: Mapping[str, TrainableLinear], settings: MaskLearning, steps: int):
        self.linears = {name: linear for name, linear in linears.items() if linear.mask_bits is not None}
        self.settings = settings
        self.last = settings.last_choice(steps)
        self.first = self._bits()
        self.norms: dict[str, Tensor] = {}

    def begin(self, step: int) -> None:
        """Before the step after `step`: let masks move, or keep them."""
        for linear in self.linears.values():
            linear.moving = self.settings.method if step < self.last else None
            linear.watches_inputs = self.settings.input_norms and step == 0

    @torch.no_grad()
    def after_step(self, step: int, rates: Mapping[str, tuple[float, float]]) -> bool:
        """What follows the optimiser's step `step` (from 1); whether masks were chosen anew.

        rates: by name the learning rate of the weight relative to its size, and that size, the root mean square of the kept
        weights
        """
        if step == 1 and self.settings.input_norms:
            self.norms = {name: linear.input_norms() for name, linear in self.linears.items()}
        if step > self.last:
            return False
        strength = self.settings.decay * step / self.last
        for name, linear in self.linears.items():
            rate, size = rates[name]
            pull(linear.weight.data, linear.kept, self.settings.method, strength * rate, size)
        chosen = step % self.settings.every == 0 or step == self.last
        if chosen:
            for name, linear in self.linears.items():
                score = linear.weight.abs()
                score = score * self.norms[name] if name in self.norms else score
                linear.keep(two_of_four(score, linear.kept))
        self.begin(step)
        return chosen

    def moved(self) -> float:
        """Share of the kept weights that training began without."""
        kept = sum(int(linear.kept.sum()) for linear in self.linears.values())
        new = 0
        for name, linear in self.linears.items():
            new += int((linear.kept & ~unpack_bits(self.first[name], linear.in_features)).sum())
        return new / kept if kept else 0.0

    def _bits(self) -> dict[str, Tensor]:
        """The masks as they are now, packed."""
        return {name: pack_bits(linear.kept) for name, linear in self.linears.items()}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the weights."""
        masks = {f"{name}.mask_bits": bits for name, bits in self._bits().items()}
        return masks | {f"{name}.norms": norms for name, norms in self.norms.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], step: int) -> None:
        """As after step `step`, when `state` was saved."""
        for name, linear in self.linears.items():
            linear.keep(unpack_bits(state[f"{name}.mask_bits"], linear.in_features))
        self.norms = {name: state[f"{name}.norms"] for name in self.linears if f"{name}.norms" in state}
        self.begin(step)

    def summary(self) -> dict[str, Any]:
        """What metrics.json says."""
        return {"method": self.settings.method, "last_change": self.last, "moved": round(self.moved(), 6)}


@torch.no_grad()
def pull(W: Tensor, mask: Tensor, method: str, rate: float, size: float) -> None:
    """Move the dropped weights toward zero, in place. W: float32 [N, K]; mask: bool [N, K], the kept ones

    ast: by the share `rate` of themselves; cast: by `rate * size`, and not beyond zero
    """
    if method == "ast":
        W.sub_(W * ~mask, alpha=min(rate, 1.0))
    else:
        W.copy_(torch.where(mask, W, W.sign() * (W.abs() - rate * size).clamp(min=0)))
