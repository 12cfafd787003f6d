"""The trainable linear against the formulas it implements, written out in fp64, and against autograd where that applies."""

import pytest
import torch

from sparsify.model.linear import LinearWeights, is_two_four
from sparsify.solver.grid import Grid, round_to_nearest
from sparsify.solver.masks.magnitude import magnitude_mask
from sparsify.training.qat_linear import TrainableLinear, make_trainable

N, K, G = 12, 64, 32


def linear(bits=4, pattern="2:4", bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(N, K, generator=generator)
    if pattern == "2:4":
        W = W * magnitude_mask(W)
    b = torch.randn(N, generator=generator).to(torch.bfloat16) if bias else None
    if bits == 16:
        return LinearWeights(16, pattern, K, values=W.to(torch.bfloat16), bias=b)
    codes, scale, _ = round_to_nearest(W, Grid(bits, G))
    return LinearWeights(bits, pattern, G, codes=codes, scale=scale, bias=b)


ALL = [(bits, pattern) for bits in (4, 8, 16) for pattern in ("2:4", "dense")]


@pytest.mark.parametrize("bits, pattern", ALL)
def test_untrained_it_is_the_linear_itself(bits, pattern):
    weights = linear(bits, pattern, bias=True)
    trainable = TrainableLinear(weights)
    exported = trainable.export().validate("x")
    assert torch.equal(exported.dense(torch.float32), weights.dense(torch.float32))
    assert torch.equal(exported.bias, weights.bias)
    x = torch.randn(3, 5, K)
    expected = x @ weights.dense(torch.float32).t() + weights.bias.float()
    torch.testing.assert_close(trainable(x), expected)


@pytest.mark.parametrize("bits, pattern", ALL)
def test_after_training_the_export_is_what_was_evaluated(bits, pattern):
    trainable = TrainableLinear(linear(bits, pattern))
    mask = None if trainable.mask is None else trainable.mask.clone()
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(200, K, generator=generator), torch.randn(200, N, generator=generator)
    optimizer = torch.optim.Adam(trainable.parameters(), 2e-2)
    losses = []
    for _ in range(30):
        loss = (trainable(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    exported = trainable.export().validate("x")
    assert torch.equal(exported.dense(torch.float32), trainable.effective())
    if mask is not None:
        assert torch.equal(trainable.mask, mask) and is_two_four(exported.dense(torch.float32))
        assert not exported.dense(torch.float32)[~mask].any()


def test_gradients_are_those_of_the_paper():
    """LSQ, equation 3: d What / d s = code - W/s inside the range and the code outside; d What / d W = 1 inside, 0 outside."""
    trainable = TrainableLinear(linear())
    with torch.no_grad():
        trainable.weight.mul_(1.7)  # some weights leave the range
        trainable.weight.add_(0.01 * torch.randn(N, K))
    gradient = torch.randn(N, K, dtype=torch.float64)
    trainable.effective().backward(gradient.float())
    scale = trainable.scale.detach().to(torch.bfloat16).double().repeat_interleave(G, 1)
    ratio = trainable.weight.detach().double() / scale
    code = ratio.round().clamp(-8, 7)
    inside = (ratio >= -8.5) & (ratio <= 7.5)
    masked = gradient * trainable.mask
    assert 0 < (~inside).sum() < N * K
    torch.testing.assert_close(trainable.weight.grad.double(), masked * inside, rtol=1e-5, atol=1e-6)
    d_scale = torch.where(inside, code - ratio, code) * masked
    torch.testing.assert_close(trainable.scale.grad.double(), d_scale.view(N, K // G, G).sum(2), rtol=1e-4, atol=1e-4)


def test_a_kept_weight_that_rounded_to_zero_may_come_back():
    weights = linear()
    codes = weights.codes.clone()
    codes[:, :4] = 0
    trainable = TrainableLinear(LinearWeights(4, "2:4", G, codes=codes, scale=weights.scale))
    assert (trainable.mask.view(N, -1, 4).sum(2) == 2).all()
    with torch.no_grad():
        trainable.weight[:, 0] = 1.0
    assert trainable.export().validate("x").codes[:, 0].all()


def test_make_trainable_replaces_only_what_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(K, N, bias=False), torch.nn.ReLU(), torch.nn.Linear(N, 4))
    kept = model[2]
    placed = make_trainable(model, {"0": linear()})
    assert model[0] is placed["0"] and isinstance(model[0], TrainableLinear) and model[2] is kept
