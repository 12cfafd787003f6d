"""The formats of this project as sources: whatever is registered in `sparsify.formats` is decoded, and is dense then."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsify.formats import get_format, known_formats
from sparsify.formats.foreign.scheme import Found, Infos, Quantized, Stored
from sparsify.formats.scheme import FLOATS, Format, ModuleScheme

BY_OUTPUTS = ("sparse24",)  # formats whose tensors all have the outputs along their first axis


def find_own(config: Mapping[str, Any], infos: Infos) -> Found | None:
    """The compressed linears of a checkpoint in a registered format; None when it is in none of them."""
    for name in known_formats():
        format = get_format(name)
        if format.recognises(config):
            schemes = format.schemes(config, {tensor: info.shape for tensor, info in infos.items()})
            modules = {module: _linear(format, infos, module, scheme) for module, scheme in schemes.items()}
            return Found(_words(name, schemes), modules)
    return None


def _words(name: str, schemes: Mapping[str, ModuleScheme]) -> str:
    kinds = sorted({(scheme.bits, scheme.pattern) for scheme in schemes.values()})
    return f"{name}, " + " and ".join(f"{bits}-bit {pattern}" for bits, pattern in kinds)


def _linear(format: Format, infos: Infos, module: str, scheme: ModuleScheme) -> Quantized:
    outputs = (0, 1) if format.name in BY_OUTPUTS else None
    names = {suffix: f"{module}.{suffix}" for suffix in sorted(format.suffixes) if f"{module}.{suffix}" in infos}
    stored = {suffix: Stored(infos[name].shape, (infos[name].dtype,), outputs) for suffix, name in names.items()}

    def decode(module: str, tensors: Mapping[str, Tensor]) -> Tensor:
        n = next(iter(tensors.values())).shape[0] if outputs else scheme.shape[0]
        return format.decode(module, tensors, replace(scheme, shape=(n, scheme.shape[1]))).dense(torch.float32)

    dtypes = [one.dtypes[0] for one in stored.values() if one.dtypes[0] in FLOATS]
    return Quantized(
        scheme.shape,
        scheme.bits,
        scheme.group_size,
        stored,
        decode,
        dtypes[0] if scheme.bits == 16 and dtypes else None,
    )
