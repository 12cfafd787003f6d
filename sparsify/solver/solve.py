"""Prune and quantize the linears that read one tensor, on one Hessian, as one stacked matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify.distributed import gathered, processes, share
from sparsify.errors import NumericalError
from sparsify.model.linear import LinearWeights
from sparsify.recipe.methods import PRUNE, needs_of
from sparsify.solver import masks as pruning
from sparsify.solver.column_sweep import column_sweep
from sparsify.solver.coordinate_descent import refine
from sparsify.solver.gptq import gptq
from sparsify.solver.grid import Grid
from sparsify.solver.hessian import Factors, corrected_target, factor, relative_error
from sparsify.solver.rtn import round_to_nearest


@dataclass(frozen=True)
class Scheme:
    """What is to become of a linear.

    prune:      name in `solver.masks.METHODS`, or None to keep it dense
    quantize:   "rtn", "gptq", or None to keep 16 bits
    bits, group_size: of the quantization grid; group_size 0 means one scale per output channel
    damping:    added to the Hessian's diagonal, relative to its mean
    error_propagation: alpha of QEP, how far the target moves toward the dense outputs; 0 aims at the original weights
    activation_order: sweep the inputs of largest second moment first
    coordinate_descent: passes of it after the sweep
    dtype:      how scales and 16-bit values are stored
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
        return Grid(self.bits, self.group_size or in_features, self.dtype, self.scale_search)

    def reason_dense(self, in_features: int) -> str | None:
        """Why a linear with so many inputs must stay dense under this scheme; None when it need not."""
        group = self.group_size if self.quantize else 0
        if in_features % 16 or (group and in_features % group):
            return f"its {in_features} inputs are no multiple of 16" + (
                f" and of the group size {group}" if group else ""
            )
        return None


@dataclass(frozen=True)
class Statistics:
    """What the calibration tokens say about one group of linears: H = X'X / tokens and C = Xd'X / tokens, float32 [K, K]."""

    H: Tensor
    C: Tensor | None = None


@torch.no_grad()
def compress(
    weights: Mapping[str, Tensor],
    scheme: Scheme,
    statistics: Statistics | None,
    together: bool = False,
    measure: bool = True,
) -> tuple[dict[str, LinearWeights], dict[str, float]]:
    """Compress linears that read the same tensor. weights: module name -> [N_i, K].

    together: all processes call this with the same arguments; each solves its share of the outputs, which do not depend
    on each other, and all get the whole.
    Returns the compressed linears, and their relative output error on the calibration tokens (empty without data, and
    without `measure`: it costs two products with H).
    """
    names = list(weights)
    for name in names:
        if not torch.isfinite(weights[name]).all():
            raise NumericalError(
                f"{name}: its dense weight holds NaN or Inf; the model itself is damaged, get it again"
            )
    rows = [weights[name].shape[0] for name in names]
    original = torch.cat([weights[name].float() for name in names])
    together = together and original.shape[0] >= processes()
    mine = share(original.shape[0]) if together else slice(None)
    compressed = _stacked(original[mine], scheme, statistics, ", ".join(names))
    compressed = _joined(gathered(compressed), original.device) if together else compressed
    parts: dict[str, LinearWeights] = {}
    errors: dict[str, float] = {}
    start = 0
    for name, n in zip(names, rows, strict=True):
        piece = slice(start, start + n)
        parts[name] = LinearWeights(
            bits=compressed.bits,
            pattern=compressed.pattern,
            group_size=compressed.group_size,
            codes=_rows(compressed.codes, piece),
            scale=_rows(compressed.scale, piece),
            values=_rows(compressed.values, piece),
        ).validate(name)
        if statistics is not None and measure:
            errors[name] = relative_error(original[piece], parts[name].dense(torch.float32), statistics.H)
        start += n
    return parts, errors


def _joined(parts: Sequence[LinearWeights], device: torch.device) -> LinearWeights:
    """One linear from the outputs that each process solved."""

    def joined(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat([tensor.to(device) for tensor in tensors])

    codes, scale, values = (joined(name) for name in ("codes", "scale", "values"))
    return replace(parts[0], codes=codes, scale=scale, values=values)


def _rows(tensor: Tensor | None, piece: slice) -> Tensor | None:
    return None if tensor is None else tensor[piece].clone()


def _stacked(W: Tensor, scheme: Scheme, statistics: Statistics | None, name: str) -> LinearWeights:
    """W: [N, K] float32, the stacked weights. Follows the recipe's order: correct, prune, quantize; fused where both sweep."""
    k = W.shape[1]
    grid = scheme.grid(k)
    pattern = "2:4" if scheme.prune else "dense"
    if not W.any():
        return _nothing(W, grid, pattern, scheme.dtype)
    factors: Factors | None = None
    if statistics is not None and (scheme.sweeps or scheme.error_propagation > 0):
        factors = factor(statistics.H, scheme.damping, name)
        if statistics.C is not None and scheme.error_propagation > 0:
            W = corrected_target(W, statistics.C, factors, scheme.error_propagation)
        W = W.masked_fill(factors.dead, 0)
    method = pruning.METHODS[scheme.prune] if scheme.prune else None
    solves = scheme.prune is not None and PRUNE[scheme.prune].hessian
    H = factors.damped if factors and solves else statistics.H if statistics else None
    keep = method.mask(W, H) if method and method.mask else None
    select = method.select if method else None
    swaps = scheme.prune is not None and PRUNE[scheme.prune].sweep
    if scheme.sweeps:
        assert factors is not None and statistics is not None
        order, U = None, factors.inverse
        if scheme.activation_order:
            order = activation_order(statistics.H, 4 if select else 1)
            U = factor(statistics.H[order][:, order], scheme.damping, name).inverse
        if grid is not None and scheme.quantize == "gptq":
            swept = gptq(W, U, grid, keep, select, order)
            refined = refine(
                swept.weight, W, factors.damped, scheme.coordinate_descent,
                scale=swept.scale, grid=grid, keep=keep, select=swaps,
            )  # fmt: skip
            return LinearWeights(grid.bits, pattern, grid.group_size, codes=refined.codes, scale=refined.scale)
        swept = column_sweep(W, U, None, keep=keep, select=select, order=order, store=scheme.dtype)
        W = refine(
            swept.weight, W, factors.damped, scheme.coordinate_descent, keep=keep, select=swaps, store=scheme.dtype
        ).weight
    elif keep is not None:
        W = W * keep
    if grid is None:
        return LinearWeights(16, pattern, k, values=W.to(scheme.dtype))
    codes, scale = round_to_nearest(W, grid)
    return LinearWeights(grid.bits, pattern, grid.group_size, codes=codes, scale=scale)


def _nothing(W: Tensor, grid: Grid | None, pattern: str, dtype: torch.dtype) -> LinearWeights:
    """The linear of a removed sublayer, W: [N, K] all zero: it has nothing to solve, and its inputs may be zero as well."""
    n, k = W.shape
    if grid is None:
        return LinearWeights(16, pattern, k, values=W.to(dtype))
    scale = torch.ones(n, k // grid.group_size, dtype=dtype, device=W.device)
    return LinearWeights(grid.bits, pattern, grid.group_size, codes=W.to(torch.int8), scale=scale)


def activation_order(H: Tensor, unit: int) -> Tensor:
    """Inputs by falling second moment, moved in units of so many neighbours. H: [K, K]. Returns int64 [K]."""
    moment = H.diagonal().reshape(-1, unit).sum(1)
    units = torch.argsort(moment, dim=0, descending=True, stable=True)
    return (units[:, None] * unit + torch.arange(unit, device=H.device)).reshape(-1)
