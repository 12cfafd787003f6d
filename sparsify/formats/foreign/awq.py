"""AWQ as AutoAWQ stores it (quant_method awq) in its layout `gemm`: 4 bits, asymmetric, groups of G inputs.

    qweight   int32 [K, N / 8]       codes of 8 outputs a word
    qzeros    int32 [K / G, N / 8]   zero points, packed alike
    scales    float16 [K / G, N]

w[n, k] = scales[k // G, n] * (code - zero point). In a word lie, from the lowest bits, the outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight
(AutoAWQ 0.2.9, awq/utils/packing_utils.py). Its other layouts (gemv, gemv_fast, marlin, llm-awq) are refused by name.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.formats.config_groups import names_in
from sparsify.formats.foreign.scheme import (
    HALVES,
    Described,
    Found,
    Infos,
    Quantized,
    Stored,
    checked_scale,
    is_kept,
    matrix_shape,
    names_ending,
)
from sparsify.formats.scheme import NOT_OWN

PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs of a word, from its lowest bits


class Awq:
    """quant_method awq."""

    marks = frozenset({"qweight", "qzeros"})

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == "awq"

    def find(self, config: Mapping[str, Any], infos: Infos) -> Found:
        size = _group_size(config)
        kept = names_in(config, "modules_to_not_convert")
        modules = {}
        for module in names_ending(infos, "qweight"):
            if any(module == name or module.startswith(f"{name}.") for name in kept):
                raise CheckpointError(f"{module}.qweight is quantized, but the config leaves it dense; {NOT_OWN}")
            modules[module] = _linear(infos, module, size)
        if not modules:
            raise CheckpointError(f"the config says awq, but no file holds a qweight; {NOT_OWN}")
        groups = f"groups of {size}" if size > 0 else "one scale per output"
        return Found(f"AWQ 4-bit, {groups}", modules)

    def tensors(self, config: Mapping[str, Any], module: str, shape: tuple[int, int]) -> Described | None:
        (n, k), size = shape, _group_size(config)
        if is_kept(module, names_in(config, "modules_to_not_convert")):
            return None
        groups, words = k // (size if size > 0 else k), n // PER_WORD
        return {
            "qweight": (torch.int32, (k, words)),
            "qzeros": (torch.int32, (groups, words)),
            "scales": (torch.float16, (groups, n)),
        }


def _group_size(config: Mapping[str, Any]) -> int:
    """Inputs per scale, -1 for one scale per output; CheckpointError for what is not read, by name."""
    layout = str(config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm").lower()
    if layout != "gemm" or config.get("backend") not in (None, "auto", "autoawq"):
        named = layout if layout != "gemm" else config.get("backend")
        raise CheckpointError(
            f"quantization_config: AWQ in the layout {named!r} is not read, only gemm; AutoAWQ reads it on a GPU: take "
            "the model's gemm version, or start from the dense model"
        )
    bits, size = (
        config.get("bits", config.get("w_bit", 4)),
        config.get("group_size", config.get("q_group_size", 128)),
    )
    if bits != 4:
        raise CheckpointError(f"quantization_config: AWQ with {bits!r} bits is not read, only 4")
    if not isinstance(size, int) or size == 0 or size < -1:
        raise CheckpointError(f"quantization_config: group_size must be positive or -1, found {size!r}; {NOT_OWN}")
    return size


def _linear(infos: Infos, module: str, group_size: int) -> Quantized:
    k, words = matrix_shape(infos, module, "qweight")
    size = group_size if group_size > 0 else k
    if k % size:
        raise CheckpointError(f"{module}.qweight: its {k} inputs are no multiple of the group size {size}; {NOT_OWN}")
    n = words * PER_WORD
    stored = {
        "qweight": Stored((k, words), (torch.int32,), (1, PER_WORD)),
        "qzeros": Stored((k // size, words), (torch.int32,), (1, PER_WORD)),
        "scales": Stored((k // size, n), HALVES, (1, 1)),
    }

    def decode(module: str, tensors: Mapping[str, Tensor]) -> Tensor:
        scale = checked_scale(module, "scales", tensors["scales"]).repeat_interleave(size, 0)
        codes, zeros = _unpacked(tensors["qweight"]), _unpacked(tensors["qzeros"]).repeat_interleave(size, 0)
        n = scale.shape[1]
        return (scale * (codes[:, :n] - zeros[:, :n])).t().contiguous()

    return Quantized((n, k), 4, size, stored, decode)


def _unpacked(words: Tensor) -> Tensor:
    """int32 [R, N / 8] to int16 [R, N] in the order of the outputs."""
    fields = torch.empty(*words.shape, PER_WORD, dtype=torch.int16)
    for place, output in enumerate(ORDER):
        fields[:, :, output] = ((words >> (4 * place)) & 15).to(torch.int16)
    return fields.flatten(1)
