"""The quantization_config of compressed-tensors: which modules a checkpoint compresses and how. For the formats it has named."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from sparsify.errors import CheckpointError
from sparsify.formats.scheme import AGAIN, NOT_OWN, Label, ModuleScheme, common_label, in_block
from sparsify.matching import matches, refuse_many

METHOD = "compressed-tensors"
Found = TypeVar("Found")


def describe(format: str, modules: Mapping[str, ModuleScheme], ignore: list[str]) -> dict[str, Any] | None:
    """As llm-compressor writes it: most linears by class, those with another scheme by name, dense ones ignored."""
    if not modules:
        return None
    default = common_label(modules)
    assert default is not None
    targets: dict[Label, list[str]] = {default: ["Linear"]}
    for name, scheme in modules.items():
        if default not in scheme.labels():
            targets.setdefault(scheme.labels()[0], []).append(name)
        elif not in_block(name):  # in vLLM an output head is no Linear: it is found by its name only
            targets[default].append(name)
    return {
        "quant_method": METHOD,
        "format": format,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": {
            f"group_{i}": _group(format, label, names) for i, (label, names) in enumerate(targets.items())
        },
    }


def is_described(config: Mapping[str, Any] | None, format: str) -> bool:
    """Whether `config` is of a checkpoint in that format."""
    return config is not None and config.get("quant_method") == METHOD and config.get("format") == format


def labels_of(
    config: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[Label, tuple[int, int]]]:
    """How each packed module is compressed, with the shape of its packed matrix; CheckpointError where they disagree.

    shapes: of every tensor of the checkpoint, by name
    """
    for name in sorted(shapes):
        if name.endswith(".bitmask"):
            module = name.removesuffix(".bitmask")
            other = (config or {}).get("format")
            raise CheckpointError(f"{module} is in sparse-24-bitmask beside {other}, which sparsify reads alone only")
    end = ".weight_packed"
    packed = {name.removesuffix(end): shape for name, shape in shapes.items() if name.endswith(end)}
    labels = labels_by_target(config or {})
    found = {}
    for module, shape in sorted(packed.items()):
        label = matching(module, labels)
        if label is None:
            raise CheckpointError(f"{module} is packed, but no group in config.json targets it; {NOT_OWN}")
        if len(shape) != 2:
            raise CheckpointError(f"{module}.weight_packed: expected a matrix, found {list(shape)}; {AGAIN}")
        found[module] = (label, (shape[0], shape[1]))
    for target in labels:
        # a target that names a module (and not a class or a regular expression) must be there
        if "." in target and not target.startswith("re:") and target not in packed:
            raise CheckpointError(f"config.json lists {target} as compressed, which no file holds; {NOT_OWN}")
    return found


def _group(format: str, label: Label, targets: list[str]) -> dict[str, Any]:
    channel = label.group_size == "channel"
    weights = {
        "num_bits": label.bits,
        "type": "int",
        "symmetric": label.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else label.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {
        "format": format, "targets": targets, "weights": weights,
        "input_activations": None, "output_activations": None,
    }  # fmt: skip


def weights_by_target(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the config groups say of weights, by target; CheckpointError when a group is damaged.

    Each comes with `group`, its name, and `input_activations` of that group.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, dict):
        raise CheckpointError(f"quantization_config: config_groups is missing or no object; {AGAIN}")
    found: dict[str, dict[str, Any]] = {}
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        targets = group.get("targets") if isinstance(group, dict) else None
        named = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
        if not isinstance(weights, dict) or not isinstance(targets, list) or not named:
            raise CheckpointError(f"quantization_config, {name}: expected weights and a list of targets; {AGAIN}")
        said = {**weights, "group": name, "input_activations": group.get("input_activations")}
        found |= dict.fromkeys(targets, said)
    if problem := refuse_many(found):
        raise CheckpointError(f"quantization_config, targets: {problem}; {AGAIN}")
    return found


def labels_by_target(config: Mapping[str, Any]) -> dict[str, Label]:
    """The config groups as target -> label; CheckpointError when a group is not of weight-only integers."""
    labels: dict[str, Label] = {}
    for target, weights in weights_by_target(config).items():
        name = weights["group"]
        if target == "Embedding":
            raise CheckpointError(
                f"quantization_config, {name}: it quantizes embeddings, and the linears of a format are packed alone; "
                "quantize the dense model again without that group"
            )
        strategy, bits, size = weights.get("strategy"), weights.get("num_bits"), weights.get("group_size")
        grouped = strategy == "group" and isinstance(size, int) and size > 0
        readable = weights.get("type", "int") == "int" and (strategy == "channel" or grouped)
        symmetric = weights.get("symmetric", True)
        readable = readable and isinstance(symmetric, bool) and not weights["input_activations"]
        if not isinstance(bits, int) or bits not in (4, 8) or not readable:
            raise CheckpointError(
                f"quantization_config, {name}: expected 4- or 8-bit integer weights, per group or channel, and no quantized "
                f"activations, found {bits!r} bits, strategy {strategy!r}, group size {size!r}, symmetric {symmetric!r}; "
                "quantize the dense model again"
            )
        labels[target] = Label(bits, size if grouped else "channel", "dense", symmetric)
    return labels


def names_in(config: Mapping[str, Any], key: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
    """A list of modules, regular expressions and classes in `config`; CheckpointError when it is something else."""
    names = config.get(key)
    if names is None:
        return default
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"quantization_config: {key} must be a list of module names; {AGAIN}")
    if problem := refuse_many(names):
        raise CheckpointError(f"quantization_config, {key}: {problem}; {AGAIN}")
    return tuple(names)


def is_name(target: str) -> bool:
    """Whether a target names one module, and is no class and no regular expression."""
    return not target.startswith("re:") and target != "Linear"


def is_ignored(module: str, ignore: Iterable[str]) -> bool:
    """Whether a module is in a list of names and regular expressions."""
    return matching(module, dict.fromkeys((name for name in ignore if name != "Linear"), True)) is not None


def matching(module: str, labels: Mapping[str, Found]) -> Found | None:
    """As compressed-tensors does: the exact name first, then regular expressions, then the class of the module."""
    if module in labels:
        return labels[module]
    for target, label in labels.items():
        try:
            if target.startswith("re:") and matches(target.removeprefix("re:"), module):
                return label
        except ValueError as error:
            problem = f"target {target[:100]!r} is no regular expression ({error})"
            raise CheckpointError(f"quantization_config: {problem}; {AGAIN}") from None
    return labels.get("Linear")
