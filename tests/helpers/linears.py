"""Compressed linears at random, as tensors of a checkpoint and as what they mean: for tests of kernels."""

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.formats import ModuleScheme
from sparsify.runtime.backends.cpu import TYPES


@dataclass(frozen=True)
class Linear:
    """A linear to be made: what `make` turns into tensors of a checkpoint."""

    bits: int
    pattern: str
    group: int
    n: int
    k: int
    stored: torch.dtype = torch.bfloat16
    seed: int = 0
    exact: bool = False  # scales are powers of two, values integers: every sum in the tests is exact

    @property
    def scheme(self) -> ModuleScheme:
        return ModuleScheme(self.bits, self.group, self.pattern, (self.n, self.k))

    @property
    def arguments(self) -> tuple[int, ...]:
        return self.n, self.k, self.bits, self.group, int(self.pattern == "2:4"), TYPES[self.stored]


@dataclass(frozen=True)
class Made:
    tensors: dict[str, Tensor]  # as on disk
    codes: Tensor  # [N, K], zeros in place; the values for 16 bits
    kept: Tensor  # [N, K] bool
    weight: Tensor  # [N, K] float64


@functools.cache
def make(linear: Linear) -> Made:
    """Random tensors of a checkpoint (DESIGN, section 5) and what they mean."""
    generator = torch.Generator().manual_seed(linear.seed)
    n, k, bits = linear.n, linear.k, linear.bits
    kept = torch.ones(n, k, dtype=torch.bool)
    tensors: dict[str, Tensor] = {}
    if linear.pattern == "2:4":
        pairs = torch.tensor(list(itertools.combinations(range(4), 2)))
        chosen = pairs[torch.randint(0, 6, (n, k // 4), generator=generator)]  # [N, K/4, 2], ascending
        kept = torch.zeros(n, k // 4, 4, dtype=torch.bool).scatter_(2, chosen, True).view(n, k)
        nibbles = (chosen[:, :, 0] | chosen[:, :, 1] << 2).view(n, k // 8, 2)
        tensors["weight_meta"] = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).to(torch.uint8)
    if bits == 16:
        numbers = torch.randn(n, k, generator=generator)
        if linear.exact:
            numbers = torch.randint(-16, 17, (n, k), generator=generator).float()
        values = numbers.to(linear.stored) * kept
        tensors["weight_values"] = values[kept].view(n, -1).contiguous()
        return Made(tensors, values, kept, values.double())
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (n, k), generator=generator) * kept
    offset = codes[kept].view(n, -1) + half
    if bits == 4:
        offset = offset[:, 0::2] | offset[:, 1::2] << 4
    tensors["weight_packed"] = offset.to(torch.uint8).view(torch.int32)  # this machine is little-endian, as the format
    scale = torch.rand(n, k // linear.group, generator=generator) * 0.1 + 0.01
    if linear.exact:
        scale = 2.0 ** torch.randint(-3, 2, scale.shape, generator=generator)
    tensors["weight_scale"] = scale.to(linear.stored)
    weight = codes.double() * tensors["weight_scale"].double().repeat_interleave(linear.group, 1)
    return Made(tensors, codes, kept, weight)
