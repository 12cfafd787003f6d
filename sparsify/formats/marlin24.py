"""`marlin-24`: 2:4 sparse integers as the Sparse-Marlin kernel of vLLM up to 0.15 read them (compressed-tensors up to 0.14).

Written here to be read there; read to bring the models that exist into `sparse24`. For N outputs (a multiple of 64), K
inputs (a multiple of 32), bits 4 or 8, groups of 128 inputs or one per channel, scales in float16:

    weight_packed   int32 [K/32, N * bits / 2]   the kept codes, offset binary
    meta            int16 [K/32, 2 N]            their positions
    scale_packed    float16 [K/G, N]

A row is one step of the kernel, 32 inputs, and holds for each 64 outputs what the 32 lanes of a warp feed to its sparse
tensor cores in four instructions (PTX ISA, mma.sp.m16n8k32). Lane 4 g + t has rows g and g + 8 of each 16-row operand, and
these rows are the outputs 8 g to 8 g + 7 of the 64: so a lane's results lie side by side. Reading is therefore nothing but
naming the parts of an index and putting them into another order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.formats.config_groups import (
    describe,
    is_described,
    is_ignored,
    is_name,
    labels_by_target,
    labels_of,
    matching,
    names_in,
)
from sparsify.formats.packing import (
    kept_nibbles,
    nibbles_ascend,
    pack_nibbles,
    put_kept,
    take_kept,
    unpack_nibbles,
)
from sparsify.formats.scheme import (
    AGAIN,
    FLOATS,
    Format,
    Label,
    ModuleScheme,
    scheme_problem,
    stored_problem,
    take_bias,
    take_tensor,
    with_bias,
)
from sparsify.model.linear import LinearWeights

SUFFIXES = frozenset({"weight_packed", "scale_packed", "meta"})
OUTPUTS, INPUTS, GROUP = 64, 32, 128

# The parts of an index. step: of 32 inputs; warp: of 64 outputs; block: which of four instructions; g, t: lane 4 g + t;
# half: row g or g + 8 of the instruction; side: the kept values 2 t and 2 t + 1, or those eight further; pair: which of the
# two. Positions: blocks: two instructions, whose words lie in the lanes t = 0, 1 and t = 2, 3 (`instruction`); lane: which
# of the two, for inputs 0-15 or 16-31.
CODES = {
    4: ("step", "warp", "g", "t", "block", "pair", "half", "side"),
    8: ("step", "warp", "g", "t", "block", "half", "pair", "side"),
}
CODES_IN_ORDER = ("warp", "g", "half", "block", "step", "side", "t", "pair")
META = ("step", "warp", "blocks", "g", "instruction", "lane", "half")
META_IN_ORDER = ("warp", "g", "half", "blocks", "instruction", "step", "lane")
SCALES = ("group", "warp", "g", "block", "half")
SCALES_IN_ORDER = ("warp", "g", "half", "block", "group")
SIZES = {"g": 8, "t": 4, "block": 4, "blocks": 2, "half": 2, "side": 2, "pair": 2, "instruction": 2, "lane": 2}


def reorder(tensor: Tensor, given: tuple[str, ...], wanted: tuple[str, ...], sizes: Mapping[str, int]) -> Tensor:
    """`tensor` with its index, split into the parts `given`, put into the order `wanted`. Returns a flat tensor."""
    split = tensor.reshape([sizes[part] for part in given])
    return split.permute([given.index(part) for part in wanted]).reshape(-1)


def _sizes(n: int, k: int, group_size: int) -> dict[str, int]:
    return {**SIZES, "step": k // INPUTS, "warp": n // OUTPUTS, "group": k // group_size}


def _scales_are_plain(k: int, group_size: int) -> bool:
    """Whether scales lie in the order of the outputs. compressed-tensors compares the group with the K/2 kept inputs."""
    return group_size >= k // 2


class Marlin24(Format):
    """What vLLM had a sparse GPU kernel for until 2026."""

    name = "marlin-24"
    suffixes = SUFFIXES
    holds = "2:4 linears with 4 or 8 bits, group_size 128 or channel, outputs in multiples of 64"
    depends_on_numbers = True

    def problem(self, scheme: ModuleScheme, dtype: torch.dtype) -> str | None:
        if scheme.bits == 16 or scheme.pattern != "2:4":
            return "marlin-24 holds 4- or 8-bit codes of 2:4 sparse linears only"
        return stored_problem(scheme, dtype) or _scheme_problem(scheme)

    def supports(self, linear: LinearWeights) -> str | None:
        if problem := self.problem(ModuleScheme.of(linear), linear.dtype):
            return problem
        assert linear.scale is not None
        if not torch.equal(linear.scale.to(torch.float16).to(linear.scale.dtype), linear.scale):
            return "marlin-24 holds scales as float16, which cannot hold these"
        return None

    def encode(self, linear: LinearWeights) -> dict[str, Tensor]:
        assert linear.codes is not None and linear.scale is not None
        (n, k), bits = linear.shape, linear.bits
        sizes = _sizes(n, k, linear.group_size)
        nibbles = kept_nibbles(linear.codes)
        codes = take_kept(linear.codes, nibbles) + (1 << bits - 1)
        codes = reorder(codes.to(torch.uint8), CODES_IN_ORDER, CODES[bits], sizes)
        if bits == 4:
            codes = codes[0::2] | codes[1::2] << 4
        meta = reorder(pack_nibbles(nibbles).view(torch.int16), META_IN_ORDER, META, sizes)
        scale = linear.scale.to(torch.float16)
        plain = _scales_are_plain(k, linear.group_size)
        scale = scale.t() if plain else reorder(scale, SCALES_IN_ORDER, SCALES, sizes).reshape(-1, n)
        encoded = {
            "weight_packed": codes.view(torch.int32).reshape(k // INPUTS, -1),
            "meta": meta.reshape(k // INPUTS, -1),
            "scale_packed": scale.contiguous(),
        }
        return with_bias(encoded, linear)

    def decode(self, module: str, tensors: Mapping[str, Tensor], scheme: ModuleScheme) -> LinearWeights:
        if problem := _scheme_problem(scheme):
            raise CheckpointError(f"{module}: {problem}; sparsify reads no such marlin-24 linear")
        (n, k), bits, steps = scheme.shape, scheme.bits, scheme.shape[1] // INPUTS
        packed = take_tensor(module, tensors, "weight_packed", (steps, n * bits // 2), (torch.int32,))
        meta = take_tensor(module, tensors, "meta", (steps, 2 * n), (torch.int16,))
        scale = take_tensor(module, tensors, "scale_packed", (k // scheme.group_size, n), FLOATS)
        sizes = _sizes(n, k, scheme.group_size)
        nibbles = reorder(meta, META, META_IN_ORDER, sizes).view(torch.uint8).reshape(n, k // 8)
        nibbles = unpack_nibbles(nibbles)
        if not nibbles_ascend(nibbles):
            expected = "expected two ascending positions in every nibble, found first >= second"
            raise CheckpointError(f"{module}.meta: {expected}; {AGAIN}")
        codes = packed.contiguous().view(torch.uint8)
        if bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1)
        kept = reorder(codes, CODES[bits], CODES_IN_ORDER, sizes).to(torch.int16) - (1 << bits - 1)
        codes = put_kept(kept.to(torch.int8).reshape(n, k // 2), nibbles)
        if _scales_are_plain(k, scheme.group_size):
            scale = scale.t().contiguous()
        else:
            scale = reorder(scale, SCALES, SCALES_IN_ORDER, sizes).reshape(n, -1)
        bias = take_bias(module, tensors, n)
        return LinearWeights(bits, "2:4", scheme.group_size, codes=codes, scale=scale, bias=bias)

    def quantization_config(self, modules: Mapping[str, ModuleScheme], ignore: list[str]) -> dict[str, Any] | None:
        return describe(self.name, dict(sorted(modules.items())), ignore)

    def recognises(self, quantization_config: Mapping[str, Any] | None) -> bool:
        return is_described(quantization_config, self.name)

    def schemes(
        self, quantization_config: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, ModuleScheme]:
        schemes = {}
        for module, (label, stored) in labels_of(quantization_config, shapes).items():
            schemes[module] = replace(label, pattern="2:4").scheme(linear_shape(stored, label.bits))
        return schemes


@dataclass(frozen=True)
class Marlin24Config:
    """The quantization_config of such a checkpoint: target -> how its linears are compressed, and what is not."""

    targets: Mapping[str, Label]
    ignore: tuple[str, ...]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Marlin24Config":
        """Read `quantization_config`; CheckpointError says what is wrong with it."""
        targets = {target: replace(label, pattern="2:4") for target, label in labels_by_target(config).items()}
        return cls(targets, names_in(config, "ignore"))

    def label(self, module: str) -> Label | None:
        """How a linear module is compressed, or None when it is dense."""
        return None if is_ignored(module, self.ignore) else matching(module, self.targets)

    @property
    def modules(self) -> dict[str, Label]:
        """The linears that are named one by one."""
        return {target: label for target, label in self.targets.items() if is_name(target)}

    def renamed(self, rename: Callable[[list[str]], list[str]]) -> "Marlin24Config":
        """The same for a model that calls its modules otherwise."""
        return Marlin24Config(
            dict(zip(rename([*self.targets]), self.targets.values(), strict=True)), tuple(rename([*self.ignore]))
        )


def linear_shape(stored: tuple[int, int], bits: int) -> tuple[int, int]:
    """(N, K) of a linear whose weight_packed has the shape `stored`."""
    return stored[1] * 2 // bits, stored[0] * INPUTS


def _scheme_problem(scheme: ModuleScheme) -> str | None:
    (n, k), size = scheme.shape, scheme.group_size
    if scheme.bits == 16 or n % OUTPUTS or k % INPUTS:
        return f"marlin-24 holds 4 or 8 bits, multiples of {OUTPUTS} outputs and of {INPUTS} inputs, not {n} x {k}"
    if size not in (GROUP, k):
        return f"marlin-24 holds groups of {GROUP} inputs or one per channel, not of {size}"
    return scheme_problem(scheme)
