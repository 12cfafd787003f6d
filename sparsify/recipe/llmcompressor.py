"""Recipes of llm-compressor (`*_stage: *_modifiers: SparseGPTModifier: ...`) read as ours.

Only one-shot weight pruning to 2:4 and integer weight quantization have a counterpart here. Settings that change how
llm-compressor computes but not what (block sizes, offloading) are dropped; everything else without a counterpart is
refused by name, because a recipe that silently does something else is worse than none.
"""

import re
from collections.abc import Callable
from typing import Any

from sparsify.errors import RecipeError
from sparsify.recipe.document import Document, KeyPath

HEAD = "lm_head"
DAMPING = 0.01  # llm-compressor's dampening_frac where none is given

_SPEED_ONLY = {"block_size", "offload_hessians", "sequential_update", "sequential_targets", "batched_quantization"}
_LIFECYCLE = {"index", "group", "start", "end", "update"}  # when training starts and stops a modifier
_OBSERVER = re.compile(r"(memoryless_|static_)?(?P<kind>minmax|mse)")


def recognised(document: Document) -> bool:
    """Whether the document is written in llm-compressor's dialect."""
    return any(str(key).endswith(("_stage", "_modifiers", "Modifier")) for key in document.data)


def translate(document: Document) -> Document:
    """The same work in our language. Every value keeps the line it came from."""
    return _Translator(document).run()


class _Translator:
    """Walks the stages in order; `passes` and `origins` are the recipe that comes out.

    ignored, damping: what each modifier says of linears and of the solver, which stands once in our recipe
    """

    def __init__(self, document: Document) -> None:
        self.document = document
        self.passes: list[dict[str, dict[str, Any]]] = []
        self.origins: dict[KeyPath, str] = {}
        self.ignored: dict[str, tuple[Any, str]] = {}
        self.damping: dict[str, tuple[Any, str]] = {}
        self.keeps: str | None = None

    def run(self) -> Document:
        for key, value in self.document.data.items():
            if key.endswith("_stage"):
                self._stage(value, (key,))
            elif key.endswith("_modifiers"):
                self._modifiers(value, (key,))
            elif key.endswith("Modifier"):
                self._modifier(key, value, (key,))
            elif key == "args" and not value:
                continue
            else:
                self._refuse((key,), f"'{key}' of an llm-compressor recipe has no counterpart here; remove it")
        if self.keeps is not None and not any("prune" in entry for entry in self.passes):
            self._insert_keep(self.keeps)
        if not self.passes:
            self._refuse((), "this llm-compressor recipe holds no modifier that sparsify knows")
        kinds = [kind for entry in self.passes for kind in entry]
        data = {
            "version": 1,
            **self._ignore(),
            **self._solver(),
            "passes": self.passes,
            "export": {"format": "sparse24" if "prune" in kinds else "pack-quantized"},
        }
        return Document(self.document.name, data, {(): self.document.origin(()), **self.origins})

    def _ignore(self) -> dict[str, Any]:
        """What all modifiers ignore, as `ignore`; what only one of them does, as overrides that leave that half out."""
        odd = next((entry for entry in self.ignored.values() if not isinstance(entry[0], list)), None)
        if odd is not None:  # no list: validation says so
            self.origins["ignore",] = odd[1]
            return {"ignore": odd[0]}
        lists = [patterns for patterns, _ in self.ignored.values()]
        everywhere: list[Any] = []
        overrides: list[dict[str, Any]] = []
        for kind, (patterns, place) in self.ignored.items():
            self.origins.setdefault(("ignore",), place)
            for pattern in patterns:
                # the head is no linear that a pass touches here, so it may stand in either list
                if all(pattern in other for other in lists) or str(pattern).rstrip("$").endswith(HEAD):
                    everywhere += [] if pattern in everywhere else [pattern]
                else:
                    self.origins["overrides", len(overrides)] = place
                    overrides.append({"match": pattern, kind: None})
        return {"ignore": everywhere, **({"overrides": overrides} if overrides else {})}

    def _solver(self) -> dict[str, Any]:
        """The one damping of all modifiers that invert a Hessian."""
        given = [entry for entry in self.damping.values() if entry[0] is not None]
        if not given:
            return {}
        for modifier, (value, _) in self.damping.items():
            damping = DAMPING if value is None else value
            if damping != given[0][0]:
                raise RecipeError(
                    f"{given[0][1]}: dampening_frac is {given[0][0]} here and {damping} in {modifier}; one solver serves "
                    "pruning and quantization, so give both the same"
                )
        self.origins["solver", "damping"] = given[0][1]
        return {"solver": {"damping": given[0][0]}}

    def _refuse(self, path: KeyPath, message: str) -> None:
        raise self.document.error(path, message)

    def _mapping(self, value: Any, path: KeyPath) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._refuse(path, f"'{path[-1]}' must be a mapping")
        return value

    def _stage(self, stage: Any, path: KeyPath) -> None:
        settings = self._mapping(stage, path)
        if settings.get("run_type", "oneshot") != "oneshot":
            self._refuse(
                (*path, "run_type"),
                f"stage '{path[-1]}' is for training (run_type: {settings['run_type']}), which sparsify does not "
                f"translate; remove the stage",
            )
        for key, value in settings.items():
            if key.endswith("_modifiers"):
                self._modifiers(value, (*path, key))
            elif key != "run_type":
                self._refuse((*path, key), f"'{key}' in stage '{path[-1]}' has no counterpart here; remove it")

    def _modifiers(self, group: Any, path: KeyPath) -> None:
        for name, settings in self._mapping(group, path).items():
            self._modifier(name, settings, (*path, name))

    def _modifier(self, name: str, settings: Any, path: KeyPath) -> None:
        view = _Settings(self.document, name, self._mapping({} if settings is None else settings, path), path)
        if name == "ConstantPruningModifier":
            return self._keep_mask(view)
        if name not in _MODIFIERS:
            known = ", ".join([*_MODIFIERS, "ConstantPruningModifier"])
            self._refuse(path, f"{name} has no counterpart in sparsify, which translates {known}")
        kind, method, read = _MODIFIERS[name]
        body = read(view, method)
        view.finish()
        self.ignored[kind] = body.pop("ignore")
        if "damping" in body:
            self.damping[name] = body.pop("damping")
        at: KeyPath = ("passes", len(self.passes), kind)
        self.origins[at] = self.document.origin(path)
        self.origins |= {(*at, key): place for key, (_, place) in body.items()}
        self.passes.append({kind: {key: value for key, (value, _) in body.items()}})

    def _keep_mask(self, settings: "_Settings") -> None:
        """Zeros stay zero in every pass here; without a pass that makes them, the model brings them along."""
        settings.drop("targets", *_LIFECYCLE)
        settings.finish()
        self.keeps = settings.place()

    def _insert_keep(self, place: str) -> None:
        """`prune: {method: keep}` before all other passes. place: where the modifier stands"""
        moved = {
            (path[0], path[1] + 1, *path[2:]) if path[0] == "passes" and isinstance(path[1], int) else path: origin
            for path, origin in ((path, origin) for path, origin in self.origins.items() if path)
        }
        self.origins = {**moved, ("passes", 0, "prune"): place}
        self.passes.insert(0, {"prune": {"method": "keep", "pattern": "2:4"}})


Body = dict[str, tuple[Any, str]]  # key of our recipe -> value and the place it was written


class _Settings:
    """The settings of one modifier. Each is taken once; `finish` refuses what nobody took."""

    def __init__(self, document: Document, modifier: str, values: dict[str, Any], path: KeyPath) -> None:
        self.document, self.modifier, self.path = document, modifier, path
        self.values = dict(values)
        self.given = {key for key, value in values.items() if value is not None}

    def refuse(self, key: str | None, message: str) -> None:
        path = self.path if key is None else (*self.path, key)
        raise self.document.error(path, f"{self.modifier}: {message}")

    def take(self, key: str, default: Any = None) -> Any:
        value = self.values.pop(key, default)
        return default if value is None else value

    def place(self, *keys: str) -> str:
        return self.document.origin((*self.path, *keys))

    def drop(self, *keys: str) -> None:
        for key in keys:
            self.values.pop(key, None)

    def must_be(self, key: str, allowed: tuple[Any, ...], meaning: str, default: Any = None) -> Any:
        """Take a setting of which only some values have a counterpart."""
        value = self.take(key, default)
        if not any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in allowed):
            self.refuse(key, f"{key}: {value} has no counterpart in sparsify, which {meaning}")
        return value

    def nested(self, key: str, values: Any) -> "_Settings":
        if not isinstance(values, dict):
            self.refuse(key, f"'{key}' must be a mapping")
        return _Settings(self.document, self.modifier, values, (*self.path, key))

    def finish(self) -> None:
        for key, value in self.values.items():
            if value not in (None, False, {}):
                self.refuse(key, f"'{key}' has no counterpart in sparsify; remove it")


def _common(settings: _Settings) -> Body:
    """Targets and ignore, which pruning and quantization share."""
    _all_linears(settings)
    ignore, place = settings.take("ignore", []), settings.place("ignore")
    ignore = [ignore] if isinstance(ignore, str) else ignore
    for pattern in ignore if isinstance(ignore, list) else ():
        if isinstance(pattern, str) and re.fullmatch(r"[A-Z]\w*", pattern):
            settings.refuse(
                "ignore",
                f"'{pattern}' in ignore is a class, but sparsify ignores by module name; "
                f"name the modules instead, for instance 're:.*router'",
            )
    settings.drop(*_SPEED_ONLY, *_LIFECYCLE)
    return {"ignore": (ignore, place)}


def _all_linears(settings: _Settings) -> None:
    targets = settings.take("targets", ["Linear"])
    if targets not in ("Linear", "__ALL__", ["Linear"], ["__ALL__"]):
        settings.refuse(
            "targets",
            f"targets {targets} cannot be translated: sparsify takes every linear of the decoder blocks but those in "
            f"'ignore'; write targets: [Linear] and list the others under ignore",
        )


def _damping(settings: _Settings) -> Body:
    """None where it is not given."""
    return {"damping": (settings.take("dampening_frac"), settings.place("dampening_frac"))}


def _prune(settings: _Settings, method: str) -> Body:
    settings.must_be("mask_structure", ("2:4",), 'prunes 2:4 only (mask_structure: "2:4")', "0:0")
    settings.must_be("sparsity", (0.5,), "prunes half of the weights, as 2:4 does (sparsity: 0.5)", 0.5)
    settings.must_be("preserve_sparsity_mask", (False,), "starts from a dense model", False)
    damping = _damping(settings) if method == "sparsegpt" else {}
    return {"method": (method, settings.place()), "pattern": ("2:4", settings.place()), **_common(settings), **damping}


def _quantize(settings: _Settings, method: str) -> Body:
    order, order_at = settings.take("actorder"), settings
    observer, observer_at = settings.take("weight_observer"), settings
    weights = _weights(settings)
    bits = weights.must_be("num_bits", (4, 8), "quantizes to 4 or 8 bits", 8)
    bits_place = weights.place("num_bits")
    weights.must_be("type", ("int",), "quantizes to integers (type: int)", "int")
    weights.must_be("symmetric", (True,), "quantizes symmetrically (symmetric: true)", True)
    weights.must_be("dynamic", (False,), "quantizes weights once (dynamic: false)", False)
    group_size, place = weights.take("group_size", -1), weights.place("group_size")
    strategy = weights.take("strategy", "channel" if group_size == -1 and "group_size" in weights.given else None)
    strategy = strategy or ("group" if group_size != -1 else "tensor")
    if strategy not in ("group", "channel"):
        weights.refuse("strategy", f"strategy: {strategy} has no counterpart in sparsify; write group or channel")
    if strategy == "group" and group_size == -1:
        weights.refuse("strategy", "strategy: group needs a group_size")
    if "actorder" in weights.given:
        order, order_at = weights.take("actorder"), weights
    if "observer" in weights.given:
        observer, observer_at = weights.take("observer"), weights
    body: Body = {
        "method": (method, settings.place()),
        "bits": (bits, bits_place),
        "group_size": ("channel" if strategy == "channel" else group_size, place),
        **_common(settings),
    }
    if method == "gptq":
        body |= _damping(settings)
    if order not in (None, "none"):
        if order not in ("static", "weight"):
            order_at.refuse(
                "actorder",
                f"actorder: {order} reorders the stored weights, which no format here allows; write actorder: static",
            )
        body["activation_order"] = (True, order_at.place("actorder"))
    if observer is not None:
        match = _OBSERVER.fullmatch(str(observer))
        if match is None:
            observer_at.refuse("observer", f"observer: {observer} has no counterpart in sparsify; write minmax or mse")
        else:
            body["scale_search"] = (match["kind"] == "mse", observer_at.place("observer"))
    weights.finish()
    return body


def _weights(settings: _Settings) -> _Settings:
    """How weights are quantized, from the only config group or from a preset scheme."""
    scheme, groups = settings.take("scheme"), settings.take("config_groups")
    if groups is not None and scheme is not None:
        settings.refuse("scheme", "both scheme and config_groups are given; keep one")
    if groups is not None:
        names = list(settings.nested("config_groups", groups).values)
        if len(names) != 1:
            settings.refuse("config_groups", f"{len(names)} config groups cannot be translated, exactly one can")
        outer = settings.nested("config_groups", groups)
        group = outer.nested(names[0], groups[names[0]])
    elif isinstance(scheme, dict) and "weights" in scheme:
        group = settings.nested("scheme", scheme)
    else:
        return _preset(settings, scheme)
    _all_linears(group)
    group.drop("format")
    weights = group.nested("weights", group.take("weights", {}))
    group.finish()
    return weights


def _preset(settings: _Settings, scheme: Any) -> _Settings:
    """The schemes that compressed-tensors defines by name."""
    if scheme is None:
        settings.refuse(None, "needs a scheme or config_groups that says how to quantize")
    name = scheme
    if isinstance(scheme, dict) and len(scheme) == 1:
        ((name, targets),) = scheme.items()
        _all_linears(settings.nested("scheme", {"targets": targets}))
    known = {"W4A16": 4, "W8A16": 8}
    if not isinstance(name, str) or name.upper() not in known:
        settings.refuse("scheme", f"scheme: {name} has no counterpart in sparsify; write {' or '.join(known)}")
    return settings.nested("scheme", {"num_bits": known[str(name).upper()], "strategy": "group", "group_size": 128})


_MODIFIERS: dict[str, tuple[str, str, Callable[[_Settings, str], Body]]] = {
    "SparseGPTModifier": ("prune", "sparsegpt", _prune),
    "WandaPruningModifier": ("prune", "wanda", _prune),
    "GPTQModifier": ("quantize", "gptq", _quantize),
    "QuantizationModifier": ("quantize", "rtn", _quantize),
}
