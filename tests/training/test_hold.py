"""A compressed linear over the micro-batches of a step: rounded once, in pieces, with the gradients of all of them."""

import pytest
import torch

from sparsify import processor
from sparsify.formats.packing import pack_bits
from sparsify.model.linear import LinearWeights, is_two_four
from sparsify.native import build
from sparsify.solver.grid import Grid, round_to_nearest
from sparsify.training import native_grid, qat_linear
from sparsify.training.qat_linear import TrainableLinear, grid_gradient, kept_positions, round_to_grid

N, K, G = 12, 64, 16


def linear(bits: int = 4, seed: int = 0, bias: bool = False) -> LinearWeights:
    W = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    keep = torch.zeros(N * K // 4, 4, dtype=torch.bool).scatter_(1, W.view(-1, 4).abs().topk(2, 1).indices, True)
    W = W * keep.view(N, K)
    shift = torch.linspace(-1, 1, N).bfloat16() if bias else None
    if bits == 16:
        return LinearWeights(16, "2:4", K, values=W.bfloat16(), bias=shift)
    codes, scale, _ = round_to_nearest(W, Grid(bits, G, torch.bfloat16, False))
    return LinearWeights(bits, "2:4", G, codes=codes, scale=scale, bias=shift)


@pytest.fixture(params=["torch", "native"])
def kernel(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native_grid, "available", lambda *_: False)
    elif build.load(native_grid.SOURCE) is None:
        pytest.skip("no native kernel here")
    return request.param


def test_rounding_in_pieces_is_the_plain_formula(kernel, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    W, gradient = (torch.randn(N, K, generator=generator) for _ in range(2))
    scale = 0.1 + torch.rand(N, K // G, generator=generator)
    mask = torch.rand(N, K, generator=generator) < 0.5
    bits = pack_bits(mask)
    codes = torch.empty(N, K, dtype=torch.float64)
    d_weight, d_scale = torch.zeros(N, K, dtype=torch.float64), torch.zeros(N, K // G, dtype=torch.float64)
    for n in range(N):
        for k in range(K):
            ratio = float(W[n, k]) / float(scale[n, k // G])
            codes[n, k] = min(7, max(-8, round(ratio)))
            if mask[n, k]:  # LSQ, equation 3
                inside = -8.5 <= ratio <= 7.5
                d_weight[n, k] = float(gradient[n, k]) if inside else 0.0
                d_scale[n, k // G] += float(gradient[n, k]) * (codes[n, k] - ratio if inside else codes[n, k])
    expected = codes * scale.double().repeat_interleave(G, 1) * mask
    for rows in (1, 5, 100):
        monkeypatch.setattr(qat_linear, "PIECE", rows * K)
        torch.testing.assert_close(round_to_grid(W, scale, bits, -8, 7).double(), expected, rtol=1e-6, atol=1e-6)
        found = grid_gradient(gradient, W, scale, bits, -8, 7)
        torch.testing.assert_close(found[0].double(), d_weight, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[1].double(), d_scale, rtol=1e-4, atol=1e-5)


def rounded_and_gradients(group: int, dtype: torch.dtype, masked: bool, through: bool) -> list[torch.Tensor]:
    """Of the same random weight, with clipped codes, ties, a NaN and zero points."""
    generator = torch.Generator().manual_seed(group)
    W, gradient = (torch.randn(N, 6 * group, generator=generator) for _ in range(2))
    scale = 0.1 + torch.rand(N, 6, generator=generator)
    W[0, :6] = torch.tensor([0.5, 1.5, -0.5, -8.5, 7.5, 100.0]) * scale[0, 0]
    W[1, 1] = torch.nan
    bits = pack_bits(torch.rand(W.shape, generator=generator) < 0.5) if masked else None
    zero = torch.randint(-8, 8, scale.shape, generator=generator).to(torch.int8)
    rounded = round_to_grid(W, scale, bits, -8, 7, zero, dtype)
    return [rounded, *grid_gradient(gradient.to(dtype), W, scale, bits, -8, 7, zero, through)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group, masked, through", [(16, True, False), (36, True, True), (7, False, False)])
def test_the_native_kernel_gives_the_bits_of_pytorch(group, masked, through, dtype, monkeypatch):
    if build.load(native_grid.SOURCE) is None:
        pytest.skip("no native kernel here")
    native = rounded_and_gradients(group, dtype, masked, through)
    monkeypatch.setattr(native_grid, "available", lambda *_: False)
    plain = rounded_and_gradients(group, dtype, masked, through)
    for one, other in zip(native[:2], plain[:2], strict=True):
        assert one.dtype == other.dtype and torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    torch.testing.assert_close(native[2], plain[2], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_levels_and_threads_give_the_same_bits(monkeypatch):
    if build.load(native_grid.SOURCE) is None:
        pytest.skip("no native kernel here")
    found = []
    before = torch.get_num_threads()
    try:
        for threads, level in enumerate(processor.available_levels(), 1):
            monkeypatch.setenv(processor.FORCE, level)
            torch.set_num_threads(threads)
            found.append([t.nan_to_num() for t in rounded_and_gradients(36, torch.float32, True, False)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("in_loop", [True, False])
def test_a_held_weight_gives_the_gradients_of_all_micro_batches(bits, in_loop):
    plain, held = TrainableLinear(linear(bits, bias=True)), TrainableLinear(linear(bits, bias=True))
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(7, K, generator=generator) for _ in range(3)]
    for module in (plain, held):
        module.quantize_in_loop = in_loop
        with torch.no_grad():
            module.weight.add_(0.05 * torch.randn(N, K, generator=torch.Generator().manual_seed(3)) * module.mask)
    held.hold(torch.float32)
    outputs = []
    for x in batches:
        pair = [module(x) for module in (plain, held)]
        for y in pair:
            y.square().sum().backward()
        outputs.append(pair)
    held.release()
    for one, other in outputs:
        assert torch.equal(one, other)
    for name, parameter in plain.named_parameters():
        other = held.get_parameter(name)
        if parameter.grad is None or (name == "scale" and not in_loop):
            continue
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-4)
    assert (held.weight.grad[~held.mask] == 0).all()
    assert not held.holds and torch.equal(plain(batches[0]), held(batches[0]))


def test_training_moves_weights_and_never_the_zeros():
    module = TrainableLinear(linear())
    target = torch.randn(N, K, generator=torch.Generator().manual_seed(5)) * module.mask
    before, mask = module.export(), module.mask.clone()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0)
    errors = []
    for _ in range(60):
        loss = (module.effective() - target).square().sum()
        errors.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = module.export().validate("linear")
    assert errors[-1] < 0.5 * errors[0] and not torch.equal(after.codes, before.codes)
    assert is_two_four(after.codes) and (after.codes[~mask] == 0).all() and torch.equal(module.mask, mask)
    assert torch.equal(after.dense(torch.float32), module.effective())


def test_without_quantization_in_the_loop_weights_are_rounded_at_the_end_only():
    module = TrainableLinear(linear())
    module.quantize_in_loop = False
    with torch.no_grad():
        module.weight.add_(0.01 * module.mask)
    assert torch.equal(module.in_loop(), module.weight * module.mask)
    assert not torch.equal(module.in_loop(), module.effective())
    assert torch.equal(module.export().dense(torch.float32), module.effective())


def test_kept_weights_that_rounded_to_zero_have_a_place_to_come_back_to():
    codes = torch.zeros(1, 8, dtype=torch.int8)
    codes[0, 2] = 3
    kept = kept_positions(LinearWeights(4, "2:4", 8, codes=codes, scale=torch.ones(1, 1).bfloat16()))
    assert kept.view(-1, 4).sum(1).tolist() == [2, 2] and kept[0, 2]
