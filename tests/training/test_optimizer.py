"""AdamW with its states on the host, and states in a file."""

import pytest
import torch
from torch import nn

from sparsify.errors import CheckpointError
from sparsify.training.log import LOG, TrainingLog, whole_log
from sparsify.training.optimizer import HostAdamW, load_states, save_gathered, states_by_name


def parameters(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(*shape, generator=generator).to(device)) for name, shape in SHAPES.items()}


SHAPES = {"a.weight": (5, 8), "b": (7,)}
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
    optimizer = HostAdamW(hosted.values(), **SETTINGS)
    two = steps(optimizer, hosted, 0, 6)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(state["exp_avg"].device.type == "cpu" for state in optimizer.state.values())


@pytest.mark.parametrize("kind", [HostAdamW, torch.optim.AdamW])
def test_states_from_a_file_go_on_with_the_same_steps(tmp_path, kind):
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
