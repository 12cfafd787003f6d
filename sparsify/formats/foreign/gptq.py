"""GPTQ as AutoGPTQ and GPTQModel store it (quant_method gptq), with 2, 3, 4 or 8 bits, symmetric or not. Groups of G inputs:

    qweight   int32 [K * bits / 32, N]       codes, the inputs of an output one after the other, lowest bits first
    qzeros    int32 [K / G, N * bits / 32]   zero points, the outputs of a group one after the other
    scales    float16 [K / G, N]             (or bfloat16, float32)
    g_idx     int32 [K]                      the group of each input; missing: k // G

w[n, k] = scales[g_idx[k], n] * (code - zero point). `checkpoint_format: gptq` (version 1) stores the zero point minus one,
`gptq_v2` stores it. A symmetric zero point is 2 ** (bits - 1).

What became of a zero point of 0 in version 1 depends on who wrote it. GPTQModel takes 1 off every field by one subtraction from
the word, and adds it back so: nothing is lost. AutoGPTQ writes -1 over all fields that follow in the word, and its kernels read
a full field as 0 or as 2 ** bits: such a word is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.formats.foreign.scheme import (
    HALVES,
    Described,
    Found,
    Infos,
    Quantized,
    Stored,
    checked_groups,
    checked_scale,
    matrix_shape,
    names_ending,
    stream_fields,
)
from sparsify.formats.gptq_packing import VERSIONS
from sparsify.formats.scheme import AGAIN, NOT_OWN
from sparsify.matching import matches, refuse_many

BITS = (2, 3, 4, 8)
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # a one in every field of a word


@dataclass(frozen=True)
class _Settings:
    """What the config says of one linear. version: of the zero points; by_word: GPTQModel wrote them."""

    bits: int
    group_size: int
    symmetric: bool | None
    activation_order: bool | None
    version: int
    by_word: bool


class Gptq:
    """quant_method gptq."""

    marks = frozenset({"qweight", "qzeros", "g_idx"})

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "gptq"

    def find(self, config: Mapping[str, Any], infos: Infos) -> Found:
        settings, dynamic = _settings(config, {}), _dynamic(config)
        modules = {}
        for module in names_ending(infos, "qweight"):
            override = _override(dynamic, module)
            if override is None:
                raise CheckpointError(
                    f"{module}.qweight is quantized, but dynamic in the config leaves it dense; {NOT_OWN}"
                )
            modules[module] = _linear(infos, module, _settings(config, override) if override else settings)
        if not modules:
            raise CheckpointError(f"the config says gptq, but no file holds a qweight; {NOT_OWN}")
        groups = f"groups of {settings.group_size}" if settings.group_size > 0 else "one scale per output"
        order = ", in activation order" if settings.activation_order else ""
        kind = "" if settings.symmetric is None else " symmetric" if settings.symmetric else " asymmetric"
        words = f"GPTQ {settings.bits}-bit{kind}, {groups}{order}, zero points of version {settings.version}"
        return Found(words, modules)

    def tensors(self, config: Mapping[str, Any], module: str, shape: tuple[int, int]) -> Described | None:
        override = _override(_dynamic(config), module)
        inside = config.get("modules_in_block_to_quantize")
        kinds = [name for names in inside for name in names] if isinstance(inside, list) else [module]
        if override is None or not any(module.endswith(str(kind)) for kind in kinds):
            return None
        (n, k), settings = shape, _settings(config, override)
        size = settings.group_size if settings.group_size > 0 else k
        return {
            "qweight": (torch.int32, (k * settings.bits // 32, n)),
            "qzeros": (torch.int32, (-(-k // size), -(-n * settings.bits // 32))),
            "scales": (torch.float16, (-(-k // size), n)),
            "g_idx": (torch.int32, (k,)),
        }


def _dynamic(config: Mapping[str, Any]) -> dict[str, Any]:
    """What GPTQModel says of single modules, by pattern."""
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise CheckpointError(f"quantization_config: dynamic must be an object; {NOT_OWN}")
    if problem := refuse_many(f"re:{pattern[2:]}" for pattern in dynamic):
        raise CheckpointError(f"quantization_config: dynamic: {problem}; {NOT_OWN}")
    return dynamic


def _settings(config: Mapping[str, Any], override: Mapping[str, Any]) -> _Settings:
    """CheckpointError for what is not read, by name."""
    merged = {**config, **override}
    format = merged.get("checkpoint_format") or merged.get("format") or "gptq"
    if merged.get("is_marlin_format"):
        format = "marlin"
    if not isinstance(format, str) or format not in VERSIONS:
        raise CheckpointError(
            f"quantization_config: GPTQ in the checkpoint format {format!r} is not read, only gptq and gptq_v2; load it with "
            "GPTQModel and save it as gptq, or take the model's gptq version"
        )
    bits, size = merged.get("bits"), merged.get("group_size", -1)
    if not isinstance(bits, int) or bits not in BITS:
        raise CheckpointError(f"quantization_config: GPTQ with {bits!r} bits is not read, only 2, 3, 4 and 8")
    if not isinstance(size, int) or size == 0 or size < -1:
        raise CheckpointError(f"quantization_config: group_size must be positive or -1, found {size!r}; {NOT_OWN}")
    if str(merged.get("pack_dtype") or "int32") != "int32":
        raise CheckpointError(f"quantization_config: GPTQ packed into {merged['pack_dtype']} is not read, only int32")
    meta = config.get("meta")
    writers = str(meta.get("quantizer")) if isinstance(meta, dict) else ""
    return _Settings(
        bits, size, merged.get("sym"), merged.get("desc_act"), VERSIONS[format], "gptqmodel" in writers.lower()
    )


def _override(dynamic: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """What GPTQModel's `dynamic` says of a module: the first pattern that matches; None where it is left dense (`-:`)."""
    for pattern, override in dynamic.items():
        try:
            if not matches(pattern.removeprefix("-:").removeprefix("+:"), module):
                continue
        except ValueError as error:
            raise CheckpointError(
                f"quantization_config: dynamic {pattern[:100]!r} is no regular expression ({error})"
            ) from None
        if override is not None and not isinstance(override, dict):
            raise CheckpointError(f"quantization_config: dynamic {pattern[:100]!r} must name an object; {NOT_OWN}")
        return None if pattern.startswith("-:") else override or {}
    return {}


def _linear(infos: Infos, module: str, settings: _Settings) -> Quantized:
    bits = settings.bits
    rows, n = matrix_shape(infos, module, "qweight")
    ordered = f"{module}.g_idx" in infos
    k = infos[f"{module}.g_idx"].shape[-1] if ordered and infos[f"{module}.g_idx"].shape else rows * 32 // bits
    size = settings.group_size if settings.group_size > 0 else k
    groups = -(-k // size)
    stored = {
        "qweight": Stored((k * bits // 32, n), (torch.int32,), (1, 1)),
        "qzeros": Stored(
            (groups, -(-n * bits // 32)), (torch.int32,), (1, 1)
        ),  # more than its outputs need does no harm
        "scales": Stored((groups, n), HALVES, (1, 1)),
    }
    if k * bits % 32 or (bits == 3 and k % 32):
        raise CheckpointError(f"{module}.qweight: {k} inputs of {bits} bits do not fill whole words; {NOT_OWN}")
    if ordered:
        stored["g_idx"] = Stored((k,), (torch.int32, torch.int64))

    def decode(module: str, tensors: Mapping[str, Tensor]) -> Tensor:
        codes = stream_fields(tensors["qweight"], bits)
        n = codes.shape[1]
        zeros = _zero_points(module, tensors["qzeros"], settings)[:, :n]
        if settings.symmetric and (zeros != 1 << (bits - 1)).any():
            found = zeros[zeros != 1 << (bits - 1)][0]
            raise CheckpointError(
                f"{module}.qzeros: the config says symmetric, which is a zero point of {1 << (bits - 1)}, found {found}; {NOT_OWN}"
            )
        scale = checked_scale(module, "scales", tensors["scales"])
        group = torch.arange(k) // size
        if ordered:
            given = checked_groups(module, "g_idx", tensors["g_idx"], groups)
            if settings.activation_order is False and not torch.equal(given, group):
                raise CheckpointError(
                    f"{module}.g_idx: the config says desc_act false, which is the order of the inputs, found another; {NOT_OWN}"
                )
            group = given
        return (scale[group] * (codes - zeros[group])).t().contiguous()

    return Quantized((n, k), bits, size, stored, decode)


def _zero_points(module: str, words: Tensor, settings: _Settings) -> Tensor:
    """int32 words [groups, N * bits / 32] to zero points: int16 [groups, N]."""
    bits, top = settings.bits, (1 << settings.bits) - 1
    padding = -words.shape[1] % (3 if bits == 3 else 1)
    words = torch.nn.functional.pad(words, (0, padding))
    if settings.version == 1 and settings.by_word and bits in ONES:
        words = (words.long() + ONES[bits]) & 0xFFFFFFFF
        return stream_fields(words.t(), bits).t()
    fields = stream_fields(words.t(), bits).t()
    if settings.version == 2:
        return fields
    if settings.by_word:
        return (fields + 1) & top
    if not padding and (fields == top).any():
        raise CheckpointError(
            f"{module}.qzeros: expected zero points of {bits} bits, found {top + 1}: AutoGPTQ overwrites the rest of a word where a "
            f"zero point is 0, and its kernels disagree on how to read it; {AGAIN}, or quantize with GPTQModel"
        )
    return fields + 1
