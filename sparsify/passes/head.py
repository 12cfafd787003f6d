"""The output head as a dense-pattern linear: rounded to nearest, data-free, in pieces that fit into memory.

Its inputs are the model's last hidden states and its outputs are the logits themselves: with 8 bits the rounding is lost
in the noise of what comes before, and there is nothing after it that could repair an error.
"""

import torch
from torch import Tensor

from sparsify.model.linear import LinearWeights
from sparsify.passes.compress import Scheme, compress
from sparsify.recipe import Head

ROWS = 16384  # outputs rounded at once: a vocabulary of 262144 in float32 would be gigabytes, several times over
GROUP_SIZES = (128, 64, 32)


def head_scheme(head: Head, dtype: torch.dtype) -> Scheme:
    """What the recipe asks of the head. dtype: how scales are stored."""
    group_size = 0 if head.group_size == "channel" else head.group_size
    return Scheme(prune=None, quantize="rtn", bits=head.bits, group_size=group_size, dtype=dtype)


def head_problem(module: str, shape: tuple[int, int], scheme: Scheme) -> str | None:
    """Why a head of `shape` (N, K) cannot become this scheme, with what would be possible; None when it can."""
    k = shape[1]
    if k % 16:
        return f"{module} has {k} inputs, no multiple of 16, so it cannot be quantized; leave head out"
    if scheme.group_size and k % scheme.group_size:
        fits = next((str(size) for size in GROUP_SIZES if k % size == 0), "channel")
        return f"{module} has {k} inputs, no multiple of the group size {scheme.group_size}; group size {fits} works"
    return None


def quantize_head(module: str, weight: Tensor, scheme: Scheme) -> LinearWeights:
    """weight: [N, K]. Rows do not depend on each other, so the pieces give what the whole would."""
    pieces = [compress({module: rows}, scheme, None)[0][module] for rows in weight.split(ROWS)]
    codes = [piece.codes for piece in pieces if piece.codes is not None]
    scales = [piece.scale for piece in pieces if piece.scale is not None]
    first = pieces[0]
    return LinearWeights(
        first.bits, first.pattern, first.group_size, codes=torch.cat(codes), scale=torch.cat(scales)
    ).validate(module)


def rounding_error(weight: Tensor, linear: LinearWeights) -> float:
    """||W - What||^2 / ||W||^2, in pieces. weight: [N, K]."""
    assert linear.codes is not None and linear.scale is not None
    lost = total = 0.0
    for start in range(0, weight.shape[0], ROWS):
        piece = slice(start, start + ROWS)
        codes, scale = linear.codes[piece], linear.scale[piece]
        rounded = LinearWeights(linear.bits, linear.pattern, linear.group_size, codes=codes, scale=scale)
        rows = weight[piece].float()
        lost += float((rows - rounded.dense(torch.float32)).square().sum(dtype=torch.float64))
        total += float(rows.square().sum(dtype=torch.float64))
    return lost / total if total else 0.0
