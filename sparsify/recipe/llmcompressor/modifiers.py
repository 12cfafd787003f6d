"""What each modifier of llm-compressor asks for, read into `Work`: which linears, which settings of our passes."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sparsify.recipe.llmcompressor.settings import Body, Settings
from sparsify.recipe.llmcompressor.targets import (
    EVERYTHING,
    USUAL,
    is_class,
    names,
    names_head,
    pattern_inside,
    pattern_of,
    rank,
)

_SPEED_ONLY = ("block_size", "offload_hessians", "sequential_update", "sequential_targets", "batched_quantization")
_LIFECYCLE = ("index", "group", "start", "end", "update")  # when training starts and stops a modifier
_WRITTEN = ("requires_calibration_data",)  # what llm-compressor finds out by itself and writes into recipe.yaml
LIFECYCLE = (*_LIFECYCLE, *_WRITTEN)
NO_EFFECT = (*_SPEED_ONLY, *LIFECYCLE)

_OBSERVER = re.compile(r"(memoryless_|static_)?(?P<kind>minmax|mse)")
_PRESET = re.compile(r"W(?P<bits>[2-8])A(?P<activations>4|8|16)(?P<asymmetric>_ASYM)?")
_PARAMETER = re.compile(r"(\\?\.)?(\\?\*)?weight\$?$")
_PARTS = {"Attention": "self_attn", "MLP": "mlp"}


@dataclass(frozen=True)
class Rule:
    """What a modifier does to the linears of one target.

    target:  as llm-compressor writes it
    pattern: in our recipe; None names every linear of the blocks
    values:  settings of our pass; None leaves the linears as they are
    place:   where the target was written
    """

    target: str
    pattern: str | None
    values: Body | None
    place: str

    @property
    def of_head_only(self) -> bool:
        return self.pattern is not None and names_head(self.target) and not any(names(self.target, n) for n in USUAL)


@dataclass(frozen=True)
class Work:
    """One modifier, read.

    kind:    prune or quantize
    rules:   weakest first: a linear gets what the last rule says that names it
    ignore:  our patterns of linears that it leaves alone, and the place where they were written
    head:    what it makes of the output head: bits, group_size, symmetric, method; None leaves it
    damping: None for a method without a Hessian
    """

    kind: str
    modifier: str
    place: str
    rules: list[Rule]
    ignore: Any
    ignore_place: str
    head: Body | None = None
    damping: tuple[Any, str] | None = None


def prune(settings: Settings, method: str) -> Work:
    """SparseGPTModifier and WandaPruningModifier."""
    settings.must_be("mask_structure", ("2:4",), 'prunes 2:4 only (mask_structure: "2:4")', "0:0")
    settings.must_be("sparsity", (0.5,), "prunes half of the weights, as 2:4 does (sparsity: 0.5)", 0.5)
    settings.must_be("preserve_sparsity_mask", (False,), "starts from a dense model", False)
    damping = _damping(settings) if method == "sparsegpt" else None
    values: Body = {"method": (method, settings.place()), "pattern": ("2:4", settings.place())}
    work = _pruning(settings, values, targets=settings.take("targets", ["Linear"]))
    return replace(work, damping=damping)


def magnitude(settings: Settings, method: str) -> Work:
    """MagnitudePruningModifier, where it is not gradual."""
    settings.must_be("mask_structure", ("2:4",), 'prunes 2:4 only (mask_structure: "2:4")', "unstructured")
    for key in ("init_sparsity", "final_sparsity"):
        settings.must_be(key, (0.5,), f"prunes half of the weights, at once ({key}: 0.5)")
    settings.drop("update_scheduler", "scheduler_args")
    values: Body = {"method": (method, settings.place()), "pattern": ("2:4", settings.place())}
    return _pruning(settings, values, targets=_of_parameters(settings.take("targets", ["__ALL__"])))


def keep(settings: Settings, method: str) -> Work:
    """ConstantPruningModifier: the zeros that are there stay."""
    values: Body = {"method": (method, settings.place()), "pattern": ("2:4", settings.place())}
    return _pruning(settings, values, targets=_of_parameters(settings.take("targets", ["__ALL__"])))


def quantize(settings: Settings, method: str) -> Work:
    """GPTQModifier and QuantizationModifier."""
    order = _order(settings, "actorder", unset=method == "gptq")
    written = "actorder" in settings.written
    observer = _observer(settings)
    rules: list[Rule] = []
    for group in _groups(settings):
        rules += _group_rules(group, method, order if method == "gptq" else None, written, observer)
    damping = _damping(settings) if method == "gptq" else None
    ignore = _ignore(settings)
    rules.sort(key=lambda rule: rank(rule.target))
    settings.drop(*NO_EFFECT)
    settings.finish()
    place = settings.place()
    head = _head(rules, ignore, method)
    return Work("quantize", settings.modifier, place, rules, _patterns(ignore), settings.place("ignore"), head, damping)


def says_nothing(settings: Settings) -> bool:
    """Whether a GPTQModifier has no groups of its own, so that it goes by a QuantizationModifier before it."""
    values = settings.values
    targets, ignore = values.get("targets") or "Linear", values.get("ignore") or []
    own = settings.given & {"config_groups", "scheme", "kv_cache_scheme"}
    return not own and not ignore and targets in ("Linear", ["Linear"])


def gptq_after(settings: Settings, before: Work) -> Work:
    """The linears and groups of the QuantizationModifier `before`, solved by GPTQ. The order is that of the groups: the default
    of this modifier reaches groups of its own only."""
    damping = _damping(settings)
    settings.drop("actorder", "targets", *NO_EFFECT)
    settings.finish()
    place = settings.place()

    def solved(values: Body | None) -> Body | None:
        return None if values is None else {**values, "method": ("gptq", place)}

    rules = [replace(rule, values=solved(rule.values)) for rule in before.rules]
    return replace(before, modifier=settings.modifier, rules=rules, head=solved(before.head), damping=damping)


# ------------------------------------------------------------------------------------------------- targets and ignore


def _pruning(settings: Settings, values: Body, targets: Any) -> Work:
    """The work of a pruning modifier, whose targets are linears or modules that hold them. The output head is left."""
    place = settings.place("targets")
    rules = []
    for target in _listed(settings, "targets", targets):
        if target in EVERYTHING or target.endswith("DecoderLayer"):
            rules.append(Rule("Linear", None, values, place))
        elif is_class(target):
            _refuse_class(settings, "targets", target)
        elif target in ("lm_head", "re:.*lm_head", "re:.*lm_head$"):
            settings.refuse("targets", f"'{target}' is the output head, which sparsify does not prune; remove it")
        elif (pattern := pattern_inside(target)) is not None:
            rules.append(Rule(target, pattern, values, place))
        else:
            settings.refuse(
                "targets",
                f"targets {target} cannot be translated: it names modules that hold linears, and its '$' does not end it; "
                "write one target each",
            )
    ignore = _ignore(settings)
    settings.drop(*NO_EFFECT)
    settings.finish()
    rules.sort(key=lambda rule: rank(rule.target))
    place = settings.place()
    return Work("prune", settings.modifier, place, rules, _patterns(ignore), settings.place("ignore"))


def _of_parameters(targets: Any) -> Any:
    """Targets that may name parameters (`re:.*q_proj.weight`) as ones that name their modules."""
    if isinstance(targets, list):
        return [_of_parameters(target) for target in targets]
    if not isinstance(targets, str) or targets in EVERYTHING:
        return targets
    if not targets.startswith("re:"):
        return targets.removesuffix(".weight")
    module = _PARAMETER.sub("", targets[3:])
    if module == targets[3:]:
        return targets
    return "Linear" if module in ("", ".", ".*", "^.*") else f"re:{module}$"


def _listed(settings: Settings, key: str, value: Any) -> list[str]:
    """A name or a list of names as a list."""
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, str) for entry in entries):
        settings.refuse(key, f"{key} {value} cannot be translated: it must be a name or a list of names")
    return list(entries)


def _refuse_class(settings: Settings, key: str, target: str) -> None:
    settings.refuse(
        key,
        f"{key} {target} cannot be translated: '{target}' is a class, and of classes sparsify takes Linear alone, the linears "
        f"of the decoder blocks; name the linears, for instance 're:.*down_proj$'",
    )


def _ignore(settings: Settings) -> Any:
    """What a modifier ignores, as it writes it; classes that are ignored by name as well are left out."""
    ignore = settings.take("ignore", [])
    ignore = [ignore] if isinstance(ignore, str) else ignore
    if not isinstance(ignore, list):
        return ignore  # no list: validation says so
    classes = [entry for entry in ignore if isinstance(entry, str) and is_class(entry)]
    others = [entry for entry in ignore if entry not in classes]
    for entry in classes:
        part = next((part for end, part in _PARTS.items() if entry.endswith(end)), None)
        linears = [name for name in USUAL if part and f".{part}." in name]
        if not linears or not all(any(names(str(other), name) for other in others) for name in linears):
            settings.refuse(
                "ignore",
                f"'{entry}' in ignore is a class, but sparsify ignores by module name (llm-compressor compares it with the "
                f"class of the linear itself); name the modules instead, for instance 're:.*router'",
            )
    return others


def _patterns(ignore: Any) -> Any:
    if not isinstance(ignore, list):
        return ignore
    return [pattern_of(entry) if isinstance(entry, str) else entry for entry in ignore]


def _head(rules: list[Rule], ignore: Any, method: str) -> Body | None:
    """What the strongest rule that names the output head makes of it."""
    if isinstance(ignore, list) and any(names_head(str(entry)) for entry in ignore):
        return None
    for rule in reversed(rules):
        if rule.pattern is None or names(rule.target, "lm_head"):
            if rule.values is None:
                return None
            head = {key: rule.values[key] for key in ("bits", "group_size", "symmetric")}
            return {**head, "method": (method, rule.place)}
    return None


# ------------------------------------------------------------------------------------------------------- quantization


def _damping(settings: Settings) -> tuple[Any, str]:
    """None where it is not given."""
    return settings.take("dampening_frac"), settings.place("dampening_frac")


Order = tuple[bool, str]


def _order(settings: Settings, key: str, unset: bool) -> Order:
    """The order of columns: static (weight is its old name) visits those of large activations first, in groups that stay as they
    are. unset: what it is where nothing is written; null, written, is no order. Takes the setting."""
    if key not in settings.written:
        return unset, settings.place()
    place, value = settings.place(key), settings.word(key)
    if value in (None, False, "none"):
        return False, place
    if value in ("static", "weight"):
        return True, place
    settings.refuse(
        key,
        f"{key}: {value} reorders the stored weights, which no format here allows and llm-compressor 0.14 no longer does; "
        f"write {key}: static",
    )
    raise AssertionError


def _observer(settings: Settings) -> Body:
    """`scale_search` as the modifier says it for all of its groups; empty where it says nothing."""
    several = settings.take("observer")
    if several is not None:
        view = settings.nested("observer", several)
        given, at = view.take("weights"), view
        view.finish()
    else:
        given, at = settings.take("weight_observer"), settings
    if given is None:
        return {}
    return {"scale_search": (_searches(at, given), at.place("weights" if several is not None else "weight_observer"))}


def _searches(settings: Settings, observer: Any) -> bool:
    """Whether an observer looks for the scale of least error (mse); minmax takes that of the largest weight."""
    match = _OBSERVER.fullmatch(str(observer).lower())
    if match is None:
        key = next((key for key in ("observer", "weight_observer", "weights") if key in settings.given), None)
        settings.refuse(key, f"observer: {observer} has no counterpart in sparsify; write minmax or mse")
        raise AssertionError
    return match["kind"] == "mse"


@dataclass(frozen=True)
class _Group:
    """Targets and how their weights are quantized; weights None leaves them dense."""

    targets: list[str]
    weights: Settings | None
    place: str
    view: Settings


def _groups(settings: Settings) -> list[_Group]:
    """The config groups, or those that a preset scheme stands for."""
    scheme, groups = settings.take("scheme"), settings.take("config_groups")
    if groups is not None and scheme is not None:
        settings.refuse("scheme", "both scheme and config_groups are given; keep one")
    targets = settings.take("targets", ["Linear"])
    if groups is not None:
        outer = settings.nested("config_groups", groups)
        if not groups:
            settings.refuse("config_groups", "config_groups is empty")
        return [_group(outer.nested(name, group)) for name, group in groups.items()]
    if isinstance(scheme, dict) and "weights" in scheme:
        return [_group(settings.nested("scheme", {"targets": targets, **scheme}))]
    if isinstance(scheme, dict) and scheme:
        view = settings.nested("scheme", scheme)
        return [_preset(view, name, _listed(view, name, named), name) for name, named in scheme.items()]
    return [_preset(settings, scheme, _listed(settings, "targets", targets), "scheme")]


def _group(view: Settings) -> _Group:
    targets = _listed(view, "targets", view.take("targets", ["Linear"]))
    view.drop("format")
    weights = view.take("weights")
    view.finish()
    nested = None if weights is None else view.nested("weights", weights)
    return _Group(targets, nested, view.place("targets"), view)


def _preset(settings: Settings, scheme: Any, targets: list[str], key: str) -> _Group:
    """The schemes that compressed-tensors defines by name. key: where the scheme is written"""
    place = settings.place("targets") if "targets" in settings.given else settings.place(key)
    if scheme is None:
        settings.refuse(None, "needs a scheme or config_groups that says how to quantize")
    if str(scheme).upper() == "UNQUANTIZED":
        return _Group(targets, None, place, settings)
    match = _PRESET.fullmatch(str(scheme).upper())
    if match is None or match["activations"] != "16":
        why = ", which quantize weights alone" if match is not None or str(scheme).upper() == "INT8" else ""
        settings.refuse(key, f"scheme: {scheme} has no counterpart in sparsify; write W4A16 or W8A16{why}")
        raise AssertionError
    weights = {"num_bits": int(match["bits"]), "strategy": "group", "group_size": 128}
    if match["asymmetric"]:
        weights["symmetric"] = False
    return _Group(targets, settings.nested(key, weights), place, settings)


def _group_rules(group: _Group, method: str, order: Order | None, written: bool, observer: Body) -> list[Rule]:
    """One rule per target. order: that of a modifier which has one; written: it is no default"""
    values = None if group.weights is None else _weights(group.weights, method, order, written, observer)
    rules = []
    for target in group.targets:
        if is_class(target) and target not in EVERYTHING:
            _refuse_class(group.view, "targets", target)
        rules.append(Rule(target, None if target in EVERYTHING else pattern_of(target), values, group.place))
    return rules


def _weights(weights: Settings, method: str, order: Order | None, written: bool, observer: Body) -> Body:
    """The settings of our quantize pass for the weights of one group."""
    bits = weights.must_be("num_bits", (4, 8), "quantizes to 4 or 8 bits", 8)
    bits_place = weights.place("num_bits")
    weights.must_be("type", ("int",), "quantizes to integers (type: int)", "int")
    symmetric = weights.must_be("symmetric", (True, False), "takes true or false", True)
    symmetric_place = weights.place("symmetric")
    if not symmetric:  # what llm-compressor writes of a group with zero points
        weights.must_be("zp_dtype", ("torch.int8",), "stores zero points as int8 (zp_dtype: torch.int8)", "torch.int8")
    weights.must_be("dynamic", (False,), "quantizes weights once (dynamic: false)", False)
    group_size, place = weights.take("group_size", -1), weights.place("group_size")
    strategy = weights.word("strategy", "channel" if group_size == -1 and "group_size" in weights.given else None)
    strategy = strategy or ("group" if group_size != -1 else "tensor")
    if strategy not in ("group", "channel"):
        weights.refuse("strategy", f"strategy: {strategy} has no counterpart in sparsify; write group or channel")
    if strategy == "group" and group_size == -1:
        weights.refuse("strategy", "strategy: group needs a group_size")
    searches = weights.take("observer")
    search: Body = {"scale_search": (True, weights.place())}  # ours, where no observer is written
    if observer:
        search = observer
    elif searches is not None:
        search = {"scale_search": (_searches(weights, searches), weights.place("observer"))}
    body: Body = {
        "method": (method, weights.document.origin(weights.path[:-1])),
        "bits": (bits, bits_place),
        "group_size": ("channel" if strategy == "channel" else group_size, place),
        "symmetric": (symmetric, symmetric_place),
        "activation_order": _group_order(weights, order, written),
        **search,
    }
    weights.finish()
    return body


def _group_order(weights: Settings, order: Order | None, written: bool) -> Order:
    """The order of one group, by GPTQModifier's rules: what the group says counts, else what the modifier says, which is static
    where it says nothing; two that differ are an error there."""
    own = _order(weights, "actorder", unset=False)
    if order is None or (own[0] and not written):
        return own
    if own[0] and own[0] != order[0]:
        weights.refuse("actorder", "actorder of the group and of the modifier differ; keep one")
    return order


_QUANTIZATION = ("config_groups", "targets", "scheme", "kv_cache_scheme", "weight_observer", "observer")
_OF_SCHEME = (*_QUANTIZATION, "ignore")


def transform(settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of a modifier that llm-compressor runs itself, and those of the quantization that an AWQModifier of old holds."""
    settings.drop(*NO_EFFECT)
    if settings.values.get("offload_device") == "not_provided":
        settings.drop("offload_device")
    values = {key: value for key, value in settings.values.items() if value is not None}
    if settings.modifier == "SpinQuantModifier" and {"R3", "R4"} & set(values.get("rotations", ())):
        settings.refuse(
            "rotations", "R3 and R4 turn activations while the model runs, which no format here can say; keep R1 and R2"
        )
    if settings.modifier != "AWQModifier" or not set(values) & set(_QUANTIZATION):
        return values, {}
    quantization = {key: values.pop(key) for key in _OF_SCHEME if key in values}
    return values, quantization


def without_quantization(scheme: dict[str, Any]) -> dict[str, Any]:
    """What a QuantizationModifier must know of a modifier that quantizes: which linears, and how many bits."""
    return {key: value for key, value in scheme.items() if key in _OF_SCHEME and value is not None}


NO_COUNTERPART = {
    "QuIPModifier": "whose formats cannot say that activations are turned while the model runs; run it in llm-compressor",
    "REAPPruningModifier": "which does not remove experts; run it in llm-compressor and give sparsify the model that it writes",
}
"""Modifiers of llm-compressor that can neither be translated nor run before us, and why."""

MODIFIERS: dict[str, tuple[str, Callable[[Settings, str], Work]]] = {
    "SparseGPTModifier": ("sparsegpt", prune),
    "WandaPruningModifier": ("wanda", prune),
    "MagnitudePruningModifier": ("magnitude", magnitude),
    "ConstantPruningModifier": ("keep", keep),
    "GPTQModifier": ("gptq", quantize),
    "QuantizationModifier": ("rtn", quantize),
}
"""Name -> the method of our pass, and what reads its settings."""
