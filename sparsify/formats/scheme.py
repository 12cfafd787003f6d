"""What a checkpoint format is, and what it knows of one compressed linear before any of its bytes are read."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.model.finite import all_finite
from sparsify.model.linear import CODE_RANGE, PATTERNS, LinearWeights

GROUP_SIZES = (32, 64, 128)
FLOATS = (torch.bfloat16, torch.float16)
INPUT_MULTIPLE = 16  # kernels read 16 inputs at a time: one word of 4-bit 2:4 codes
NOT_OWN = "the checkpoint is damaged or its config.json is not its own"
AGAIN = "download or create the checkpoint again"


@dataclass(frozen=True)
class ModuleScheme:
    """How one linear with N outputs and K inputs is compressed.

    bits: 4, 8 or 16. pattern: "2:4" or "dense". shape: (N, K).
    group_size: dense inputs per scale, always a number: K for one scale per output and for 16 bits.
    symmetric: there are no zero points.
    """

    bits: int
    group_size: int
    pattern: str
    shape: tuple[int, int]
    symmetric: bool = True

    @classmethod
    def of(cls, linear: LinearWeights) -> "ModuleScheme":
        return cls(linear.bits, linear.group_size, linear.pattern, linear.shape, linear.symmetric)

    def labels(self) -> list["Label"]:
        """The ways to say this scheme without the shape; two when the group is the whole row."""
        if self.bits == 16:
            return [Label(16, None, self.pattern)]
        sizes: list[int | str] = [self.group_size] if self.group_size in GROUP_SIZES else []
        sizes += ["channel"] if self.group_size == self.shape[1] else []
        return [Label(self.bits, size, self.pattern, self.symmetric) for size in sizes or [self.group_size]]


@dataclass(frozen=True)
class Label:
    """A scheme as configurations write it: group_size is a number, "channel", or None when there are no scales."""

    bits: int
    group_size: int | str | None
    pattern: str
    symmetric: bool = True

    def scheme(self, shape: tuple[int, int]) -> ModuleScheme:
        size = self.group_size if isinstance(self.group_size, int) else shape[1]
        return ModuleScheme(self.bits, size, self.pattern, shape, self.symmetric)


def common_label(modules: Mapping[str, ModuleScheme]) -> Label | None:
    """The label that fits most modules (ties: the first in order); None when there are none."""
    votes = Counter(label for scheme in modules.values() for label in scheme.labels())

    def rank(label: Label) -> tuple[int, int, str, str, bool]:
        return -votes[label], label.bits, str(label.group_size), label.pattern, not label.symmetric

    return min(votes, key=rank, default=None)


def scheme_problem(scheme: ModuleScheme) -> str | None:
    """Why no kernel can run this scheme, or None."""
    k = scheme.shape[1]
    if scheme.pattern not in PATTERNS:
        return f"pattern {scheme.pattern!r} is unknown; known are {', '.join(PATTERNS)}"
    if scheme.bits not in (4, 8, 16):
        return f"{scheme.bits} bits are not supported, only 4, 8 and 16"
    if k == 0 or scheme.shape[0] == 0 or k % INPUT_MULTIPLE:
        return f"its {k} inputs are no multiple of {INPUT_MULTIPLE}"
    if scheme.bits == 16:
        if not scheme.symmetric:
            return "16-bit values have no zero points"
        return None if scheme.pattern == "2:4" else "16 bits without 2:4 sparsity is a plain dense linear"
    if scheme.group_size <= 0 or k % scheme.group_size:
        return f"its {k} inputs are no multiple of the group size {scheme.group_size}"
    if scheme.group_size != k and scheme.group_size not in GROUP_SIZES:
        return f"group size {scheme.group_size} is none of {', '.join(map(str, GROUP_SIZES))} or all {k} inputs"
    return None


def stored_problem(scheme: ModuleScheme, dtype: torch.dtype) -> str | None:
    """Why a linear has to stay dense in every packed format, or None. dtype: of its scales or values."""
    if dtype not in FLOATS:
        return f"its weights or scales are {str(dtype).removeprefix('torch.')}, not bfloat16 or float16"
    return scheme_problem(scheme)


def in_block(module: str) -> bool:
    """Whether a module lies in a numbered block, as in `model.layers.3.mlp.up_proj`."""
    return re.search(r"(^|\.)\d+\.", module) is not None


def take_tensor(
    module: str, tensors: Mapping[str, Tensor], suffix: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> Tensor:
    """One tensor of a compressed linear, after its presence, type and shape were checked; CheckpointError by name."""
    name = f"{module}.{suffix}"
    wanted = f"{' or '.join(str(d).removeprefix('torch.') for d in dtypes)} {list(shape)}"
    tensor = tensors.get(suffix)
    if tensor is None:
        raise CheckpointError(f"{name} is missing, expected {wanted}; {AGAIN}")
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise CheckpointError(f"{name}: expected {wanted}, found {found}; {NOT_OWN}")
    return finite(name, tensor)


def finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor; CheckpointError, by its name, where it holds NaN or Inf."""
    if tensor.is_floating_point() and not all_finite(tensor):
        raise CheckpointError(f"{name}: expected finite numbers, found NaN or Inf; {AGAIN}")
    return tensor


def check_zero_point(module: str, suffix: str, zero_point: Tensor, bits: int) -> Tensor:
    """Zero points [N, K/G] as they are, int8; CheckpointError for one beyond the codes of `bits` bits."""
    low, high = CODE_RANGE[bits]
    wrong = zero_point[(zero_point < low) | (zero_point > high)]
    if wrong.numel():
        expected = f"expected zero points of {bits} bits, {low} to {high}, found {int(wrong[0])}"
        raise CheckpointError(f"{module}.{suffix}: {expected}; {AGAIN}")
    return zero_point


def take_bias(module: str, tensors: Mapping[str, Tensor], outputs: int) -> Tensor | None:
    """The optional bias [N] of a compressed linear, checked."""
    return take_tensor(module, tensors, "bias", (outputs,), (*FLOATS, torch.float32)) if "bias" in tensors else None


def with_bias(encoded: dict[str, Tensor], linear: LinearWeights) -> dict[str, Tensor]:
    """Add the bias of `linear`, when it has one, to its encoded tensors."""
    return encoded if linear.bias is None else {**encoded, "bias": linear.bias}


class Format(Protocol):
    """One way to write compressed linears into safetensors files and config.json.

    suffixes: the last name components that mark a tensor as part of a compressed linear (the bias aside).
    holds: the linears that it can hold, in the words of a recipe, for the message about one that it cannot.
    depends_on_numbers: whether `supports` can refuse what `problem` cannot, or reads the pattern that decides.
    records_pattern: whether a checkpoint says which linears are 2:4; where it does not, the codes are looked at.
    written: whether sparsify writes it.
    config_file: a file beside config.json that repeats its quantization_config.
    """

    name: str
    suffixes: frozenset[str]
    holds: str
    depends_on_numbers: bool = False
    records_pattern: bool = True
    written: bool = True
    config_file: str | None = None

    def problem(self, scheme: ModuleScheme, dtype: torch.dtype) -> str | None:
        """None, or why a linear of this scheme must stay dense in this format, as it is known before its weights are read.

        dtype: of its scales, or of its values where there are none
        """

    def together_problem(self, modules: Mapping[str, ModuleScheme]) -> str | None:
        """None, or why these linears, each of which the format holds, cannot stand in one checkpoint."""
        return None

    def supports(self, linear: LinearWeights) -> str | None:
        """None, or why this very linear must stay dense in this format: `problem`, or a number that cannot be held."""
        return self.problem(ModuleScheme.of(linear), linear.dtype)

    def encode(self, linear: LinearWeights) -> dict[str, Tensor]:
        """The tensors of a validated linear by suffix."""

    def decode(self, module: str, tensors: Mapping[str, Tensor], scheme: ModuleScheme) -> LinearWeights:
        """Inverse of `encode`; every tensor is checked first and a bad one raises CheckpointError naming it."""

    def quantization_config(self, modules: Mapping[str, ModuleScheme], ignore: list[str]) -> dict[str, Any] | None:
        """What config.json says of `modules`; ignore: the other matrices. None when there is nothing to say."""

    def recognises(self, quantization_config: Mapping[str, Any] | None) -> bool:
        """Whether a checkpoint with this quantization_config is in this format."""

    def schemes(
        self, quantization_config: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, ModuleScheme]:
        """The compressed modules of a checkpoint, from its config and the shapes of all its tensors."""
