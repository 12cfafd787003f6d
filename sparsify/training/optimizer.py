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
from sparsify.training.eight_bits import BLOCK, EightBits
from sparsify.training.sharding import as_share, local, share_of, whole

MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE = 1 << 22  # numbers of a tensor that are stepped at a time, whole blocks of moments in 8 bits
SMALL = 4096  # tensors of fewer numbers keep their moments in float32
assert PIECE % BLOCK == 0
STEP = "step"  # of a parameter's states the one that is no tensor of its shape: how many steps it has taken


class TensorwiseAdamW(torch.optim.AdamW):
    """AdamW that steps one tensor after another, a piece at a time, so that its two moments may be elsewhere or in fewer bits than
    the weights. With neither it is AdamW, to the bit.

    on_host: the moments lie in the memory of the host, where steps are computed too: a GPU holds weights and gradients alone, 8 of 16
        bytes for each parameter. Each step takes gradients and weights over the bus once and the weights back.
    eight_bits: they are kept in 8 bits (`eight_bits`), 6 bytes less for each parameter, but for those of tensors of fewer than SMALL
        numbers. Of several processes each rounds its own share.
    """

    def __init__(self, params: Any, *, on_host: bool = False, eight_bits: bool = False, **settings: Any):
        super().__init__(params, **settings)
        self.on_host, self.eight_bits = on_host, eight_bits

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
            state |= {STEP: torch.zeros(()), **{name: self._zeros(parameter, name) for name in MOMENTS}}
        assert parameter.grad is not None
        own = local(parameter.detach())
        device = torch.device("cpu") if self.on_host else own.device
        weights, gradients = (tensor.to(device).contiguous().view(-1) for tensor in (own, local(parameter.grad)))
        for start in range(0, weights.numel(), PIECE):
            piece = slice(start, min(start + PIECE, weights.numel()))
            moments = [_read(state[name], piece) for name in MOMENTS]
            adamw(
                [weights[piece]], [gradients[piece]], [moments[0]], [moments[1]], [], [state[STEP].to(device, copy=True)],
                fused=True, amsgrad=False, maximize=False, beta1=group["betas"][0], beta2=group["betas"][1],
                lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            )  # fmt: skip
            for name, moment in zip(MOMENTS, moments, strict=True):
                if isinstance(state[name], EightBits):
                    state[name].write(start, moment)
        state[STEP] += 1
        if weights.data_ptr() != own.data_ptr():
            own.copy_(weights.view_as(own))

    def _zeros(self, parameter: Tensor, moment: str) -> Tensor | EightBits:
        device = torch.device("cpu") if self.on_host else local(parameter.detach()).device
        if self.eight_bits and parameter.numel() >= SMALL:
            return EightBits(local(parameter.detach()).numel(), moment == MOMENTS[0], device)
        return as_share(torch.zeros_like(local(parameter.detach()), device=device), parameter)

    def restore(self, parameter: Tensor, step: int, moments: Mapping[str, Tensor]) -> None:
        """Give a parameter the moments that it had after `step`. moments: by name, whole, float32"""
        state: dict[str, Any] = {STEP: torch.tensor(float(step))}
        for name, moment in moments.items():
            state[name] = self._zeros(parameter, name)
            share = local(share_of(moment, parameter)).reshape(-1)
            for start in range(0, share.numel(), PIECE):
                piece = slice(start, min(start + PIECE, share.numel()))
                if isinstance(state[name], EightBits):
                    state[name].write(start, share[piece].to(state[name].codes.device))
                else:
                    _read(state[name], piece).copy_(share[piece])
        self.state[parameter] = state


def _read(state: Any, piece: slice) -> Tensor:
    """A piece of a moment: of float32 the numbers themselves, of 8 bits what they stand for."""
    return state.read(piece.start, piece.stop) if isinstance(state, EightBits) else local(state).view(-1)[piece]


def _whole(state: Any, parameter: Tensor) -> Tensor:
    """A moment of a parameter as float32, gathered from all processes."""
    if not isinstance(state, EightBits):
        return whole(state)
    own = local(parameter.detach())
    return whole(as_share(state.read(0, own.numel()).view_as(own), parameter))


def save_gathered(tensors: Mapping[str, Tensor | LazyTensor], file: Path) -> None:
    """Write tensors that may be shared out over processes into one safetensors file. All processes take part, and never is
    more than one tensor gathered."""
    gathered = {
        name: tensor
        if isinstance(tensor, LazyTensor)
        else LazyTensor(tuple(tensor.shape), tensor.dtype, partial(whole, tensor.detach()))
        for name, tensor in tensors.items()
    }
    if is_main():
        write_tensors(file, gathered, {})
        return
    for name in written_order(gathered):
        gathered[name].load()


def states_by_name(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """The moments of parameters, as `NAME.exp_avg`, in float32 in however many bits they are kept. parameters: by name"""
    return {
        f"{name}.{state}": LazyTensor(tuple(parameter.shape), torch.float32, partial(_whole, tensor, parameter))
        for name, parameter in parameters.items()
        for state, tensor in optimizer.state.get(parameter, {}).items()
        if state != STEP
    }


def load_states(optimizer: Any, parameters: Mapping[str, Tensor], file: Path, step: int) -> None:
    """Give an optimizer that has made no step yet the states that a checkpoint holds after `step`; of each the share of this
    process."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    stored, _ = read_header(file)
    found: dict[str, dict[str, str]] = {name: {} for name in parameters}
    for entry, info in stored.items():
        name, _, state = entry.rpartition(".")
        if name not in found or info.shape != tuple(parameters[name].shape):
            raise CheckpointError(f"{file} belongs to another training; remove {file.parent.parent} to train again")
        found[name][state] = entry
    for name, entries in found.items():
        if not entries:
            continue
        parameter = parameters[name]
        whole_ones = {state: read_tensor(file, entry) for state, entry in entries.items()}
        if isinstance(optimizer, TensorwiseAdamW):
            optimizer.restore(parameter, step, whole_ones)
            continue
        shares = {state: share_of(tensor, parameter) for state, tensor in whole_ones.items()}
        optimizer.state[parameter] = {STEP: torch.tensor(float(step), device=parameter.device), **shares}
