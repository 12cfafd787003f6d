"""FP8 weights as transformers and vLLM store them: scales per block (DeepSeek), per output (FBGEMM) or one for all.

    weight             float8_e4m3fn or float8_e5m2 [N, K]
    weight_scale_inv   float32, bfloat16, float8_e8m0fnu or uint8 (an exponent, 2 ** (stored - 127)) [ceil(N / a), ceil(K / b)] for
                       blocks a x b of `weight_block_size`; or the same without blocks, as weight_scale
    weight_scale       [N, 1] or [N] per output, [1] or [] for all

w = weight * scale: despite its name, weight_scale_inv is what an FP8 number is multiplied by (DeepSeek-V3, inference/kernel.py).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.formats.config_groups import names_in
from sparsify.formats.foreign.scheme import (
    FLOAT8,
    HALVES,
    Described,
    Found,
    Infos,
    Quantized,
    Stored,
    checked_scale,
    checked_weight,
    info_of,
    is_kept,
    matrix_shape,
    spread,
)
from sparsify.formats.scheme import NOT_OWN
from sparsify.model.checkpoint import TensorInfo

METHODS = {"fp8": "FP8", "fbgemm_fp8": "FBGEMM FP8"}
SCALES = ("weight_scale_inv", "weight_scale")
ACTIVATIONS = (
    ".input_scale",
    ".activation_scale",
    ".input_scale_ub",
    ".output_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
)
SCALE_TYPES = (*HALVES, torch.float8_e8m0fnu, torch.uint8)
NAN_EXPONENT = 255  # of E8M0 (OCP Microscaling Formats 1.0, 5.4.1)


class Fp8:
    """quant_method fp8 and fbgemm_fp8."""

    marks = frozenset(SCALES)

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") in METHODS

    def find(self, config: Mapping[str, Any], infos: Infos) -> Found:
        block = block_size(config.get("weight_block_size"))
        modules = {}
        for name, info in sorted(infos.items()):
            if info.dtype in FLOAT8:
                module, _, last = name.rpartition(".")
                if last != "weight":
                    raise CheckpointError(
                        f"{name} holds FP8 numbers of something else than one linear; sparsify reads FP8 only in linears "
                        "stored one by one: dequantize it with transformers (FineGrainedFP8Config(dequantize=True))"
                    )
                modules[module] = fp8_linear(infos, module, block)
        for suffix in SCALES:
            for name in infos:
                if name.endswith(f".{suffix}") and name.removesuffix(f".{suffix}") not in modules:
                    raise CheckpointError(f"{name} belongs to no FP8 weight; {NOT_OWN}")
        how = f"blocks of {block[0]} x {block[1]}" if block else "one scale per output or for all"
        left_out = tuple(name for name in sorted(infos) if name.endswith(ACTIVATIONS))
        return Found(f"{METHODS[config['quant_method']]} weights, {how}", modules, left_out)

    def tensors(self, config: Mapping[str, Any], module: str, shape: tuple[int, int]) -> Described | None:
        if is_kept(module, names_in(config, "modules_to_not_convert")):
            return None
        (n, k), block = shape, block_size(config.get("weight_block_size"))
        weight = (torch.float8_e4m3fn, shape)
        if block is not None:
            return {"weight": weight, SCALES[0]: (torch.float32, (-(-n // block[0]), -(-k // block[1])))}
        per_output = config["quant_method"] == "fbgemm_fp8"
        return {"weight": weight, SCALES[1]: (torch.float32, (n, 1) if per_output else (1,))}


def block_size(given: object) -> tuple[int, int] | None:
    """weight_block_size of a config; CheckpointError when it is no pair of positive numbers."""
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != 2 or not all(isinstance(size, int) and size > 0 for size in given):
        raise CheckpointError(
            f"quantization_config: weight_block_size must be two positive numbers, found {given}; {NOT_OWN}"
        )
    return (given[0], given[1])


def fp8_linear(infos: Infos, module: str, block: tuple[int, int] | None) -> Quantized:
    """How one FP8 weight is stored, by the shape of its scales."""
    shape = matrix_shape(infos, module, "weight")
    suffix = next((suffix for suffix in SCALES if f"{module}.{suffix}" in infos), SCALES[0 if block else 1])
    scale = info_of(infos, module, suffix)
    stored = {"weight": Stored(shape, FLOAT8, (0, 1)), suffix: scale_of(f"{module}.{suffix}", scale, shape, block)}

    def decode(module: str, tensors: Mapping[str, Tensor]) -> Tensor:
        weight = checked_weight(module, "weight", tensors["weight"])
        return weight * spread_scale(read_scale(module, suffix, tensors[suffix]), weight, block)

    return Quantized(shape, 8, block[1] if block else shape[1], stored, decode, floating=True)


def scale_of(name: str, scale: TensorInfo, shape: tuple[int, int], block: tuple[int, int] | None) -> Stored:
    """What the scales of a weight must be: those of blocks where the config names a size, else per output or for all."""
    n, k = shape
    if block is not None:
        return Stored((-(-n // block[0]), -(-k // block[1])), SCALE_TYPES, (0, block[0]))
    if scale.shape in ((), (1,), (1, 1)):
        return Stored(scale.shape, SCALE_TYPES)
    if scale.shape in ((n,), (n, 1)):
        return Stored(scale.shape, SCALE_TYPES, (0, 1))
    raise CheckpointError(
        f"{name}: expected one scale or {n}, as the config names no weight_block_size, found {list(scale.shape)}; {NOT_OWN}"
    )


def read_scale(module: str, suffix: str, scale: Tensor) -> Tensor:
    """Scales in float32, checked; bytes are exponents."""
    if scale.dtype == torch.uint8:
        scale = exponents_to_scale(scale)
    return checked_scale(module, suffix, scale)


def exponents_to_scale(exponents: Tensor) -> Tensor:
    """E8M0 in float32: 2 ** (stored - 127), 255 is NaN."""
    scale = torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127)
    return scale.masked_fill(exponents == NAN_EXPONENT, torch.nan)


def spread_scale(scale: Tensor, weight: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Scales as they multiply a weight [N, K]."""
    if block is not None:
        return spread(scale, block, (weight.shape[0], weight.shape[1]))
    return scale.reshape(-1, 1)
