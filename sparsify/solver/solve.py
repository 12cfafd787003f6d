"""The layer-wise solve: prune and quantize the linears that read one tensor, on one Hessian, as one stacked matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify.distributed import gathered, processes, share
from sparsify.errors import NumericalError
from sparsify.model.finite import all_finite
from sparsify.model.linear import LinearWeights
from sparsify.phases import phase
from sparsify.recipe.methods import KEEP, NOTHING, PRUNE, needs_of
from sparsify.solver import masks
from sparsify.solver.column_sweep import column_sweep
from sparsify.solver.coordinate_descent import coordinate_descent
from sparsify.solver.grid import Grid, round_to_nearest
from sparsify.solver.hessian import Statistics, damped_in_place, factor, lost_part, propagated_target, squared_outputs

KEPT = 64 << 20  # bytes


@dataclass(frozen=True)
class Scheme:
    """Settings of the solver for one linear.

    prune:      name in `solver.masks.METHODS`, or None to keep it dense
    quantize:   "rtn", "gptq", or None to keep 16 bits
    bits, group_size: of the quantization grid; group_size 0 means one scale per output channel
    damping:    added to the Hessian's diagonal, relative to its mean
    error_propagation: alpha of QEP, how far the target moves toward the dense outputs; 0 aims at the original weights
    activation_order: sweep the inputs of largest second moment first
    coordinate_descent: passes of it after the sweep
    as_dense:   the format is not told of the zeros, because vLLM merges this linear with one that has none
    dtype:      how scales and 16-bit values are stored
    symmetric:  the grid has no zero points
    """

    prune: str | None
    quantize: str | None
    bits: int = 16
    group_size: int = 0
    damping: float = 0.01
    error_propagation: float = 0.0
    activation_order: bool = False
    scale_search: bool = True
    coordinate_descent: int = 0
    dtype: torch.dtype = torch.bfloat16
    as_dense: bool = False
    symmetric: bool = True

    @property
    def pattern(self) -> str:
        """What is stored: "2:4" or "dense"."""
        return "2:4" if self.prune and not self.as_dense else "dense"

    @property
    def sweeps(self) -> bool:
        """Whether weights are repaired by the column sweep, which needs the whole Hessian."""
        return needs_of(self.prune, self.quantize).sweep

    @property
    def needs_data(self) -> bool:
        return needs_of(self.prune, self.quantize).data or self.error_propagation > 0

    def grid(self, in_features: int) -> Grid | None:
        if self.quantize is None:
            return None
        return Grid(self.bits, self.group_size or in_features, self.dtype, self.scale_search, self.symmetric)

    def reason_dense(self, in_features: int) -> str | None:
        """Why a linear with so many inputs must stay dense under this scheme; None when it need not."""
        group = self.group_size if self.quantize else 0
        if in_features % 16 or (group and in_features % group):
            return f"its {in_features} inputs are no multiple of 16" + (
                f" and of the group size {group}" if group else ""
            )
        return None


@torch.no_grad()
def solve_layer(
    weights: Mapping[str, Tensor],
    scheme: Scheme,
    statistics: Statistics | None,
    together: bool = False,
    measure: bool = True,
    masks_found: dict[str, Tensor] | None = None,
) -> tuple[dict[str, LinearWeights], dict[str, float]]:
    """Compress linears that read the same tensor. weights: module name -> [N_i, K].

    together: all processes call this with the same arguments; each solves its share of the outputs, which do not depend
    on each other, and all get the whole.
    masks_found: by method, masks that were found for these weights on these statistics with the same damping and error
    propagation; they are taken from here and kept here. Only without `together`.
    Returns the compressed linears, and their relative output error on the calibration tokens (empty without data, and
    without `measure`: it costs two products with H). Raises NumericalError for NaN or Inf in a weight or in the Hessian.
    """
    for name, weight in weights.items():
        if not all_finite(weight):
            raise NumericalError(
                f"{name}: its dense weight holds NaN or Inf; the model itself is damaged, get it again"
            )
    W = torch.cat([weight.float() for weight in weights.values()])
    together = together and W.shape[0] >= processes()
    mine = share(W.shape[0]) if together else slice(0, W.shape[0])
    own = None if statistics is None else statistics.of(mine)
    solved = _solve(W[mine], scheme, own, ", ".join(weights), {} if masks_found is None else masks_found)
    stacked: dict[str, slice] = {}
    start = 0
    for name, weight in weights.items():
        stacked[name] = slice(start, start + weight.shape[0])
        start += weight.shape[0]
    parts: dict[str, tuple[float, float]] = {}
    if statistics is not None and measure:
        with phase("errors"):
            parts = {name: _lost(W, solved, mine, outputs, statistics.H) for name, outputs in stacked.items()}
    every = gathered((solved, parts)) if together else [(solved, parts)]
    solved = _joined([each for each, _ in every], W.device) if together else solved
    errors = {name: lost_part(*map(sum, zip(*(part[name] for _, part in every), strict=True))) for name in parts}
    return {name: solved.of(outputs).validate(name) for name, outputs in stacked.items()}, errors


def _lost(W: Tensor, solved: LinearWeights, mine: slice, outputs: slice, H: Tensor) -> tuple[float, float]:
    """Of those `outputs` of W [N, K] that are `mine`, which `solved` holds: what is lost of their squared sum, and that sum."""
    here = slice(max(mine.start, outputs.start), max(mine.start, min(mine.stop, outputs.stop)))
    before = W[here]
    off = before - solved.of(slice(here.start - mine.start, here.stop - mine.start)).dense(torch.float32)
    return squared_outputs(off, H), squared_outputs(before, H)


def _solve(
    W: Tensor, scheme: Scheme, statistics: Statistics | None, name: str, masks_found: dict[str, Tensor]
) -> LinearWeights:
    """W: [N, K] float32, stacked. In this order: error propagation, mask, column sweep, coordinate descent; or rounding.

    Beside the statistics there is one [K, K] matrix at a time, and a small factor beside that of ALPS.
    """
    k = W.shape[1]
    grid = scheme.grid(k)
    pattern = scheme.pattern
    given = W
    if not W.any():
        return _removed(W, grid, pattern, scheme.dtype)
    needs = PRUNE[scheme.prune] if scheme.prune else NOTHING
    H = None if statistics is None else statistics.H
    diagonal: Tensor | None = None  # of the damped Hessian
    U: Tensor | None = None
    if statistics is not None and (scheme.sweeps or scheme.error_propagation > 0):
        with phase("factors"):
            factors = factor(statistics.H, scheme.damping, name)
            if scheme.error_propagation > 0 and (statistics.C is not None or statistics.WC is not None):
                W = propagated_target(W, statistics, factors, scheme.error_propagation)
        if factors.dead.any():
            W = W.masked_fill(factors.dead, 0)
        diagonal, U = factors.diagonal, None if scheme.activation_order else factors.inverse_cholesky
        del factors
    mask = None
    if scheme.prune and masks.METHODS[scheme.prune].mask:
        if needs.hessian and scheme.prune not in masks_found and not factor_is_kept(k):
            U = None  # made anew after the mask, for which it would be in the way
        # error propagation moves what is zero; the mask to keep is that of the weights as they were given
        source = given if scheme.prune == KEEP else W
        with phase("masks"):
            mask = _mask(source, H, diagonal if needs.hessian else None, scheme.prune, masks_found)
    if scheme.sweeps:
        assert H is not None and diagonal is not None
        select = masks.METHODS[scheme.prune].select if scheme.prune else None
        swept_to = grid if scheme.quantize == "gptq" else None
        order = activation_order(H, 4 if select else 1) if scheme.activation_order else None
        if U is None:
            with phase("factors"):
                U = factor(H, scheme.damping, name, order).inverse_cholesky
        with phase("sweep"):
            solved = column_sweep(W, U, swept_to, mask, select, order, scheme.dtype)
        del U
        with damped_in_place(H, diagonal), phase("coordinate descent"):
            solved = coordinate_descent(
                solved, W, H, scheme.coordinate_descent,
                grid=swept_to, mask=mask, two_four=needs.sweep, store=scheme.dtype,
            )  # fmt: skip
        if scheme.quantize == "gptq":
            assert grid is not None
            return LinearWeights(
                grid.bits,
                pattern,
                grid.group_size,
                codes=solved.codes,
                scale=solved.scale,
                zero_point=solved.zero_point,
            )
        W = solved.weight
    elif mask is not None:
        W = W * mask
    if grid is None:
        return LinearWeights(16, pattern, k, values=W.to(scheme.dtype).contiguous())
    with phase("sweep"):
        codes, scale, zero_point = round_to_nearest(W, grid)
    return LinearWeights(grid.bits, pattern, grid.group_size, codes=codes, scale=scale, zero_point=zero_point)


def factor_is_kept(k: int) -> bool:
    """Whether the factor [K, K] of the Hessian is so small that it stays while a method chooses a mask."""
    return 4 * k * k <= KEPT


def _mask(
    W: Tensor, H: Tensor | None, diagonal: Tensor | None, prune: str, masks_found: dict[str, Tensor]
) -> Tensor | None:
    """What a method keeps of W [N, K], bool [N, K]. H: [K, K], with another diagonal [K] where one is given."""
    method = masks.METHODS[prune].mask
    if method is not None and prune not in masks_found:
        if H is None:
            masks_found[prune] = method(W, None)
        else:
            with damped_in_place(H, diagonal):
                masks_found[prune] = method(W, H)
    return masks_found.get(prune)


def _removed(W: Tensor, grid: Grid | None, pattern: str, dtype: torch.dtype) -> LinearWeights:
    """The linear of a removed sublayer, W: [N, K] all zero: it has nothing to solve, and its inputs may be zero as well."""
    n, k = W.shape
    if grid is None:
        return LinearWeights(16, pattern, k, values=W.to(dtype))
    scale = torch.ones(n, k // grid.group_size, dtype=dtype, device=W.device)
    zero_point = None if grid.symmetric else torch.zeros_like(scale, dtype=torch.int8)
    return LinearWeights(
        grid.bits, pattern, grid.group_size, codes=W.to(torch.int8), scale=scale, zero_point=zero_point
    )


def activation_order(H: Tensor, unit: int) -> Tensor:
    """Columns by falling second moment, moved in units of so many neighbours. H: [K, K]. Returns int64 [K]."""
    moment = H.diagonal().reshape(-1, unit).sum(1)
    units = torch.argsort(moment, dim=0, descending=True, stable=True)
    return (units[:, None] * unit + torch.arange(unit, device=H.device)).reshape(-1)


def _joined(parts: Sequence[LinearWeights], device: torch.device) -> LinearWeights:
    """One linear from the outputs that each process solved."""

    def joined(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat([tensor.to(device) for tensor in tensors])

    codes, scale, values, zero_point = (joined(name) for name in ("codes", "scale", "values", "zero_point"))
    return replace(parts[0], codes=codes, scale=scale, values=values, zero_point=zero_point)
