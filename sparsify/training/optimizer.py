"""The states of the optimizer: kept whole and by the name of the parameter in a checkpoint, whoever wrote it and whoever reads it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from sparsify.distributed import is_main
from sparsify.errors import CheckpointError
from sparsify.formats.tensor_file import LazyTensor, read_tensor, write_tensors, written_order
from sparsify.model.checkpoint import read_header
from sparsify.training.sharding import local, share_of, whole, zeros_on_host

STEP = "step"  # of a parameter's states the one that is no tensor of its shape: how many steps it has taken


class HostAdamW(torch.optim.AdamW):
    """AdamW whose states lie in the memory of the host, where its steps are computed too: a GPU holds weights and gradients alone,
    8 of 16 bytes for each parameter. Each step takes gradients and weights over the bus once and the weights back, one tensor
    after the other. On a CPU it is AdamW, to the bit."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step with the gradients that are there."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= {STEP: torch.zeros(()), **{name: zeros_on_host(parameter) for name in ("exp_avg", "exp_avg_sq")}}
        held, gradient = (local(tensor.detach()).cpu() for tensor in (parameter, parameter.grad))  # type: ignore[union-attr]
        adamw(
            [held], [gradient], [local(state["exp_avg"])], [local(state["exp_avg_sq"])], [], [state[STEP]],
            fused=True, amsgrad=False, maximize=False, beta1=group["betas"][0], beta2=group["betas"][1],
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip
        local(parameter.detach()).copy_(held)


def save_gathered(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors that may be shared out over processes into one safetensors file. All processes take part, and never is
    more than one tensor gathered."""
    gathered = {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, partial(whole, tensor.detach()))
        for name, tensor in tensors.items()
    }
    if is_main():
        write_tensors(file, gathered, {})
        return
    for name in written_order(gathered):
        gathered[name].load()


def states_by_name(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The states of parameters, as `NAME.exp_avg`. parameters: by name"""
    return {
        f"{name}.{state}": tensor
        for name, parameter in parameters.items()
        for state, tensor in optimizer.state.get(parameter, {}).items()
        if state != STEP
    }


def load_states(optimizer: Any, parameters: Mapping[str, Tensor], file: Path, step: int) -> None:
    """Give an optimizer that has made no step yet the states that a checkpoint holds after `step`; of each the share of this
    process."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    stored, _ = read_header(file)
    on_host = isinstance(optimizer, HostAdamW)
    likes = {name: zeros_on_host(parameter) if on_host else parameter for name, parameter in parameters.items()}
    found: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for entry, info in stored.items():
        name, _, state = entry.rpartition(".")
        if name not in found or info.shape != tuple(parameters[name].shape):
            raise CheckpointError(f"{file} belongs to another training; remove {file.parent.parent} to train again")
        found[name][state] = share_of(read_tensor(file, entry), likes[name])
    for name, states in found.items():
        if states:
            optimizer.state[parameters[name]] = {STEP: torch.tensor(float(step), device=likes[name].device), **states}
