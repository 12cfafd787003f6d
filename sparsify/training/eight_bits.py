"""Numbers kept in 8 bits, each block of 256 relative to its largest: for the two moments of AdamW.

Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861): section 2.1 cuts a tensor into blocks, each
with a scale of its own; section 2.2 is the dynamic tree type, whose codes lie dense where numbers are small (six decades below
the scale) and, for numbers that are never negative, have the bit of the sign for the fraction. Blocks are of 256 numbers as in the
authors' later code, not of 2048.

Two things differ from there. The scale has the sign of the block's largest number, so that this one is exact, and numbers that
were read and are written again stay as they are, to the bit. And a second moment above zero never becomes zero: the step
divides by its root, and a first moment beside it may still be there.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 256
DECADES = 7


@cache
def dynamic_map(signed: bool, device: str = "cpu") -> Tensor:
    """The 256 values of the dynamic tree type in ascending order, in [-1, 1] or [0, 1]. float32 [256]

    Of every decade 10^-6 to 1 the means of neighbours among 2^i + 1 (signed) or 2^(i+1) + 1 evenly spaced points, i from 0 to 6
    as decades grow; beside these 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(DECADES):
        points = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1, dtype=torch.float64)
        means = ((points[:-1] + points[1:]) / 2 * 10.0 ** (i - DECADES + 1)).tolist()
        values += means + [-mean for mean in means if signed]
    return torch.tensor(sorted(values), dtype=torch.float64).float().to(device)


@cache
def _between(signed: bool, device: str) -> Tensor:
    """The bounds between neighbouring values: a number belongs to the nearest. float32 [255]"""
    values = dynamic_map(signed).double()
    return ((values[:-1] + values[1:]) / 2).float().to(device)


class EightBits:
    """A flat tensor of float32 numbers, zero at first, of which blocks are read and written.

    signed: whether numbers may be negative; those that may not are never rounded from above zero to zero
    codes: uint8 [count, filled up to whole blocks]; scales: float32 [blocks], of the sign of the block's largest number
    """

    def __init__(self, count: int, signed: bool, device: torch.device):
        blocks = -(-count // BLOCK)
        self.count, self.signed = count, signed
        zero = int(dynamic_map(signed).eq(0).nonzero())
        self.codes = torch.full((blocks * BLOCK,), zero, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(blocks, device=device)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def read(self, start: int, stop: int) -> Tensor:
        """Numbers start to stop, float32. start: a multiple of BLOCK"""
        first, last = start // BLOCK, -(-stop // BLOCK)
        values = dynamic_map(self.signed, str(self.codes.device))
        found = values.index_select(0, self.codes[first * BLOCK : last * BLOCK].int()).view(-1, BLOCK)
        return found.mul_(self.scales[first:last, None]).view(-1)[: stop - start]

    def write(self, start: int, numbers: Tensor) -> None:
        """Keep numbers from start on, a multiple of BLOCK. numbers: float32 [n], up to a bound of blocks or the end"""
        blocks = torch.nn.functional.pad(numbers, (0, -len(numbers) % BLOCK)).view(-1, BLOCK)
        first, last = start // BLOCK, start // BLOCK + len(blocks)
        scales = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        ratios = blocks / torch.where(scales == 0, 1.0, scales)
        codes = torch.bucketize(ratios, _between(self.signed, str(ratios.device)), out_int32=True)
        if not self.signed:
            codes = torch.where(ratios > 0, codes.clamp(min=1), codes)
        self.scales[first:last] = scales.view(-1)
        self.codes[first * BLOCK : last * BLOCK] = codes.view(-1).to(torch.uint8)
