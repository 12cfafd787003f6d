"""`sparse24`: the project's own checkpoint format, neutral to kernels (design, section 5).

For a linear with N outputs, K inputs and group size G:

    weight_packed   int32 [N, K/16] (4 bits), [N, K/8] (8 bits)   the two kept codes of every quad, offset binary
    weight_meta     uint8 [N, K/8]                                their positions, one nibble per quad
    weight_scale    bfloat16 or float16 [N, K/G]                  one scale per G dense inputs
    weight_zero_point int8 [N, K/G]                               the code of zero, where the grid is not symmetric
    weight_values   bfloat16 or float16 [N, K/2]                  instead of codes and scales when bits is 16
    bias            [N]                                           optional

A linear of pattern "dense" has weight_packed int32 [N, K * bits / 32] in plain input order and no weight_meta.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.formats.packing import (
    kept_nibbles,
    nibbles_ascend,
    pack_nibbles,
    pack_words,
    put_kept,
    take_kept,
    unpack_nibbles,
    unpack_words,
)
from sparsify.formats.scheme import (
    AGAIN,
    FLOATS,
    NOT_OWN,
    Format,
    Label,
    ModuleScheme,
    check_zero_point,
    common_label,
    in_block,
    scheme_problem,
    stored_problem,
    take_bias,
    take_tensor,
    with_bias,
)
from sparsify.model.experts import is_expert
from sparsify.model.linear import PATTERNS, LinearWeights

VERSION, ZERO_POINTS = 1, 2  # the second is written where some linear has zero points, so that older readers refuse it
SUFFIXES = frozenset({"weight_packed", "weight_meta", "weight_scale", "weight_zero_point", "weight_values"})
KEYS = ("bits", "group_size", "pattern", "symmetric")  # of a label; what is symmetric need not say so
DEFAULT = Label(4, 64, "2:4")  # what the config of a checkpoint without any compressed linear says


@dataclass(frozen=True)
class Sparse24Config:
    """The quantization_config of a sparse24 checkpoint, checked.

    default: how the linears of decoder blocks are compressed; ignore: modules that stay dense;
    modules: those that are compressed in another way, inside or outside of the blocks.
    """

    default: Label
    ignore: frozenset[str]
    modules: Mapping[str, Label]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Sparse24Config":
        """Read `quantization_config`; CheckpointError says what is wrong with it."""
        if config.get("quant_method") != "sparse24":
            found = config.get("quant_method")
            raise CheckpointError(f"quantization_config: expected quant_method sparse24, found {found!r}; {NOT_OWN}")
        version = config.get("version")
        if version not in (VERSION, ZERO_POINTS):
            raise CheckpointError(
                f"expected sparse24 version {VERSION} or {ZERO_POINTS}, config.json says {version!r}; update sparsify"
            )
        ignore, modules = config.get("ignore", []), config.get("modules", {})
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise CheckpointError("quantization_config: ignore must be a list of module names")
        if not isinstance(modules, dict) or not all(isinstance(entry, dict) for entry in modules.values()):
            raise CheckpointError("quantization_config: modules must map module names to {bits, group_size, pattern}")
        base = {"pattern": "2:4", **{key: config[key] for key in KEYS if key in config}}
        overrides = {name: _label(f"modules.{name}", {**base, **entry}) for name, entry in modules.items()}
        default = _label("the default", base)
        if version == VERSION and not all(label.symmetric for label in (default, *overrides.values())):
            expected = (
                f"expected version {ZERO_POINTS}, which has zero points, or symmetric true, found version {version}"
            )
            raise CheckpointError(f"quantization_config: {expected}; {NOT_OWN}")
        return cls(default, frozenset(ignore), overrides)

    def label(self, module: str) -> Label | None:
        """How a linear module is compressed, or None when it is dense."""
        if module in self.modules:
            return self.modules[module]
        return self.default if in_block(module) and module not in self.ignore else None

    def scheme(self, module: str, shape: tuple[int, int]) -> ModuleScheme | None:
        """How the linear `module` with `shape` (N, K) is compressed, or None when it is dense."""
        label = self.label(module)
        return None if label is None else label.scheme(shape)


def _label(where: str, entry: Mapping[str, Any]) -> Label:
    bits, size, pattern, symmetric = *(entry.get(key) for key in KEYS[:3]), entry.get("symmetric", True)
    where = f"quantization_config, {where}"
    if not isinstance(bits, int) or bits not in (4, 8, 16) or pattern not in PATTERNS:
        found = f"{bits!r} and {pattern!r}"
        raise CheckpointError(f"{where}: expected bits 4, 8 or 16 and pattern 2:4 or dense, found {found}; {AGAIN}")
    if not isinstance(symmetric, bool):
        raise CheckpointError(f"{where}: expected symmetric true or false, found {symmetric!r}; {AGAIN}")
    if bits == 16:
        return Label(16, None, pattern)
    if size != "channel" and (not isinstance(size, int) or isinstance(size, bool) or size <= 0):
        raise CheckpointError(f"{where}: expected group_size as a number or 'channel', found {size!r}")
    return Label(bits, size, pattern, symmetric)


def _entry(label: Label, default: Label | None) -> dict[str, Any]:
    """A label in config.json. default: what the entry inherits from; None for the default itself."""
    entry = asdict(label)
    if label.symmetric is (True if default is None else default.symmetric):
        del entry["symmetric"]
    return entry


def tensor_layout(scheme: ModuleScheme, dtype: torch.dtype) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    """Shape and type of every tensor that a linear has on disk (the bias aside); dtype: of the scales or values."""
    n, k = scheme.shape
    stored = k // 2 if scheme.pattern == "2:4" else k
    layout: dict[str, tuple[tuple[int, int], torch.dtype]] = {}
    if scheme.bits == 16:
        layout["weight_values"] = ((n, stored), dtype)
    else:
        layout["weight_packed"] = ((n, stored * scheme.bits // 32), torch.int32)
        layout["weight_scale"] = ((n, k // scheme.group_size), dtype)
        if not scheme.symmetric:
            layout["weight_zero_point"] = ((n, k // scheme.group_size), torch.int8)
    if scheme.pattern == "2:4":
        layout["weight_meta"] = ((n, k // 8), torch.uint8)
    return layout


def layout_problem(tensors: Mapping[str, Tensor], scheme: ModuleScheme, device: str) -> str | None:
    """Why a kernel cannot read these tensors as a linear of this scheme: one is missing, of another shape or elsewhere."""
    for suffix, (shape, dtype) in tensor_layout(scheme, FLOATS[0]).items():
        tensor = tensors.get(suffix)
        if tensor is None:
            return f"{suffix} is missing"
        if tuple(tensor.shape) != shape:
            return f"{suffix} has shape {list(tensor.shape)}, expected {list(shape)}"
        if tensor.dtype not in ((*FLOATS, torch.float32) if dtype in FLOATS else (dtype,)):
            return f"{suffix} has type {tensor.dtype}"
        if tensor.device.type != device:
            return f"{suffix} is on {tensor.device.type}, not on {device}"
    return None


def checked_tensors(module: str, tensors: Mapping[str, Tensor], scheme: ModuleScheme) -> dict[str, Tensor]:
    """The tensors of one linear (the bias aside) without decoding them, when each byte is fit for a kernel.

    Checks the scheme, presence, shapes, types, finite scales and values, zero points and ascending positions; CheckpointError
    names the first bad tensor. Codes need no check: every bit pattern of weight_packed is a code.
    """
    if problem := scheme_problem(scheme):
        raise CheckpointError(f"{module}: {problem}; {NOT_OWN}")
    layout = tensor_layout(scheme, FLOATS[0])
    for suffix in sorted(SUFFIXES & set(tensors) - set(layout)):
        kind = f"a {scheme.bits}-bit linear of pattern {scheme.pattern}"
        kind = f"symmetric codes, {kind}" if suffix == "weight_zero_point" and scheme.bits < 16 else kind
        raise CheckpointError(f"{module}.{suffix}: expected no such tensor in {kind}, found one; {NOT_OWN}")
    checked = {
        suffix: take_tensor(module, tensors, suffix, shape, FLOATS if dtype in FLOATS else (dtype,))
        for suffix, (shape, dtype) in layout.items()
    }
    if scheme.pattern == "2:4" and not nibbles_ascend(unpack_nibbles(checked["weight_meta"])):
        expected = "expected two ascending positions in every nibble, found first >= second"
        raise CheckpointError(f"{module}.weight_meta: {expected}; {AGAIN}")
    if "weight_zero_point" in checked:
        check_zero_point(module, "weight_zero_point", checked["weight_zero_point"], scheme.bits)
    return checked


def all_zero(tensors: Mapping[str, Tensor], scheme: ModuleScheme) -> bool:
    """Whether every weight of a linear is zero, as in a sublayer that depth pruning removed: it needs no product.

    tensors: as `tensor_layout` says, checked. A code of zero is stored as the middle of its range.
    """
    if scheme.bits == 16:
        return not bool(tensors["weight_values"].any())
    if not scheme.symmetric and tensors["weight_zero_point"].any():
        return not bool(_decoded(tensors, scheme).unscaled().any())
    word = sum(1 << (scheme.bits - 1 + shift) for shift in range(0, 32, scheme.bits)) - (1 << 32)  # as a signed int32
    return bool((tensors["weight_packed"] == word).all())


def _decoded(checked: Mapping[str, Tensor], scheme: ModuleScheme) -> LinearWeights:
    """The linear that checked tensors are, without a bias."""
    stored = checked["weight_values"] if scheme.bits == 16 else unpack_words(checked["weight_packed"], scheme.bits)
    zero_point = checked.get("weight_zero_point")
    if scheme.pattern == "2:4":
        nibbles = unpack_nibbles(checked["weight_meta"])
        kept = put_kept(torch.ones_like(stored, dtype=torch.bool), nibbles) if zero_point is not None else None
        stored = put_kept(stored, nibbles)
        if zero_point is not None and kept is not None:  # a pruned weight is zero, whatever code that is
            stored = torch.where(kept, stored, zero_point.repeat_interleave(scheme.group_size, 1))
    if scheme.bits == 16:
        return LinearWeights(16, scheme.pattern, scheme.group_size, values=stored)
    return LinearWeights(
        scheme.bits, scheme.pattern, scheme.group_size,
        codes=stored, scale=checked["weight_scale"], zero_point=zero_point,
    )  # fmt: skip


class Sparse24(Format):
    """2:4 sparse with 4, 8 or 16 bits, and quantized without sparsity where a module asks for it."""

    name = "sparse24"
    suffixes = SUFFIXES
    holds = "2:4 linears with 4, 8 or 16 bits and dense ones with 4 or 8, group_size 32, 64, 128 or channel"

    def problem(self, scheme: ModuleScheme, dtype: torch.dtype) -> str | None:
        return stored_problem(scheme, dtype)

    def encode(self, linear: LinearWeights) -> dict[str, Tensor]:
        stored = linear.values if linear.bits == 16 else linear.codes
        assert stored is not None
        encoded: dict[str, Tensor] = {}
        if linear.pattern == "2:4":
            # adding zero turns -0.0 into 0.0: equal weights become equal bytes
            stored = stored + 0 if linear.bits == 16 else stored
            nibbles = kept_nibbles(linear.unscaled())
            stored = take_kept(stored, nibbles)
            encoded["weight_meta"] = pack_nibbles(nibbles)
        if linear.bits == 16:
            encoded["weight_values"] = stored
        else:
            assert linear.scale is not None
            encoded |= {"weight_packed": pack_words(stored, linear.bits), "weight_scale": linear.scale}
            encoded |= {} if linear.zero_point is None else {"weight_zero_point": linear.zero_point}
        return with_bias(encoded, linear)

    def decode(self, module: str, tensors: Mapping[str, Tensor], scheme: ModuleScheme) -> LinearWeights:
        linear = _decoded(checked_tensors(module, tensors, scheme), scheme)
        return replace(linear, bias=take_bias(module, tensors, scheme.shape[0]))

    def quantization_config(self, modules: Mapping[str, ModuleScheme], ignore: list[str]) -> dict[str, Any] | None:
        """The default applies to every linear of a decoder block that is not ignored; overrides name the others."""
        default = common_label({name: s for name, s in modules.items() if in_block(name)}) or DEFAULT
        overrides = {
            name: _entry(scheme.labels()[0], default)
            for name, scheme in sorted(modules.items())
            if default not in scheme.labels() or not in_block(name)
        }
        symmetric = all(scheme.symmetric for scheme in modules.values())
        head = {"quant_method": "sparse24", "version": VERSION if symmetric else ZERO_POINTS}
        experts = {"experts": True} if any(map(is_expert, modules)) else {}
        return {**head, **_entry(default, None), **experts, "ignore": ignore, "modules": overrides}

    def recognises(self, quantization_config: Mapping[str, Any] | None) -> bool:
        return quantization_config is not None and quantization_config.get("quant_method") == "sparse24"

    def schemes(
        self, quantization_config: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, ModuleScheme]:
        config = Sparse24Config.from_dict(quantization_config or {})
        packed = {name.rpartition(".")[0] for name in shapes if name.rpartition(".")[2] in SUFFIXES}
        for module in sorted(set(config.modules) - packed):
            raise CheckpointError(f"config.json lists {module} as compressed, which no file holds; {NOT_OWN}")
        schemes = {}
        for module in sorted(packed):
            label = config.label(module)
            if label is None:
                raise CheckpointError(f"{module} is packed, but config.json says that it is dense; {NOT_OWN}")
            schemes[module] = label.scheme(_shape(module, label, shapes))
        for name, shape in shapes.items():
            module = name.removesuffix(".weight")
            if module != name and len(shape) == 2 and (module in packed or config.label(module) is not None):
                raise CheckpointError(f"{name} is dense, but config.json says that it is compressed; {NOT_OWN}")
        return schemes


def _shape(module: str, label: Label, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """(N, K) of a packed linear, from the one tensor that always tells; the others are compared with it on reading."""
    suffix, inputs_per_column = ("weight_meta", 8) if label.pattern == "2:4" else ("weight_packed", 32 // label.bits)
    shape = shapes.get(f"{module}.{suffix}")
    if shape is None or len(shape) != 2:
        found = "nothing" if shape is None else list(shape)
        raise CheckpointError(f"{module}.{suffix}: expected a matrix, found {found}; {AGAIN}")
    return shape[0], shape[1] * inputs_per_column
