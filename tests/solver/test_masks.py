"""Masks judged by what they cost at best: kept weights solved exactly in fp64 for every output."""

import pytest
import torch

from sparsify import processor
from sparsify.errors import NumericalError
from sparsify.model.linear import is_two_four
from sparsify.native import build
from sparsify.solver.column_sweep import column_sweep
from sparsify.solver.hessian import Statistics, factor
from sparsify.solver.masks import alps
from sparsify.solver.masks.alps import GROWTH, ITERATIONS, PENALTY, alps_mask, next_round
from sparsify.solver.masks.magnitude import keep_two_of_four, magnitude_mask
from sparsify.solver.masks.sparsegpt import sparsegpt_select
from sparsify.solver.masks.wanda import wanda_mask
from sparsify.solver.solve import Scheme, solve_layer

N, K, TOKENS = 24, 64, 400


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(11)
    mixing = torch.randn(K, K, generator=generator) / K**0.5 + 0.5 * torch.eye(K)
    X = torch.randn(TOKENS, K, generator=generator) @ mixing * torch.rand(K, generator=generator).add(0.1)
    return torch.randn(N, K, generator=generator), factor(X.t() @ X / TOKENS, 0.01, "x")


def least_error(W, mask, H):
    """sum_n min over v of (v - w)' H (v - w), v zero outside the mask."""
    W, H = W.double(), H.double()
    total = 0.0
    for w, keep in zip(W, mask, strict=True):
        v = torch.zeros_like(w)
        v[keep] = torch.linalg.solve(H[keep][:, keep], (H @ w)[keep])
        total += float((v - w) @ H @ (v - w))
    return total


def test_alps_finds_cheaper_masks(problem):
    W, factors = problem
    H = factors.damped
    found = alps_mask(W, H)
    assert (found.view(N, -1, 4).sum(2) == 2).all()
    swept = column_sweep(W, factors.inverse_cholesky, None, select=sparsegpt_select, store=torch.float32).weight
    costs = {
        "alps": least_error(W, found, H),
        "sparsegpt": least_error(W, swept != 0, H),
        "wanda": least_error(W, wanda_mask(W, H), H),
        "magnitude": least_error(W, magnitude_mask(W), H),
    }
    assert costs["alps"] < 0.97 * costs["sparsegpt"] < costs["wanda"] < costs["magnitude"], costs


def test_alps_refuses_a_hessian_that_cannot_be_factored(problem):
    W, factors = problem
    H = factors.damped
    H[0, 1] = H[1, 0] = 9 * H.diagonal().max()
    with pytest.raises(NumericalError, match="not positive definite"):
        alps_mask(W, H)


def test_alps_where_inputs_do_not_interact():
    """With a diagonal Hessian the best mask is known: the two largest of w^2 h in every group. ADMM comes within 1% of it."""
    generator = torch.Generator().manual_seed(2)
    W, H = torch.randn(N, K, generator=generator), torch.diag(torch.rand(K, generator=generator).add(0.05))
    best = least_error(W, wanda_mask(W, H), H)
    assert best <= least_error(W, alps_mask(W, H), H) < 1.01 * best


@pytest.mark.parametrize("quantize", ["gptq", None])
def test_alps_compresses_better_than_sparsegpt(problem, quantize):
    W, factors = problem
    errors = {}
    for method in ("sparsegpt", "alps"):
        bits, group = (4, 32) if quantize else (16, 0)
        scheme = Scheme(method, quantize, bits=bits, group_size=group, coordinate_descent=3)
        linears, found = solve_layer({"a": W}, scheme, Statistics(factors.damped))
        stored = linears["a"].codes if quantize else linears["a"].values
        assert is_two_four(stored)
        errors[method] = found["a"]
    assert errors["alps"] < errors["sparsegpt"], errors


@pytest.fixture(params=["torch", "native"])
def way(request, monkeypatch):
    if request.param == "native" and build.load("cpu/alps") is None:
        pytest.skip("no native kernel here")
    monkeypatch.setenv("SPARSIFY_ALPS", request.param)
    return request.param


@pytest.mark.parametrize("outputs", [N, 3 * K])
def test_alps_is_the_paper_s_iteration(problem, way, outputs):
    """Section 3.1 in fp64, each system solved as it stands; more outputs than inputs go through its inverse."""
    W, factors = problem
    W = W.repeat(outputs // N + 1, 1)[:outputs] + 0.01 * torch.arange(outputs)[:, None]
    size = factors.damped.double().diagonal().sqrt()
    H, T = factors.damped.double() / size / size[:, None], W.double() * size
    kept, rho = keep_two_of_four(T.abs()), PENALTY
    D, V = T * kept, T * ~kept
    for _ in range(ITERATIONS):
        free = torch.linalg.solve(H + rho * torch.eye(K), (T @ H + rho * (D - V)).t()).t()
        kept = keep_two_of_four((free + V).abs())
        D, V = (free + V) * kept, (free + V) * ~kept
        rho *= GROWTH
    assert (alps_mask(W, factors.damped) != kept).float().mean() < 0.01  # rounding may decide a tie


@pytest.mark.parametrize("quads", [1, 15, 16, 37])
def test_a_round_of_alps_at_every_level(quads, monkeypatch):
    """Ties too: of equal sizes the first stays, as in `keep_two_of_four`."""
    if build.load("cpu/alps") is None:
        pytest.skip("no native kernel here")
    generator = torch.Generator().manual_seed(quads)
    W, pull, V = (torch.randint(-3, 4, (5, 4 * quads), generator=generator).float() for _ in range(3))
    results = {}
    for level in ("torch", *processor.available_levels()):
        monkeypatch.setenv("SPARSIFY_ALPS", "torch" if level == "torch" else "native")
        if level != "torch":
            monkeypatch.setenv(processor.FORCE, level)
        after, right = V.clone(), W.clone()
        results[level] = (next_round(right, pull, 0.25, after), after, right)
    for level, result in results.items():
        assert all(torch.equal(a, b) for a, b in zip(result, results["torch"], strict=True)), level
    kept, after, right = results["torch"]
    assert torch.equal(kept, keep_two_of_four((V + W).abs())) and not after[kept].any()
    assert torch.equal(right, pull + 0.25 * torch.where(kept, V + W, -(V + W)))


def test_two_of_four_are_kept_whatever_the_numbers():
    """Against a stable sort; NaN counts as the largest, so a mask is 2:4 even of what is no number."""
    values = torch.tensor([-torch.inf, -1.0, 0.0, 0.0, 1.0, 1.0, 2.0, torch.inf, torch.nan, torch.nan])
    quads = values[torch.randint(len(values), (4000, 4), generator=torch.Generator().manual_seed(3))]
    first_two = quads.nan_to_num(torch.inf, torch.inf, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :2]
    wanted = torch.zeros_like(quads, dtype=torch.bool).scatter_(1, first_two, True)
    assert torch.equal(keep_two_of_four(quads.reshape(200, 80)), wanted.reshape(200, 80))


def test_alps_takes_outputs_in_pieces_that_give_what_the_whole_gives(problem, monkeypatch):
    W, factors = problem
    whole = alps_mask(W, factors.damped)
    monkeypatch.setattr(alps, "ROWS", 7)
    monkeypatch.setattr(alps, "TIMES", 0)
    pieces = alps_mask(W, factors.damped)
    assert (pieces != whole).float().mean() < 0.01  # rounding may decide a tie
    assert (pieces.reshape(-1, 4).sum(1) == 2).all()
