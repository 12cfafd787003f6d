"""`pack-quantized`: the weight-only integer format of compressed-tensors (W4A16, W8A16), with zero points or symmetric.

Runs in stock transformers and stock vLLM without any plugin (vLLM 0.32 on a CPU: 4 bits only, K and N multiples of 32).
Sparsity is not used: zeros are stored as codes 0. An output head is held too (vLLM finds it by its name); an 8-bit one
needs a GPU there, `sparsify export --head 16` multiplies it out.

    weight_packed   int32 [N, K * bits / 32]     all codes in input order, offset binary, first code lowest
    weight_scale    bfloat16 or float16 [N, K/G] G = K: one scale per output channel
    weight_shape    int64 [2]                    N, K
    weight_zero_point int32 [ceil(N * bits / 32), K/G]   asymmetric: packed likewise, along the outputs
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.errors import CheckpointError
from sparsify.formats.config_groups import describe, is_described, labels_of
from sparsify.formats.packing import pack_words, unpack_words
from sparsify.formats.scheme import (
    AGAIN,
    FLOATS,
    Format,
    ModuleScheme,
    scheme_problem,
    stored_problem,
    take_bias,
    take_tensor,
    with_bias,
)
from sparsify.model.linear import CODE_RANGE, LinearWeights, is_two_four

SUFFIXES = frozenset({"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"})


class PackQuantized(Format):
    """The format that everybody else reads."""

    name = "pack-quantized"
    suffixes = SUFFIXES
    holds = "linears that are quantized to 4 or 8 bits, group_size 32, 64, 128 or channel"
    records_pattern = False

    def problem(self, scheme: ModuleScheme, dtype: torch.dtype) -> str | None:
        if scheme.bits == 16:
            return "pack-quantized holds 4- or 8-bit codes, and this linear is not quantized"
        return stored_problem(scheme, dtype)

    def encode(self, linear: LinearWeights) -> dict[str, Tensor]:
        assert linear.codes is not None and linear.scale is not None
        encoded = {
            "weight_packed": pack_words(linear.codes, linear.bits),
            "weight_scale": linear.scale,
            "weight_shape": torch.tensor(linear.shape, dtype=torch.int64),
        }
        if linear.zero_point is not None:
            encoded["weight_zero_point"] = _pack_zero_point(linear.zero_point, linear.bits)
        return with_bias(encoded, linear)

    def decode(self, module: str, tensors: Mapping[str, Tensor], scheme: ModuleScheme) -> LinearWeights:
        """The format does not say whether zeros are a pattern, so the pattern is read off the codes."""
        if problem := scheme_problem(scheme):
            raise CheckpointError(f"{module}: {problem}; sparsify reads no such pack-quantized linear")
        for suffix in sorted(({"weight_zero_point"} if scheme.symmetric else set()) | {"weight_g_idx"}):
            if suffix in tensors:
                expected = f"expected {'symmetric ' * scheme.symmetric}codes in input order, found this tensor"
                raise CheckpointError(f"{module}.{suffix}: {expected}; quantize the dense model again without it")
        n, k = scheme.shape
        shape = take_tensor(module, tensors, "weight_shape", (2,), (torch.int64, torch.int32))
        if shape.tolist() != [n, k]:
            raise CheckpointError(f"{module}.weight_shape: expected {[n, k]}, found {shape.tolist()}; {AGAIN}")
        packed = take_tensor(module, tensors, "weight_packed", (n, k * scheme.bits // 32), (torch.int32,))
        scale = take_tensor(module, tensors, "weight_scale", (n, k // scheme.group_size), FLOATS)
        zero_point = None
        if not scheme.symmetric:
            rows = -(-n * scheme.bits // 32)
            words = take_tensor(module, tensors, "weight_zero_point", (rows, k // scheme.group_size), (torch.int32,))
            zero_point = unpack_words(words.t(), scheme.bits).t()[:n].contiguous()
        linear = LinearWeights(
            scheme.bits, "dense", scheme.group_size,
            codes=unpack_words(packed, scheme.bits), scale=scale, zero_point=zero_point,
        )  # fmt: skip
        pattern = "2:4" if is_two_four(linear.unscaled()) else "dense"
        if scheme.pattern == "2:4" and pattern != "2:4":
            expected = "expected 2:4 codes, found more than two non-zero in a group of 4"
            raise CheckpointError(f"{module}.weight_packed: {expected}; {AGAIN}")
        return replace(linear, pattern=pattern, bias=take_bias(module, tensors, n))

    def quantization_config(self, modules: Mapping[str, ModuleScheme], ignore: list[str]) -> dict[str, Any] | None:
        plain = {n: replace(s, pattern="dense") for n, s in sorted(modules.items())}
        return describe(self.name, plain, ignore)

    def recognises(self, quantization_config: Mapping[str, Any] | None) -> bool:
        return is_described(quantization_config, self.name)

    def schemes(
        self, quantization_config: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, ModuleScheme]:
        schemes = {}
        for module, (label, shape) in labels_of(quantization_config, shapes).items():
            schemes[module] = label.scheme((shape[0], shape[1] * (32 // label.bits)))
        return schemes


def _pack_zero_point(zero_point: Tensor, bits: int) -> Tensor:
    """int8 [N, K/G] to int32 [ceil(N * bits / 32), K/G]; what is over in the last words is zero bits."""
    low, _ = CODE_RANGE[bits]
    padded = functional.pad(zero_point.t(), (0, -zero_point.shape[0] % (32 // bits)), value=low)
    return pack_words(padded, bits).t().contiguous()
