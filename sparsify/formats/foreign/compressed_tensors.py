"""The quantized formats of compressed-tensors (0.17) that are read by dequantizing, as its `decompress` does it:

    pack-quantized         weight_packed int32, 1 to 8 bits in 32 // bits fields a word; weight_shape; weight_zero_point packed
                           along the outputs; weight_g_idx
    int-quantized, naive-quantized   weight int8; weight_zero_point int8; weight_g_idx
    float-quantized, naive-quantized weight float8
    mxfp8-quantized        weight float8, weight_scale uint8: an exponent for 32 inputs
    nvfp4-pack-quantized   weight_packed uint8, two E2M1 a byte; weight_scale float8 for 16 inputs; weight_global_scale
    mxfp4-pack-quantized   weight_packed likewise; weight_scale uint8: an exponent for 32 inputs

w = (code - zero point) * scale, for NVFP4 w = code * (scale / global scale). Scales are one for all (strategy tensor), per output
(channel), per group of inputs (group) or per block. weight_g_idx is the group of each input; -1 in it means their order.
What only quantized activations need is left out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.formats.config_groups import METHOD
from sparsify.formats.foreign.fp8 import block_size, exponents_to_scale
from sparsify.formats.foreign.scheme import (
    FLOAT8,
    HALVES,
    Described,
    Found,
    Infos,
    Quantized,
    Stored,
    checked_groups,
    checked_scale,
    checked_weight,
    info_of,
    matrix_shape,
    names_ending,
    spread,
)
from sparsify.formats.scheme import AGAIN, NOT_OWN
from sparsify.formats.tensor_file import read_tensor
from sparsify.matching import matches, refuse_many

PACKED, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
FORMATS = (PACKED, INT, FLOAT, NAIVE, NVFP4, MXFP4, MXFP8)
MIXED = "mixed-precision"  # each group says its own
DENSE = (None, "dense")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
ACTIVATIONS = (
    ".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point", ".output_global_scale",
    ".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point", ".q_zero_point", ".k_global_scale", ".v_global_scale",
    ".q_global_scale",
)  # fmt: skip
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_in|word_embeddings|wte|tok_embeddings)$")


@dataclass(frozen=True)
class _Group:
    """How one group of the config stores its weights. block: of the strategy block."""

    format: str
    bits: int
    floating: bool
    symmetric: bool
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    activations: bool


class CompressedTensors:
    """quant_method compressed-tensors."""

    marks = frozenset({"weight_packed", "weight_scale", "weight_global_scale", "weight_zero_point", "weight_g_idx"})

    def recognises(self, config: Mapping[str, Any]) -> bool:
        said = {"config_groups", "sparsity_config"} & config.keys()  # before 0.6 the method was not named
        if config.get("quant_method", METHOD if said else None) != METHOD:
            return False
        if _is_dense(config):
            return True
        formats = {config.get("format"), *(g.get("format") for g in _groups(config).values())} - {None, MIXED}
        return bool(formats) and formats <= set(FORMATS) and _sparsity(config) in DENSE

    def is_native(self, config: Mapping[str, Any]) -> bool:
        """Whether transformers runs it on a CPU with these very weights: packed integers of linears, and what is dense.
        compressed-tensors 0.17 fails on a packed embedding."""
        if any("Embedding" in (group.get("targets") or ()) for group in _groups(config).values()):
            return False
        formats = {config.get("format"), *(group.get("format") for group in _groups(config).values())}
        return formats <= {PACKED, *DENSE}

    def find(self, config: Mapping[str, Any], infos: Infos) -> Found:
        targets = {} if _is_dense(config) else _targets(config)
        ignored = _ignored(config)
        modules: dict[str, Quantized] = {}
        for module in _quantized(infos):
            group = _matching(module, targets, ignored)
            modules[module] = _WEIGHTS[group.format](infos, module, group)
        if targets and not modules:
            raise CheckpointError(f"the config says {_words(config, targets)}, but no tensor is quantized; {NOT_OWN}")
        for target in targets:
            if "." in target and not target.startswith("re:") and f"{target}.weight" in infos and target not in modules:
                raise CheckpointError(
                    f"{target}.weight is dense, but the config lists {target} as quantized; {NOT_OWN}"
                )
        left_out = tuple(name for name in sorted(infos) if name.endswith(ACTIVATIONS))
        return Found(_words(config, targets), modules, left_out)

    def tensors(self, config: Mapping[str, Any], module: str, shape: tuple[int, int]) -> Described | None:
        targets = {} if _is_dense(config) else _targets(config)
        if not targets or any(_matches(module, name) for name in _ignored(config)):
            return None
        group = _target_of(module, targets)
        return None if group is None else _described(group, shape)


def _described(group: _Group, shape: tuple[int, int]) -> Described:
    """The tensors of a weight [N, K] by the strategy of its group."""
    (n, k), per_word = shape, 32 // group.bits
    size = group.group_size if group.strategy in ("group", "tensor_group") and group.group_size else k
    scale: tuple[int, ...] = (1,) if group.strategy == "tensor" else (n, k // size)
    if group.block is not None:
        scale = (-(-n // group.block[0]), -(-k // group.block[1]))
    if group.format in (NVFP4, MXFP4):
        packed = {"weight_packed": (torch.uint8, (n, k // 2))}
        if group.format == MXFP4:
            return {**packed, "weight_scale": (torch.uint8, scale)}
        return {**packed, "weight_scale": (torch.float8_e4m3fn, scale), "weight_global_scale": (torch.float32, (1,))}
    if group.format == PACKED:
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight_packed": (torch.int32, (n, -(-k // per_word))),
            "weight_scale": (torch.bfloat16, scale),
            "weight_shape": (torch.int64, (2,)),
        }
        return (
            found if group.symmetric else {**found, "weight_zero_point": (torch.int32, (-(-n // per_word), scale[1]))}
        )
    narrow = {"weight": (torch.float8_e4m3fn if group.floating else torch.int8, shape)}
    scales = {"weight_scale": (torch.uint8 if group.format == MXFP8 else torch.bfloat16, scale)}
    return {**narrow, **scales} if group.symmetric else {**narrow, **scales, "weight_zero_point": (torch.int8, scale)}


def _words(config: Mapping[str, Any], targets: Mapping[str, _Group]) -> str:
    if not targets:
        return "compressed-tensors, stored dense"
    kinds = {
        f"{group.format} {group.bits}-bit, {'' if group.symmetric else 'asymmetric, '}per {group.strategy}"
        + (f" of {group.group_size}" if group.group_size and group.group_size > 0 else "")
        for group in targets.values()
    }
    quantized = "; its quantized activations are not" if any(group.activations for group in targets.values()) else ""
    return f"compressed-tensors {' and '.join(sorted(kinds))}{quantized and quantized + ' kept'}"


def _sparsity(config: Mapping[str, Any]) -> object:
    sparsity = config.get("sparsity_config")
    return sparsity.get("format") if isinstance(sparsity, dict) else None


def _is_dense(config: Mapping[str, Any]) -> bool:
    """Whether nothing is quantized: the description of a sparse model whose zeros are stored in place."""
    return config.get("format") in DENSE and not _groups(config) and _sparsity(config) in DENSE


def _groups(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    groups = config.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(f"quantization_config: config_groups must be an object of objects; {AGAIN}")
    return groups


def _targets(config: Mapping[str, Any]) -> dict[str, _Group]:
    """The groups by target; those that quantize no weights are left out."""
    found: dict[str, _Group] = {}
    for name, group in _groups(config).items():
        weights, targets = group.get("weights"), group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise CheckpointError(f"quantization_config, {name}: expected a list of targets; {AGAIN}")
        if weights is None:
            continue
        if not isinstance(weights, dict):
            raise CheckpointError(f"quantization_config, {name}: weights must be an object; {AGAIN}")
        found |= dict.fromkeys(targets, _group(name, weights, group, config))
    if problem := refuse_many(found):
        raise CheckpointError(f"quantization_config, targets: {problem}; {AGAIN}")
    return found


def _group(name: str, weights: Mapping[str, Any], group: Mapping[str, Any], config: Mapping[str, Any]) -> _Group:
    format = group.get("format") or config.get("format")
    bits, size, kind = weights.get("num_bits", 8), weights.get("group_size"), weights.get("type", "int")
    inferred = "tensor" if size is None else "group" if isinstance(size, int) and size > 0 else "channel"
    strategy = weights.get("strategy") or inferred
    known = (
        format in FORMATS
        and kind in ("int", "float")
        and strategy in ("tensor", "channel", "group", "block", "tensor_group")
        and (size is None or isinstance(size, int))
    )
    grouped = strategy not in ("group", "tensor_group") or (isinstance(size, int) and size > 0)
    if not known or not grouped or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise CheckpointError(
            f"quantization_config, {name}: {bits!r}-bit {kind} weights, strategy {strategy!r}, group size {size!r}, in the "
            f"format {format!r} are not read; start from the dense model, or decompress with compressed-tensors"
        )
    block = block_size(weights.get("block_structure")) if strategy == "block" else None
    if strategy == "block" and block is None:
        raise CheckpointError(f"quantization_config, {name}: the strategy block needs a block_structure; {AGAIN}")
    symmetric = bool(weights.get("symmetric", True))
    activations = group.get("input_activations") is not None or group.get("output_activations") is not None
    return _Group(str(format), bits, kind == "float", symmetric, strategy, size, block, activations)


def _ignored(config: Mapping[str, Any]) -> list[str]:
    ignored = config.get("ignore") or []
    if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        raise CheckpointError(f"quantization_config: ignore must be a list of names; {AGAIN}")
    if problem := refuse_many(ignored):
        raise CheckpointError(f"quantization_config: ignore: {problem}; {AGAIN}")
    return ignored


def _quantized(infos: Infos) -> list[str]:
    """The modules whose tensors are those of a quantized weight."""
    packed = set(names_ending(infos, "weight_packed")) | set(names_ending(infos, "weight_scale"))
    narrow = {n.removesuffix(".weight") for n, i in infos.items() if n.endswith(".weight") and i.dtype.itemsize == 1}
    return sorted(packed | narrow)


def _matches(module: str, target: str) -> bool:
    """As compressed-tensors does: a name, or a regular expression that matches from the beginning."""
    try:
        return matches(target.removeprefix("re:"), module) if target.startswith("re:") else module == target
    except ValueError as error:
        raise CheckpointError(
            f"quantization_config: {target[:100]!r} is no regular expression ({error}); {AGAIN}"
        ) from None


def _matching(module: str, targets: Mapping[str, _Group], ignored: list[str]) -> _Group:
    """The exact name first, then regular expressions, then the class of the module."""
    if any(_matches(module, name) for name in ignored):
        raise CheckpointError(f"{module} is stored quantized, but the config ignores it; {NOT_OWN}")
    if (found := _target_of(module, targets)) is not None:
        return found
    raise CheckpointError(f"{module} is stored quantized, but no group of the config targets it; {NOT_OWN}")


def _target_of(module: str, targets: Mapping[str, _Group]) -> _Group | None:
    for target in sorted(targets, key=lambda target: target.startswith("re:")):
        if _matches(module, target):
            return targets[target]
    kind = "Embedding" if _EMBEDDING.search(module) else "Linear"  # what class a module has, no file says
    return targets.get(kind)


def _scale_of(infos: Infos, module: str, shape: tuple[int, int], group: _Group) -> Stored:
    """The scales (and zero points) of a weight by the strategy of its group."""
    (n, k), strategy = shape, group.strategy
    if strategy == "tensor":
        found = info_of(infos, module, "weight_scale").shape
        return Stored(found if found in ((), (1, 1)) else (1,), HALVES)
    if strategy == "block":
        assert group.block is not None
        return Stored((-(-n // group.block[0]), -(-k // group.block[1])), HALVES, (0, group.block[0]))
    if strategy == "channel":
        return Stored((n, 1), HALVES, (0, 1))
    assert group.group_size is not None
    if k % group.group_size:
        raise CheckpointError(
            f"{module}: its {k} inputs are no multiple of the group size {group.group_size}; {NOT_OWN}"
        )
    return Stored((n, k // group.group_size), HALVES, (0, 1))


def _spread(values: Tensor, shape: tuple[int, int], group: _Group, order: Tensor | None) -> Tensor:
    """Scales or zero points for every weight: what broadcasts to [N, K]. order: the group of each input."""
    if group.block is not None:
        return spread(values, group.block, shape)
    if values.numel() == 1:
        return values.reshape(1, 1)
    if order is not None:
        return values[:, order]
    return values.repeat_interleave(shape[1] // values.shape[1], 1)


def _order(module: str, tensors: Mapping[str, Tensor], group: _Group) -> Tensor | None:
    """The group of each input [K] where inputs are not in the order of the groups."""
    given = tensors.get("weight_g_idx")
    if given is None or group.group_size is None or (given == -1).any():
        return None
    groups = len(given) // group.group_size
    order = checked_groups(module, "weight_g_idx", given, groups)
    if not (torch.bincount(order, minlength=groups) == group.group_size).all():
        raise CheckpointError(f"{module}.weight_g_idx: expected {group.group_size} inputs in every group; {AGAIN}")
    return order


def _zero_points(module: str, zeros: Tensor, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    low, high = int(zeros.min()), int(zeros.max())
    if low < -half or high >= half:
        found = low if low < -half else high
        raise CheckpointError(
            f"{module}.weight_zero_point: expected numbers of {bits} bits, {-half} to {half - 1}, found {found}; {AGAIN}"
        )
    return zeros.float()


def _multiplied(
    module: str, codes: Tensor, zeros: Tensor | None, tensors: Mapping[str, Tensor], group: _Group
) -> Tensor:
    """(code - zero point) * scale in float32."""
    shape, order = (codes.shape[0], codes.shape[1]), _order(module, tensors, group)
    # AutoRound turns the sign of a scale where the largest weight is positive, since -8 reaches further than 7
    signed = group.format == PACKED and group.symmetric
    scale = checked_scale(module, "weight_scale", tensors["weight_scale"], signed)
    weight = codes.float()
    if zeros is not None:
        weight = weight - _spread(_zero_points(module, zeros, group.bits), shape, group, order)
    return weight * _spread(scale, shape, group, order)


def _fields(words: Tensor, bits: int) -> Tensor:
    """int32 [R, C] to signed codes [R, C * (32 // bits)]: offset binary, lowest bits first, unused bits above."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, dtype=torch.int32) * bits
    fields = (words[:, :, None] >> shifts) & ((1 << bits) - 1)
    return (fields - (1 << (bits - 1))).to(torch.int16).flatten(1)


def _packed(infos: Infos, module: str, group: _Group) -> Quantized:
    """pack-quantized."""
    n, words = matrix_shape(infos, module, "weight_packed")
    per_word = 32 // group.bits
    k = _inputs(infos, module, words * per_word, group)
    words = -(-k // per_word)
    stored = {
        "weight_packed": Stored((n, words), (torch.int32,), (0, 1)),
        "weight_scale": _scale_of(infos, module, (n, k), group),
        "weight_shape": Stored((2,), (torch.int64, torch.int32)),
    }
    if not group.symmetric:
        if group.strategy not in ("group", "channel"):
            raise CheckpointError(f"{module}: asymmetric codes per {group.strategy} are not read; {NOT_OWN}")
        scales = stored["weight_scale"].shape[1]
        stored["weight_zero_point"] = Stored((-(-n // per_word), scales), (torch.int32,), (0, per_word))
    _with_order(stored, infos, module, k)

    def decode(module: str, tensors: Mapping[str, Tensor]) -> Tensor:
        shape = tensors["weight_shape"].tolist()
        if shape != [n, k]:
            raise CheckpointError(f"{module}.weight_shape: expected {[n, k]}, found {shape}; {NOT_OWN}")
        codes = _fields(tensors["weight_packed"], group.bits)[:, :k]
        zeros = tensors.get("weight_zero_point")
        if zeros is not None:
            zeros = _fields(zeros.t(), group.bits).t()[: len(codes)]
        return _multiplied(module, codes, zeros, tensors, group)

    return Quantized((n, k), group.bits, _inputs_per_scale(group, k), stored, decode)


def _inputs(infos: Infos, module: str, fields: int, group: _Group) -> int:
    """K of a packed weight: the fields of the last word need not all be used. fields: those of a row."""
    if group.strategy == "group" and group.group_size:
        return matrix_shape(infos, module, "weight_scale")[1] * group.group_size
    if 32 % group.bits == 0:
        return fields
    shape = read_tensor(info_of(infos, module, "weight_shape").file, f"{module}.weight_shape")
    return int(shape[1]) if shape.shape == (2,) else fields


def _with_order(stored: dict[str, Stored], infos: Infos, module: str, k: int) -> None:
    if f"{module}.weight_g_idx" in infos:
        stored["weight_g_idx"] = Stored((k,), (torch.int32, torch.int64))


def _inputs_per_scale(group: _Group, k: int) -> int:
    return group.block[1] if group.block else group.group_size if group.group_size and group.group_size > 0 else k


def _naive(infos: Infos, module: str, group: _Group) -> Quantized:
    """int-quantized, float-quantized, naive-quantized and mxfp8-quantized: one number a weight."""
    shape = matrix_shape(infos, module, "weight")
    scale = _scale_of(infos, module, shape, group)
    if group.format == MXFP8:
        scale = Stored(scale.shape, (torch.uint8,), scale.outputs)
    stored = {"weight": Stored(shape, FLOAT8 if group.floating else (torch.int8,), (0, 1)), "weight_scale": scale}
    if not group.symmetric:
        stored["weight_zero_point"] = Stored(scale.shape, (torch.int8,), scale.outputs)
    _with_order(stored, infos, module, shape[1])

    def decode(module: str, tensors: Mapping[str, Tensor]) -> Tensor:
        if group.format == MXFP8:
            tensors = {**tensors, "weight_scale": exponents_to_scale(tensors["weight_scale"])}
        codes = checked_weight(module, "weight", tensors["weight"])
        return _multiplied(module, codes, tensors.get("weight_zero_point"), tensors, group)

    return Quantized(shape, group.bits, _inputs_per_scale(group, shape[1]), stored, decode, floating=group.floating)


def _fp4(infos: Infos, module: str, group: _Group) -> Quantized:
    """nvfp4-pack-quantized and mxfp4-pack-quantized."""
    n, half = matrix_shape(infos, module, "weight_packed")
    shape, nvidia = (n, 2 * half), group.format == NVFP4
    scale = _scale_of(infos, module, shape, group)
    types = (*FLOAT8, *HALVES) if nvidia else (torch.uint8,)
    stored = {
        "weight_packed": Stored((n, half), (torch.uint8,), (0, 1)),
        "weight_scale": Stored(scale.shape, types, scale.outputs),
    }
    if nvidia:
        found = info_of(infos, module, "weight_global_scale").shape
        stored["weight_global_scale"] = Stored(found if found == () else (1,), (torch.float32,))

    def decode(module: str, tensors: Mapping[str, Tensor]) -> Tensor:
        weight = e2m1_values(tensors["weight_packed"])
        scale = tensors["weight_scale"]
        scale = checked_scale(module, "weight_scale", scale if nvidia else exponents_to_scale(scale))
        if nvidia:
            whole = checked_scale(module, "weight_global_scale", tensors["weight_global_scale"])
            if not whole.all():
                raise CheckpointError(f"{module}.weight_global_scale is 0, which scales are divided by; {AGAIN}")
            scale = scale / whole
        return weight * _spread(scale, (weight.shape[0], weight.shape[1]), group, None)

    return Quantized(shape, 4, _inputs_per_scale(group, shape[1]), stored, decode, floating=True)


def e2m1_values(packed: Tensor) -> Tensor:
    """FP4 numbers, sign in bit 3, the first in the low nibble. packed: uint8 [N, K / 2]. Returns float32 [N, K]."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    nibbles = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)
    return table[nibbles.int()]


_WEIGHTS: Mapping[str, Any] = {
    PACKED: _packed, INT: _naive, FLOAT: _naive, NAIVE: _naive, MXFP8: _naive, NVFP4: _fp4, MXFP4: _fp4
}  # fmt: skip
