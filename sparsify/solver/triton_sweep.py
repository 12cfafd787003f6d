"""The inner loops of the column sweep and of coordinate descent on a GPU, in Triton: what `native_sweep.py` is on a CPU.

PyTorch would launch a handful of kernels per input of a linear, and a hundred per group of four that is refined: time to start
kernels, not to run them. Here one launch takes a whole panel. A program holds the panel for BLOCK outputs in registers, one
input per row and one output per column, and goes through the inputs in order; outputs do not depend on each other. To read a
row it adds up the tile under a mask that leaves that row alone, as dynamic indices into registers do not exist.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsify.solver.grid import Grid

BLOCK = 16  # outputs of a program: a panel of 128 inputs is 16 registers in each of 128 threads
WARPS = 4
# 1.5 * 2^23: adding it leaves no bits for a fraction, so the sum is rounded to nearest even
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _row(tile, at):
    """One row of a tile as a vector. at: bool [B, 1], true at that row."""
    return tl.reduce(tl.where(at, tile, 0.0), 0, _add)


@triton.jit
def _code(x, unit, low, high):
    """The code of x on the grid, as a float."""
    clamped = tl.minimum(tl.maximum(tl.div_rn(x, unit), low), high)
    return (clamped + _ROUND) - _ROUND


@triton.jit
def _stored(x, unit, low, high, GRID: tl.constexpr, TO_BF16: tl.constexpr):
    """x as it will be stored: on the grid, or rounded to bfloat16, or as it is."""
    if GRID:
        x = _code(x, unit, low, high) * unit
    elif TO_BF16:
        bits = x.to(tl.int32, bitcast=True)  # not `to(bfloat16)`, which Triton's interpreter truncates
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x != x, x, rounded)  # a carry would make a number of NaN
    return x


@triton.jit
def _ahead(loss, other, EARLIER: tl.constexpr):
    """1 where another input of the four comes before this one: it costs more to remove, or as much and stands earlier."""
    if EARLIER:
        return (other >= loss).to(tl.int32)
    else:
        return (other > loss).to(tl.int32)


@triton.jit
def sweep(
    rows, errors, factor, scale, zero, codes, keep, outputs, size, first, last, low, high,
    ld_rows, ld_errors, ld_factor, ld_scale, ld_codes, ld_keep,
    GRID: tl.constexpr, ZERO: tl.constexpr, KEEP: tl.constexpr, SELECT: tl.constexpr, TO_BF16: tl.constexpr,
    PANEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decide inputs first ... last - 1 of a panel one by one; every later input of the panel repairs each error."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < outputs
    r = tl.arange(0, PANEL)
    place = rows + r[:, None] * ld_rows + n[None, :]
    held = (r < size)[:, None] & inside[None, :]
    tile = tl.load(place, mask=held, other=0.0)
    step: tl.constexpr = 4 if SELECT else 1
    for start in range(first, last, step):
        if SELECT:
            l0 = tl.div_rn(_row(tile, (r == start)[:, None]), tl.load(factor + start * (ld_factor + 1)))
            l1 = tl.div_rn(_row(tile, (r == start + 1)[:, None]), tl.load(factor + (start + 1) * (ld_factor + 1)))
            l2 = tl.div_rn(_row(tile, (r == start + 2)[:, None]), tl.load(factor + (start + 2) * (ld_factor + 1)))
            l3 = tl.div_rn(_row(tile, (r == start + 3)[:, None]), tl.load(factor + (start + 3) * (ld_factor + 1)))
            l0, l1, l2, l3 = l0 * l0, l1 * l1, l2 * l2, l3 * l3
            place0 = _ahead(l0, l1, False) + _ahead(l0, l2, False) + _ahead(l0, l3, False)
            place1 = _ahead(l1, l0, True) + _ahead(l1, l2, False) + _ahead(l1, l3, False)
            place2 = _ahead(l2, l0, True) + _ahead(l2, l1, True) + _ahead(l2, l3, False)
            place3 = _ahead(l3, l0, True) + _ahead(l3, l1, True) + _ahead(l3, l2, True)
        for j in tl.static_range(step):
            i = start + j
            at = (r == i)[:, None]
            now = _row(tile, at)
            kept = inside
            if SELECT:
                if j == 0:
                    kept = place0 < 2
                elif j == 1:
                    kept = place1 < 2
                elif j == 2:
                    kept = place2 < 2
                else:
                    kept = place3 < 2
            elif KEEP:
                kept = tl.load(keep + i * ld_keep + n, mask=inside, other=0) != 0
            if GRID:
                unit = tl.load(scale + (i - first) * ld_scale + n, mask=inside, other=1.0)
                if ZERO:
                    z = tl.load(zero + (i - first) * ld_scale + n, mask=inside, other=0.0)
                    code = tl.where(kept, _code(now, unit, low - z, high - z), 0.0)  # less its zero point
                    tl.store(codes + i * ld_codes + n, (code + z).to(tl.int8), mask=inside)
                else:
                    code = tl.where(kept, _code(now, unit, low, high), 0.0)
                    tl.store(codes + i * ld_codes + n, code.to(tl.int8), mask=inside)
                new = code * unit
            else:
                new = tl.where(kept, _stored(now, now, low, high, False, TO_BF16), 0.0)
            error = tl.div_rn(now - new, tl.load(factor + i * (ld_factor + 1)))
            tl.store(errors + i * ld_errors + n, error, mask=inside)
            repair = tl.load(factor + i * ld_factor + r, mask=(r > i) & (r < size), other=0.0)
            tile = tl.where(at, new[None, :], tile - repair[:, None] * error[None, :])
    tl.store(place, tile, mask=held & (r >= first)[:, None])


@triton.jit
def _try(
    least, earlier, later, support, b_r, b_s, a_r, a_s, cross, unit, low, high,
    NUMBER: tl.constexpr, GRID: tl.constexpr, TO_BF16: tl.constexpr,
):  # fmt: skip
    """One support of two inputs, r rounded first and s knowing what r lost; taken where it is better than the best so far."""
    det = a_r * a_s - cross * cross
    regular = det > 1e-6 * a_r * a_s
    joint = (a_s * b_r - cross * b_s) / tl.where(regular, det, 1.0)
    alone = tl.where(a_r > 0, b_r / tl.where(a_r > 0, a_r, 1.0), 0.0)
    v = _stored(tl.where(regular, joint, alone), unit, low, high, GRID, TO_BF16)
    u = _stored((b_s - cross * v) / tl.where(a_s > 0, a_s, 1.0), unit, low, high, GRID, TO_BF16)
    e = v * (a_r * v + 2 * (cross * u - b_r)) + u * (a_s * u - 2 * b_s)
    better = tl.where(a_s > 0, e, float("inf")) < least
    least = tl.where(better, e, least)
    earlier = tl.where(better, v, earlier)
    later = tl.where(better, u, later)
    support = tl.where(better, NUMBER, support)
    return least, earlier, later, support


@triton.jit
def _chosen(support, earlier, later, now, INPUT: tl.constexpr):
    """The new weights of one of the four inputs; support is 4 r + s, or -1 where nothing was better than what is there."""
    new = tl.where(support // 4 == INPUT, earlier, tl.where(support % 4 == INPUT, later, 0.0))
    return tl.where(support < 0, now, new)


@triton.jit
def visit(
    W, G, H, scale, zero, keep, outputs, size, low, high, ld_w, ld_g, ld_h, ld_keep,
    GRID: tl.constexpr, ZERO: tl.constexpr, KEEP: tl.constexpr, SELECT: tl.constexpr, TO_BF16: tl.constexpr,
    PANEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decide every input of a panel once, given all others, so that the exact layer error falls (coordinate_descent.py)."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < outputs
    r = tl.arange(0, PANEL)
    there = r < size
    held = there[:, None] & inside[None, :]
    w = tl.load(W + r[:, None] * ld_w + n[None, :], mask=held, other=0.0)
    g = tl.load(G + r[:, None] * ld_g + n[None, :], mask=held, other=0.0)
    unit = tl.load(scale + n, mask=inside, other=1.0) if GRID else tl.full([BLOCK], 1.0, tl.float32)
    if ZERO:
        z = tl.load(zero + n, mask=inside, other=0.0)
        low, high = low - z, high - z
    if SELECT:
        for i in range(0, size, 4):
            at0, at1, at2, at3 = (r == i)[:, None], (r == i + 1)[:, None], (r == i + 2)[:, None], (r == i + 3)[:, None]
            w0, w1, w2, w3 = _row(w, at0), _row(w, at1), _row(w, at2), _row(w, at3)
            h0, h1, h2 = H + i * ld_h + i, H + (i + 1) * ld_h + i, H + (i + 2) * ld_h + i
            a00, a01, a02, a03 = tl.load(h0), tl.load(h0 + 1), tl.load(h0 + 2), tl.load(h0 + 3)
            a11, a12, a13 = tl.load(h1 + 1), tl.load(h1 + 2), tl.load(h1 + 3)
            a22, a23, a33 = tl.load(h2 + 2), tl.load(h2 + 3), tl.load(h2 + ld_h + 3)
            s0 = a00 * w0 + a01 * w1 + a02 * w2 + a03 * w3
            s1 = a01 * w0 + a11 * w1 + a12 * w2 + a13 * w3
            s2 = a02 * w0 + a12 * w1 + a22 * w2 + a23 * w3
            s3 = a03 * w0 + a13 * w1 + a23 * w2 + a33 * w3
            b0, b1, b2, b3 = s0 - _row(g, at0), s1 - _row(g, at1), s2 - _row(g, at2), s3 - _row(g, at3)
            best = w0 * (s0 - 2 * b0) + w1 * (s1 - 2 * b1) + w2 * (s2 - 2 * b2) + w3 * (s3 - 2 * b3)
            v, u = tl.full([BLOCK], 0.0, tl.float32), tl.full([BLOCK], 0.0, tl.float32)
            support = tl.full([BLOCK], -1, tl.int32)
            best, v, u, support = _try(best, v, u, support, b0, b1, a00, a11, a01, unit, low, high, 1, GRID, TO_BF16)
            best, v, u, support = _try(best, v, u, support, b0, b2, a00, a22, a02, unit, low, high, 2, GRID, TO_BF16)
            best, v, u, support = _try(best, v, u, support, b0, b3, a00, a33, a03, unit, low, high, 3, GRID, TO_BF16)
            best, v, u, support = _try(best, v, u, support, b1, b0, a11, a00, a01, unit, low, high, 4, GRID, TO_BF16)
            best, v, u, support = _try(best, v, u, support, b1, b2, a11, a22, a12, unit, low, high, 6, GRID, TO_BF16)
            best, v, u, support = _try(best, v, u, support, b1, b3, a11, a33, a13, unit, low, high, 7, GRID, TO_BF16)
            best, v, u, support = _try(best, v, u, support, b2, b0, a22, a00, a02, unit, low, high, 8, GRID, TO_BF16)
            best, v, u, support = _try(best, v, u, support, b2, b1, a22, a11, a12, unit, low, high, 9, GRID, TO_BF16)
            best, v, u, support = _try(best, v, u, support, b2, b3, a22, a33, a23, unit, low, high, 11, GRID, TO_BF16)
            best, v, u, support = _try(best, v, u, support, b3, b0, a33, a00, a03, unit, low, high, 12, GRID, TO_BF16)
            best, v, u, support = _try(best, v, u, support, b3, b1, a33, a11, a13, unit, low, high, 13, GRID, TO_BF16)
            best, v, u, support = _try(best, v, u, support, b3, b2, a33, a22, a23, unit, low, high, 14, GRID, TO_BF16)
            n0, n1 = _chosen(support, v, u, w0, 0), _chosen(support, v, u, w1, 1)
            n2, n3 = _chosen(support, v, u, w2, 2), _chosen(support, v, u, w3, 3)
            column = H + i * ld_h + r  # H is symmetric: its rows are its columns
            g += tl.load(column, mask=there, other=0.0)[:, None] * (n0 - w0)[None, :]
            g += tl.load(column + ld_h, mask=there, other=0.0)[:, None] * (n1 - w1)[None, :]
            g += tl.load(column + 2 * ld_h, mask=there, other=0.0)[:, None] * (n2 - w2)[None, :]
            g += tl.load(column + 3 * ld_h, mask=there, other=0.0)[:, None] * (n3 - w3)[None, :]
            w = tl.where(at0, n0[None, :], tl.where(at1, n1[None, :], w))
            w = tl.where(at2, n2[None, :], tl.where(at3, n3[None, :], w))
    else:
        for i in range(0, size):
            at = (r == i)[:, None]
            now, slope = _row(w, at), _row(g, at)
            curvature = tl.load(H + i * (ld_h + 1))
            new = _stored(now - slope / tl.where(curvature > 0, curvature, 1.0), unit, low, high, GRID, TO_BF16)
            change = new - now
            better = tl.where(curvature > 0, change * (curvature * change + 2 * slope), 0.0) < 0
            if KEEP:
                better = better & (tl.load(keep + i * ld_keep + n, mask=inside, other=0) != 0)
            change = tl.where(better, change, 0.0)
            g += tl.load(H + i * ld_h + r, mask=there, other=0.0)[:, None] * change[None, :]
            w = tl.where(at, tl.where(better, new, now)[None, :], w)
    tl.store(W + r[:, None] * ld_w + n[None, :], w, mask=held)
    tl.store(G + r[:, None] * ld_g + n[None, :], g, mask=held)


def sweep_block(
    W: Tensor, errors: Tensor, U: Tensor, codes: Tensor | None, mask: Tensor | None, first: int, last: int,
    grid: Grid | None, scale: Tensor | None, zero: Tensor | None, select: bool, store: torch.dtype,
) -> None:  # fmt: skip
    """As `column_sweep.sweep_block`, on a GPU. Where a tensor is missing, Triton gets another one, which it never reads."""
    size, outputs = W.shape
    scale, zero = (None if t is None else t.contiguous() for t in (scale, zero))
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    sweep[_programs(outputs)](
        W, errors, U, W if scale is None else scale, W if zero is None else zero, W if codes is None else codes,
        W if mask is None else mask,
        outputs, size, first, last, float(grid.low if grid else 0), float(grid.high if grid else 0),
        W.stride(0), errors.stride(0), U.stride(0), 0 if scale is None or scale.shape[0] == 1 else scale.stride(0),
        0 if codes is None else codes.stride(0), 0 if mask is None else mask.stride(0),
        GRID=grid is not None, ZERO=zero is not None, KEEP=mask is not None, SELECT=select, TO_BF16=store == torch.bfloat16,
        PANEL=_panel(size), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def visit_block(
    W: Tensor, G: Tensor, H: Tensor, scale: Tensor | None, zero: Tensor | None, grid: Grid | None,
    mask: Tensor | None, two_four: bool, store: torch.dtype,
) -> None:  # fmt: skip
    """As `coordinate_descent.visit_block`, on a GPU."""
    size, outputs = W.shape
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    visit[_programs(outputs)](
        W, G, H, W if scale is None else scale, W if zero is None else zero, W if mask is None else mask, outputs, size,
        float(grid.low if grid else 0), float(grid.high if grid else 0),
        W.stride(0), G.stride(0), H.stride(0), 0 if mask is None else mask.stride(0),
        GRID=grid is not None and scale is not None, ZERO=zero is not None, KEEP=mask is not None, SELECT=two_four,
        TO_BF16=store == torch.bfloat16, PANEL=_panel(size), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def _programs(outputs: int) -> tuple[int]:
    return (triton.cdiv(outputs, BLOCK),)


def _panel(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
