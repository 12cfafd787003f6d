"""Asymmetric grids against formulas written out in fp64: the range, GPTQ's update with zero points, and what stays exactly zero."""

import pytest
import torch

from sparsify import processor
from sparsify.model.linear import CODE_RANGE, is_two_four
from sparsify.native import build
from sparsify.solver.column_sweep import column_sweep, group_scale
from sparsify.solver.coordinate_descent import coordinate_descent
from sparsify.solver.grid import SHRINK, Grid, round_to_nearest, search_scale
from sparsify.solver.hessian import Statistics, factor, relative_error
from sparsify.solver.masks.magnitude import keep_two_of_four
from sparsify.solver.masks.sparsegpt import sparsegpt_select
from sparsify.solver.solve import Scheme, solve_layer

N, K, TOKENS, DAMPING = 24, 256, 700, 0.01


@pytest.fixture(params=["torch", "native"])
def way(request, monkeypatch):
    """The inner loops of PyTorch and those in C++."""
    if request.param == "native" and build.load("cpu/column_sweep") is None:
        pytest.skip("the native sweep needs a C++ compiler")
    for variable in ("SPARSIFY_SWEEP", "SPARSIFY_COORDINATE_DESCENT"):
        monkeypatch.setenv(variable, request.param)
    return request.param


@pytest.fixture(scope="module")
def problem():
    """Weights that lean to one side, by another amount in every group of 32."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(K, K, generator=generator) / K**0.5 + torch.eye(K)
    X = torch.randn(TOKENS, K, generator=generator) @ mixing * torch.rand(K, generator=generator).add(0.2)
    W = torch.randn(N, K, generator=generator) + torch.randn(N, K // 32, generator=generator).repeat_interleave(32, 1)
    return W, X, X.t() @ X / TOKENS


def decoded(codes, scale, zero_point):
    group = codes.shape[1] // scale.shape[1]
    zeros = zero_point.repeat_interleave(group, 1)
    return scale.double().repeat_interleave(group, 1) * (codes.double() - zeros)


def min_max(groups, bits):
    """compressed-tensors 0.17, `calculate_qparams` without symmetry, in fp64. groups: [M, G]. Returns scale, zero point [M]."""
    low, high = CODE_RANGE[bits]
    least, most = groups.double().amin(1).clamp(max=0), groups.double().amax(1).clamp(min=0)
    scale = (most - least) / (high - low)
    return scale, (low - least / scale).clamp(low, high).round()


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_to_nearest_is_the_affine_grid_from_minimum_to_maximum(problem, bits):
    W, _, _ = problem
    W = torch.cat([W, W.abs(), -W.abs()])  # ranges that end at zero
    codes, scale, zero_point = round_to_nearest(W, Grid(bits, 32, torch.float32, search=False, symmetric=False))
    groups, (low, high) = W.reshape(-1, 32).double(), CODE_RANGE[bits]
    wanted_scale, wanted_zero = min_max(groups, bits)
    torch.testing.assert_close(scale.reshape(-1).double(), wanted_scale, rtol=1e-6, atol=0)
    assert torch.equal(zero_point.reshape(-1).double(), wanted_zero) and zero_point.dtype == torch.int8
    assert set(zero_point[N : 2 * N].unique().tolist()) == {low} and set(zero_point[2 * N :].unique().tolist()) == {
        high
    }
    exact = (groups / wanted_scale[:, None]).round() + wanted_zero[:, None]
    away = (codes.reshape(-1, 32).double() - exact.clamp(low, high)).abs()
    assert away.max() <= 1 and (away == 0).float().mean() > 0.999  # a tie in float32 may fall the other way
    error = (decoded(codes, scale, zero_point) - W.double()).abs()
    assert (error <= 1.001 * scale.double().repeat_interleave(32, 1)).all()  # half a step, and half of the zero point's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["none", "given", "chosen"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_search_takes_the_best_shrunk_range(dtype, mask, bits, monkeypatch):
    """By brute force over all ratios in fp64, in each way, for weights of both signs, of one sign, and none."""
    generator = torch.Generator().manual_seed(7)
    low, high = CODE_RANGE[bits]
    for size, outputs in ((32, 70), (64, 1100), (128, 3), (256, 70)):
        rows = torch.randn(size, outputs, generator=generator) + torch.randn(outputs, generator=generator)
        rows[:, 0], rows[:, 1], rows[:, 2] = rows[:, 0].abs(), 0, -rows[:, 2].abs()
        d = torch.rand(size, generator=generator) + 0.5
        keep = keep_two_of_four(rows.t()).t() if mask == "given" else None
        select = sparsegpt_select if mask == "chosen" else None
        grid = Grid(bits, size, dtype, symmetric=False)
        found = {}
        for forced in ("torch", "native"):
            monkeypatch.setenv("SPARSIFY_SWEEP", forced)
            found[forced] = group_scale(rows, d, grid, keep, select)
        if select is not None:
            keep = torch.cat([select(rows[j : j + 4], d[j : j + 4]) for j in range(0, size, 4)])
        masked = rows if keep is None else rows * keep
        least, most = masked.amin(0).clamp(max=0), masked.amax(0).clamp(min=0)

        def error(scale, zero, masked=masked, d=d):
            code = ((masked / scale).round() + zero).clamp(low, high).double() - zero
            return ((code * scale.double() - masked.double()) / d[:, None].double()).square().sum(0)

        errors = []
        for ratio in SHRINK:
            scale = ((most - least) / (high - low) * ratio).to(dtype).float().clamp(min=torch.finfo(dtype).tiny)
            errors.append(error(scale, (low - least * ratio / scale).round().clamp(low, high)))
        for scale, zero in found.values():
            assert torch.equal(scale.to(dtype).float(), scale) and (scale > 0).all()
            assert zero.min() >= low and zero.max() <= high and torch.equal(zero, zero.round())
            assert (error(scale, zero) <= torch.stack(errors).amin(0) * (1 + 1e-5) + 1e-30).all()


def published_gptq(W, H, scale, zero, bits, keep=None):
    """Algorithm 1 of the GPTQ paper in fp64, with the quantizer of its code: scale * (clamp(round(w / scale) + zero) - zero).

    scale, zero: [N, K/G]; keep: bool [N, K], other weights become zero
    """
    low, high = CODE_RANGE[bits]
    W = W.double().clone()
    group = K // scale.shape[1]
    damped = H.double() + DAMPING * H.double().diagonal().mean() * torch.eye(K, dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    for k in range(K):
        s, z = scale[:, k // group].double(), zero[:, k // group].double()
        new = s * (((W[:, k] / s).round() + z).clamp(low, high) - z)
        new = new if keep is None else new * keep[:, k]
        W[:, k + 1 :] -= torch.outer((W[:, k] - new) / U[k, k], torch.ones(1)) * U[k, k + 1 :]
        W[:, k] = new
    return W


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_the_sweep_is_the_published_update_with_zero_points(problem, way, bits, masked):
    W, _, H = problem
    keep = keep_two_of_four(W) if masked else None
    grid = Grid(bits, K, torch.float32, symmetric=False)  # one scale a row: it does not depend on the sweep
    swept = column_sweep(W, factor(H, DAMPING, "t").inverse_cholesky, grid, mask=keep)
    assert swept.zero_point.dtype == torch.int8 and swept.zero_point.any()
    torch.testing.assert_close(decoded(swept.codes, swept.scale, swept.zero_point).float(), swept.weight)
    expected = published_gptq(W, H, swept.scale, swept.zero_point, bits, keep)
    assert (swept.weight.double() - expected).abs().lt(1e-6).float().mean() > (0.97 if bits == 4 else 0.8)
    ours, theirs = (relative_error(W.double(), found.double(), H.double()) for found in (swept.weight, expected))
    assert ours == pytest.approx(theirs, rel=0.05)
    if keep is not None:
        zeros = swept.zero_point.expand(-1, K)
        assert not swept.weight[~keep].any() and torch.equal(swept.codes[~keep], zeros[~keep])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("masked", ["no", "given", "selected"])
@pytest.mark.parametrize("outputs", [1, 63, 200])
@pytest.mark.parametrize("ordered", [False, True])
def test_both_inner_loops_agree_to_the_bit_where_nothing_is_passed_on(monkeypatch, bits, masked, outputs, ordered):
    generator = torch.Generator().manual_seed(5)
    W = torch.randn(outputs, K, generator=generator) + 0.7
    U = torch.rand(K, generator=generator).add(0.5).diag()
    keep = keep_two_of_four(torch.rand(outputs, K, generator=generator)) if masked == "given" else None
    select = sparsegpt_select if masked == "selected" else None
    order = torch.arange(K).reshape(-1, 4).flip(0).reshape(-1) if ordered else None
    results = []
    for forced in ("torch", "native"):
        monkeypatch.setenv("SPARSIFY_SWEEP", forced)
        results.append(column_sweep(W, U, Grid(bits, 64, symmetric=False), keep, select, order))
    one, other = results
    for name in ("weight", "codes", "scale", "zero_point"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128, 0])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("prune", [None, "wanda", "sparsegpt"])
@pytest.mark.parametrize("quantize", ["gptq", "rtn"])
def test_every_scheme_decodes_to_what_was_solved(problem, way, bits, group, order, prune, quantize):
    W, _, H = problem
    made = {}
    for symmetric in (True, False):
        scheme = Scheme(prune, quantize, bits, group, activation_order=order, coordinate_descent=2, symmetric=symmetric)
        parts, errors = solve_layer({"a": W[:10], "b": W[10:]}, scheme, Statistics(H))
        made[symmetric] = max(errors.values())
    linear = parts["b"]
    assert linear.zero_point.shape == linear.scale.shape == (14, K // (group or K)) and linear.zero_point.any()
    weight = decoded(linear.codes, linear.scale, linear.zero_point)
    assert torch.equal(linear.dense(torch.float32), weight.float())
    assert prune is None or is_two_four(weight)
    # half of the codes of a symmetric grid are of no use to a group that leans to one side
    assert prune is not None or made[False] < made[True]


def test_coordinate_descent_with_zero_points_never_loses_and_ends_at_a_fixed_point(problem, way):
    W, _, H = problem
    factors, grid = factor(H, DAMPING, "t"), Grid(4, 128, symmetric=False)
    H = factors.damped

    def error(weight):
        off = (weight - W).double()
        return ((off @ H.double()) * off).sum(1)

    swept = column_sweep(W, factors.inverse_cholesky, grid)
    before = error(swept.weight)
    for passes in (1, 2, 30):
        refined = coordinate_descent(swept, W, H, passes, grid=grid)
        after = error(refined.weight)
        assert (after <= before * (1 + 1e-5)).all() and after.sum() < 0.97 * error(swept.weight).sum()
        before = after
    assert torch.equal(decoded(refined.codes, refined.scale, refined.zero_point).float(), refined.weight)
    assert torch.equal(refined.zero_point, swept.zero_point)
    for step in (-1, 1):
        moved = refined.codes + step
        gradient = (refined.weight - W).double() @ H.double()
        change = step * refined.scale.double().repeat_interleave(128, 1)
        gain = 2 * gradient * change + change**2 * H.diagonal().double()
        assert (gain[(moved >= -8) & (moved <= 7)] > -1e-4 * after.max()).all()


@pytest.mark.parametrize("mask", ["given", "chosen"])
def test_coordinate_descent_keeps_two_of_four_with_zero_points(problem, way, mask):
    W, _, H = problem
    factors, grid = factor(H, DAMPING, "t"), Grid(4, 32, symmetric=False)
    keep = keep_two_of_four(W) if mask == "given" else None
    select = None if keep is not None else sparsegpt_select
    swept = column_sweep(W, factors.inverse_cholesky, grid, keep, select)
    refined = coordinate_descent(swept, W, factors.damped, 3, grid=grid, mask=keep, two_four=keep is None)
    weight = decoded(refined.codes, refined.scale, refined.zero_point).float()
    assert torch.equal(weight, refined.weight) and is_two_four(weight)
    assert keep is None or not weight[~keep].any()
    found = [relative_error(W.double(), w.double(), factors.damped.double()) for w in (refined.weight, swept.weight)]
    assert found[0] < 0.99 * found[1]


@pytest.mark.parametrize("select", [True, False])
def test_native_result_does_not_depend_on_the_level(problem, monkeypatch, select):
    W, _, H = problem
    factors, grid = factor(H, DAMPING, "t"), Grid(4, 64, symmetric=False)
    found = {}
    for level in processor.available_levels():
        monkeypatch.setenv(processor.FORCE, level)
        swept = column_sweep(W.repeat(5, 1), factors.inverse_cholesky, grid, None, sparsegpt_select if select else None)
        found[level] = coordinate_descent(swept, W.repeat(5, 1), factors.damped, 2, grid=grid, two_four=select)
    for level, solved in found.items():
        assert torch.equal(solved.codes, found["portable"].codes), level
        assert torch.equal(solved.zero_point, found["portable"].zero_point), level


def test_a_removed_linear_and_dead_inputs_stay_zero(problem, way):
    H = torch.zeros(K, K)
    H[:8, :8] = torch.eye(8)
    W = torch.randn(4, K, generator=torch.Generator().manual_seed(2))
    W[1] = 0
    scheme = Scheme("sparsegpt", "gptq", 4, 64, coordinate_descent=2, symmetric=False)
    weight = solve_layer({"m": W}, scheme, Statistics(H))[0]["m"].dense(torch.float32)
    assert torch.isfinite(weight).all() and not weight[1].any() and not weight[:, 8:].any()
    removed = solve_layer({"m": torch.zeros(4, K)}, scheme, Statistics(H))[0]["m"]
    assert removed.is_zero() and not removed.symmetric


def test_the_scale_of_a_search_in_pieces_is_that_of_the_whole():
    rows = torch.randn(32, 2100, generator=torch.Generator().manual_seed(1)) + 0.3
    grid = Grid(4, 32, symmetric=False)
    whole = search_scale(rows, grid, None, None)
    pieces = [search_scale(part, grid, None, None) for part in rows.split(700, 1)]
    for index in range(2):
        assert torch.equal(whole[index], torch.cat([piece[index] for piece in pieces]))
