"""Masks judged by what they cost at best: kept weights solved exactly in fp64 for every output."""

import pytest
import torch

from sparsify.model.linear import is_two_four
from sparsify.solver.column_sweep import column_sweep
from sparsify.solver.hessian import Statistics, factor
from sparsify.solver.masks.alps import alps_mask
from sparsify.solver.masks.magnitude import magnitude_mask
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


def test_alps_takes_outputs_in_pieces_that_give_what_the_whole_gives(problem, monkeypatch):
    W, factors = problem
    whole = alps_mask(W, factors.damped)
    monkeypatch.setattr("sparsify.solver.masks.alps.ROWS", 7)
    pieces = alps_mask(W, factors.damped)
    assert (pieces != whole).float().mean() < 0.01  # rounding may decide a tie
    assert (pieces.reshape(-1, 4).sum(1) == 2).all()
