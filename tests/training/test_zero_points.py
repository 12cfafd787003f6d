"""Training on asymmetric grids: codes and scales move, zero points stay, and what is exported is what was trained."""

import pytest
import torch

from sparsify.formats.packing import pack_bits
from sparsify.model.linear import CODE_RANGE, LinearWeights, is_two_four
from sparsify.solver.grid import Grid, round_to_nearest
from sparsify.solver.masks.magnitude import magnitude_mask
from sparsify.training.lora import FrozenLinear, merge_inside_mask
from sparsify.training.qat_linear import TrainableLinear, codes_of, grid_gradient, kept_positions, round_to_grid
from tests.training.test_lora import adapted, delta_of

N, K, G = 24, 64, 32
ALL = [(bits, pattern) for bits in (4, 8) for pattern in ("2:4", "dense")]


def linear(bits: int = 4, pattern: str = "2:4", seed: int = 0) -> LinearWeights:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(N, K, generator=generator) + 0.8
    if pattern == "2:4":
        W = W * magnitude_mask(W)
    codes, scale, zero_point = round_to_nearest(W, Grid(bits, G, symmetric=False))
    bias = torch.randn(N, generator=generator).bfloat16()
    return LinearWeights(bits, pattern, G, codes=codes, scale=scale, bias=bias, zero_point=zero_point).validate("x")


@pytest.mark.parametrize("bits, pattern", ALL)
def test_untrained_it_is_the_linear_itself(bits, pattern):
    weights = linear(bits, pattern)
    exported = TrainableLinear(weights).export().validate("x")
    for name in ("codes", "scale", "zero_point", "bias"):
        assert torch.equal(getattr(exported, name), getattr(weights, name)), name
    x = torch.randn(3, 5, K)
    torch.testing.assert_close(TrainableLinear(weights)(x), x @ weights.dense(torch.float32).t() + weights.bias.float())


@pytest.mark.parametrize("bits, pattern", ALL)
@pytest.mark.parametrize("held", [False, True])
def test_after_training_the_export_is_what_was_evaluated(bits, pattern, held):
    weights = linear(bits, pattern)
    trainable = TrainableLinear(weights)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(200, K, generator=generator), torch.randn(200, N, generator=generator)
    optimizer = torch.optim.Adam(trainable.parameters(), 2e-2)
    losses = []
    for _ in range(30):
        if held:
            trainable.hold(torch.float32)
        loss = (trainable(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if held:
            trainable.release()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    exported = trainable.export().validate("x")
    assert torch.equal(exported.dense(torch.float32), trainable.effective())
    assert torch.equal(exported.zero_point, weights.zero_point) and not torch.equal(exported.scale, weights.scale)
    if pattern == "2:4":
        assert is_two_four(exported.dense(torch.float32))
        assert not exported.dense(torch.float32)[~kept_positions(weights)].any()


def test_rounding_and_its_gradient_are_the_formulas_of_lsq_with_zero_points():
    generator = torch.Generator().manual_seed(1)
    W, gradient = (torch.randn(N, K, generator=generator) for _ in range(2))
    scale = 0.1 + torch.rand(N, K // G, generator=generator)
    zero = torch.randint(-8, 8, (N, K // G), generator=generator).to(torch.int8)
    mask = torch.rand(N, K, generator=generator) < 0.5
    bits = pack_bits(mask)
    value, d_weight = torch.zeros(N, K, dtype=torch.float64), torch.zeros(N, K, dtype=torch.float64)
    codes, d_scale = torch.zeros(N, K, dtype=torch.int8), torch.zeros(N, K // G, dtype=torch.float64)
    for n in range(N):
        for k in range(K):
            s, z = float(scale[n, k // G]), int(zero[n, k // G])
            ratio = float(W[n, k]) / s
            code = min(7, max(-8, round(ratio) + z))
            codes[n, k] = code if mask[n, k] else z
            if mask[n, k]:  # LSQ, equation 3, with v / s counted from the zero point
                value[n, k] = s * (code - z)
                inside = code == round(ratio) + z
                d_weight[n, k] = float(gradient[n, k]) if inside else 0.0
                d_scale[n, k // G] += float(gradient[n, k]) * (code - z - ratio if inside else code - z)
    torch.testing.assert_close(round_to_grid(W, scale, bits, -8, 7, zero).double(), value, rtol=1e-6, atol=1e-6)
    found = grid_gradient(gradient, W, scale, bits, -8, 7, zero)
    torch.testing.assert_close(found[0].double(), d_weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1].double(), d_scale, rtol=1e-4, atol=1e-5)
    assert torch.equal(codes_of(W, scale, mask, 4, zero), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_linear_gives_the_compressed_one_back(bits, quantized, dtype):
    weights = linear(bits)
    frozen = FrozenLinear(weights, quantized, dtype)
    assert torch.equal(frozen.dense(dtype), weights.dense(dtype))
    back = frozen.linear().validate("x")
    for name in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(back, name), getattr(weights, name)), name


@pytest.mark.parametrize("bits, pattern", ALL)
@pytest.mark.parametrize("refit", [True, False])
def test_merging_is_the_formula_inside_the_mask(bits, pattern, refit):
    weights = linear(bits, pattern)
    delta = 0.2 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(5))
    merged = merge_inside_mask(weights, delta, refit).validate("x")
    mask = kept_positions(weights) if pattern == "2:4" else torch.ones(weights.shape, dtype=torch.bool)
    goal = weights.dense(torch.float32) + mask * delta
    low, high = CODE_RANGE[bits]
    steps, zeros = (t.float().repeat_interleave(G, 1) for t in (merged.scale, merged.zero_point))
    wanted = ((goal / steps).round() + zeros).clamp(low, high)
    assert torch.equal(merged.codes.float(), torch.where(mask, wanted, zeros))
    assert torch.equal(merged.zero_point, weights.zero_point) or refit
    lost = [(m.dense(torch.float32) - goal).square().sum() for m in (merged, merge_inside_mask(weights, delta, False))]
    assert lost[0] < lost[1] or not refit


@pytest.mark.parametrize("quantized", [True, False])
def test_an_adapter_inside_the_mask_is_trained_as_what_is_merged(quantized):
    weights = linear()
    model, layer = adapted(weights, quantized_base=quantized, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(10)
    merged = merge_inside_mask(weights, delta_of(layer).detach(), refit=False)
    assert torch.equal(layer.effective(), merged.dense(torch.float32))
    exported = layer.export()
    assert torch.equal(exported.dense(torch.float32), merged.dense(torch.float32)) and not exported.symmetric
    assert not torch.equal(merged.codes, weights.codes)
