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

from sparsify.errors import NumericalError
from sparsify.model.blocks import BlockCall, join_calls, run_block
from sparsify.model.linear import LinearWeights
from sparsify.passes.recover.trainable import TrainableLinear, make_trainable


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
    learning_rate: float = 5e-3
    scale_rate: float = 2e-3
    norm_rate: float = 1e-3
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


def token_weights(wanted: Tensor) -> Tensor:
    """1 / max(|y_t|^2, median over tokens). wanted: [B, T, d]. Returns [B, T]: errors become relative, outliers do not decide."""
    size = wanted.float().square().sum(-1)
    return 1 / size.clamp(min=float(size.median()))


def block_loss(output: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """mean_t weights_t |output_t - wanted_t|^2. output, wanted: [B, T, d]; weights: [B, T]."""
    return ((output.float() - wanted.float()).square().sum(-1) * weights).mean()


def tune_block(
    block: nn.Module,
    linears: Mapping[str, LinearWeights],
    samples: Sequence[Sample],
    settings: BlockTuning,
    advance: Callable[[int, int], None] = lambda step, steps: None,
) -> Tuned:
    """Train a block toward the dense outputs. The block itself is left as it is.

    block:   with the compressed weights in place
    linears: its compressed linears by their names inside the block
    Raises NumericalError when the loss is NaN or infinite before a single step.
    """
    student = copy.deepcopy(block).float()
    trained = make_trainable(student, linears)
    held = max(1, round(len(samples) * settings.holdout)) if len(samples) > 1 else 0
    step_of = max(1, len(samples) // held) if held else 0
    held_out = [sample for i, sample in enumerate(samples) if held and i % step_of == step_of - 1][:held]
    training = [sample for sample in samples if all(sample is not other for other in held_out)] or list(samples)
    held_out = held_out or training

    def forward(batch: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        entering = torch.cat([sample.entering for sample in batch]).float()
        wanted = torch.cat([sample.wanted for sample in batch])
        with torch.autocast(entering.device.type, dtype=torch.bfloat16):
            output = run_block(student, entering, join_calls([sample.call for sample in batch]))
        return output, wanted

    def held_out_loss() -> float:
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(held_out), settings.batch):
                batch = held_out[start : start + settings.batch]
                output, wanted = forward(batch)
                total += float(block_loss(output, wanted, token_weights(wanted))) * len(batch)
        return total / len(held_out)

    before = best = held_out_loss()
    if not math.isfinite(before):
        raise NumericalError("the loss of the block is NaN or infinite before any training; check the dense model")
    best_state: dict[str, Tensor] | None = None
    steps_per_epoch = math.ceil(len(training) / settings.batch)
    steps = settings.epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(_parameter_groups(student, trained, settings), weight_decay=0.0, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    order = torch.Generator().manual_seed(settings.seed)
    start_time, step = time.monotonic(), 0
    spent = False
    while not spent and step < steps:
        shuffled = [training[i] for i in torch.randperm(len(training), generator=order).tolist()]
        for first in range(0, len(shuffled), settings.batch):
            progress = step / steps
            if settings.seconds is not None:
                progress = max(progress, (time.monotonic() - start_time) / settings.seconds)
            if spent := progress >= 1:
                break
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * _schedule(progress)
            with torch.enable_grad():
                output, wanted = forward(shuffled[first : first + settings.batch])
                loss = block_loss(output, wanted, token_weights(wanted))
                loss.backward()
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
    others = {
        name: parameter.detach().to(block.get_parameter(name).dtype)
        for name, parameter in student.named_parameters()
        if not any(name.startswith(linear + ".") for linear in trained)
    }
    return Tuned({name: linear.export().validate(name) for name, linear in trained.items()}, others, before, best, step)


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
        parameter.requires_grad_(True)
        rate = settings.norm_rate
        values = parameter.detach()
        if id(parameter) in weights:
            rate = settings.learning_rate
            mask: Tensor | None = weights[id(parameter)].mask  # type: ignore[assignment]
            values = values if mask is None else values[mask]
        elif id(parameter) in scales:
            rate = settings.scale_rate
        size = float(values.square().mean().sqrt())
        groups.append({"params": [parameter], "lr": rate * (size or 1.0)})
    return groups
