"""Masks that move by rule: which are chosen, what gradients reach, what is pulled, and when it all stands still."""

import itertools

import pytest
import torch

from sparsify.formats.packing import unpack_bits
from sparsify.model.linear import is_two_four
from sparsify.recipe import MaskLearning
from sparsify.training.learned_masks import LearnedMasks, pull, two_of_four
from sparsify.training.qat_linear import TrainableLinear
from tests.training.test_hold import G, K, N, linear


def test_the_two_largest_of_four_are_kept_and_equal_ones_stay():
    for values in itertools.product((0.0, 1.0, 2.0), repeat=4):
        for pair in itertools.combinations(range(4), 2):
            mask = torch.zeros(1, 4, dtype=torch.bool)
            mask[0, list(pair)] = True
            new = two_of_four(torch.tensor([values]), mask)[0]
            kept, dropped = (
                [v for v, k in zip(values, new.tolist(), strict=True) if k],
                [v for v, k in zip(values, new.tolist(), strict=True) if not k],
            )
            assert len(kept) == 2 and min(kept) >= max(dropped)
            if min(values[i] for i in pair) >= max(v for i, v in enumerate(values) if i not in pair):
                assert torch.equal(new, mask[0])  # nothing is larger than what is kept, so nothing changes


def test_only_dropped_weights_are_pulled():
    W = torch.tensor([[1.0, -2.0, 0.25, -0.1]])
    mask = torch.tensor([[True, True, False, False]])
    shrunk, reduced = W.clone(), W.clone()
    pull(shrunk, mask, "ast", 0.2, 5.0)
    pull(reduced, mask, "cast", 0.04, 5.0)
    torch.testing.assert_close(shrunk, torch.tensor([[1.0, -2.0, 0.2, -0.08]]))
    torch.testing.assert_close(reduced, torch.tensor([[1.0, -2.0, 0.05, 0.0]]))  # by 0.2, not beyond zero
    pull(shrunk, mask, "ast", 7.0, 5.0)
    assert shrunk.tolist() == [[1.0, -2.0, 0.0, 0.0]]


@pytest.mark.parametrize("method", ["ast", "cast"])
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("in_loop", [True, False])
def test_gradients_reach_dropped_weights_while_masks_move(method, bits, in_loop):
    """Against the plain formula in float64: rounding and, for ast, the mask are passed straight through; a scale learns from what
    is multiplied with."""
    module = TrainableLinear(linear(bits))
    module.quantize_in_loop, module.moving = in_loop, method
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        module.weight.add_(0.05 * torch.randn(N, K, generator=generator))
    x, target = torch.randn(7, K, generator=generator), torch.randn(7, N, generator=generator)
    module.hold(torch.float32)
    y = module(x)
    (y * target).sum().backward()
    module.release()
    gradient = target.double().t() @ x.double()
    mask = torch.ones_like(module.kept) if method == "cast" else module.kept
    expected, d_scale = gradient.clone(), None
    used = module.weight.detach().double() * mask
    if bits == 16:  # stored as it is multiplied with
        used = used.float().bfloat16().double()
    if bits == 4 and in_loop:
        steps = module.scale.detach().bfloat16().double().repeat_interleave(G, 1)
        ratio = module.weight.detach().double() / steps
        code = ratio.round().clamp(-8, 7)
        inside = (code - ratio).abs() <= 0.5
        used, expected = steps * code * mask, gradient * inside
        d_scale = (torch.where(inside, code - ratio, code) * gradient * mask).view(N, -1, G).sum(2)
    torch.testing.assert_close(y.double(), x.double() @ used.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.weight.grad.double(), expected, rtol=1e-4, atol=1e-4)
    assert (module.weight.grad[~module.kept] != 0).any()
    if d_scale is not None:
        torch.testing.assert_close(module.scale.grad.double(), d_scale, rtol=1e-3, atol=1e-3)
    assert is_two_four(module.export().validate("linear").unscaled())  # at any time


def learned(**settings):
    linears = {"a": TrainableLinear(linear(seed=1)), "b": TrainableLinear(linear(seed=2))}
    return linears, LearnedMasks(linears, MaskLearning(**settings), steps=10)


RATES = {"a": (0.01, 1.0), "b": (0.01, 1.0)}


def walk(linears, masks, first, last, seed=0):
    """Steps first to last (from 1), each of which moves all weights at random; the steps after which masks had changed."""
    changed = []
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(100 * seed + step)
        masks.begin(step - 1)
        before = {name: module.kept.clone() for name, module in linears.items()}
        with torch.no_grad():
            for module in linears.values():
                if module.watches_inputs:
                    with torch.enable_grad():
                        module(torch.rand(5, K, generator=generator) * torch.linspace(0.1, 3, K))
                moved = 0.3 * torch.randn(N, K, generator=generator)
                module.weight.add_(moved if module.moving else moved * module.kept)
        masks.after_step(step, RATES)
        if any(not torch.equal(module.kept, before[name]) for name, module in linears.items()):
            changed.append(step)
        assert all((module.kept.view(-1, 4).sum(1) == 2).all() for module in linears.values())
    return changed


def test_masks_are_chosen_every_few_steps_and_then_stand_still():
    linears, masks = learned(every=2, frozen=0.5)
    assert masks.last == 5 and walk(linears, masks, 1, 10) == [2, 4, 5]
    assert all(module.moving is None for module in linears.values())
    kept = sum(int(module.kept.sum()) for module in linears.values())
    new = sum(int((module.kept & ~unpack_bits(masks.first[name], K)).sum()) for name, module in linears.items())
    assert 0 < masks.moved() == new / kept < 1 and masks.summary()["last_change"] == 5


def test_a_dense_linear_has_no_mask_to_learn():
    from dataclasses import replace

    dense = TrainableLinear(replace(linear(), pattern="dense"))
    assert LearnedMasks({"a": dense}, MaskLearning(), steps=10).linears == {}


@pytest.mark.parametrize("norms", [False, True])
def test_the_criterion_may_count_the_norms_of_inputs(norms):
    linears, masks = learned(every=1, frozen=0.5, decay=0, input_norms=norms)
    walk(linears, masks, 1, 1)
    module = linears["a"]
    score = module.weight.detach().abs()
    if norms:
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(5, K, generator=generator) * torch.linspace(0.1, 3, K)
        torch.testing.assert_close(masks.norms["a"], x.norm(dim=0))
        score = score * x.norm(dim=0)
    best = score.view(-1, 4).topk(2, 1).indices.sort(1).values
    assert torch.equal(module.kept.view(-1, 4).nonzero()[:, 1].view(-1, 2), best) and not module.watches_inputs


@pytest.mark.parametrize("method", ["ast", "cast"])
@pytest.mark.parametrize("killed", [1, 3, 5, 8])
def test_what_is_saved_goes_on_as_if_nothing_had_happened(method, killed):
    settings = {"method": method, "every": 2, "frozen": 0.5, "input_norms": True}
    whole, masks = learned(**settings)
    walk(whole, masks, 1, 10)
    halted, before = learned(**settings)
    walk(halted, before, 1, killed)
    again, after = learned(**settings)
    for name, module in again.items():
        module.load_state_dict({**module.state_dict(), "weight": halted[name].weight.detach()})
    after.restore(before.state(), killed)
    walk(again, after, killed + 1, 10)
    for name, module in whole.items():
        assert torch.equal(module.weight, again[name].weight) and torch.equal(module.kept, again[name].kept)
    assert masks.moved() == after.moved()
