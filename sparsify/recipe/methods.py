"""What each method of pruning and quantization needs: the one table that recipe, plan and solver ask.

To add a method: its line here, its file in `solver/masks/` (or its case in `solver/solve.py`), a recipe, a test.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """What a method works with.

    data:    it reads what the calibration text activates
    hessian: it factors H = X'X, damped
    sweep:   the column sweep repairs what it leaves, and coordinate descent goes on from there
    """

    data: bool = False
    hessian: bool = False
    sweep: bool = False

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(self.data or other.data, self.hessian or other.hessian, self.sweep or other.sweep)


NOTHING = Needs()
KEEP = "keep"  # the zeros of a linear that is 2:4 already
PRUNE = {
    KEEP: NOTHING,
    "magnitude": NOTHING,
    "wanda": Needs(data=True),
    "sparsegpt": Needs(data=True, hessian=True, sweep=True),
    "alps": Needs(data=True, hessian=True, sweep=True),
}
QUANTIZE = {
    "rtn": NOTHING,
    "gptq": Needs(data=True, hessian=True, sweep=True),
}


TRANSFORMS = {"AWQModifier": True, "SmoothQuantModifier": True, "SpinQuantModifier": False}
"""Modifiers of llm-compressor that change a dense model into another dense model; True for those that read calibration text."""


def needs_of(prune: str | None, quantize: str | None) -> Needs:
    """What a linear needs that is pruned and quantized by these methods; None leaves that half out."""
    return (PRUNE[prune] if prune else NOTHING) | (QUANTIZE[quantize] if quantize else NOTHING)
