"""The layer-wise least-squares problem: the Hessian, its damping and factors, and error propagation.

A linear y = W x is compressed to What so that sum_m ||W x_m - What x_m||^2 is small over M calibration tokens x_m. Every
method here needs of the tokens only H = X'X / M, and for error propagation C = Xd'X / M, where row m of X is x_m in the
compressed model and row m of Xd is the same token's input in the dense model; or W C, which is Yd'X / M with the dense model's
outputs Yd = Xd W' and smaller than C where there are fewer outputs than inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsify.distributed import sum_over_all, sum_symmetric_over_all
from sparsify.errors import NumericalError
from sparsify.model.finite import all_finite
from sparsify.phases import phase
from sparsify.solver.gram import cross, gram, mirror

RETRIES = 3  # each with ten times the damping
PANEL = 1024  # rows or columns of a [K, K] matrix that are worked on together
ROWS = 256  # the same where those of a triangle are multiplied: what is computed of the other one is wasted


@dataclass(frozen=True)
class Statistics:
    """What the calibration tokens say about linears that read one tensor, float32.

    H:  [K, K], X'X / M
    C:  [K, K], Xd'X / M, where errors are propagated
    WC: [N, K], Yd'X / M, instead of C
    """

    H: Tensor
    C: Tensor | None = None
    WC: Tensor | None = None

    def of(self, outputs: slice) -> Statistics:
        """For some of the outputs."""
        return self if self.WC is None else replace(self, WC=self.WC[outputs])


class HessianAccumulator:
    """X'X and Xd'X, or Yd'X, over all calibration tokens, of this process and of all others.

    Feed it one micro-batch after the other, then take the mean. The bits of the result depend on how the tokens are cut
    into micro-batches, and on their order.
    outputs: the dense model's part of a micro-batch is what its linear makes of the tokens, not what that reads
    """

    def __init__(self, outputs: bool = False) -> None:
        self.tokens = 0
        self.outputs = outputs
        self._H: Tensor | None = None
        self._C: Tensor | None = None

    def add(self, inputs: Tensor, dense: Tensor | None = None) -> HessianAccumulator:
        """inputs: a micro-batch [tokens, K] of the compressed model; dense: the same tokens of the dense model, [tokens, K] or
        their outputs [tokens, N]. Returns itself."""
        self._H = gram([inputs], self._H, whole=False)
        if dense is not None:
            self._C = cross([dense], [inputs], self._C)
        self.tokens += inputs.shape[0]
        return self

    def mean(self) -> Statistics:
        """The means over the tokens of all processes, which all call this. Takes the sums: nothing can be added after it."""
        assert self._H is not None, "no tokens were added"
        tokens = int(sum_over_all(torch.tensor(self.tokens)))
        H = sum_symmetric_over_all(mirror(self._H)).div_(tokens)
        C = None if self._C is None else sum_over_all(self._C).div_(tokens)
        self._H = self._C = None
        return Statistics(H, WC=C) if self.outputs else Statistics(H, C)


def accumulated(batches: Iterable[tuple[Tensor, Tensor | None]], outputs: bool = False) -> Statistics:
    """Statistics of micro-batches as a walk gives them: what linears read in the compressed model and in the dense one,
    [tokens, K] each, None where C is not wanted; with `outputs`, what the dense model's linear made of it, [tokens, N]."""
    sums = HessianAccumulator(outputs)
    with phase("statistics"):
        for inputs, dense in batches:
            sums.add(inputs, dense)
            del inputs, dense  # before the next one is computed
        return sums.mean()


@dataclass(frozen=True)
class Factors:
    """The damped Hessian, H with another diagonal, and the factor of its inverse.

    H:        [K, K], as given, not a copy; `damped_in_place` gives it the damped diagonal for a while
    diagonal: [K], of the damped Hessian: that of H plus damping * mean(diag H)
    inverse_cholesky: U [K, K] upper triangular with U'U = damped^-1; row k says how later columns make up for an error at k
    ridge:    what was added to the diagonal
    dead:     bool [K], inputs that are zero for every token; their weights do not matter
    """

    H: Tensor
    diagonal: Tensor
    inverse_cholesky: Tensor
    ridge: float
    dead: Tensor

    @property
    def damped(self) -> Tensor:
        """A copy of the damped Hessian: [K, K]."""
        damped = self.H.clone()
        damped.diagonal().copy_(self.diagonal)
        return damped

    @property
    def inverse(self) -> Tensor:
        """The inverse of the damped Hessian: [K, K]."""
        return self.inverse_cholesky.t() @ self.inverse_cholesky


@contextmanager
def damped_in_place(H: Tensor, diagonal: Tensor | None) -> Iterator[Tensor]:
    """H [K, K] itself, with another diagonal [K] inside of the block; None leaves its own."""
    if diagonal is None:
        yield H
        return
    before = H.diagonal().clone()
    H.diagonal().copy_(diagonal)
    try:
        yield H
    finally:
        H.diagonal().copy_(before)


def factor(H: Tensor, damping: float, name: str, order: Tensor | None = None) -> Factors:
    """Factor H: [K, K] float32 as SparseGPT (arXiv 2301.00774, section 3) and GPTQ (arXiv 2210.17323, section 3) do.

    damping is relative to the mean of the diagonal and is raised tenfold, a few times, if H cannot be factored.
    order: int64 [K], a permutation of the inputs in which U is wanted; all else stays in the order of H.
    Makes one matrix, U. Raises NumericalError naming the linear when H is not finite or cannot be factored at all.
    """
    diagonal = H.diagonal()
    if not all_finite(diagonal):
        raise NumericalError(
            f"{name}: its calibration inputs hold NaN or Inf; check the dense model and the calibration text"
        )
    dead = diagonal == 0
    mean = float(diagonal.mean())
    for attempt in range(RETRIES):
        ridge = damping * 10**attempt * mean if mean > 0 else 1.0
        damped = (diagonal + ridge).masked_fill(dead, max(mean, 1.0))
        if (U := _inverse_cholesky(H, damped, order)) is not None:
            return Factors(H, damped, U, ridge, dead)
    raise NumericalError(
        f"{name}: its Hessian cannot be factored even with damping {damping * 10 ** (RETRIES - 1):g}; "
        "raise `damping` in the recipe or use more calibration samples"
    )


def _inverse_cholesky(H: Tensor, diagonal: Tensor, order: Tensor | None) -> Tensor | None:
    """U upper triangular with U'U = A^-1, where A [K, K] is H with another diagonal, in another order; None if A has none.

    With J the reversal of the inputs and M the Cholesky factor of J A J, A = (J M J)(J M J)', whose factors are upper and
    lower triangular. So U = J M^-1 J: one factorization and one inverse of a triangle, all in one matrix, where GPTQ's
    Cholesky factor of the explicit inverse takes twice the operations and three.
    """
    with damped_in_place(H, diagonal):
        M = H.flip((0, 1)) if order is None else _permuted(H, order.flip(0))
    failed = torch.empty((), dtype=torch.int32, device=H.device)
    # LAPACK counts columns first: its upper triangle is the lower one here, and the result stays where M was
    torch.linalg.cholesky_ex(M.t(), upper=True, out=(M.t(), failed))
    if failed:
        return None
    _invert_lower(M)
    _reverse(M)
    return M if all_finite(M) else None


def _permuted(H: Tensor, order: Tensor) -> Tensor:
    """H[order][:, order], without the matrix between the two. H: [K, K]; order: int64 [K]."""
    permuted = torch.empty_like(H, memory_format=torch.contiguous_format)
    for rows, chosen in zip(permuted.split(PANEL), order.split(PANEL), strict=True):
        rows.copy_(H[chosen][:, order])
    return permuted


def _invert_lower(M: Tensor) -> None:
    """Invert a lower triangular matrix [K, K] in place, a panel of rows after the other: those above are inverted already."""
    for start in range(0, M.shape[0], PANEL):
        rows = slice(start, min(start + PANEL, M.shape[0]))
        corner = torch.linalg.solve_triangular(
            M[rows, rows], torch.eye(rows.stop - start, dtype=M.dtype, device=M.device), upper=False
        )
        left = torch.matmul(corner, M[rows, :start]).neg_()
        for first in range(0, start, PANEL):
            columns = slice(first, first + PANEL)
            M[rows, columns] = left[:, first:] @ M[first:start, columns]
        M[rows, rows] = corner


def _reverse(M: Tensor) -> None:
    """Reverse rows and columns of [K, K] in place."""
    k = M.shape[0]
    for start in range(0, k // 2, PANEL):
        stop = min(start + PANEL, k // 2)
        top, bottom = M[start:stop], M[k - stop : k - start]
        aside = top.flip((0, 1))
        top.copy_(bottom.flip((0, 1)))
        bottom.copy_(aside)
    if k % 2:
        M[k // 2] = M[k // 2].flip(0)


def propagated_target(W: Tensor, statistics: Statistics, factors: Factors, alpha: float) -> Tensor:
    """Error propagation: move W toward the weights that give the dense model's outputs from the compressed model's inputs.

    W*: argmin over V of ||Xd W' - X V'||^2 / M + ridge ||V - W||^2  =  W (C + ridge I) (H + ridge I)^-1, and the result is
    W + alpha (W* - W): the weight correction of QEP with its propagation strength (arXiv 2504.09629), and close to GPTAQ's
    target (arXiv 2504.02692). W: [N, K], outputs of the dense model, for which the statistics have C or W C; alpha in [0, 1].
    """
    if statistics.WC is not None:
        best = statistics.WC.add(W, alpha=factors.ridge)
    else:
        assert statistics.C is not None
        best = (W @ statistics.C).add_(W, alpha=factors.ridge)
    _times_inverse(best, factors.inverse_cholesky)
    return torch.lerp(W, best, alpha, out=best)


def _times_inverse(X: Tensor, U: Tensor) -> None:
    """X U'U in place, a panel of columns after the other, without the products by zeros. X: [N, K]; U: [K, K] upper triangular."""
    k = X.shape[1]
    starts = range(0, k, PANEL)
    for start in starts:  # X U': column j is made of columns j and later
        panel = slice(start, min(start + PANEL, k))
        X[:, panel] = X[:, start:] @ U[panel, start:].t()
    for start in reversed(starts):  # times U: column j is made of columns up to j
        panel = slice(start, min(start + PANEL, k))
        X[:, panel] = X[:, : panel.stop] @ U[: panel.stop, panel]


def relative_error(W: Tensor, What: Tensor, H: Tensor) -> float:
    """||X (W - What)'||^2 / ||X W'||^2 on the tokens of H. W, What: [N, K]; H: [K, K]."""
    return lost_part(squared_outputs(W - What, H), squared_outputs(W, H))


def lost_part(lost: float, total: float) -> float:
    """`relative_error` from its two sums; 0 where there is nothing to lose."""
    return lost / total if total > 0 else 0.0


def squared_outputs(W: Tensor, H: Tensor) -> float:
    """||X W'||^2 / M = tr(W H W') = <W'W, H>, of which one triangle is computed, a few of its rows at a time; 0 without outputs.
    W: [N, K]; H: [K, K], symmetric."""
    found = 0.0
    for start in range(0, H.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        products = (W[:, rows].t() @ W[:, start:]).mul_(H[rows, start:])  # from the diagonal on
        found += 2 * float(products.sum(dtype=torch.float64)) - float(products[:, :ROWS].sum(dtype=torch.float64))
    return found
