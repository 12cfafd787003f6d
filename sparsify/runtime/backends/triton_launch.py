"""Launches the Triton kernels on one product: their arguments, their compile-time constants, the temporary tensors."""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify.formats import ModuleScheme
from sparsify.runtime.backends.triton_config import Config

if TYPE_CHECKING:
    from sparsify.runtime.backends.triton_experts import Routes

DTYPES = (torch.bfloat16, torch.float16)
PANEL, UNIT = 32, 32  # outputs and inputs that lie together (triton_kernels.py)
ONE_GROUP = 30  # a shift that makes every unit one of group 0
ADDED_TOGETHER = 512  # outputs per program that adds the sums of a split


def run(
    config: Config, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, scheme: ModuleScheme, y: Tensor
) -> None:
    """Write x @ W.T + bias into y by the kernel and tile that `config` names, on the current GPU.

    x: [M, K], contiguous, 16-byte aligned; prepared: as `Triton.prepare` returned it; bias: [N] or None; y: [..., N].
    """
    kernels = _kernels()
    words, scales = prepared
    rows, (n, k) = x.shape[0], scheme.shape
    padded, units, groups = words.shape[0] * PANEL, words.shape[1], scales.shape[1] if scales.dim() == 3 else 1
    fixed, options = constants(config, scheme, x.dtype, scales.dtype, bias is not None)
    what = {**fixed, **options}
    if config.kind == "gemv":
        kernels.gemv[(-(-n // config.block_n), rows)](
            x.view(torch.int64), words, scales, bias, y, n, padded, units, groups, k // 4, kernels.MAGIC, **what
        )
    elif config.kind == "gemm":
        partial = x.new_empty((config.splits, rows, n), dtype=torch.float32) if config.splits > 1 else None
        steps = -(-k // fixed["BLOCK_K"])
        per_split = -(-steps // config.splits) * fixed["BLOCK_K"]
        kernels.gemm[(-(-rows // config.block_m), -(-n // config.block_n), config.splits)](
            x, words, scales, bias, y, partial, rows, n, padded, k, units, groups, per_split, kernels.MAGIC, **what
        )
        if partial is not None:
            kernels.add_partials[(-(-n // ADDED_TOGETHER), rows)](
                partial,
                bias,
                y,
                rows,
                n,
                config.splits,
                X=fixed["X"],
                HAS_BIAS=bias is not None,
                BLOCK_N=ADDED_TOGETHER,
            )
    else:
        weight = x.new_empty((n, k))
        kernels.decode[(-(-k // config.block_k), -(-n // config.block_n))](
            words, scales, weight, n, padded, k, units, groups, kernels.MAGIC, **what
        )
        with torch.no_grad():
            out = y.view(rows, n)
            if bias is None:
                torch.mm(x, weight.T, out=out)
            else:
                torch.addmm(bias.to(x.dtype), x, weight.T, out=out)


def run_experts(
    config: Config,
    x: Tensor,
    stacked: Sequence[Tensor],
    bias: Tensor | None,
    scheme: ModuleScheme,
    routes: "Routes",
    gates: Tensor | None,
    y: Tensor,
) -> None:
    """Write the products of one linear of every expert with its rows into y, on the current GPU, in one launch.

    stacked:  as `Triton.prepare` returned it for each expert, [experts, ...]
    bias:     [experts, N] or None
    gates:    None for the first linear: x is [tokens, K], and row i of y belongs to entry order[i]. Else float32 [entries]:
              row i of x belongs to entry order[i], and row order[i] of y, float32, is multiplied by its gate.
    """
    kernels = _kernels()
    words, scales = stacked
    (n, k), first = scheme.shape, gates is None
    fixed, options = constants(config, scheme, x.dtype, scales.dtype, bias is not None)
    groups = scales.shape[2] if scales.dim() == 4 else 1
    kernels.experts[(len(routes.block_expert), -(-n // config.block_n))](
        x, words, scales, bias, routes.order, routes.starts, routes.block_expert, routes.block_start, gates, y,
        words.stride(0), scales.stride(0), n, words.shape[1] * PANEL, k, words.shape[2], groups, kernels.MAGIC,
        FIRST=first, CHOSEN=routes.chosen, EXPERTS=routes.experts, **fixed, **options,
    )  # fmt: skip


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current GPU, which need not be the one that holds the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def constants(
    config: Config, scheme: ModuleScheme, dtype: torch.dtype, value_dtype: torch.dtype, has_bias: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compile-time arguments of the kernel that `config` names, and the options of the compiler."""
    n, k = scheme.shape
    fixed: dict[str, Any] = {
        "GROUP_SHIFT": group_shift(scheme),
        "BITS": scheme.bits,
        "SPARSE": scheme.pattern == "2:4",
        "X": _triton_type(dtype),
        "VALUE": _triton_type(value_dtype),
        "BLOCK_N": config.block_n,
    }
    if config.kind == "gemv":
        fixed |= {"HAS_BIAS": has_bias, "BLOCK_U": config.block_k // UNIT, "STAGES": config.stages}
    elif config.kind in ("gemm", "experts"):
        block_k = config.tile_k(scheme)
        one_group = group_shift(scheme) == ONE_GROUP
        fixed |= {"ONE_GROUP": one_group, "EVEN_K": k % block_k == 0, "BLOCK_M": config.block_m, "BLOCK_K": block_k}
        fixed |= {"HAS_BIAS": has_bias, **({"SPLIT": config.splits > 1} if config.kind == "gemm" else {})}
    else:
        fixed |= {"BLOCK_K": config.block_k}
    # fused: a code becomes a float in one multiply-add (exact with and without)
    return fixed, {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}


def group_shift(scheme: ModuleScheme) -> int:
    """Units of 32 inputs to groups of scales, as a shift."""
    if scheme.bits == 16 or scheme.group_size == scheme.shape[1]:
        return ONE_GROUP
    return (scheme.group_size // UNIT).bit_length() - 1


def _kernels() -> Any:
    from sparsify.runtime.backends import triton_kernels

    return triton_kernels


def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
