"""`gptq`: integers as AutoGPTQ and GPTQModel store them, the inputs in order.

vLLM, transformers (with gptqmodel) and most engines read it. Sparsity is not used: zeros are stored as codes. The words are
described in `gptq_packing.py`; a linear has

    qweight   int32 [K * bits / 32, N]
    qzeros    int32 [K/G, N * bits / 32]         symmetric: the middle of the range everywhere
    scales    bfloat16 or float16 [K/G, N]       G = K: one scale per output channel, `group_size: -1`
    g_idx     int32 [K]                          k // G

config.json has one `bits` and `group_size` for all; `dynamic` (GPTQModel, vLLM) holds other settings by regular expression.
AutoGPTQ 0.7.1 reads `quantize_config.json` instead, knows no `dynamic`, and needs every linear of the blocks to be quantized.

Symmetric linears are written in version 1 (`checkpoint_format: gptq`), which everything reads. It has no word for a zero point at
the low end of the range on which readers agree, so those with zero points are written in version 2 (`gptq_v2`), which GPTQModel
reads. The version is that of a whole checkpoint: one of both kinds is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.formats.gptq_packing import (
    VERSIONS,
    group_indices,
    pack_codes,
    pack_zero_points,
    unpack_codes,
    unpack_zero_points,
)
from sparsify.formats.scheme import (
    AGAIN,
    FLOATS,
    NOT_OWN,
    Format,
    Label,
    ModuleScheme,
    common_label,
    in_block,
    scheme_problem,
    stored_problem,
    take_bias,
    take_tensor,
    with_bias,
)
from sparsify.matching import matches, pattern_problem, refuse_many
from sparsify.model.linear import LinearWeights, is_two_four

SUFFIXES = frozenset({"qweight", "qzeros", "scales", "g_idx"})
MULTIPLE = 32  # AutoGPTQ makes room for whole words of 32 inputs and of 32 outputs
DEFAULT = Label(4, 128, "dense")


class Gptq(Format):
    """What most engines read as 4- and 8-bit weights."""

    name = "gptq"
    suffixes = SUFFIXES
    holds = "linears that are quantized to 4 or 8 bits, group_size 32, 64, 128 or channel, inputs and outputs in multiples of 32"
    records_pattern = False
    config_file = "quantize_config.json"

    def problem(self, scheme: ModuleScheme, dtype: torch.dtype) -> str | None:
        if scheme.bits == 16:
            return "gptq holds 4- or 8-bit codes, and this linear is not quantized"
        if scheme.shape[0] % MULTIPLE or scheme.shape[1] % MULTIPLE:
            return f"gptq holds multiples of {MULTIPLE} outputs and inputs, not {scheme.shape[0]} x {scheme.shape[1]}"
        return stored_problem(scheme, dtype)

    def together_problem(self, modules: Mapping[str, ModuleScheme]) -> str | None:
        asymmetric = [module for module, scheme in modules.items() if not scheme.symmetric]
        symmetric = [module for module, scheme in modules.items() if scheme.symmetric]
        if not asymmetric or not symmetric:
            return None
        return (
            f"gptq stores the zero points of a whole checkpoint in one way: {asymmetric[0]} has them and {symmetric[0]} is "
            "symmetric; make all linears alike, or export sparse24 or pack-quantized"
        )

    def encode(self, linear: LinearWeights) -> dict[str, Tensor]:
        assert linear.codes is not None and linear.scale is not None
        zero_point = torch.zeros_like(linear.scale, dtype=torch.int8) if linear.symmetric else linear.zero_point
        assert zero_point is not None
        encoded = {
            "qweight": pack_codes(linear.codes, linear.bits),
            "qzeros": pack_zero_points(zero_point, linear.bits, version=1 if linear.symmetric else 2),
            "scales": linear.scale.t().contiguous(),
            "g_idx": group_indices(linear.shape[1], linear.group_size),
        }
        return with_bias(encoded, linear)

    def decode(self, module: str, tensors: Mapping[str, Tensor], scheme: ModuleScheme) -> LinearWeights:
        """The format does not say whether zeros are a pattern, so the pattern is read off the codes."""
        if problem := scheme_problem(scheme):
            raise CheckpointError(f"{module}: {problem}; sparsify reads no such gptq linear")
        (n, k), bits, groups = scheme.shape, scheme.bits, scheme.shape[1] // scheme.group_size
        qweight = take_tensor(module, tensors, "qweight", (k * bits // 32, n), (torch.int32,))
        qzeros = take_tensor(module, tensors, "qzeros", (groups, n * bits // 32), (torch.int32,))
        scales = take_tensor(module, tensors, "scales", (groups, n), FLOATS)
        zero_point = None if scheme.symmetric else unpack_zero_points(qzeros, bits, version=2)
        # a checkpoint is of one version; the middle of the range cannot be mistaken for that of the other
        if scheme.symmetric and not any(
            not unpack_zero_points(qzeros, bits, version).any() for version in VERSIONS.values()
        ):
            expected = "expected symmetric weights (zero points in the middle of the range), found others"
            raise CheckpointError(f"{module}.qzeros: {expected}; quantize the dense model again with sym: true")
        if "g_idx" in tensors:
            g_idx = take_tensor(module, tensors, "g_idx", (k,), (torch.int32,))
            if not torch.equal(g_idx, group_indices(k, scheme.group_size)):
                expected = "expected inputs in order, found activation order"
                raise CheckpointError(
                    f"{module}.g_idx: {expected}; quantize the dense model again with desc_act: false"
                )
        linear = LinearWeights(
            bits, "dense", scheme.group_size,
            codes=unpack_codes(qweight, bits), scale=scales.t().contiguous(), zero_point=zero_point,
        )  # fmt: skip
        pattern = "2:4" if is_two_four(linear.unscaled()) else "dense"
        return replace(linear, pattern=pattern, bias=take_bias(module, tensors, n))

    def quantization_config(self, modules: Mapping[str, ModuleScheme], ignore: list[str]) -> dict[str, Any] | None:
        if not modules:
            return None
        plain = {n: replace(s, pattern="dense") for n, s in sorted(modules.items())}
        default = common_label({n: s for n, s in plain.items() if in_block(n)}) or common_label(plain) or DEFAULT
        dynamic: dict[str, dict[str, Any]] = {f"-:^{re.escape(name)}$": {} for name in ignore if in_block(name)}
        for name, scheme in plain.items():
            if default not in scheme.labels():
                dynamic[f"+:^{re.escape(name)}$"] = _settings(scheme.labels()[0])
        outside = [name for name in plain if not in_block(name)]
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq" if default.symmetric else "gptq_v2",
            **_settings(default),
            "sym": default.symmetric,
            "desc_act": False,
            "static_groups": False,
            "true_sequential": True,
            "lm_head": bool(outside),
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
        }

    def recognises(self, quantization_config: Mapping[str, Any] | None) -> bool:
        return quantization_config is not None and quantization_config.get("quant_method") == self.name

    def schemes(
        self, quantization_config: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, ModuleScheme]:
        config = GptqConfig.from_dict(quantization_config or {})
        if (quantization_config or {}).get("desc_act", False) is not False:
            raise CheckpointError("quantization_config: expected desc_act: false; quantize the dense model again so")
        end, schemes = ".qweight", {}
        for name in sorted(shapes):
            if name.endswith(end):
                module, shape = name.removesuffix(end), shapes[name]
                label = config.label(module)
                if label is None:
                    raise CheckpointError(f"{module} is packed, but `dynamic` in config.json excludes it; {NOT_OWN}")
                if len(shape) != 2:
                    raise CheckpointError(f"{name}: expected a matrix, found {list(shape)}; {AGAIN}")
                schemes[module] = label.scheme((shape[1], shape[0] * 32 // label.bits))
        if not schemes:
            raise CheckpointError(f"config.json says that the model is in gptq, but no tensor is; {NOT_OWN}")
        return schemes


@dataclass(frozen=True)
class GptqConfig:
    """The quantization_config of such a checkpoint. dynamic: (regular expression, settings), None for what stays dense."""

    default: Label
    dynamic: tuple[tuple[str, Label | None], ...]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "GptqConfig":
        """Read `quantization_config`; CheckpointError says what is wrong with it."""
        version = config.get("checkpoint_format", config.get("format", "gptq"))
        if version not in VERSIONS:
            known = " or ".join(VERSIONS)
            raise CheckpointError(
                f"quantization_config: expected checkpoint_format {known}, found {version!r}; {AGAIN}"
            )
        rules = config.get("dynamic") or {}
        if not isinstance(rules, dict) or not all(isinstance(rule, dict) for rule in rules.values()):
            raise CheckpointError(f"quantization_config: dynamic must map regular expressions to settings; {AGAIN}")
        if problem := refuse_many(f"re:{pattern[2:]}" for pattern in rules):
            raise CheckpointError(f"quantization_config: dynamic: {problem}; {AGAIN}")
        dynamic = []
        for pattern, rule in rules.items():
            left = pattern.startswith("-:")
            expression = pattern.removeprefix("-:" if left else "+:")
            if problem := pattern_problem(expression):
                raise CheckpointError(
                    f"quantization_config: dynamic {pattern[:100]!r} is no regular expression ({problem}); {AGAIN}"
                )
            dynamic.append((expression, None if left else _label({**config, **rule})))
        found = cls(_label(config), tuple(dynamic))
        labels = [found.default, *(label for _, label in dynamic if label is not None)]
        if version != "gptq_v2" and not all(label.symmetric for label in labels):
            raise CheckpointError(
                "quantization_config: expected sym: true or checkpoint_format: gptq_v2; quantize the dense model again so"
            )
        return found

    def label(self, module: str) -> Label | None:
        """How a linear is packed, as GPTQModel looks it up: the first rule that matches; None when one excludes it."""
        return next((label for pattern, label in self.dynamic if matches(pattern, module)), self.default)


def _settings(label: Label) -> dict[str, Any]:
    return {"bits": label.bits, "group_size": -1 if label.group_size == "channel" else label.group_size}


def _label(config: Mapping[str, Any]) -> Label:
    bits, size = config.get("bits"), config.get("group_size")
    if bits not in (4, 8) or not isinstance(size, int) or isinstance(size, bool) or (size <= 0 and size != -1):
        found = f"bits {bits!r} and group_size {size!r}"
        raise CheckpointError(
            f"quantization_config: expected bits 4 or 8 and group_size as a number or -1, found {found}"
        )
    symmetric = config.get("sym", True)
    if not isinstance(symmetric, bool):
        raise CheckpointError(f"quantization_config: expected sym true or false, found {symmetric!r}")
    return Label(bits, "channel" if size == -1 else size, "dense", symmetric)
