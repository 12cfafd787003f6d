"""Factors of the Hessian in panels against fp64, and how many [K, K] matrices are alive while a layer is solved."""

import pytest
import torch

from sparsify.model.footprint import _Alive
from sparsify.solver import hessian
from sparsify.solver.hessian import (
    HessianAccumulator,
    Statistics,
    accumulated,
    damped_in_place,
    factor,
    propagated_target,
    relative_error,
    squared_outputs,
)
from sparsify.solver.solve import Scheme, solve_layer

DAMPING = 0.01


def problem(k, n=12, tokens=300):
    generator = torch.Generator().manual_seed(k)
    X = torch.randn(tokens, k, generator=generator) * torch.rand(k, generator=generator).add(0.2)
    Xd = X + 0.3 * torch.randn(tokens, k, generator=generator)
    return torch.randn(n, k, generator=generator), X, Xd


def damped_fp64(H):
    H = H.double()
    return H + DAMPING * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 5, 8, 16, 37, 64])
@pytest.mark.parametrize("panel", [8, 1024])
def test_inverse_cholesky_is_that_of_fp64(monkeypatch, k, panel):
    monkeypatch.setattr(hessian, "PANEL", panel)
    _, X, _ = problem(k)
    H = X.t() @ X / len(X)
    before = H.clone()
    for order in (None, torch.randperm(k, generator=torch.Generator().manual_seed(1))):
        U = factor(H, DAMPING, "x", order).inverse_cholesky
        damped = damped_fp64(H) if order is None else damped_fp64(H)[order][:, order]
        expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
        torch.testing.assert_close(U.double(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(U, U.triu()) and U.is_contiguous()
    assert torch.equal(H, before)


def test_an_input_that_is_always_zero_is_dead_and_the_rest_is_factored():
    _, X, _ = problem(16)
    X[:, 3] = 0
    factors = factor(X.t() @ X / len(X), DAMPING, "x")
    assert factors.dead.tolist() == [i == 3 for i in range(16)]
    assert factors.diagonal[3] == max(1.0, float(factors.H.diagonal().mean()))
    torch.testing.assert_close(factors.inverse @ factors.damped, torch.eye(16), rtol=1e-4, atol=1e-4)


def test_what_is_not_definite_gets_ten_times_the_damping():
    H = torch.eye(8)
    H[0, 1] = H[1, 0] = 1.05  # eigenvalue -0.05: 1% is too little, 10% is enough
    assert factor(H, 0.01, "x").ridge == pytest.approx(0.1)


def test_damping_in_place_is_taken_back_after_an_error():
    H = torch.eye(4)
    with pytest.raises(ZeroDivisionError), damped_in_place(H, torch.full((4,), 3.0)) as damped:
        assert damped is H and float(H.trace()) == 12
        raise ZeroDivisionError
    assert torch.equal(H, torch.eye(4))


@pytest.mark.parametrize("panel", [8, 1024])
def test_error_propagation_is_the_least_squares_solution(monkeypatch, panel):
    monkeypatch.setattr(hessian, "PANEL", panel)
    W, X, Xd = problem(37)
    H, C = X.t() @ X / len(X), Xd.t() @ X / len(X)
    factors = factor(H, DAMPING, "x")
    ridge = factors.ridge * torch.eye(37, dtype=torch.float64)
    best = W.double() @ (C.double() + ridge) @ torch.linalg.inv(H.double() + ridge)
    expected = W.double() + 0.4 * (best - W.double())
    given = W.clone()
    torch.testing.assert_close(
        propagated_target(W, Statistics(H, C), factors, 0.4).double(), expected, rtol=1e-3, atol=1e-3
    )
    assert torch.equal(W, given)
    outputs = Statistics(H, WC=W @ C)
    torch.testing.assert_close(propagated_target(W, outputs, factors, 0.4).double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(outputs.WC, W @ C) and torch.equal(W, given)
    some = propagated_target(W[2:4], outputs.of(slice(2, 4)), factors, 0.4)
    torch.testing.assert_close(some.double(), expected[2:4], rtol=1e-3, atol=1e-3)


def test_the_error_of_pieces_is_that_of_the_whole(monkeypatch):
    W, X, _ = problem(24, n=30)
    What = W * 0.9
    What[3] = 0
    H = X.t() @ X / len(X)
    expected = ((X @ (W - What).t()).square().sum() / (X @ W.t()).square().sum()).item()
    for rows in (1, 7, 256):
        monkeypatch.setattr(hessian, "ROWS", rows)
        assert relative_error(W, What, H) == pytest.approx(expected, rel=1e-4)
    assert squared_outputs(W[:0], H) == 0


def test_statistics_are_means_over_micro_batches():
    _, X, Xd = problem(16)
    found = accumulated(iter([(X[:100], Xd[:100]), (X[100:], Xd[100:])]))
    torch.testing.assert_close(found.H, X.t() @ X / len(X), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.C, Xd.t() @ X / len(X), rtol=1e-4, atol=1e-5)
    assert accumulated([(X, None)]).C is None
    W = torch.randn(5, 16)
    outputs = accumulated([(X[:100], Xd[:100] @ W.t()), (X[100:], Xd[100:] @ W.t())], outputs=True)
    torch.testing.assert_close(outputs.WC, W @ found.C, rtol=1e-4, atol=1e-5)
    assert outputs.C is None and torch.equal(outputs.H, found.H)
    assert torch.equal(HessianAccumulator().add(X).mean().H, accumulated([(X, None)]).H)


@pytest.mark.parametrize("changes", [{}, {"coordinate_descent": 1}, {"activation_order": True}])
def test_one_matrix_is_alive_beside_the_statistics(monkeypatch, changes):
    """H, C and a factor: three. Everything else is a panel, or as large as the weights."""
    monkeypatch.setattr(hessian, "PANEL", 32)
    W, X, Xd = problem(512, n=8, tokens=2000)
    statistics = Statistics(X.t() @ X / len(X), Xd.t() @ X / len(X))
    before = statistics.H.clone()
    scheme = Scheme("sparsegpt", "gptq", 4, 32, DAMPING, error_propagation=0.4, **changes)
    solve_layer({"a": W}, scheme, statistics)  # kernels are loaded
    alive = _Alive()
    with alive:
        solve_layer({"a": W}, scheme, statistics)
    matrix = 4 * 512 * 512
    assert matrix <= alive.peak < 1.5 * matrix
    assert torch.equal(statistics.H, before)
