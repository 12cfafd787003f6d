"""Block tuning on blocks of tiny models: the dense output comes nearer, masks stay, and nothing is ever made worse."""

import copy

import pytest
import torch

from sparsify.errors import NumericalError
from sparsify.model.capture import BlockCall
from sparsify.model.linear import LinearWeights, is_two_four
from sparsify.solver.grid import Grid, round_to_nearest
from sparsify.solver.masks.magnitude import magnitude_mask
from sparsify.training.block_tuning import BlockTuning, Sample, block_loss, tune_block

D, T = 32, 12


class Block(torch.nn.Module):
    """A residual block with a norm, which the walk's own test covers on real architectures."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.RMSNorm(D)
        self.up = torch.nn.Linear(D, 2 * D, bias=False)
        self.down = torch.nn.Linear(2 * D, D, bias=False)

    def forward(self, x, shift=None):
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


def problem(bits=4):
    torch.manual_seed(0)
    dense = Block()
    block, linears = copy.deepcopy(dense), {}
    for name in ("up", "down"):
        W = dense.get_submodule(name).weight.detach()
        W = W * magnitude_mask(W)
        if bits == 16:
            linears[name] = LinearWeights(16, "2:4", W.shape[1], values=W.to(torch.bfloat16))
        else:
            codes, scale, _ = round_to_nearest(W, Grid(bits, 32))
            linears[name] = LinearWeights(bits, "2:4", 32, codes=codes, scale=scale)
        block.get_submodule(name).weight.data.copy_(linears[name].dense(torch.float32))
    samples = []
    for _ in range(32):
        x = torch.randn(1, T, D)
        samples.append(Sample(x, dense(x).detach(), BlockCall((), {})))
    return block.requires_grad_(False), linears, samples


def loss_of(block, linears, others, samples):
    """The loss of finished weights, computed without any of the training code."""
    block = copy.deepcopy(block)
    for name, weights in linears.items():
        block.get_submodule(name).weight.data.copy_(weights.dense(torch.float32))
    for name, value in others.items():
        block.get_parameter(name).data.copy_(value)
    x, wanted = (torch.cat([getattr(sample, side) for sample in samples]) for side in ("entering", "wanted"))
    size = wanted.square().sum(-1)
    median = size.sort(-1).values[:, (T - 1) // 2 : (T + 1) // 2]
    return float(((block(x) - wanted).square().sum(-1) / size.maximum(median)).mean())


@pytest.mark.parametrize("bits", [4, 16])
def test_the_block_comes_nearer_to_the_dense_one(bits):
    block, linears, samples = problem(bits)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    seen = []
    tuned = tune_block(
        block,
        linears,
        samples,
        BlockTuning(epochs=10, learning_rate=2e-2),
        lambda step, steps: seen.append((step, steps)),
    )
    assert tuned.after < 0.8 * tuned.before
    assert seen[0] == (1, 80) and seen[-1] == (80, 80) and tuned.steps == 80
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())
    held_out = samples[15::16]
    exact = loss_of(block, tuned.linears, tuned.others, held_out)
    assert exact < 0.8 * loss_of(block, linears, {}, held_out)
    assert exact == pytest.approx(tuned.after, rel=0.05)  # bf16 products there, float32 here
    for name, linear in tuned.linears.items():
        stored = linear.codes if bits == 4 else linear.values
        was = linears[name].codes if bits == 4 else linears[name].values
        assert is_two_four(stored)
        full = (was != 0).view(-1, 4).sum(1) == 2
        assert not (stored.reshape(-1, 4)[full] * (was.reshape(-1, 4)[full] == 0)).any()  # the mask stayed
    assert set(tuned.others) == {"norm.weight"}


def test_training_that_does_not_help_changes_nothing():
    block, linears, samples = problem()
    tuned = tune_block(block, linears, samples, BlockTuning(epochs=1, learning_rate=1.0, scale_rate=1.0, norm_rate=1.0))
    assert tuned.after == tuned.before and tuned.others == {}
    assert all(tuned.linears[name] is linears[name] for name in linears)


def test_a_budget_in_seconds_ends_the_training():
    block, linears, samples = problem()
    assert tune_block(block, linears, samples, BlockTuning(epochs=10**6, seconds=0.3)).steps < 10**5


def test_the_same_seed_gives_the_same_block():
    block, linears, samples = problem()
    one, other, third = (
        tune_block(block, linears, samples, BlockTuning(epochs=8, learning_rate=2e-2, seed=s)) for s in (1, 1, 2)
    )
    assert torch.equal(one.linears["up"].codes, other.linears["up"].codes) and one.after == other.after
    assert one.after != third.after


def test_outlier_tokens_count_like_all_others():
    wanted = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    wanted[0, 0] *= 1000
    wanted[0, 1] *= 1e-3
    sizes = wanted.double().square().sum(-1)
    median = sizes.sort(1).values[:, 2:3]
    output = wanted + 0.1 * torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    expected = ((output - wanted).double().square().sum(-1) / sizes.maximum(median)).mean(1).sum()
    assert float(block_loss(output, wanted)) == pytest.approx(float(expected), rel=1e-5)


def test_nan_is_said_at_once():
    block, linears, samples = problem()
    samples = [Sample(s.entering * float("nan"), s.wanted, s.call) for s in samples]
    with pytest.raises(NumericalError, match="before any training"):
        tune_block(block, linears, samples, BlockTuning())
