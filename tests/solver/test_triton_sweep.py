"""The inner loops for GPUs, in Triton's interpreter, against the same loops in PyTorch, which other tests hold against the papers."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from sparsify.model.linear import is_two_four
from sparsify.solver.column_sweep import Solved, column_sweep
from sparsify.solver.coordinate_descent import coordinate_descent, visit_block
from sparsify.solver.grid import Grid
from sparsify.solver.hessian import factor
from sparsify.solver.masks.magnitude import keep_two_of_four
from sparsify.solver.masks.sparsegpt import sparsegpt_select
from tests.helpers.floats import hard_bits, is_nan, to_bfloat16

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")

N, K, BLOCK = 3, 24, 2  # outputs of two programs, one of them ragged; inputs that fill no power of two
STORES = [torch.float32, torch.bfloat16]
ASYMMETRIC = Grid(4, 8, symmetric=False)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter, which it chooses when it decorates functions. It adds numbers one by one: the shapes are small."""
    from sparsify.solver import triton_sweep

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib.reload(triton_sweep), "BLOCK", BLOCK)
    yield
    monkeypatch.undo()
    importlib.reload(triton_sweep)


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(8)
    X = torch.randn(300, K, generator=generator) @ (torch.eye(K) + torch.randn(K, K, generator=generator) / K**0.5)
    W = torch.randn(N, K, generator=generator)
    keep = keep_two_of_four(torch.rand(N, K, generator=generator))
    return W, factor(X.t() @ X / 300, 0.01, "x"), keep


def both(monkeypatch, variable, run):
    """What `run` gives in PyTorch and in Triton."""
    found = []
    for way in ("torch", "triton"):
        monkeypatch.setenv(variable, way)
        found.append(run())
    return found


def test_what_is_stored_as_bfloat16_is_rounded_bit_by_bit(interpreted):
    """On integers, so that no processor's way with denormals or NaN can show or hide anything."""
    from tests.helpers import triton_probes

    bits = hard_bits()
    stored = torch.empty(len(bits))
    numbers = torch.tensor(bits, dtype=torch.uint32).view(torch.float32)
    importlib.reload(triton_probes).store[(1,)](numbers, stored, len(bits))
    for given, found in zip(bits, stored.view(torch.uint32).tolist(), strict=True):
        assert is_nan(found) if is_nan(given) else found == to_bfloat16(given) << 16, hex(given)


@pytest.mark.parametrize("mask", ["given", "chosen", "none"])
@pytest.mark.parametrize(
    "grid", [Grid(4, 8), Grid(8, K), ASYMMETRIC, None], ids=["int4", "int8", "asymmetric", "values"]
)
def test_sweeps_agree(interpreted, monkeypatch, problem, mask, grid):
    W, factors, keep = problem
    for store in STORES if grid is None else STORES[:1]:
        torch_way, triton_way = both(
            monkeypatch, "SPARSIFY_SWEEP",
            lambda store=store: column_sweep(
                W, factors.inverse_cholesky, grid, mask=keep if mask == "given" else None,
                select=sparsegpt_select if mask == "chosen" else None, store=store,
            ),
        )  # fmt: skip
        # sums in another order may tip one rounding, which the inputs after it then repair
        same = (torch_way.weight - triton_way.weight).abs() < 1e-4
        assert same.all(1).sum() >= N - 1
        assert torch.equal(triton_way.weight, triton_way.weight.to(store).float())
        assert mask == "none" or is_two_four(triton_way.weight)
        assert mask != "given" or not triton_way.weight[~keep].any()
        if grid is not None:
            assert torch.equal(torch_way.codes[same], triton_way.codes[same])
            assert torch.equal(decoded(triton_way, grid.group_size), triton_way.weight)


def test_sweeps_in_another_order_agree(interpreted, monkeypatch, problem):
    """As output heads are swept: every input of a panel brings the scale of its own group."""
    W, factors, _ = problem
    order = torch.randperm(K, generator=torch.Generator().manual_seed(9))
    U = factor(factors.damped[order][:, order], 0.01, "x").inverse_cholesky
    for grid in (Grid(4, 8), ASYMMETRIC):
        torch_way, triton_way = both(
            monkeypatch, "SPARSIFY_SWEEP", lambda grid=grid: column_sweep(W, U, grid, order=order)
        )
        assert torch.equal(torch_way.scale, triton_way.scale)
        same = (torch_way.codes == triton_way.codes).all(1)
        assert same.sum() >= N - 1
        assert torch.equal(decoded(triton_way, 8), triton_way.weight)


@pytest.mark.parametrize("mask", ["given", "chosen", "none"])
@pytest.mark.parametrize("grid", [Grid(4, 8), ASYMMETRIC, None], ids=["int4", "asymmetric", "values"])
def test_coordinate_descents_agree(interpreted, monkeypatch, problem, mask, grid):
    target, factors, keep = problem
    start = target * keep
    scale = zero_point = None
    if grid is not None:
        swept = column_sweep(target, factors.inverse_cholesky, grid, mask=keep)
        start, scale, zero_point = swept.weight, swept.scale, swept.zero_point
    for store in STORES if grid is None else STORES[:1]:
        start = start.to(store).float()
        torch_way, triton_way = both(
            monkeypatch, "SPARSIFY_COORDINATE_DESCENT",
            lambda start=start, store=store: coordinate_descent(
                Solved(start, scale=scale, zero_point=zero_point), target, factors.damped, 1, grid=grid,
                mask=keep if mask == "given" else None, two_four=mask == "chosen", store=store,
            ),
        )  # fmt: skip
        same = (torch_way.weight - triton_way.weight).abs() < 1e-3
        assert same.all(1).sum() >= N - 1
        assert (error(triton_way.weight, target, factors.damped) < error(start, target, factors.damped)).all()
        assert mask == "none" or is_two_four(triton_way.weight)
        assert mask != "given" or not triton_way.weight[~keep].any()
        assert grid is None or torch.equal(decoded(triton_way, grid.group_size), triton_way.weight)


def decoded(solved, group):
    steps = solved.codes.float()
    if solved.zero_point is not None:
        steps = steps - solved.zero_point.repeat_interleave(group, 1)
    return steps * solved.scale.float().repeat_interleave(group, 1)


def error(W, target, H):
    difference = (W - target).double()
    return ((difference @ H.double()) * difference).sum(1)


def test_a_panel_leaves_the_gradient_right(interpreted, monkeypatch, problem):
    target, factors, _ = problem
    H = factors.damped[:12, :12].contiguous()
    rows, wanted = torch.zeros(12, N), target[:, :12].t().contiguous()
    gradient = H @ (rows - wanted)
    monkeypatch.setenv("SPARSIFY_COORDINATE_DESCENT", "triton")
    visit_block(rows, gradient, H, None, None, None, None, True, torch.float32)
    assert is_two_four(rows.t()) and rows.any(0).all()
    torch.testing.assert_close(gradient, H @ (rows - wanted), rtol=1e-4, atol=1e-4)


COMPILE = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparsify.solver import triton_sweep as panels

found = {}
for name, fixed in (("sweep", {"PANEL": 128}), ("visit", {"PANEL": 64}), ("visit", {"PANEL": 128})):
    for choice in ({"KEEP": False, "SELECT": True, "ZERO": True}, {"KEEP": True, "SELECT": False, "ZERO": False}):
        kernel = getattr(panels, name)
        values = {**fixed, **choice, "GRID": True, "TO_BF16": True, "BLOCK": panels.BLOCK}
        pointers = {"codes": "*i8", "keep": "*u8", "low": "fp32", "high": "fp32"}
        pointers |= {word: "*fp32" for word in ("rows", "errors", "factor", "scale", "zero", "W", "G", "H")}
        signature = {word: "constexpr" if word in values else pointers.get(word, "i32") for word in kernel.arg_names}
        constants = {(kernel.arg_names.index(word),): value for word, value in values.items()}
        for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
            compiled = triton.compile(ASTSource(kernel, signature, constants), target=target, options={"num_warps": panels.WARPS})
            found[f"{name} {fixed['PANEL']} {choice['SELECT']} {target.arch}"] = compiled.metadata.shared
print(json.dumps(found))
"""


def test_they_compile_for_gpus_that_are_not_here():
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) == 18 and max(found.values()) < 16 * 1024  # bytes of shared memory: several programs fit
