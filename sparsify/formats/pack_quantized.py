"""`pack-quantized`: the weight-only integer format of compressed-tensors (W4A16, W8A16), symmetric.

Runs in stock transformers and stock vLLM without any plugin (vLLM 0.32 on a CPU: 4 bits only, K and N multiples of 32).
Sparsity is not used: zeros are stored as codes 0. An output head is held too (vLLM finds it by its name); an 8-bit one
needs a GPU there, `sparsify export --head 16` multiplies it out.

    weight_packed   int32 [N, K * bits / 32]     all codes in input order, offset binary, first code lowest
    weight_scale    bfloat16 or float16 [N, K/G] G = K: one scale per output channel
    weight_shape    int64 [2]                    N, K
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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
from sparsify.model.linear import LinearWeights, is_two_four

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
        return with_bias(encoded, linear)

    def decode(self, module: str, tensors: Mapping[str, Tensor], scheme: ModuleScheme) -> LinearWeights:
        """The format does not say whether zeros are a pattern, so the pattern is read off the codes."""
        if problem := scheme_problem(scheme):
            raise CheckpointError(f"{module}: {problem}; sparsify reads no such pack-quantized linear")
        for suffix in sorted({"weight_zero_point", "weight_g_idx"} & set(tensors)):
            expected = "expected symmetric codes in input order, found this tensor"
            raise CheckpointError(f"{module}.{suffix}: {expected}; quantize the dense model again without it")
        n, k = scheme.shape
        shape = take_tensor(module, tensors, "weight_shape", (2,), (torch.int64, torch.int32))
        if shape.tolist() != [n, k]:
            raise CheckpointError(f"{module}.weight_shape: expected {[n, k]}, found {shape.tolist()}; {AGAIN}")
        packed = take_tensor(module, tensors, "weight_packed", (n, k * scheme.bits // 32), (torch.int32,))
        scale = take_tensor(module, tensors, "weight_scale", (n, k // scheme.group_size), FLOATS)
        codes = unpack_words(packed, scheme.bits)
        pattern = "2:4" if is_two_four(codes) else "dense"
        if scheme.pattern == "2:4" and pattern != "2:4":
            expected = "expected 2:4 codes, found more than two non-zero in a group of 4"
            raise CheckpointError(f"{module}.weight_packed: {expected}; {AGAIN}")
        bias = take_bias(module, tensors, n)
        return LinearWeights(scheme.bits, pattern, scheme.group_size, codes=codes, scale=scale, bias=bias)

    def quantization_config(self, modules: Mapping[str, ModuleScheme], ignore: list[str]) -> dict[str, Any] | None:
        plain = {n: ModuleScheme(s.bits, s.group_size, "dense", s.shape) for n, s in sorted(modules.items())}
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
