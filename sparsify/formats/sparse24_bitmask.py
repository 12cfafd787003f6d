"""`sparse-24-bitmask`: 2:4 weights with a bit mask, as compressed-tensors up to 0.14 and llm-compressor wrote them. Read only.

For N outputs and K inputs:

    shape          int64 [2, 1] or [2]        N, K
    compressed     [N, K/2]                   the two kept weights of every quad, row by row
    bitmask        uint8 [N, ceil(K/8)]       a bit per input, the first lowest: exactly two of every quad
    weight_scale   [N, K/G], [N, 1] or [1]    where the weights were quantized first

compressed is bfloat16 or float16 (sparsity alone), int8 (`int-quantized`: codes, kept as such) or float8_e4m3fn
(`float-quantized`: float8 times scale, read as 16-bit values, rounded once). Scales of activations are not read: sparsify
multiplies with activations as they are. config.json names the format in `quantization_config.sparsity_config`, which vLLM
refuses from 0.24 on, so nothing is written in this format.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.formats.config_groups import METHOD, is_ignored, is_name, matching, names_in, weights_by_target
from sparsify.formats.packing import INVALID, put_kept, two_kept_nibbles, unpack_nibbles
from sparsify.formats.scheme import (
    AGAIN,
    FLOATS,
    NOT_OWN,
    Format,
    Label,
    ModuleScheme,
    scheme_problem,
    take_bias,
    take_tensor,
)
from sparsify.model.linear import LinearWeights

STORED = frozenset({"shape", "compressed", "bitmask"})
QUANTIZED = frozenset({"weight_scale", "weight_zero_point"})
ACTIVATIONS = frozenset({"input_scale", "input_zero_point", "output_scale", "output_zero_point"})
FLOAT8 = torch.float8_e4m3fn


class Sparse24Bitmask(Format):
    """What llm-compressor wrote for 2:4 models, with weights in 16 bits, float8 or int8."""

    name = "sparse-24-bitmask"
    suffixes = STORED | QUANTIZED | ACTIVATIONS
    holds = "nothing that sparsify writes"
    written = False

    def problem(self, scheme: ModuleScheme, dtype: torch.dtype) -> str | None:
        return "sparsify reads sparse-24-bitmask and does not write it"

    def encode(self, linear: LinearWeights) -> dict[str, Tensor]:
        raise NotImplementedError(self.problem(ModuleScheme.of(linear), linear.dtype))

    def decode(self, module: str, tensors: Mapping[str, Tensor], scheme: ModuleScheme) -> LinearWeights:
        if problem := scheme_problem(scheme):
            raise CheckpointError(f"{module}: {problem}; sparsify reads no such sparse-24-bitmask linear")
        (n, k), quantized = scheme.shape, "weight_scale" in tensors
        _check_shape(module, tensors, scheme.shape)
        kinds = (torch.int8,) if scheme.bits == 8 else (FLOAT8,) if quantized else FLOATS
        kept = take_tensor(module, tensors, "compressed", (n, k // 2), kinds)
        bitmask = take_tensor(module, tensors, "bitmask", (n, k // 8), (torch.uint8,))
        nibbles = two_kept_nibbles(unpack_nibbles(bitmask))
        if (nibbles == INVALID).any():
            expected = "expected two of every four bits, found more or fewer"
            raise CheckpointError(f"{module}.bitmask: {expected}; {AGAIN}")
        if "weight_zero_point" in tensors and tensors["weight_zero_point"].any():
            expected = "expected symmetric codes, found a zero point other than 0"
            raise CheckpointError(f"{module}.weight_zero_point: {expected}; quantize the dense model again without it")
        bias = take_bias(module, tensors, n)
        if scheme.bits == 8:
            scale = _scale(module, tensors, scheme.shape, FLOATS)
            if scale.shape[1] != k // scheme.group_size:
                found = f"expected {[n, k // scheme.group_size]}, found {list(scale.shape)}"
                raise CheckpointError(f"{module}.weight_scale: {found}; {NOT_OWN}")
            codes = put_kept(kept, nibbles)
            return LinearWeights(8, "2:4", scheme.group_size, codes=codes, scale=scale, bias=bias)
        values = put_kept(kept, nibbles) if not quantized else _from_float8(module, tensors, kept, nibbles)
        return LinearWeights(16, "2:4", k, values=values, bias=bias).validate(module)

    def quantization_config(self, modules: Mapping[str, ModuleScheme], ignore: list[str]) -> dict[str, Any] | None:
        raise NotImplementedError("sparse-24-bitmask is not written")

    def recognises(self, quantization_config: Mapping[str, Any] | None) -> bool:
        return is_bitmask(quantization_config)

    def schemes(
        self, quantization_config: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, ModuleScheme]:
        config = BitmaskConfig.from_dict(quantization_config or {})
        end = ".bitmask"
        modules = [name.removesuffix(end) for name in sorted(shapes) if name.endswith(end)]
        for name in sorted(shapes):
            module, _, suffix = name.rpartition(".")
            if suffix in QUANTIZED and f"{module}{end}" not in shapes:
                problem = f"expected beside a bitmask, and {module} has none: it is quantized and not sparse"
                raise CheckpointError(f"{name}: {problem}, which sparsify reads in no sparse-24-bitmask checkpoint")
        schemes = {}
        for module in modules:
            label, scaled = config.label(module), f"{module}.weight_scale" in shapes
            if label is None:
                raise CheckpointError(f"{module} has a bitmask, but config.json says that it is dense; {NOT_OWN}")
            if scaled != (config.quantized(module) is not None):
                says = "not quantized" if scaled else "quantized"
                found = "one" if scaled else "none"
                raise CheckpointError(f"{module}.weight_scale: config.json says {says}, found {found}; {NOT_OWN}")
            shape = shapes.get(f"{module}.compressed")
            if shape is None or len(shape) != 2:
                found = "nothing" if shape is None else str(list(shape))
                raise CheckpointError(f"{module}.compressed: expected a matrix, found {found}; {AGAIN}")
            schemes[module] = label.scheme((shape[0], 2 * shape[1]))
        return schemes


@dataclass(frozen=True)
class BitmaskConfig:
    """The quantization_config of such a checkpoint: which linears are sparse, and how they were quantized before.

    sparse, ignore: targets of `sparsity_config`; quantization: target -> scheme of the weights; dense: ignored by it
    """

    sparse: tuple[str, ...]
    ignore: tuple[str, ...]
    quantization: Mapping[str, Label]
    dense: tuple[str, ...]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "BitmaskConfig":
        """Read `quantization_config`; CheckpointError says what is wrong with it."""
        sparsity = config.get("sparsity_config")
        if not is_bitmask(config) or not isinstance(sparsity, dict):
            raise CheckpointError(f"quantization_config: expected sparsity_config of sparse-24-bitmask; {NOT_OWN}")
        if sparsity.get("sparsity_structure", "2:4") != "2:4":
            found = sparsity.get("sparsity_structure")
            raise CheckpointError(f"sparsity_config: expected sparsity_structure 2:4, found {found!r}; {NOT_OWN}")
        groups = weights_by_target(config) if config.get("config_groups") else {}
        return cls(
            names_in(sparsity, "targets", ("Linear",)),
            names_in(sparsity, "ignore"),
            {target: _label(target, weights) for target, weights in groups.items()},
            names_in(config, "ignore"),
        )

    def quantized(self, module: str) -> Label | None:
        """How the weights of a module were quantized before they were compressed; None when they were not."""
        return None if is_ignored(module, self.dense) else matching(module, self.quantization)

    def label(self, module: str) -> Label | None:
        """How a sparse module is read; None when it is not sparse."""
        if is_ignored(module, self.ignore) or matching(module, dict.fromkeys(self.sparse, True)) is None:
            return None
        return self.quantized(module) or Label(16, None, "2:4")

    @property
    def modules(self) -> dict[str, Label]:
        """The sparse linears that are named one by one."""
        found = {module: self.label(module) for module in self.sparse if is_name(module)}
        return {module: label for module, label in found.items() if label is not None}

    def renamed(self, rename: Callable[[list[str]], list[str]]) -> "BitmaskConfig":
        """The same for a model that calls its modules otherwise."""
        quantization = dict(zip(rename([*self.quantization]), self.quantization.values(), strict=True))
        sparse, ignore, dense = (tuple(rename([*names])) for names in (self.sparse, self.ignore, self.dense))
        return BitmaskConfig(sparse, ignore, quantization, dense)


def is_bitmask(config: Mapping[str, Any] | None) -> bool:
    """Whether a quantization_config is of a checkpoint in this format."""
    sparsity = (config or {}).get("sparsity_config")
    quantized = (config or {}).get("format") in (None, "dense", "int-quantized", "float-quantized", "naive-quantized")
    named = isinstance(sparsity, dict) and sparsity.get("format") == Sparse24Bitmask.name
    return named and quantized and (config or {}).get("quant_method", METHOD) == METHOD


def _label(target: str, weights: Mapping[str, Any]) -> Label:
    """What the linears of a config group are read as: int8 codes stay codes, float8 becomes 16-bit values."""
    kind, bits, strategy, size = (weights.get(key) for key in ("type", "num_bits", "strategy", "group_size"))
    grouped = strategy == "group" and isinstance(size, int) and size > 0
    readable = bits == 8 and kind in ("int", "float") and (grouped or strategy in ("channel", "tensor"))
    if not readable or weights.get("symmetric", True) is not True or weights.get("actorder"):
        raise CheckpointError(
            f"quantization_config, target {target}: expected symmetric 8-bit weights, int or float, per group, channel or "
            f"tensor, found {bits!r}-bit {kind!r}, strategy {strategy!r}, symmetric {weights.get('symmetric')!r}; "
            "start from the dense model instead"
        )
    if kind == "float":
        return Label(16, None, "2:4")
    return Label(8, size if grouped else "channel", "2:4")


def _check_shape(module: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
    """The tensor `shape` is there and says what the others say."""
    stored = tensors.get("shape")
    if stored is None or stored.numel() != 2 or stored.is_floating_point() or stored.flatten().tolist() != list(shape):
        found = "nothing" if stored is None else str(stored.flatten().tolist()[:4])
        raise CheckpointError(f"{module}.shape: expected {list(shape)}, found {found}; {AGAIN}")


def _scale(
    module: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtypes: tuple[torch.dtype, ...]
) -> Tensor:
    """weight_scale as [N, groups]; one for the whole tensor is repeated."""
    n, k = shape
    scale = tensors["weight_scale"]
    if scale.numel() == 1 and (n != 1 or scale.dim() < 2):
        return take_tensor(module, tensors, "weight_scale", tuple(scale.shape), dtypes).reshape(1, 1).repeat(n, 1)
    groups = scale.shape[1] if scale.dim() == 2 and scale.shape[1] and k % scale.shape[1] == 0 else 1
    return take_tensor(module, tensors, "weight_scale", (n, groups), dtypes)


def _from_float8(module: str, tensors: Mapping[str, Tensor], kept: Tensor, nibbles: Tensor) -> Tensor:
    """float8 times scale as 16-bit values [N, K], in the type of the scales (bfloat16 for float32 ones), rounded once."""
    n, k = kept.shape[0], 2 * kept.shape[1]
    scale = _scale(module, tensors, (n, k), (*FLOATS, torch.float32))
    weight = put_kept(kept.view(torch.uint8), nibbles).view(FLOAT8).float()
    product = weight.reshape(n, scale.shape[1], -1) * scale.float()[:, :, None]
    return product.reshape(n, k).to(scale.dtype if scale.dtype in FLOATS else torch.bfloat16)
