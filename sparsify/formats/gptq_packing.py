"""Codes and zero points as AutoGPTQ and GPTQModel store them. Pure functions, any device.

A linear with N outputs, K inputs and groups of G inputs, 4 or 8 bits (AutoGPTQ 0.7.1, `qlinear_cuda.py`, `pack`):

    qweight   int32 [K * bits / 32, N]     u = code + 2^(bits-1); a word holds consecutive inputs, the first lowest
    qzeros    int32 [K/G, N * bits / 32]   z = zero point + 2^(bits-1); a word holds consecutive outputs, the first lowest
    scales    float16 or bfloat16 [K/G, N]
    g_idx     int32 [K]                    the group of each input

w[n, k] = scales[g, n] * (u[n, k] - z[n, g]) with g = g_idx[k]. In version 1 (`checkpoint_format: gptq`, and where nothing is
said) qzeros holds z - 1, in version 2 (`gptq_v2`) z itself. Here codes and zero points are signed, in
[-2^(bits-1), 2^(bits-1)): a symmetric linear has zero points of 0, stored as 7 or 127 in version 1.
"""

import torch
from torch import Tensor

from sparsify.formats.packing import pack_words, unpack_words

VERSIONS = {"gptq": 1, "gptq_v2": 2}  # how zero points are stored, by `checkpoint_format`


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """qweight. codes: int8 [N, K], K a multiple of 32 / bits. Returns int32 [K * bits / 32, N]."""
    return pack_words(codes, bits).t().contiguous()


def unpack_codes(qweight: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_codes`. qweight: int32 [K * bits / 32, N]. Returns int8 [N, K]."""
    return unpack_words(qweight.t(), bits)


def pack_zero_points(zero_points: Tensor, bits: int, version: int = 1) -> Tensor:
    """qzeros. zero_points: int8 [N, K/G], N a multiple of 32 / bits. Returns int32 [K/G, N * bits / 32].

    Version 1 cannot hold the lowest zero point: the packers' z - 1 borrows from the neighbours. Here it wraps around.
    """
    return pack_words(_shifted(zero_points, bits, -1 if version == 1 else 0).t(), bits)


def unpack_zero_points(qzeros: Tensor, bits: int, version: int = 1) -> Tensor:
    """Inverse of `pack_zero_points`. qzeros: int32 [K/G, N * bits / 32]. Returns int8 [N, K/G].

    In version 1 a stored 2^bits - 1 means 0, as AutoGPTQ reads it.
    """
    return _shifted(unpack_words(qzeros, bits), bits, 1 if version == 1 else 0).t().contiguous()


def group_indices(inputs: int, group_size: int) -> Tensor:
    """g_idx of a linear whose inputs are in order. Returns int32 [inputs]."""
    return torch.arange(inputs, dtype=torch.int32) // group_size


def _shifted(codes: Tensor, bits: int, by: int) -> Tensor:
    """codes + by, modulo 2^bits, in the signed range. codes: int8, any shape."""
    offset, mask = 1 << (bits - 1), (1 << bits) - 1
    return (((codes.to(torch.int16) + offset + by) & mask) - offset).to(torch.int8)
