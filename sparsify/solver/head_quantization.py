"""The output head as a dense-pattern linear, in pieces that fit into memory.

Its inputs are the model's last hidden states and its outputs are the logits themselves: nothing after it could repair an
error. With 8 bits rounding to nearest is lost in the noise of what comes before. With 4 it is not: a few inputs are many
times larger than all others, and their errors reach every logit. GPTQ knows them and lets the other inputs repair.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify.model.linear import LinearWeights
from sparsify.recipe import Head
from sparsify.solver.hessian import Statistics
from sparsify.solver.solve import Scheme, solve_layer

ROWS = 16384  # outputs rounded at once: a vocabulary of 262144 in float32 would be gigabytes, several times over
GROUP_SIZES = (128, 64, 32)
COORDINATE_DESCENT = 5  # passes after GPTQ, as the recipes have for linears


def head_scheme(head: Head, dtype: torch.dtype, calibrates: bool = False) -> Scheme:
    """What the recipe asks of the head. dtype: how scales are stored; calibrates: whether it reads text anyway."""
    scheme = Scheme(
        prune=None,
        quantize=head.method or ("gptq" if head.bits == 4 and calibrates else "rtn"),
        bits=head.bits,
        group_size=0 if head.group_size == "channel" else head.group_size,
        dtype=dtype,
        symmetric=head.symmetric,
    )
    return replace(scheme, activation_order=True, coordinate_descent=COORDINATE_DESCENT) if scheme.sweeps else scheme


def head_problem(module: str, shape: tuple[int, int], scheme: Scheme) -> str | None:
    """Why a head of `shape` (N, K) cannot become this scheme, with what would be possible; None when it can."""
    k = shape[1]
    if k % 16:
        return f"{module} has {k} inputs, no multiple of 16, so it cannot be quantized; leave head out"
    if scheme.group_size and k % scheme.group_size:
        fits = next((str(size) for size in GROUP_SIZES if k % size == 0), "channel")
        return f"{module} has {k} inputs, no multiple of the group size {scheme.group_size}; group size {fits} works"
    return None


@dataclass(frozen=True)
class SolvedHead:
    """A quantized output head. weight_error: ||W - What||^2 / ||W||^2; output_error: the same of the logits, where text was read."""

    linear: LinearWeights
    weight_error: float
    output_error: float | None


def solve_head(module: str, weight: Tensor, scheme: Scheme, H: Tensor | None = None) -> SolvedHead:
    """weight: [N, K]. H: X'X / tokens of what the head reads, [K, K], for a scheme that needs data; where there are several
    processes, all of them then call this."""
    if H is not None:
        weight = weight.to(H.device)
    linear = quantize_head(module, weight, scheme, H)
    return SolvedHead(linear, head_error(weight, linear), None if H is None else head_error(weight, linear, H))


def quantize_head(module: str, weight: Tensor, scheme: Scheme, H: Tensor | None = None) -> LinearWeights:
    """As `solve_head`, unmeasured. Rows do not depend on each other, so the pieces give what the whole would."""
    statistics, together = (None, False) if H is None else (Statistics(H), True)
    split = weight.split(ROWS)
    pieces = [solve_layer({module: rows}, scheme, statistics, together, measure=False)[0][module] for rows in split]
    codes = [piece.codes for piece in pieces if piece.codes is not None]
    scales = [piece.scale for piece in pieces if piece.scale is not None]
    zeros = [piece.zero_point for piece in pieces if piece.zero_point is not None]
    zero_point = torch.cat(zeros) if zeros else None
    return replace(pieces[0], codes=torch.cat(codes), scale=torch.cat(scales), zero_point=zero_point).validate(module)


def head_error(weight: Tensor, linear: LinearWeights, H: Tensor | None = None) -> float:
    """||W - What||^2 / ||W||^2, or of the outputs on the tokens of H: [K, K]; in pieces. weight: [N, K]."""
    assert linear.codes is not None and linear.scale is not None

    def energy(rows: Tensor) -> float:
        return float(((rows if H is None else rows @ H) * rows).sum(dtype=torch.float64))

    lost = total = 0.0
    for start in range(0, weight.shape[0], ROWS):
        piece = slice(start, start + ROWS)
        zero_point = None if linear.zero_point is None else linear.zero_point[piece]
        rounded = replace(linear, codes=linear.codes[piece], scale=linear.scale[piece], zero_point=zero_point)
        rows = weight[piece].float()
        lost += energy(rows - rounded.dense(torch.float32))
        total += energy(rows)
    return lost / total if total else 0.0
