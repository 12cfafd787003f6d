"""`pack-quantized`: the weight-only integer format of compressed-tensors (W4A16, W8A16), symmetric.

Runs in stock transformers and stock vLLM without any plugin (vLLM 0.32 on a CPU: 4 bits only, K and N multiples of 32).
Sparsity is not used: zeros are stored as codes 0. An output head is held too (vLLM finds it by its name); an 8-bit one
needs a GPU there, `sparsify export --head 16` multiplies it out.

    weight_packed   int32 [N, K * bits / 32]     all codes in input order, offset binary, first code lowest
    weight_scale    bfloat16 or float16 [N, K/G] G = K: one scale per output channel
    weight_shape    int64 [2]                    N, K
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.formats.packing import pack_words, unpack_words
from sparsify.formats.scheme import (
    AGAIN,
    FLOATS,
    NOT_OWN,
    Label,
    ModuleScheme,
    common_label,
    in_block,
    linear_problem,
    scheme_problem,
    take_bias,
    take_tensor,
    with_bias,
)
from sparsify.model.linear import LinearWeights, is_two_four

SUFFIXES = frozenset({"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"})
METHOD = "compressed-tensors"


class PackQuantized:
    """The format that everybody else reads."""

    name = "pack-quantized"
    suffixes = SUFFIXES

    def supports(self, linear: LinearWeights) -> str | None:
        if linear.bits == 16:
            return "pack-quantized holds 4- or 8-bit codes, and this linear is not quantized"
        return linear_problem(linear)

    def encode(self, linear: LinearWeights) -> dict[str, Tensor]:
        assert linear.codes is not None and linear.scale is not None
        encoded = {
            "weight_packed": pack_words(linear.codes, linear.bits),
            "weight_scale": linear.scale,
            "weight_shape": torch.tensor(linear.shape, dtype=torch.int64),
        }
        return with_bias(encoded, linear)

    def decode(self, module: str, tensors: Mapping[str, Tensor], scheme: ModuleScheme) -> LinearWeights:
        """The format does not say whether zeros are a pattern, so the pattern is read off the codes."""
        if problem := scheme_problem(scheme):
            raise CheckpointError(f"{module}: {problem}; sparsify reads no such pack-quantized linear")
        for suffix in sorted({"weight_zero_point", "weight_g_idx"} & set(tensors)):
            expected = "expected symmetric codes in input order, found this tensor"
            raise CheckpointError(f"{module}.{suffix}: {expected}; quantize the dense model again without it")
        n, k = scheme.shape
        shape = take_tensor(module, tensors, "weight_shape", (2,), (torch.int64, torch.int32))
        if shape.tolist() != [n, k]:
            raise CheckpointError(f"{module}.weight_shape: expected {[n, k]}, found {shape.tolist()}; {AGAIN}")
        packed = take_tensor(module, tensors, "weight_packed", (n, k * scheme.bits // 32), (torch.int32,))
        scale = take_tensor(module, tensors, "weight_scale", (n, k // scheme.group_size), FLOATS)
        codes = unpack_words(packed, scheme.bits)
        pattern = "2:4" if is_two_four(codes) else "dense"
        if scheme.pattern == "2:4" and pattern != "2:4":
            expected = "expected 2:4 codes, found more than two non-zero in a group of 4"
            raise CheckpointError(f"{module}.weight_packed: {expected}; {AGAIN}")
        bias = take_bias(module, tensors, n)
        return LinearWeights(scheme.bits, pattern, scheme.group_size, codes=codes, scale=scale, bias=bias)

    def quantization_config(self, modules: Mapping[str, ModuleScheme], ignore: list[str]) -> dict[str, Any] | None:
        """As llm-compressor writes it: most linears by class, those with another scheme by name, dense ones ignored."""
        if not modules:
            return None
        plain = {n: ModuleScheme(s.bits, s.group_size, "dense", s.shape) for n, s in sorted(modules.items())}
        default = common_label(plain)
        assert default is not None
        targets: dict[Label, list[str]] = {default: ["Linear"]}
        for name, scheme in plain.items():
            if default not in scheme.labels():
                targets.setdefault(scheme.labels()[0], []).append(name)
            elif not in_block(name):  # in vLLM an output head is no Linear: it is found by its name only
                targets[default].append(name)
        return {
            "quant_method": METHOD,
            "format": self.name,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": ignore,
            "config_groups": {f"group_{i}": _group(label, names) for i, (label, names) in enumerate(targets.items())},
        }

    def recognises(self, quantization_config: Mapping[str, Any] | None) -> bool:
        config = quantization_config or {}
        return config.get("quant_method") == METHOD and config.get("format") == self.name

    def schemes(
        self, quantization_config: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, ModuleScheme]:
        labels = _labels_by_target(quantization_config or {})
        end = ".weight_packed"
        packed = {name.removesuffix(end): shape for name, shape in shapes.items() if name.endswith(end)}
        schemes = {}
        for module, shape in sorted(packed.items()):
            label = _matching(module, labels)
            if label is None:
                raise CheckpointError(f"{module} is packed, but no group in config.json targets it; {NOT_OWN}")
            if len(shape) != 2:
                raise CheckpointError(f"{module}.weight_packed: expected a matrix, found {list(shape)}; {AGAIN}")
            schemes[module] = label.scheme((shape[0], shape[1] * (32 // label.bits)))
        for target in labels:
            # a target that names a module (and not a class or a regular expression) must be there
            if "." in target and not target.startswith("re:") and target not in packed:
                raise CheckpointError(f"config.json lists {target} as compressed, which no file holds; {NOT_OWN}")
        return schemes


def _group(label: Label, targets: list[str]) -> dict[str, Any]:
    channel = label.group_size == "channel"
    weights = {
        "num_bits": label.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else label.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {
        "format": "pack-quantized", "targets": targets, "weights": weights,
        "input_activations": None, "output_activations": None,
    }  # fmt: skip


def _labels_by_target(config: Mapping[str, Any]) -> dict[str, Label]:
    """The config groups as target -> label; CheckpointError when a group is not symmetric weight-only integers."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict):
        raise CheckpointError(f"quantization_config: config_groups is missing or no object; {AGAIN}")
    labels: dict[str, Label] = {}
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        targets = group.get("targets") if isinstance(group, dict) else None
        named = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
        if not isinstance(weights, dict) or not isinstance(targets, list) or not named:
            raise CheckpointError(f"quantization_config, {name}: expected weights and a list of targets; {AGAIN}")
        strategy, bits, size = weights.get("strategy"), weights.get("num_bits"), weights.get("group_size")
        grouped = strategy == "group" and isinstance(size, int) and size > 0
        readable = weights.get("type", "int") == "int" and (strategy == "channel" or grouped)
        symmetric = weights.get("symmetric", True) is True and not group.get("input_activations")
        if not isinstance(bits, int) or bits not in (4, 8) or not readable or not symmetric:
            raise CheckpointError(
                f"quantization_config, {name}: expected symmetric 4- or 8-bit integer weights, per group or channel, "
                f"and no quantized activations, found {bits!r} bits, strategy {strategy!r}, group size {size!r}, "
                f"symmetric {weights.get('symmetric')!r}; quantize the dense model again"
            )
        labels |= {target: Label(bits, size if grouped else "channel", "dense") for target in targets}
    return labels


def _matching(module: str, labels: Mapping[str, Label]) -> Label | None:
    """As compressed-tensors does: the exact name first, then regular expressions, then the class of the module."""
    if module in labels:
        return labels[module]
    for target, label in labels.items():
        try:
            if target.startswith("re:") and re.match(target.removeprefix("re:"), module):
                return label
        except re.error as error:
            problem = f"target {target!r} is no regular expression ({error})"
            raise CheckpointError(f"quantization_config: {problem}; {AGAIN}") from None
    return labels.get("Linear")
