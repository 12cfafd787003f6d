"""The column sweep against the papers' own formula: explicit inverse Hessians in fp64, one weight removed at a time."""

import pytest
import torch

from sparsify import processor
from sparsify.errors import NumericalError, SparsifyError
from sparsify.model.linear import is_two_four
from sparsify.native import build
from sparsify.solver.column_sweep import column_sweep, group_scale
from sparsify.solver.grid import SHRINK, Grid, search_scale
from sparsify.solver.hessian import Statistics, factor, propagated_target, relative_error
from sparsify.solver.masks.magnitude import keep_two_of_four
from sparsify.solver.masks.sparsegpt import sparsegpt_select
from sparsify.solver.solve import Scheme, activation_order, solve_layer

N, K, TOKENS, DAMPING = 24, 256, 700, 0.01  # two panels, so lazy updates are crossed


@pytest.fixture(autouse=True, params=["torch", "native"])
def way(request, monkeypatch):
    """Every test runs on both inner loops."""
    if request.param == "native" and build.load("cpu/column_sweep") is None:
        pytest.skip("the native sweep needs a C++ compiler")
    monkeypatch.setenv("SPARSIFY_SWEEP", request.param)
    return request.param


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(K, K, generator=generator) / K**0.5 + torch.eye(K)
    X = torch.randn(TOKENS, K, generator=generator) @ mixing * torch.rand(K, generator=generator).add(0.2)
    W = torch.randn(N, K, generator=generator)
    return W, X, X.t() @ X / TOKENS


def damped_fp64(H):
    H = H.double()
    return H + DAMPING * H.diagonal().mean() * torch.eye(K, dtype=torch.float64)


def reference_sweep(W, H, keep_of, code_of):
    """OBS, literally: at column j the inverse of the trailing Hessian gives the update of the columns that are left.

    keep_of(column, weights [N, 4], costs [4]) -> bool [N, 4] at every multiple of 4; code_of(column, W) -> stored value.
    """
    W, H = W.double().clone(), damped_fp64(H)
    inverses = torch.linalg.inv(H)
    keep = torch.ones(W.shape, dtype=torch.bool)
    for j in range(K):
        if j % 4 == 0 and keep_of is not None:
            # the costs of the 4 columns as the sweep will meet them: each with the earlier ones already removed
            costs, trailing = [], inverses
            for _ in range(4):
                costs.append(trailing[0, 0])
                trailing = eliminate(trailing)
            keep[:, j : j + 4] = keep_of(W[:, j : j + 4], torch.stack(costs))
        new = code_of(j, W) * keep[:, j]
        error = (W[:, j] - new) / inverses[0, 0]
        W[:, j:] -= error[:, None] * inverses[0][None, :]
        W[:, j] = new
        inverses = eliminate(inverses)
    return W


def eliminate(inverse):
    """The inverse Hessian of the remaining columns (equation 3 of the GPTQ paper, equation 4 of SparseGPT)."""
    return (inverse - torch.outer(inverse[:, 0], inverse[0, :]) / inverse[0, 0])[1:, 1:]


def keep_by_cost(weights, costs):
    loss = weights**2 / costs
    order = loss.argsort(1, descending=True)[:, :2]
    return torch.zeros_like(loss, dtype=torch.bool).scatter_(1, order, True)


def test_sparsegpt_is_the_paper_formula(problem):
    W, X, H = problem
    got = column_sweep(
        W, factor(H, DAMPING, "t").inverse_cholesky, None, select=sparsegpt_select, store=torch.float32
    ).weight
    expected = reference_sweep(W, H, keep_by_cost, lambda j, w: w[:, j])
    assert is_two_four(got)
    same_mask = ((got != 0) == (expected != 0)).float().mean()
    assert same_mask > 0.999  # a tie within float32 may fall the other way
    rows = ((got != 0) == (expected != 0)).all(1)
    torch.testing.assert_close(got[rows].double(), expected[rows], rtol=1e-3, atol=1e-3)
    assert rows.float().mean() > 0.9


def published_sparsegpt(W, H, blocksize=128, every=4):
    """Algorithm 1 of the SparseGPT paper for n:m sparsity, in fp64: Cholesky factor, adaptive masks, lazy batches."""
    W = W.double().clone()
    U = torch.linalg.cholesky(torch.linalg.inv(damped_fp64(H)), upper=True)
    M = torch.ones_like(W)
    for i in range(0, K, blocksize):
        E = torch.zeros(N, blocksize, dtype=torch.float64)
        for j in range(i, i + blocksize):
            if j % every == 0:
                loss = W[:, j : j + every] ** 2 / U.diagonal()[j : j + every] ** 2
                M[:, j : j + every].scatter_(1, loss.topk(every // 2, dim=1, largest=False).indices, 0)
            E[:, j - i] = (1 - M[:, j]) * W[:, j] / U[j, j]
            W[:, j : i + blocksize] -= torch.outer(E[:, j - i], U[j, j : i + blocksize])
        W[:, i + blocksize :] -= E @ U[i : i + blocksize, i + blocksize :]
    return W * M


def test_sparsegpt_is_the_published_algorithm(problem):
    """A third reference: the one above removes weights by explicit inverses, this one by the paper's factor."""
    W, X, H = problem
    got = column_sweep(
        W, factor(H, DAMPING, "t").inverse_cholesky, None, select=sparsegpt_select, store=torch.float32
    ).weight
    expected = published_sparsegpt(W, H)
    rows = ((got != 0) == (expected != 0)).all(1)  # a tie within float32 may fall the other way
    assert rows.float().mean() > 0.9
    torch.testing.assert_close(got[rows].double(), expected[rows], rtol=1e-3, atol=1e-3)


def test_gptq_is_the_paper_formula(problem):
    W, X, H = problem
    grid = Grid(4, K, torch.float32)
    swept = column_sweep(W, factor(H, DAMPING, "t").inverse_cholesky, grid)
    scale = swept.scale[:, 0].double()
    expected = reference_sweep(W, H, None, lambda j, w: (w[:, j] / scale).round().clamp(-8, 7) * scale)
    agreement = (swept.weight.double() - expected).abs().lt(1e-6).float().mean()
    assert agreement > 0.97  # once a rounding falls the other way in float32, its row differs from there on
    ours = relative_error(W.double(), swept.weight.double(), H.double())
    theirs = relative_error(W.double(), expected, H.double())
    assert ours == pytest.approx(theirs, rel=0.05)


def test_joint_sweep_is_the_formula_with_mask_and_code(problem):
    W, X, H = problem
    grid = Grid(4, K, torch.float32)
    swept = column_sweep(W, factor(H, DAMPING, "t").inverse_cholesky, grid, select=sparsegpt_select)
    scale = swept.scale[:, 0].double()
    expected = reference_sweep(W, H, keep_by_cost, lambda j, w: (w[:, j] / scale).round().clamp(-8, 7) * scale)
    assert is_two_four(swept.codes)
    ours = relative_error(W.double(), swept.weight.double(), H.double())
    assert ours == pytest.approx(relative_error(W.double(), expected, H.double()), rel=0.05)


def test_sweep_beats_what_it_improves_on(problem):
    W, X, H = problem
    errors = {}
    for name, prune, quantize in (
        ("magnitude", "magnitude", None), ("wanda", "wanda", None), ("sparsegpt", "sparsegpt", None),
        ("rtn", None, "rtn"), ("gptq", None, "gptq"), ("joint", "sparsegpt", "gptq"), ("naive", "magnitude", "rtn"),
        ("wanda+gptq", "wanda", "gptq"), ("sparsegpt+rtn", "sparsegpt", "rtn"),
    ):  # fmt: skip
        scheme = Scheme(prune, quantize, bits=4 if quantize else 16, group_size=64 if quantize else 0)
        parts, found = solve_layer({"m": W}, scheme, Statistics(H))
        # the reported error is the true one on the tokens themselves
        direct = (X @ (W - parts["m"].dense(torch.float32)).t()).square().sum() / (X @ W.t()).square().sum()
        assert found["m"] == pytest.approx(float(direct), rel=1e-3)
        assert prune is None or is_two_four(parts["m"].dense(torch.float32))
        errors[name] = found["m"]
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]
    assert errors["gptq"] < errors["rtn"]
    assert errors["joint"] < errors["sparsegpt+rtn"]
    assert errors["joint"] < errors["wanda+gptq"] < errors["naive"]


def test_correction_is_least_squares_to_the_dense_outputs(problem):
    W, X, H = problem
    Xd = X + 0.3 * torch.randn(X.shape, generator=torch.Generator().manual_seed(9))
    factors = factor(H, DAMPING, "t")
    got = propagated_target(W, Statistics(H, Xd.t() @ X / TOKENS), factors, 1.0)
    # minimise ||Xd W' - X V'||^2 / tokens + ridge ||V - W||^2 as one stacked least-squares problem in fp64
    A = torch.cat([X.double() / TOKENS**0.5, factors.ridge**0.5 * torch.eye(K, dtype=torch.float64)])
    B = torch.cat([Xd.double() @ W.double().t() / TOKENS**0.5, factors.ridge**0.5 * W.double().t()])
    expected = torch.linalg.lstsq(A, B).solution.t()
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)
    half = propagated_target(W, Statistics(H, Xd.t() @ X / TOKENS), factors, 0.5)
    torch.testing.assert_close(half.double(), (W.double() + expected) / 2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("prune", [None, "wanda", "sparsegpt"])
def test_every_grid_decodes_to_the_swept_weights(problem, bits, group, order, prune):
    W, X, H = problem
    scheme = Scheme(prune, "gptq", bits, group, activation_order=order)
    parts, errors = solve_layer({"a": W[:10], "b": W[10:]}, scheme, Statistics(H))
    joined = torch.cat([parts["a"].codes, parts["b"].codes])
    assert joined.shape == W.shape and parts["a"].scale.shape == (10, K // (group or K))
    assert parts["a"].scale.dtype == torch.bfloat16
    assert prune is None or is_two_four(joined)
    assert max(errors.values()) < (0.02 if bits == 4 else 1e-3) + (0.5 if prune else 0)


def test_activation_order_keeps_the_columns_in_place(problem):
    W, X, H = problem
    order = activation_order(H, 4)
    assert sorted(order.tolist()) == list(range(K))
    moments = H.diagonal()[order].reshape(-1, 4).sum(1)
    assert (moments[:-1] >= moments[1:]).all() and (order.reshape(-1, 4)[:, 0] % 4 == 0).all()


def test_given_mask_is_never_left(problem):
    W, X, H = problem
    keep = keep_two_of_four(torch.rand(N, K, generator=torch.Generator().manual_seed(1)))
    swept = column_sweep(W, factor(H, DAMPING, "t").inverse_cholesky, Grid(4, 64), mask=keep)
    assert not swept.codes[~keep].any()


def test_scale_search_is_the_best_of_its_candidates():
    rows = torch.randn(64, 5, generator=torch.Generator().manual_seed(2))
    grid = Grid(4, 64, torch.float32)
    scale, _ = search_scale(rows, grid, None, None)
    plain, _ = search_scale(rows, Grid(4, 64, torch.float32, search=False), None, None)

    def error(s):
        return ((rows / s).round().clamp(-8, 7) * s - rows).square().sum(0)

    assert (error(scale) <= error(plain)).all() and (error(scale) < error(plain)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", ["none", "given", "chosen"])
def test_the_scale_of_a_group_is_the_best_candidate_in_fp64(dtype, mask):
    """By brute force over all clipping ratios, in each way and for groups of every size; float16 overflows in one output."""
    generator = torch.Generator().manual_seed(7)
    for size, outputs in ((32, 70), (64, 1100), (128, 3), (256, 70)):
        rows = torch.randn(size, outputs, generator=generator)
        rows[:, 1], rows[:, 2] = 0, rows[:, 2] * 1e-15  # a removed output, and one that float16 cannot scale
        d = torch.rand(size, generator=generator) + 0.5
        keep = keep_two_of_four(rows.t()).t() if mask == "given" else None
        select = sparsegpt_select if mask == "chosen" else None
        found, _ = group_scale(rows, d, Grid(4, size, dtype), keep, select)
        if select is not None:
            keep = torch.cat([select(rows[j : j + 4], d[j : j + 4]) for j in range(0, size, 4)])
        masked = rows if keep is None else rows * keep
        full = masked.abs().amax(0) / 7.5
        candidates = torch.stack([(full * ratio).to(dtype).float() for ratio in SHRINK]).clamp(
            min=torch.finfo(dtype).tiny
        )

        def error(scale, masked=masked, d=d):
            code = (masked / scale).round().clamp(-8, 7).double()
            return ((code * scale.double() - masked.double()) / d[:, None].double()).square().sum(0)

        assert (found == candidates).any(0).all(), "a scale as it is stored"
        least = torch.stack([error(scale) for scale in candidates]).amin(0)
        assert (error(found) <= least * (1 + 1e-5)).all()
        plain, _ = group_scale(rows, d, Grid(4, size, dtype, search=False), keep, None)
        assert torch.equal(plain, candidates[0])
    huge = torch.full((32, 1), 1e38)
    assert group_scale(huge, torch.ones(32), Grid(4, 32, dtype), None, None)[0].isinf().all() == (
        dtype == torch.float16
    )


def test_all_zero_rows_and_dead_inputs_stay_finite():
    H = torch.zeros(K, K)
    H[:8, :8] = torch.eye(8)
    W = torch.randn(4, K, generator=torch.Generator().manual_seed(2))
    W[1] = 0
    parts, _ = solve_layer({"m": W}, Scheme("sparsegpt", "gptq", 4, 64), Statistics(H))
    weight = parts["m"].dense(torch.float32)
    assert torch.isfinite(weight).all() and not weight[1].any() and not weight[:, 8:].any()


def test_nan_inputs_and_singular_hessians_are_named(problem):
    W, _, H = problem
    with pytest.raises(NumericalError, match="layer.7.*NaN or Inf"):
        factor(torch.full_like(H, float("nan")), DAMPING, "layer.7")
    with pytest.raises(NumericalError, match="layer.7.*damping"):
        factor(-H, DAMPING, "layer.7")


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("masked", ["no", "given", "selected"])
@pytest.mark.parametrize("outputs", [1, 63, 64, 200])
def test_both_inner_loops_agree_to_the_bit_where_nothing_is_passed_on(monkeypatch, bits, masked, outputs):
    """With a diagonal Hessian no error travels, so not even the order of additions can differ."""
    generator = torch.Generator().manual_seed(5)
    W = torch.randn(outputs, K, generator=generator)
    U = torch.rand(K, generator=generator).add(0.5).diag()
    keep = keep_two_of_four(torch.rand(outputs, K, generator=generator)) if masked == "given" else None
    select = sparsegpt_select if masked == "selected" else None
    results = []
    for forced in ("torch", "native"):
        monkeypatch.setenv("SPARSIFY_SWEEP", forced)
        results.append(column_sweep(W, U, Grid(bits, 64) if bits < 16 else None, keep, select))
    one, other = results
    assert torch.equal(one.weight, other.weight)
    assert bits == 16 or (torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale))


def test_native_result_does_not_depend_on_threads(problem, way):
    W, X, H = problem
    U = factor(H, DAMPING, "t").inverse_cholesky
    W = W.repeat(9, 1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(column_sweep(W, U, Grid(4, 64), select=sparsegpt_select).codes)
    finally:
        torch.set_num_threads(before)
    assert way == "torch" or torch.equal(*results)


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("masked", ["no", "given", "selected"])
def test_native_result_does_not_depend_on_the_level(problem, way, monkeypatch, bits, masked):
    """Errors travel here, so that a product added without being rounded first would show."""
    W, X, H = problem
    U = factor(H, DAMPING, "t").inverse_cholesky
    W = W.repeat(9, 1)
    keep = keep_two_of_four(W) if masked == "given" else None
    select = sparsegpt_select if masked == "selected" else None
    found = {}
    for level in processor.available_levels():
        monkeypatch.setenv(processor.FORCE, level)
        found[level] = column_sweep(W, U, Grid(bits, 64) if bits < 16 else None, keep, select).weight
    for level, weight in found.items():
        assert torch.equal(weight, found["portable"]), level


def test_native_arithmetic_rounds_each_product(way):
    """The bits that the paper's loop has when every step of it is rounded on its own."""
    if way == "torch":
        pytest.skip("PyTorch's addr may use fused multiply-adds")
    generator = torch.Generator().manual_seed(7)
    W = torch.randn(5, 24, generator=generator)
    U = (torch.randn(24, 24, generator=generator) * 0.1).triu(1) + torch.rand(24, generator=generator).add(0.5).diag()
    rows = W.t().numpy().copy()
    for i in range(24):
        stored = torch.from_numpy(rows[i]).bfloat16().float().numpy()
        error = (rows[i] - stored) / U[i, i].numpy()
        rows[i] = stored
        for j in range(i + 1, 24):
            rows[j] = rows[j] - U[i, j].numpy() * error
    assert torch.equal(column_sweep(W, U, None).weight, torch.from_numpy(rows).t())


def test_an_unknown_way_is_refused(problem, monkeypatch):
    W, X, H = problem
    monkeypatch.setenv("SPARSIFY_SWEEP", "fast")
    with pytest.raises(SparsifyError, match="choose torch, native or triton"):
        column_sweep(W, torch.eye(K), None)
