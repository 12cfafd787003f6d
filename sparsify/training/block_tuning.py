"""Block tuning: a compressed block learns to give what the dense block gave, its zeros fixed, quantization in the loop.

Reconstruction block by block is that of BRECQ (arXiv 2102.05426, section 3.2) and EfficientQAT (arXiv 2407.11062, section
3.2), here toward the dense model's own outputs, so that a block also repairs what the blocks before it lost. A few tokens
carry activations a thousand times larger than all others; the loss counts every token relative to its own size, or those
few would decide alone.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import compute
from sparsify.distributed import gathered, processes, rank, sum_over_all
from sparsify.errors import NumericalError
from sparsify.model.capture import BlockCall, join_calls, run_block
from sparsify.model.linear import LinearWeights
from sparsify.training.qat_linear import TrainableLinear, make_trainable


@dataclass(frozen=True)
class BlockTuning:
    """How a block is tuned.

    epochs:        passes over the calibration tokens
    learning_rate: of the weights, relative to the root mean square of those a linear keeps
    scale_rate, norm_rate: of scales and of all other parameters, relative to their root mean square
    batch:         sequences per step
    holdout:       share of the sequences that is never trained on and decides which state is kept
    seconds:       stop the training of a block after this long; None for no limit
    seed:          of the order of the sequences
    """

    epochs: int = 4
    learning_rate: float = 1.5e-2
    scale_rate: float = 5e-3
    norm_rate: float = 5e-3
    batch: int = 4
    holdout: float = 0.0625
    seconds: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """One sequence at a block: hidden states that enter it [1, T, d], what the dense block gave [1, T, d], its other arguments."""

    entering: Tensor
    wanted: Tensor
    call: BlockCall


@dataclass(frozen=True)
class Tuned:
    """linears, others: what the block's linears and its other parameters become, by their names inside the block.

    before, after: the loss on the held-out sequences; after <= before, and equal when training did not help.
    """

    linears: dict[str, LinearWeights]
    others: dict[str, Tensor]
    before: float
    after: float
    steps: int


def block_loss(output: Tensor, wanted: Tensor) -> Tensor:
    """sum_b mean_t |output_bt - wanted_bt|^2 / max(|wanted_bt|^2, median_t |wanted_bt|^2). output, wanted: [B, T, d].

    Errors are relative to the size of a token, so those few that carry massive activations do not decide alone.
    """
    size = wanted.float().square().sum(-1)
    size = size.clamp(min=size.median(-1, keepdim=True).values)
    return ((output.float() - wanted.float()).square().sum(-1) / size).mean(-1).sum()


BlockLoss = Callable[[Tensor, Tensor], Tensor]


def tune_block(
    block: nn.Module,
    linears: Mapping[str, LinearWeights],
    samples: Sequence[Sample],
    settings: BlockTuning,
    advance: Callable[[int, int], None] = lambda step, steps: None,
    loss: BlockLoss = block_loss,
) -> Tuned:
    """Train a block toward the dense outputs. The block itself is left as it is, and so are its matrices that are all zero:
    those of a sublayer that was removed.

    block:   with the compressed weights in place
    linears: its compressed linears by their names inside the block
    samples: of several processes each has every nth; all come to the same result
    loss:    of outputs [B, T, d] and what the samples want, summed over B
    Products are computed in the type of the run that is going on, or of this machine.
    Raises NumericalError when the loss is NaN or infinite before a single step.
    """
    student = copy.deepcopy(block).float()
    trained = make_trainable(student, {name: linear for name, linear in linears.items() if not linear.is_zero()})
    mine = {position * processes() + rank(): sample for position, sample in enumerate(samples)}
    dtype = compute.choose().dtype
    training, held_out = _split(sum(gathered(len(samples))), settings.holdout)

    def loss_of(numbers: Sequence[int]) -> Tensor | None:
        """The summed loss of those of the sequences that this process has; None when it has none of them."""
        batch = [mine[number] for number in numbers if number in mine]
        if not batch:
            return None
        entering = torch.cat([sample.entering for sample in batch]).float()
        with torch.autocast(entering.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = run_block(student, entering, join_calls([sample.call for sample in batch]))
        return loss(output, torch.cat([sample.wanted for sample in batch]))

    def held_out_loss() -> float:
        with torch.no_grad():
            parts = [loss_of(numbers) for numbers in _batches(held_out, settings.batch)]
        return sum(gathered(sum(float(part) for part in parts if part is not None))) / len(held_out)

    before = best = held_out_loss()
    if not math.isfinite(before):
        raise NumericalError("the loss of the block is NaN or infinite before any training; check the dense model")
    best_state: dict[str, Tensor] | None = None
    steps = settings.epochs * len(_batches(training, settings.batch))
    groups = _parameter_groups(student, trained, settings)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    order = torch.Generator().manual_seed(settings.seed)
    started, step, spent = time.monotonic(), 0, False
    while not spent and step < steps:
        shuffled = [training[i] for i in torch.randperm(len(training), generator=order).tolist()]
        for numbers in _batches(shuffled, settings.batch):
            progress = step / steps
            if settings.seconds is not None:
                progress = max(progress, *gathered((time.monotonic() - started) / settings.seconds))
            if spent := progress >= 1:
                break
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * _schedule(progress)
            with torch.enable_grad():
                summed = loss_of(numbers)
                if summed is not None:
                    (summed / len(numbers)).backward()
            _sum_gradients(parameters)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            advance(step, steps)
        now = held_out_loss()
        if now < best:
            best, best_state = now, copy.deepcopy(student.state_dict())
        if not math.isfinite(now):
            break
    if best_state is None:
        return Tuned(dict(linears), {}, before, before, step)
    student.load_state_dict(best_state)
    others = _others(student, block, linears)
    tuned = {name: linear.export().validate(name) for name, linear in trained.items()}
    return Tuned({**linears, **tuned}, others, before, best, step)


def _others(student: nn.Module, block: nn.Module, linears: Mapping[str, LinearWeights]) -> dict[str, Tensor]:
    """The trained parameters outside of the compressed linears, in the types of the block."""
    return {
        name: parameter.detach().to(block.get_parameter(name).dtype)
        for name, parameter in student.named_parameters()
        if not any(name.startswith(linear + ".") for linear in linears)
    }


def _split(count: int, holdout: float) -> tuple[list[int], list[int]]:
    """Numbers of the sequences to train on and of those held out, spread evenly; with a single one it is both."""
    held = min(count - 1, max(1, round(count * holdout))) if holdout else 0
    if not held:
        return list(range(count)), list(range(count))
    held_out = [count * (i + 1) // held - 1 for i in range(held)]
    return sorted(set(range(count)) - set(held_out)), held_out


def _batches(numbers: Sequence[int], size: int) -> list[Sequence[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def _sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Each process has seen its own sequences; all take the same step."""
    if processes() == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    summed = sum_over_all(torch.cat([gradient.flatten() for gradient in gradients]))
    for parameter, part in zip(parameters, summed.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def _schedule(progress: float) -> float:
    """A short linear warm-up, then a cosine to zero. progress in [0, 1)."""
    return min(1.0, (progress + 0.02) / 0.05) * 0.5 * (1 + math.cos(math.pi * progress))


def _parameter_groups(
    student: nn.Module, trained: Mapping[str, TrainableLinear], settings: BlockTuning
) -> list[dict[str, Any]]:
    """One group per tensor: Adam's steps have the size of the learning rate, so it is set from the size of the tensor."""
    groups = []
    weights = {id(linear.weight): linear for linear in trained.values()}
    scales = {id(linear.scale) for linear in trained.values() if linear.scale is not None}
    for parameter in student.parameters():
        if parameter.dim() >= 2 and not parameter.any():
            parameter.requires_grad_(False)
            continue
        parameter.requires_grad_(True)
        rate = settings.norm_rate
        values = parameter.detach()
        if id(parameter) in weights:
            rate = settings.learning_rate
            mask = weights[id(parameter)].mask
            values = values if mask is None else values[mask]
        elif id(parameter) in scales:
            rate = settings.scale_rate
        size = float(values.square().mean().sqrt())
        groups.append({"params": [parameter], "lr": rate * (size or 1.0)})
    return groups
