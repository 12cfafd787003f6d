"""Coordinate descent against brute force in fp64: the best of a group, the exact error, never worse than before."""

from itertools import combinations

import pytest
import torch

from sparsify import processor
from sparsify.errors import SparsifyError
from sparsify.model.linear import is_two_four
from sparsify.native import build
from sparsify.solver.column_sweep import Solved, column_sweep
from sparsify.solver.coordinate_descent import coordinate_descent, refit_scale, visit_block
from sparsify.solver.grid import Grid
from sparsify.solver.hessian import Statistics, factor, relative_error
from sparsify.solver.masks.magnitude import magnitude_mask
from sparsify.solver.masks.sparsegpt import sparsegpt_select
from sparsify.solver.solve import Scheme, solve_layer

N, K, TOKENS = 70, 128, 500  # outputs: more than one chunk of the native loop, and a ragged one


@pytest.fixture(autouse=True, params=["torch", "native"])
def way(request, monkeypatch):
    """Every test runs on both ways."""
    if request.param == "native" and build.load("cpu/coordinate_descent") is None:
        pytest.skip("native coordinate descent needs a C++ compiler")
    monkeypatch.setenv("SPARSIFY_COORDINATE_DESCENT", request.param)
    return request.param


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(K, K, generator=generator) / K**0.5 + torch.eye(K)
    X = torch.randn(TOKENS, K, generator=generator) @ mixing * torch.rand(K, generator=generator).add(0.2)
    W = torch.randn(N, K, generator=generator)
    return W, factor(X.t() @ X / TOKENS, 0.01, "x")


def error(W, target, H):
    difference = (W - target).double()
    return ((difference @ H.double()) * difference).sum(1)


def test_one_group_becomes_its_best_support(problem):
    """With float32 values and four inputs, the result is the exact optimum: all six supports, solved in fp64."""
    target, factors = problem
    H, target = factors.damped[:4, :4].contiguous(), target[:, :4].contiguous()
    found = coordinate_descent(
        Solved(torch.zeros_like(target)), target, H, 1, two_four=True, store=torch.float32
    ).weight
    best = torch.full((N,), torch.inf, dtype=torch.float64)
    for pair in combinations(range(4), 2):
        s = list(pair)
        values = torch.linalg.solve(H.double()[s][:, s], (H.double() @ target.double().t())[s]).t()
        candidate = torch.zeros(N, 4, dtype=torch.float64)
        candidate[:, s] = values
        best = torch.minimum(best, error(candidate, target, H))
    assert is_two_four(found)
    torch.testing.assert_close(error(found, target, H), best, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_each_sweep_lowers_the_error_of_every_output(problem, group_size):
    W, factors = problem
    grid = Grid(4, group_size)
    swept = column_sweep(W, factors.inverse_cholesky, grid, None, sparsegpt_select)
    before = error(swept.weight, W, factors.damped)
    for sweeps in (1, 2, 6):
        refined = coordinate_descent(swept, W, factors.damped, sweeps, grid=grid, two_four=True)
        after = error(refined.weight, W, factors.damped)
        assert (after <= before * (1 + 1e-5)).all() and after.sum() < 0.97 * before.sum()
        before = after
        assert is_two_four(refined.codes) and refined.codes.min() >= -8 and refined.codes.max() <= 7
        stored = refined.codes.float() * refined.scale.float().repeat_interleave(group_size, 1)
        assert torch.equal(stored, refined.weight)  # what is evaluated is what is stored


def test_no_single_group_can_be_bettered_at_the_end(problem):
    """A fixed point: no other support and no other values of any one group have a smaller error, by brute force."""
    W, factors = problem
    H = factors.damped
    swept = column_sweep(W, factors.inverse_cholesky, None, select=sparsegpt_select, store=torch.float32)
    found = coordinate_descent(swept, W, H, 200, two_four=True, store=torch.float32).weight.double()  # some take 100
    now = error(found, W, H)
    for start in range(0, K, 4):
        rest = found.clone()
        rest[:, start : start + 4] = 0
        b = ((W.double() - rest) @ H.double())[:, start : start + 4]
        for pair in combinations(range(4), 2):
            s = [start + i for i in pair]
            candidate = rest.clone()
            candidate[:, s] = torch.linalg.solve(H.double()[s][:, s], b[:, list(pair)].t()).t()
            assert (error(candidate, W, H) > now * (1 - 1e-4)).all()


def test_a_given_mask_is_kept(problem):
    W, factors = problem
    keep, grid = magnitude_mask(W), Grid(4, 32)
    swept = column_sweep(W, factors.inverse_cholesky, grid, keep)
    refined = coordinate_descent(swept, W, factors.damped, 3, grid=grid, mask=keep)
    assert not refined.codes[~keep].any()
    assert error(refined.weight, W, factors.damped).sum() < 0.99 * error(swept.weight, W, factors.damped).sum()


def test_dense_codes_at_a_fixed_point(problem):
    """Without a mask: no code can move by one step and gain."""
    W, factors = problem
    H, grid = factors.damped, Grid(4, 128)
    swept = column_sweep(W, factors.inverse_cholesky, grid)
    refined = coordinate_descent(swept, W, H, 30, grid=grid)
    now = error(refined.weight, W, H)
    unit = refined.scale.float()
    for step in (-1, 1):
        moved = refined.codes + step
        gradient = (refined.weight - W).double() @ H.double()
        change = step * unit.double()
        gain = 2 * gradient * change + change**2 * H.diagonal().double()
        allowed = (moved >= -8) & (moved <= 7)
        assert (gain[allowed] > -1e-4 * now.max()).all()


def test_both_ways_decide_alike(problem, monkeypatch):
    W, factors = problem
    grid = Grid(4, 64)
    swept = column_sweep(W, factors.inverse_cholesky, grid, None, sparsegpt_select)
    results = []
    for way in ("torch", "native"):
        if way == "native" and build.load("cpu/coordinate_descent") is None:
            pytest.skip("native coordinate descent needs a C++ compiler")
        monkeypatch.setenv("SPARSIFY_COORDINATE_DESCENT", way)
        rows = swept.weight.t().contiguous()
        gradient = factors.damped @ (rows - W.t())
        visit_block(
            rows[:64], gradient[:64].clone(), factors.damped[:64, :64].contiguous(), swept.scale[:, 0].float().contiguous(),
            None, grid, None, True, torch.bfloat16,
        )  # fmt: skip
        results.append(rows)
    same = (results[0] == results[1]).float().mean()
    assert same > 0.995  # sums in another order: a rare tie may fall the other way


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [128, 30])
def test_scales_move_to_the_minimum_with_codes_fixed(problem, stored, size):
    W, factors = problem
    H = factors.damped[:size, :size].contiguous()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (size, N), generator=generator).double()
    before = (0.5 + torch.rand(N, generator=generator)).to(stored).float()
    target = before * codes.float() * (1 + 0.3 * torch.randn(N, generator=generator))
    target += 0.1 * torch.randn(size, N, generator=generator)
    codes[:, 0] = 0  # no scale is better than another

    rows, scale = codes.float() * before, before.clone()
    refit_scale(rows, H @ (rows - target), H, scale, Grid(4, size, stored))
    assert torch.equal(rows, codes.float() * scale)
    assert torch.equal(scale.to(stored).float(), scale)
    exact = (codes * (H.double() @ target.double())).sum(0) / (codes * (H.double() @ codes)).sum(0)
    exact = torch.where(exact.isnan(), before.double(), exact)
    off = (scale - exact).abs() / exact
    assert off.max() < torch.finfo(stored).eps + 1e-5
    assert (scale != before).float().mean() > 0.5


def test_scales_without_curvature_or_out_of_range_stay(problem):
    H = torch.eye(4)
    W = torch.tensor([[2.0, 0.0, 1e30]] * 4)
    unit = torch.tensor([1.0, 1.0, 1e30])
    G = H @ (W - torch.tensor([[-4.0, 5.0, 3e30]] * 4))
    refit_scale(W, G, H, unit, Grid(4, 4, torch.float16))
    assert unit.tolist()[:2] == [1.0, 1.0]  # a negative scale, and one that moves nothing
    assert unit[2] == torch.tensor(1e30)  # float16 holds nothing larger than 65504


@pytest.mark.parametrize(("bits", "select"), [(4, True), (4, False), (16, True), (16, False)])
def test_native_result_does_not_depend_on_the_level(problem, monkeypatch, bits, select):
    W, factors = problem
    grid = Grid(bits, 64) if bits < 16 else None
    swept = column_sweep(W, factors.inverse_cholesky, grid, None, sparsegpt_select if select else None)
    found = {}
    for level in processor.available_levels():
        monkeypatch.setenv(processor.FORCE, level)
        found[level] = coordinate_descent(swept, W, factors.damped, 2, grid=grid, two_four=select).weight
    for level, weight in found.items():
        assert torch.equal(weight, found["portable"]), level


def test_inputs_that_are_always_zero(problem):
    W, _ = problem
    X = torch.randn(300, K, generator=torch.Generator().manual_seed(1))
    X[:, 4:8] = 0
    scheme = Scheme("sparsegpt", "gptq", bits=4, group_size=32, coordinate_descent=3)
    linears, errors = solve_layer({"a": W}, scheme, Statistics(X.t() @ X / 300))
    assert not linears["a"].codes[:, 4:8].any() and 0 < errors["a"] < 1


@pytest.mark.parametrize("quantize", ["gptq", None])
def test_compress_refines_what_it_exports(problem, quantize):
    W, _ = problem
    X = torch.randn(300, K, generator=torch.Generator().manual_seed(2)) @ torch.randn(K, K) / K**0.5
    statistics = Statistics(X.t() @ X / 300)
    errors = []
    for sweeps in (0, 4):
        bits, group = (4, 32) if quantize else (16, 0)
        scheme = Scheme("sparsegpt", quantize, bits=bits, group_size=group, coordinate_descent=sweeps)
        linears, found = solve_layer({"a": W}, scheme, statistics)
        assert found["a"] == pytest.approx(relative_error(W, linears["a"].dense(torch.float32), statistics.H))
        errors.append(found["a"])
    assert errors[1] < 0.97 * errors[0]


def test_an_unknown_way_is_refused(problem, monkeypatch):
    W, factors = problem
    monkeypatch.setenv("SPARSIFY_COORDINATE_DESCENT", "numpy")
    with pytest.raises(
        SparsifyError, match="SPARSIFY_COORDINATE_DESCENT=numpy is unknown; choose torch, native or triton"
    ):
        coordinate_descent(Solved(W), W, factors.damped, 1, two_four=True)
