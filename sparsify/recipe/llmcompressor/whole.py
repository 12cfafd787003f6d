"""Recipes that llm-compressor runs from the first modifier to the last.

A recipe with a modifier or a setting that prunes or quantizes as no pass of ours does is handed over whole: all of its
modifiers run there, in their order, and what llm-compressor saves is the result.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sparsify.recipe.methods import TRANSFORMS

Entries = Iterable[Mapping[str, Mapping[str, Any]]]
"""`llm_compressor` of a recipe: modifiers in their order, each `{NAME: settings}`."""

AUTOROUND = "AutoRoundModifier"
QUANTIZES = (AUTOROUND, "GPTQModifier", "QuantizationModifier")
PRUNES = ("SparseGPTModifier", "WandaPruningModifier", "MagnitudePruningModifier", "ConstantPruningModifier")
KNOWN = (*TRANSFORMS, *QUANTIZES, *PRUNES)
SAVED = "compressed-tensors"  # the export format that keeps what llm-compressor saves
REMOVED = "actorder: group"  # in llm-compressor 0.14
_TEXT = (AUTOROUND, "GPTQModifier", "SparseGPTModifier", "WandaPruningModifier")
_PRESET = re.compile(r"W(?P<bits>[2-8])A16(?P<asymmetric>_ASYM)?")
_ONLINE = {"R3", "R4"}  # rotations of SpinQuant that turn activations while the model runs
_HELD_GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class _Group:
    """A config group of a modifier. weights: None where it leaves them dense; path: of the group inside the modifier."""

    targets: list[str]
    weights: Mapping[str, Any] | None
    activations: bool
    path: tuple[str, ...]

    @property
    def strategy(self) -> str:
        """As compressed-tensors infers it where it is not written."""
        weights = self.weights or {}
        size = weights.get("group_size")
        return _word(weights.get("strategy")) or ("tensor" if size is None else "channel" if size == -1 else "group")

    @property
    def held(self) -> bool:
        """Whether our pack-quantized holds its codes."""
        if self.weights is None:
            return True
        size = self.strategy == "channel" or (
            self.strategy == "group" and self.weights.get("group_size") in _HELD_GROUPS
        )
        plain = self.weights.get("symmetric") is not False and "Embedding" not in self.targets
        return size and plain and self.weights.get("num_bits", 8) in (4, 8)


def without_counterpart(name: str, settings: Mapping[str, Any]) -> str | None:
    """What of a modifier sparsify has not and llm-compressor runs itself, for instance `observer: imatrix_mse`; else None."""
    if name == AUTOROUND:
        return name
    if name in ("SparseGPTModifier", "WandaPruningModifier"):
        structure = settings.get("mask_structure") or "0:0"
        return None if structure == "2:4" else f"mask_structure: {structure}"
    if name not in QUANTIZES:
        return None
    observer = settings.get("observer")
    observers = [settings.get("weight_observer"), observer.get("weights") if isinstance(observer, dict) else observer]
    if _orders_groups(settings):
        return REMOVED
    for group in _groups(settings):
        weights = group.weights or {}
        if weights.get("observer_kwargs"):
            return "observer_kwargs"
        if "Embedding" in group.targets:
            return "target Embedding"
        if group.weights is not None and group.strategy == "tensor":
            return "strategy: tensor"
        observers.append(weights.get("observer"))
    return next((f"observer: {named}" for named in observers if "imatrix" in _word(named)), None)


def unusable(name: str, settings: Mapping[str, Any]) -> tuple[tuple[str, ...], str] | None:
    """What of a modifier makes a model that sparsify cannot read or run: the place inside of its settings, and why; else None."""
    if name not in KNOWN:
        return (), f"sparsify hands over {', '.join(KNOWN)}"
    if _ONLINE & set(_names(settings.get("rotations"))):
        return (
            "rotations",
        ), "R3 and R4 turn activations while the model runs, which no format here can say; keep R1 and R2"
    if settings.get("sparsity_profile") is not None:
        return ("sparsity_profile",), "sparsity_profile is not handed over; give one sparsity for all"
    if name not in QUANTIZES:
        return None
    if settings.get("kv_cache_scheme") is not None:
        return (
            "kv_cache_scheme",
        ), "a quantized key-value cache is read by nothing here; sparsify takes quantized weights alone"
    scheme = settings.get("scheme")
    for preset in [] if scheme is None or (isinstance(scheme, dict) and "weights" in scheme) else _names(scheme):
        if _PRESET.fullmatch(preset.upper()) is None and preset.upper() != "UNQUANTIZED":
            return (
                "scheme",
            ), f"scheme: {preset} is no scheme of integer weights alone; write W4A16, W8A16 or config_groups"
    for group in _groups(settings):
        weights = group.weights or {}
        if group.activations:
            return group.path, "quantized activations are run by nothing here; sparsify takes quantized weights alone"
        if _word(weights.get("type", "int")) != "int":
            return (*group.path, "weights", "type"), f"type: {weights['type']} is no integer; sparsify takes type: int"
        if weights.get("num_bits", 8) not in range(2, 9):
            return (*group.path, "weights", "num_bits"), "num_bits must be a number from 2 to 8"
    return None


def saved_as(entries: Entries) -> str:
    """The export format that keeps what llm-compressor makes of a whole recipe: `dense` where nothing is quantized,
    `pack-quantized` where that holds all codes, else `compressed-tensors`, the files as llm-compressor saves them."""
    quantizing = [(settings, _groups(settings)) for name, settings in _each(entries) if name in QUANTIZES]
    if not quantizing:
        return "dense"
    held = all(group.held for _, groups in quantizing for group in groups)
    return "pack-quantized" if held and not needs_older(entries) else SAVED


def leaves_zeros(entries: Entries) -> bool:
    """Whether any modifier prunes without the 2:4 pattern."""
    return any(
        (without_counterpart(name, settings) or "").startswith("mask_structure") for name, settings in _each(entries)
    )


def needs_older(entries: Entries) -> bool:
    """Whether only llm-compressor up to 0.13 runs it."""
    return any(name in QUANTIZES and _orders_groups(settings) for name, settings in _each(entries))


def reads_text(entries: Entries) -> bool:
    """Whether any modifier looks at what calibration text activates."""
    return any(
        TRANSFORMS.get(name, name in _TEXT) or (name in QUANTIZES and "imatrix" in str(settings).lower())
        for name, settings in _each(entries)
    )


def names_of(entries: Entries) -> list[str]:
    """The modifiers by name, in order."""
    return [name for name, _ in _each(entries)]


def _each(entries: Entries) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, settings) for entry in entries for name, settings in entry.items()]


def _orders_groups(settings: Mapping[str, Any]) -> bool:
    """Whether groups are formed in the order of activations, so that weights are stored with the group of each input."""
    written = [settings.get("actorder"), *((group.weights or {}).get("actorder") for group in _groups(settings))]
    return any(value is True or _word(value) == "group" for value in written)


def _groups(settings: Mapping[str, Any]) -> list[_Group]:
    """The config groups of a modifier that quantizes, or those that its preset scheme stands for."""
    scheme, groups, targets = settings.get("scheme"), settings.get("config_groups"), settings.get("targets")
    if isinstance(groups, dict):
        return [_group(group, ("config_groups", str(name))) for name, group in groups.items()]
    if isinstance(scheme, dict) and "weights" in scheme:
        return [_group({"targets": targets, **scheme}, ("scheme",))]
    presets = scheme if isinstance(scheme, dict) else {} if scheme is None else {scheme: targets}
    return [_group({"targets": named, "weights": _preset(str(name))}, ("scheme",)) for name, named in presets.items()]


def _group(group: Any, path: tuple[str, ...]) -> _Group:
    group = group if isinstance(group, dict) else {}
    weights = group.get("weights")
    activations = group.get("input_activations") is not None or group.get("output_activations") is not None
    named = _names(group.get("targets")) or ["Linear"]
    return _Group(named, weights if isinstance(weights, dict) else None, activations, path)


def _preset(name: str) -> dict[str, Any] | None:
    """The weights of a scheme that compressed-tensors defines by name."""
    match = _PRESET.fullmatch(name.upper())
    if match is None:
        return None
    symmetric = match["asymmetric"] is None
    return {"num_bits": int(match["bits"]), "strategy": "group", "group_size": 128, "symmetric": symmetric}


def _names(value: Any) -> list[str]:
    entries = [value] if isinstance(value, str) else value
    return [str(entry) for entry in entries] if isinstance(entries, list | tuple | dict) else []


def _word(value: Any) -> str:
    return "" if value is None else str(value).lower()
