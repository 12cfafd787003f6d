"""AdamW with its states on the host, and states in a file."""

from functools import partial

import pytest
import torch
from torch import nn

import sparsify.training.optimizer as optimizers
from sparsify.errors import CheckpointError
from sparsify.training.eight_bits import BLOCK, EightBits, dynamic_map
from sparsify.training.log import LOG, TrainingLog, whole_log
from sparsify.training.optimizer import TensorwiseAdamW, load_states, save_gathered, states_by_name


def parameters(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(*shape, generator=generator).to(device)) for name, shape in SHAPES.items()}


SHAPES = {"a.weight": (5, 80), "b": (7,)}
SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.0}


def steps(optimizer, trained, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in trained.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        optimizer.step()
    return [parameter.detach().cpu() for parameter in trained.values()]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_states_on_the_host_make_the_same_steps(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    plain, hosted = parameters(), parameters(device)
    one = steps(torch.optim.AdamW(plain.values(), fused=True, **SETTINGS), plain, 0, 6)
    optimizer = TensorwiseAdamW(hosted.values(), on_host=True, **SETTINGS)
    two = steps(optimizer, hosted, 0, 6)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(state["exp_avg"].device.type == "cpu" for state in optimizer.state.values())


@pytest.mark.parametrize(
    "kind", [TensorwiseAdamW, partial(TensorwiseAdamW, eight_bits=True), torch.optim.AdamW], ids=["32", "8", "torch"]
)
def test_states_from_a_file_go_on_with_the_same_steps(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(optimizers, "SMALL", 1)
    trained = parameters()
    optimizer = kind(trained.values(), **SETTINGS)
    steps(optimizer, trained, 0, 3)
    save_gathered(states_by_name(optimizer, trained), tmp_path / "states.safetensors")
    again = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in trained.items()}
    other = kind(again.values(), **SETTINGS)
    load_states(other, again, tmp_path / "states.safetensors", 3)
    one, two = steps(optimizer, trained, 3, 6), steps(other, again, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    with pytest.raises(CheckpointError, match="belongs to another training"):
        load_states(other, {"c": again["b"]}, tmp_path / "states.safetensors", 3)


def test_a_run_may_go_on_with_moments_of_other_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizers, "SMALL", 1)
    trained, file = parameters(), tmp_path / "states.safetensors"
    exact = torch.optim.AdamW(trained.values(), fused=True, **SETTINGS)
    steps(exact, trained, 0, 3)
    save_gathered(states_by_name(exact, trained), file)
    wanted = {name: tensor.load().clone() for name, tensor in states_by_name(exact, trained).items()}
    eight = TensorwiseAdamW(trained.values(), eight_bits=True, **SETTINGS)
    load_states(eight, trained, file, 3)
    near = {name: tensor.load() for name, tensor in states_by_name(eight, trained).items()}
    assert near.keys() == wanted.keys() and any(not torch.equal(near[name], wanted[name]) for name in wanted)
    for name, tensor in wanted.items():
        assert (near[name] - tensor).abs().max() < 0.01 * tensor.abs().max()
    save_gathered(states_by_name(eight, trained), file)
    again = torch.optim.AdamW(trained.values(), fused=True, **SETTINGS)
    load_states(again, trained, file, 3)
    for name, tensor in states_by_name(again, trained).items():
        assert torch.equal(tensor.load(), near[name])
    assert all(state["step"] == 3 for state in again.state.values())


def test_values_of_the_dynamic_type_are_those_of_the_authors():
    """bitsandbytes' `create_dynamic_map(True)` and `(False)`."""
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    assert len(signed.unique()) == len(unsigned.unique()) == 256
    places = [0, 1, 127, 128, 129, 200, 254, 255]
    known = [-0.99296874, -0.97890627, 0.0, 5.5e-7, 3.25e-6, 0.23359375, 0.99296874, 1.0]
    torch.testing.assert_close(signed[places], torch.tensor(known))
    known = [0.0, 3.25e-7, 0.10351562, 0.11054687, 0.11757812, 0.61679685, 0.99648438, 1.0]
    torch.testing.assert_close(unsigned[places], torch.tensor(known))


@pytest.mark.parametrize("signed", [True, False])
def test_numbers_in_8_bits_are_the_nearest_values_of_their_block(signed):
    count = 5 * BLOCK + 70
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(count, generator=generator) * 10 ** (6 * torch.rand(count, generator=generator) - 3)
    numbers = numbers if signed else numbers.square()
    numbers[BLOCK : 2 * BLOCK] = 0
    kept = EightBits(count, signed, torch.device("cpu"))
    assert not kept.read(0, count).any()
    kept.write(0, numbers[: 2 * BLOCK])
    kept.write(2 * BLOCK, numbers[2 * BLOCK :])
    found = kept.read(0, count)
    assert torch.equal(kept.read(3 * BLOCK, 4 * BLOCK - 6), found[3 * BLOCK : 4 * BLOCK - 6])
    for first in range(0, count, BLOCK):
        block, read = numbers[first : first + BLOCK].double(), found[first : first + BLOCK].double()
        largest = block[block.abs().argmax()]
        values = dynamic_map(signed).double() * largest
        nearest = values[(block[:, None] - values).abs().argmin(1)]
        if not signed:
            nearest = torch.where(block > 0, nearest.clamp(min=float(values[1])), nearest)
        torch.testing.assert_close(read, nearest, rtol=1e-6, atol=0)
        assert read[block.abs().argmax()] == largest
    assert signed or (found[numbers > 0] > 0).all()
    again = EightBits(count, signed, torch.device("cpu"))
    again.write(0, found)
    assert torch.equal(again.read(0, count), found) and torch.equal(again.codes, kept.codes)
    assert kept.nbytes == 6 * (BLOCK + 4)


@pytest.mark.parametrize("decades, bound", [(0, 0.025), (2, 0.07)])
def test_steps_with_moments_in_8_bits_follow_those_of_torch(monkeypatch, decades, bound):
    """Least squares with inputs of sizes that differ by so many decades, and so moments by twice as many, inside of every block:
    50 steps of both, never further apart than a share of the way. torchao's AdamW8bit is 0.015 and 0.058 away."""
    generator = torch.Generator().manual_seed(2)
    size = torch.logspace(-decades, 0, 80)
    wanted, start = (torch.randn(80, 80, generator=generator) for _ in range(2))

    def path(kind):
        weight = nn.Parameter(start.clone())
        optimizer, points = kind([weight], **SETTINGS), []
        batches = torch.Generator().manual_seed(3)
        for _ in range(50):
            x = torch.randn(64, 80, generator=batches) * size
            loss = (x @ (weight - wanted).T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            points.append(weight.detach().clone())
        return points, optimizer.state[weight]

    exact, _ = path(partial(torch.optim.AdamW, fused=True))
    near, state = path(partial(TensorwiseAdamW, eight_bits=True))
    assert isinstance(state["exp_avg"], EightBits) and isinstance(state["exp_avg_sq"], EightBits)
    for one, other in zip(exact, near, strict=True):
        assert (one - other).norm() < bound * (one - start).norm()
    monkeypatch.setattr(optimizers, "PIECE", 2 * BLOCK)
    pieces, _ = path(partial(TensorwiseAdamW, eight_bits=True))
    assert torch.equal(pieces[-1], near[-1])


def test_a_log_loses_what_is_done_again_and_what_was_cut(tmp_path):
    file = tmp_path / "training-2" / LOG
    file.parent.mkdir()
    log = TrainingLog(file, 0)
    for step in (1, 2, 3):
        log.add(step, {"loss": 1 / step, "gradient_norm": float("inf")})
    file.write_text(file.read_text() + '{"step": 4, "lo')
    TrainingLog(file, 2).add(3, {"loss": 0.5})
    TrainingLog(None, 2).add(3, {"loss": 0.5})
    assert whole_log(tmp_path).splitlines() == [
        '{"training": 2, "step": 1, "loss": 1.0, "gradient_norm": null}',
        '{"training": 2, "step": 2, "loss": 0.5, "gradient_norm": null}',
        '{"training": 2, "step": 3, "loss": 0.5}',
    ]
