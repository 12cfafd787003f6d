"""The operations that a plan counts, against those that PyTorch counts while they are done."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import sparsify.solver.coordinate_descent as refine_pass
from sparsify import compute
from sparsify.compiler.estimate import writing_bytes
from sparsify.compiler.operations import CHOOSE_TWO, groups_of, in_words, solving
from sparsify.compiler.planning import make_plan
from sparsify.model.decoder import open_blocks
from sparsify.model.linear_groups import find_groups, is_narrow
from sparsify.model.sequential import Walk
from sparsify.recipe import parse_recipe
from sparsify.solver import hessian
from sparsify.solver.column_sweep import Solved
from sparsify.solver.grid import Grid
from sparsify.solver.hessian import Statistics, factor, propagated_target, relative_error
from sparsify.solver.masks import alps
from sparsify.solver.solve import Scheme
from tests.helpers.tiny import FAMILIES, save_tiny

RECIPE = """
version: 1
calibration: {source: self, samples: 8, sequence_length: 32}
solver: {error_propagation: 0.5}
passes:
  - prune: {method: alps}
  - quantize: {method: gptq, bits: 4, group_size: 32}
"""
N, K, G = 24, 64, 16


def counted(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return {str(op).split(".")[-1]: count for op, count in counter.get_flop_counts()["Global"].items()}


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(N, K, generator=generator), torch.randn(4 * K, K, generator=generator)
    return W, X.T @ X / len(X)


def scheme(**changes):
    return Scheme(
        **{"prune": "alps", "quantize": "gptq", "bits": 4, "group_size": G, "coordinate_descent": 3, **changes}
    )


def test_a_forward_pass_and_the_writing_of_text(tmp_path):
    source = save_tiny(tmp_path / "model", "llama")
    plan = make_plan(parse_recipe(RECIPE), str(source))
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    length = 32
    found = counted(lambda: model(torch.ones(1, length, dtype=torch.long), use_cache=False))
    products, attention = found["mm"], found["bmm"] * (length + 1) / (2 * length)  # the pairs that the mask leaves
    operations = plan.estimate().operations
    head = 2 * length * plan.model.head_weights()
    assert (
        operations["forward"]
        == operations["dense forward"]
        == pytest.approx(8 * (products - head + attention), rel=1e-3)
    )  # the angles are a product to PyTorch
    rows = 9  # 8 rows kept of 1.125 times as many; the last token of a row is never read
    per_token = products / length + attention / length
    assert operations["self-written text"] == pytest.approx(rows * (length - 1) * per_token, rel=0.02)


def test_products_of_the_solver(problem, monkeypatch):
    W, H = problem
    factors = factor(H, 0.01, "x")
    for outputs in (N, 2 * K):  # PyTorch counts products, neither factors nor triangles
        weights = W.repeat(outputs // N + 1, 1)[:outputs]
        found = sum(counted(partial(alps.alps_mask, weights, factors.damped)).values())
        rounds = alps.ITERATIONS
        products, cubes = (1, 1 / 3) if outputs == N else (1 + rounds, 1)
        assert found == products * 2 * outputs * K * K
        expected = (1 + rounds) * 2 * outputs * K * K + rounds * cubes * K**3
        assert solving(outputs, K, scheme())["masks"] == pytest.approx(expected)
    monkeypatch.setattr(hessian, "PANEL", 1)  # larger ones multiply some of what is beside a triangle
    monkeypatch.setattr(hessian, "ROWS", 1)
    errors = counted(lambda: relative_error(W, W / 2, H))
    assert solving(N, K, scheme())["errors"] == sum(errors.values()) - 2 * N * K  # both diagonals
    propagated = counted(lambda: propagated_target(W, Statistics(H, H), factors, 0.5))
    more = solving(N, K, scheme(error_propagation=0.5))["factors"] - solving(N, K, scheme())["factors"]
    assert more == pytest.approx(sum(propagated.values()) - 2 * N * K)  # the diagonal of both triangles
    monkeypatch.setattr(refine_pass, "visit_block", lambda *arguments: None)
    monkeypatch.setenv(refine_pass.FORCE, "torch")
    grid = Grid(4, G)
    scale = torch.full((N, K // G), 0.1).bfloat16()
    refined = counted(lambda: refine_pass.coordinate_descent(Solved(W, scale=scale), W, H, 3, grid=grid, two_four=True))
    assert solving(N, K, scheme())["coordinate descent"] - 3 * CHOOSE_TWO * N * K == sum(refined.values())


def test_what_a_scheme_does_not_do_is_not_counted():
    assert set(solving(N, K, Scheme("magnitude", "rtn", 4, G))) == {"sweep"}  # the search for scales
    assert not solving(N, K, Scheme("magnitude", None))
    assert set(solving(N, K, scheme(prune="sparsegpt", coordinate_descent=0))) == {"factors", "sweep", "errors"}
    swept = scheme(prune="sparsegpt")
    ordered = solving(N, K, replace(swept, activation_order=True))["factors"] - solving(N, K, swept)["factors"]
    assert ordered == pytest.approx(2 * K**3 / 3)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "phi3", "gpt_neox", "gemma2"])
def test_groups_are_those_that_the_walk_finds(tmp_path, family):
    assert family in FAMILIES
    source = save_tiny(tmp_path / "model", family)
    plan = make_plan(parse_recipe(RECIPE), str(source))
    walk = Walk(open_blocks(plan.checkpoint), torch.ones(1, 32, dtype=torch.long))
    walk.model.load(0)
    groups, _ = find_groups(walk.model.block(0), walk.probe[0], walk.probe[1][0])
    named = {name: number for number, group in enumerate(groups) for name in group.names}
    block = walk.model.block(0)
    outputs = [group is groups[-1] and is_narrow(block, group) for group in groups]
    found = sorted((g.in_features, len(g.names), outputs[number]) for number, g in enumerate(groups))
    planned = groups_of(plan)[: len(groups)]
    assert found == sorted((g.inputs, len(g.members), g.outputs) for g in planned) and len(named) >= 4
    assert any(outputs) == (family in ("llama", "qwen2", "phi3", "gemma2"))  # the others have biases


def test_a_plan_measures_nothing_and_shows_what_it_counts(tmp_path, monkeypatch):
    source = save_tiny(tmp_path / "model", "llama")
    monkeypatch.setattr(compute, "_measured", None)  # a call would fail
    monkeypatch.setattr(compute, "_known", {})
    monkeypatch.setattr(compute, "device", lambda: "cpu")
    monkeypatch.setattr("sparsify.compiler.estimate.device", lambda: "cpu")
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    plan = make_plan(parse_recipe(RECIPE), str(source))
    total = sum(plan.estimate().operations.values())
    assert f"{in_words(total)} (how long that takes is known after the first" in str(plan.table().caption)
    assert plan.to_json()["estimate"]["operations"] == plan.estimate().operations
    assert 2 * plan.estimate().multiply_adds in (total, total - 1)
    monkeypatch.setattr(compute, "_measured", lambda: compute.Rates(total / 100, total / 100))
    compute.rates(measure=True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert f"{in_words(total)}, about 3 minutes on this machine" in str(plan.table().caption)  # 100 s and the overhead


def test_a_model_that_writes_its_own_text_lies_whole_in_memory(tmp_path, monkeypatch):
    source = save_tiny(tmp_path / "model", "llama", torch.bfloat16, hidden_size=256, intermediate_size=2048)
    short = RECIPE.replace("samples: 8, sequence_length: 32", "samples: 1, sequence_length: 2")
    found = {}
    for name in ("bfloat16", "float32"):
        monkeypatch.setenv("SPARSIFY_COMPUTE", name)
        plan = make_plan(parse_recipe(short), str(source))
        found[name] = writing_bytes(plan)
        assert (
            plan.estimate().memory_bytes
            >= found[name]
            == plan.model.dtype.itemsize * sum(p.numel() for p in plan.model.model.parameters())
        )
    assert found["float32"] == 2 * found["bfloat16"]


def test_counts_in_words():
    assert [in_words(n) for n in (999, 5.4e6, 12.3e12, 850e12, 2e15)] == [
        "999 operations", "5.4 MFLOP", "12 TFLOP", "850 TFLOP", "2 PFLOP",
    ]  # fmt: skip
