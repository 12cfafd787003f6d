"""vLLM's dense 4-bit Marlin kernel for GPUs, as a baseline."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsify.bench.baselines import CHECKED_OUTPUTS, Baseline, error_of
from sparsify.bench.missing import PeerMissing
from sparsify.failure import first_line

MARLIN = "vLLM Marlin"
TOLERANCE = 2e-2  # of its product, relative to the largest output


def marlin_linear(n: int, k: int, group_size: int, copies: int, device: torch.device) -> Baseline:
    """A linear [N, K] in bfloat16 with random 4-bit weights, packed and called by vLLM's own functions.

    Raises PeerMissing where it cannot be had: no vLLM, another interface, or a wrong product.
    """
    try:
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.quantization.utils.marlin_utils import (
            apply_gptq_marlin_linear,
            marlin_make_empty,
            marlin_make_workspace_new,
            marlin_permute_scales,
        )
        from vllm.scalar_type import scalar_types
    except Exception as error:
        raise PeerMissing("not installed", f"{MARLIN}: not here ({first_line(error)[:80]})") from None
    try:
        # GPTQ's order, [K/8, N]: any word is valid
        words = torch.randint(-(2**31), 2**31, (k // 8, n), dtype=torch.int32, device=device)
        scales = torch.empty(k // group_size, n, dtype=torch.bfloat16, device=device).uniform_(2.0**-8, 2.0**-7)
        packed = ops.gptq_marlin_repack(words, size_k=k, size_n=n, num_bits=4)
        placed = marlin_permute_scales(scales, size_k=k, size_n=n, group_size=group_size)
        weights = [(packed.clone(), placed.clone()) for _ in range(copies)]
        empty, workspace = marlin_make_empty(device), marlin_make_workspace_new(device)

        def call(w: Tensor, s: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda x: apply_gptq_marlin_linear(
                input=x, weight=w, weight_scale=s, weight_zp=empty, workspace=workspace, wtype=scalar_types.uint4b8,
                output_size_per_partition=n, input_size_per_partition=k,
            )  # fmt: skip

        made = Baseline(
            name=MARLIN,
            calls=[call(w, s) for w, s in weights],
            nbytes=words.numel() * 4 + scales.numel() * 2,
            dtype=torch.bfloat16,
            expected=first_outputs(words, scales, group_size),
            tolerance=TOLERANCE,
        )
        difference = error_of(made, torch.randn(3, k, dtype=torch.bfloat16, device=device))
    except Exception as error:
        reason = f"{MARLIN}: this vLLM differs from the one this was written for ({first_line(error)})"
        raise PeerMissing("another interface", reason) from None
    if not difference <= TOLERANCE:
        reason = (
            f"{MARLIN}: its product is wrong (relative error {difference:.2g}), so this vLLM is called wrongly here"
        )
        raise PeerMissing("wrong product", reason)
    return made


def first_outputs(words: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """The dense weights of the first few outputs, in float64: [<= CHECKED_OUTPUTS, K].

    words: int32 [K/8, N], eight inputs each, the first in the low bits, offset by 8. scales: [K/G, N].
    """
    rows = min(CHECKED_OUTPUTS, words.shape[1])
    shifts = torch.arange(0, 32, 4, device=words.device)
    codes = (words[:, :rows, None] >> shifts & 15).transpose(1, 2).reshape(-1, rows).double() - 8
    return (codes * scales[:, :rows].double().repeat_interleave(group_size, 0)).T
