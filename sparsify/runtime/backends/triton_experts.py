"""The linears of a mixture's experts on a GPU: one launch for all experts, each on its tokens, in tiles of the Triton `gemm`.

Tokens are sorted by expert on the device. How many each expert has is not known to the processor: the grid is the most blocks
of rows that there can be, and those beyond the last one end at once. So nothing synchronises, and CUDA graphs may hold it.
The kernels agree with float64 in Triton's interpreter and on an H200, and compile for every target.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.formats import ModuleScheme
from sparsify.runtime.backends.triton_config import experts_config
from sparsify.runtime.backends.triton_launch import on_device, run_experts


@dataclass(frozen=True)
class Routes:
    """Which rows belong to which expert. An entry is one choice of one token, number token * chosen + place.

    order:          int64 [entries], the entries sorted by expert; those without an expert come last
    starts:         int32 [experts + 1], where each expert's begin in `order`
    block_expert:   int32 [blocks], of each block of `block_m` rows; the number of experts for one that there is not
    block_start:    int32 [blocks], where it begins in `order`
    """

    order: Tensor
    starts: Tensor
    block_expert: Tensor
    block_start: Tensor
    chosen: int
    experts: int

    @classmethod
    def of(cls, ids: Tensor, experts: int, block_m: int) -> "Routes":
        """ids: [tokens, chosen], a number of `experts` stands for none."""
        entries = ids.numel()
        sorted_, order = ids.reshape(-1).sort(stable=True)
        numbers = torch.arange(experts + 1, device=ids.device, dtype=sorted_.dtype)
        starts = torch.searchsorted(sorted_, numbers)
        blocks = (starts.diff() + block_m - 1) // block_m
        ends = blocks.cumsum(0)
        at = torch.arange(min(entries, entries // block_m + experts), device=ids.device)
        expert = torch.searchsorted(ends, at, right=True)
        known = expert.clamp(max=experts - 1)
        start = starts[known] + (at - (ends - blocks)[known]) * block_m
        return cls(order, starts.int(), expert.int(), start.int(), ids.shape[1], experts)


def routed_experts(
    x: Tensor, ids: Tensor, gates: Tensor, gate_up: Sequence[Tensor], down: Sequence[Tensor],
    biases: tuple[Tensor | None, Tensor | None], schemes: tuple[ModuleScheme, ModuleScheme], activate: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """The weighted sum of what the chosen experts of each token make of it, added in float32 in the order of the choices.

    x: [tokens, K], bfloat16 or float16; ids: [tokens, chosen], the number of experts for none; gates: of the same shape
    gate_up, down: what `Triton.prepare` made of [2I, K] and [K, I] of every expert, stacked; biases: of these, [E, 2I]
    and [E, K], or None; schemes: of one expert's
    activate: [entries, 2I] -> [entries, I]

    Returns [tokens, K] in the type of x.
    """
    experts, entries = gate_up[0].shape[0], ids.numel()
    if not entries:
        return torch.zeros_like(x)
    config = experts_config(entries, experts)
    routes = Routes.of(ids, experts, config.block_m)
    with on_device(x.device):
        both = x.new_empty((entries, schemes[0].shape[0]))
        run_experts(config, x.contiguous(), gate_up, biases[0], schemes[0], routes, None, both)
        y = x.new_zeros((entries, schemes[1].shape[0]), dtype=torch.float32)
        run_experts(config, activate(both), down, biases[1], schemes[1], routes, gates.float().contiguous(), y)
    return y.view(*ids.shape, -1).sum(1).to(x.dtype)
