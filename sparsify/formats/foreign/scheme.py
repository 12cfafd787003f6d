"""What a foreign scheme of quantization is: which weights a checkpoint stores by it, and how each is dequantized."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.formats.scheme import AGAIN, NOT_OWN
from sparsify.matching import matches
from sparsify.model.checkpoint import TensorInfo
from sparsify.model.finite import all_finite

Infos = Mapping[str, TensorInfo]
Described = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Decode = Callable[[str, Mapping[str, Tensor]], Tensor]

HALVES = (torch.float16, torch.bfloat16, torch.float32)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Stored:
    """One tensor of a quantized weight with N outputs.

    outputs: the axis along which the outputs lie, and how many of them one entry holds; None for what all outputs share.
    """

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    outputs: tuple[int, int] | None = None


@dataclass(frozen=True)
class Quantized:
    """One quantized weight W: [N, K].

    shape:      (N, K)
    bits:       of a stored weight
    group_size: inputs per scale; K for one scale per output or for all
    stored:     its tensors by what follows the name of the module and a dot
    decode:     (module, tensors) -> float32 [N, K]. The tensors have the shapes and types of `stored`, or hold only the first
                outputs of it; the values are checked here, CheckpointError by name.
    dtype:      what W is rounded to; None for the type of the model
    floating:   whether a stored weight is a floating number and no integer
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    stored: Mapping[str, Stored]
    decode: Decode
    dtype: torch.dtype | None = None
    floating: bool = False


@dataclass(frozen=True)
class Found:
    """The quantized weights of a checkpoint by module. words: how they are stored; left_out: tensors that only
    quantized activations or a quantized cache of keys and values need."""

    words: str
    modules: Mapping[str, Quantized]
    left_out: tuple[str, ...] = field(default=())


class Scheme(Protocol):
    """One way in which other software writes quantized weights."""

    marks: frozenset[str]  # last components of names that only quantized weights have

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a quantization_config is of this scheme."""

    def find(self, config: Mapping[str, Any], infos: Infos) -> Found:
        """The quantized weights of a checkpoint; CheckpointError when config and tensors disagree."""

    def tensors(self, config: Mapping[str, Any], module: str, shape: tuple[int, int]) -> Described | None:
        """What files hold of a linear [N, K] in a block by this config: type and shape of each tensor, by what follows the name
        of the module and a dot. None for one that it leaves dense."""


def names_ending(infos: Infos, suffix: str) -> list[str]:
    """The modules that have a tensor `suffix`."""
    return sorted(name.removesuffix(f".{suffix}") for name in infos if name.endswith(f".{suffix}"))


def is_kept(module: str, names: Iterable[str]) -> bool:
    """Whether a module is one that transformers does not convert by `modules_to_not_convert`: a regular expression that matches
    from its beginning, or how its name ends."""
    try:
        return any(module.endswith(name) or matches(f"(?:{name}).*", module) for name in names)
    except ValueError as error:
        raise CheckpointError(f"quantization_config, modules_to_not_convert: {error}; {AGAIN}") from None


def info_of(infos: Infos, module: str, suffix: str) -> TensorInfo:
    """What the header says of a tensor that must be there."""
    try:
        return infos[f"{module}.{suffix}"]
    except KeyError:
        raise CheckpointError(f"{module}.{suffix} is missing, without it {module} cannot be read; {AGAIN}") from None


def matrix_shape(infos: Infos, module: str, suffix: str) -> tuple[int, int]:
    """The shape of a tensor that must be a matrix."""
    shape = info_of(infos, module, suffix).shape
    if len(shape) != 2 or not all(shape):
        raise CheckpointError(
            f"{module}.{suffix}: expected a matrix, found {list(shape)}; sparsify reads no such weight"
        )
    return (shape[0], shape[1])


def check_stored(modules: Mapping[str, Quantized], infos: Infos) -> None:
    """Presence, type and shape of every tensor of the quantized weights, from the headers; CheckpointError by name."""
    for module, quantized in modules.items():
        for suffix, stored in quantized.stored.items():
            info = info_of(infos, module, suffix)
            if info.dtype not in stored.dtypes or info.shape != stored.shape:
                wanted = " or ".join(_name(dtype) for dtype in stored.dtypes)
                raise CheckpointError(
                    f"{module}.{suffix}: expected {wanted} {list(stored.shape)}, "
                    f"found {_name(info.dtype)} {list(info.shape)}; {NOT_OWN}"
                )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def checked_scale(module: str, suffix: str, scale: Tensor, signed: bool = False) -> Tensor:
    """Scales in float32; CheckpointError for NaN, Inf and, unless signed, negative ones."""
    scale = scale.float()
    wrong = ~(torch.isfinite(scale) & ((scale >= 0) | signed))
    if wrong.any():
        found = scale[wrong].flatten()[0].item()
        positive = "" if signed else " that are not negative"
        raise CheckpointError(f"{module}.{suffix}: expected finite scales{positive}, found {found}; {AGAIN}")
    return scale


def checked_weight(module: str, suffix: str, weight: Tensor) -> Tensor:
    """Floating weights in float32; CheckpointError for NaN and Inf."""
    weight = weight.float()
    if not all_finite(weight):
        raise CheckpointError(f"{module}.{suffix}: expected finite numbers, found NaN or Inf; {AGAIN}")
    return weight


def checked_groups(module: str, suffix: str, group: Tensor, groups: int) -> Tensor:
    """The group of each input as int64 [K]; CheckpointError for one that is not there."""
    group = group.long()
    if group.numel() and (group.min() < 0 or group.max() >= groups):
        low, high = int(group.min()), int(group.max())
        raise CheckpointError(
            f"{module}.{suffix}: expected groups from 0 to {groups - 1} in activation order, found {low} to {high}; {AGAIN}"
        )
    return group


def spread(values: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """One value for each block of weights, as one for each weight: [ceil(N / a), ceil(K / b)] for blocks a x b gives [N, K].

    The last blocks of a row or column need not be full.
    """
    return values.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def stream_fields(words: Tensor, bits: int) -> Tensor:
    """Unsigned fields of `bits` bits that follow each other through the int32 words of a column, lowest bits first.

    words: int32 [W, C], W a multiple of bits / gcd(bits, 32). Returns int16 [W * 32 / bits, C].
    """
    period = bits // math.gcd(bits, 32)  # words after which a field begins with a word again
    per_period = period * 32 // bits
    parts = (words.long() & 0xFFFFFFFF).reshape(-1, period, words.shape[1])
    fields = torch.empty(parts.shape[0], per_period, words.shape[1], dtype=torch.int16)
    for i in range(per_period):
        word, shift = divmod(i * bits, 32)
        value = parts[:, word] >> shift
        if shift + bits > 32:
            value = value | parts[:, word + 1] << (32 - shift)
        fields[:, i] = (value & ((1 << bits) - 1)).to(torch.int16)
    return fields.reshape(-1, words.shape[1])
