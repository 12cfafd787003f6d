"""The modifiers of a recipe put together: one prune and one quantize pass, overrides, `ignore`, the solver and the output head;
or, where one of them has no counterpart, `llm_compressor` with all of them and no pass."""

from typing import Any

from sparsify.errors import RecipeError
from sparsify.recipe.document import Document, KeyPath
from sparsify.recipe.llmcompressor.modifiers import (
    LIFECYCLE,
    MODIFIERS,
    NO_COUNTERPART,
    Rule,
    Work,
    gptq_after,
    quantize,
    says_nothing,
    transform,
    without_quantization,
)
from sparsify.recipe.llmcompressor.settings import Body, Settings
from sparsify.recipe.llmcompressor.targets import USUAL, names, names_head
from sparsify.recipe.llmcompressor.whole import KNOWN, saved_as, unusable, without_counterpart
from sparsify.recipe.methods import TRANSFORMS

DAMPING = 0.01  # llm-compressor's dampening_frac where none is given
KEEP = "ConstantPruningModifier"
DEFAULTS: dict[str, Any] = {
    "symmetric": True,
    "activation_order": False,
    "scale_search": True,
}  # what a pass need not say


def translate(document: Document) -> Document:
    """The same work in our language. Every value keeps the line it came from."""
    return _Translator(document).run()


class _Translator:
    """Walks the stages in order; `found` are the modifiers as written, `works` as read, `origins` the places of the recipe that
    comes out."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.found: list[tuple[str, dict[str, Any], KeyPath]] = []
        self.works: list[Work] = []
        self.kept: Work | None = None
        self.handed: list[tuple[str, dict[str, Any], KeyPath]] = []
        self.schemes: list[dict[str, Any]] = []
        self.origins: dict[KeyPath, str] = {}
        self.overrides: list[dict[str, Any]] = []

    def run(self) -> Document:
        for key, value in ((str(key), value) for key, value in self.document.data.items()):
            if _is_stage(key):
                self._stage(value, (key,))
            elif key.endswith("_modifiers"):
                self._modifiers(value, (key,))
            elif key.endswith("Modifier"):
                self._find(key, value, (key,))
            elif key == "args" and not value:
                continue
            else:
                self._refuse((key,), f"'{key}' of an llm-compressor recipe has no counterpart here; remove it")
        if any(without_counterpart(name, values) for name, values, _ in self.found):
            return self._whole()
        for name, values, path in self.found:
            self._modifier(name, values, path)
        if self.kept is not None and all(work.kind != "prune" for work in self.works):
            self.works.insert(0, self.kept)
        if not self.works and self.handed:
            self._refuse(
                self.handed[0][2],
                f"{self.handed[0][0]} has no counterpart in sparsify, which lets llm-compressor run it before it compresses; "
                "but no modifier follows that prunes or quantizes",
            )
        if not self.works:
            self._refuse((), "this llm-compressor recipe holds no modifier that sparsify knows")
        return self._recipe()

    # ----------------------------------------------------------------------------------------------------- reading

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
                f"translate: the recipe does not say on what; remove the stage, or train with a distill or finetune pass",
            )
        for key, value in settings.items():
            if str(key).endswith("_modifiers"):
                self._modifiers(value, (*path, key))
            elif key != "run_type":
                self._refuse((*path, key), f"'{key}' in stage '{path[-1]}' has no counterpart here; remove it")

    def _modifiers(self, group: Any, path: KeyPath) -> None:
        for name, settings in self._mapping(group, path).items():
            self._find(name, settings, (*path, name))

    def _find(self, name: str, values: Any, path: KeyPath) -> None:
        self.found.append((name, self._mapping({} if values is None else values, path), path))

    def _whole(self) -> Document:
        """The recipe that llm-compressor runs from end to end, settings as they stand."""
        entries: list[dict[str, Any]] = []
        for name, values, path in self.found:
            if name not in KNOWN:
                self._refuse(path, _unknown(name))
            if problem := unusable(name, values):
                self._refuse((*path, *problem[0]), f"{name}: {problem[1]}")
            settings = Settings(self.document, name, values, path)
            own, quantization = transform(settings) if name == "AWQModifier" else (_written(values), {})
            self.origins["llm_compressor", len(entries)] = self.document.origin(path)
            entries += [{name: own}, *([{"QuantizationModifier": _written(quantization)}] if quantization else [])]
        data = {"version": 1, "llm_compressor": entries, "passes": [], "export": {"format": saved_as(entries)}}
        return Document(self.document.name, data, {(): self.document.origin(()), **self.origins})

    def _modifier(self, name: str, values: dict[str, Any], path: KeyPath) -> None:
        settings = Settings(self.document, name, values, path)
        if name in TRANSFORMS:
            self._hand_over(settings, path)
            return
        if name not in MODIFIERS:
            self._refuse(path, _unknown(name))
        method, read = MODIFIERS[name]
        if name == KEEP:  # all passes keep zeros; without a pass that makes them, the model brings them along
            self.kept = read(settings, method)
            return
        before = self.works[-1] if self.works else None
        if read is quantize and method == "gptq" and says_nothing(settings) and before and before.kind == "quantize":
            self.works[-1] = gptq_after(settings, before)
            return
        scheme = dict(settings.values)
        work = read(settings, method)
        if work.kind == "quantize":
            self.schemes.append(scheme)
        self._check_apart(work, path)
        self.works.append(work)

    def _hand_over(self, settings: Settings, path: KeyPath) -> None:
        """A modifier that llm-compressor runs itself, on the dense model. An AWQModifier of old quantizes as well."""
        if self.works:
            self._refuse(
                path,
                f"{settings.modifier} changes the dense model but stands after {self.works[-1].modifier}; put it first",
            )
        own, quantization = transform(settings)
        self.handed.append((settings.modifier, own, path))
        if quantization:
            self._modifier("QuantizationModifier", quantization, path)

    def _handed_over(self) -> dict[str, Any]:
        """`llm_compressor` of our recipe. AWQ looks for what its quantization loses least by, so that goes along."""
        if not self.handed:
            return {}
        entries = [{name: settings} for name, settings, _ in self.handed]
        if any(name == "AWQModifier" for name, _, _ in self.handed):
            if not self.schemes:
                self._refuse(
                    self.handed[0][2], "AWQModifier prepares for quantization, and no modifier follows that quantizes"
                )
            entries += [{"QuantizationModifier": without_quantization(scheme)} for scheme in self.schemes]
        self.origins["llm_compressor",] = self.document.origin(self.handed[0][2])
        return {"llm_compressor": entries}

    def _check_apart(self, work: Work, path: KeyPath) -> None:
        """Two modifiers of one kind must name different linears and ignore the same, or it is not clear who decides."""
        for other in self.works:
            if other.kind != work.kind:
                continue
            both = next((name for name in USUAL if _named(work, name) and _named(other, name)), None)
            if both is not None:
                self._refuse(
                    path,
                    f"{work.modifier} and {other.modifier} both {work.kind} {both}; a linear is decided once, so name each in "
                    "one of the two",
                )
            if sorted(map(str, work.ignore)) != sorted(map(str, other.ignore)):
                self._refuse(path, f"{work.modifier} and {other.modifier} ignore different modules; give both the same")

    # ----------------------------------------------------------------------------------------------------- writing

    def _recipe(self) -> Document:
        kinds = list(dict.fromkeys(work.kind for work in self.works))
        ignore = self._ignore(kinds)
        passes = [self._pass(kind, ("passes", index, kind)) for index, kind in enumerate(kinds)]
        self._leave_out(kinds, ignore)
        export: dict[str, Any] = {"format": "sparse24" if "prune" in kinds else "pack-quantized"}
        if head := next((work.head for work in self.works if work.head is not None), None):
            export["head"] = self._written(head, ("export", "head"))
        data = {
            "version": 1,
            **self._handed_over(),
            "ignore": ignore,
            **self._solver(),
            "passes": passes,
            "export": export,
            **({"overrides": self.overrides} if self.overrides else {}),
        }
        return Document(self.document.name, data, {(): self.document.origin(()), **self.origins})

    def _written(self, body: Body, path: KeyPath) -> dict[str, Any]:
        """Plain values of a body; their places go into `origins`."""
        self.origins |= {(*path, key): place for key, (_, place) in body.items()}
        return {key: value for key, (value, _) in body.items()}

    def _pass(self, kind: str, path: KeyPath) -> dict[str, Any]:
        """The pass of a kind, with overrides for the linears that its rules set otherwise."""
        works = [work for work in self.works if work.kind == kind]
        rules = [rule for work in works for rule in work.rules if not rule.of_head_only]
        base = next((rule for rule in rules if rule.values is not None), None)
        if base is None or base.values is None:
            raise RecipeError(f"{works[0].place}: {works[0].modifier} names no linear of the decoder blocks")
        self.origins[path] = works[0].place
        values = _effective(base.values)
        if base.pattern is not None:
            self._override("*", {kind: None}, base.place)
        bodies = [_effective(rule.values) for rule in rules if rule.values is not None]
        differing = [key for key in values if any(body[key][0] != values[key][0] for body in bodies)]
        for rule in rules:
            if rule is not base or rule.pattern is not None:
                self._change(kind, rule, differing or ["method"])
        body = {key: entry for key, entry in values.items() if key not in DEFAULTS or entry[0] != DEFAULTS[key]}
        return {kind: self._written(body, path)}

    def _change(self, kind: str, rule: Rule, keys: list[str]) -> None:
        """The override of one rule. keys: of all that rules of the kind set differently, since a linear may match several."""
        if rule.values is None:
            return self._override(rule.pattern or "*", {kind: None}, rule.place)
        changes = {key: entry for key, entry in _effective(rule.values).items() if key in keys}
        path: KeyPath = ("overrides", len(self.overrides), kind)
        self._override(rule.pattern or "*", {kind: self._written(changes, path)}, rule.place)

    def _override(self, pattern: str, change: dict[str, Any], place: str) -> None:
        self.origins["overrides", len(self.overrides)] = place
        self.overrides.append({"match": pattern, **change})

    def _ignore(self, kinds: list[str]) -> Any:
        """What all kinds ignore; the output head may stand in either list, since no pass touches it."""
        odd = next((work for work in self.works if not isinstance(work.ignore, list)), None)
        if odd is not None:  # no list: validation says so
            self.origins["ignore",] = odd.ignore_place
            return odd.ignore
        everywhere: list[Any] = []
        for work in self.works:
            self.origins.setdefault(("ignore",), work.ignore_place)
            for pattern in work.ignore:
                common = all(any(pattern in w.ignore for w in self.works if w.kind == kind) for kind in kinds)
                if (common or names_head(str(pattern))) and pattern not in everywhere:
                    self.origins["ignore", len(everywhere)] = work.ignore_place
                    everywhere.append(pattern)
        return everywhere

    def _leave_out(self, kinds: list[str], everywhere: list[Any]) -> None:
        """Overrides for what only one kind ignores."""
        for kind in kinds:
            work = next(work for work in self.works if work.kind == kind)
            for pattern in work.ignore if isinstance(work.ignore, list) else ():
                if pattern not in everywhere:
                    self._override(pattern, {kind: None}, work.ignore_place)

    def _solver(self) -> dict[str, Any]:
        """The one damping of all modifiers that invert a Hessian."""
        damped = [(work.modifier, *work.damping) for work in self.works if work.damping is not None]
        given = [(value, place) for _, value, place in damped if value is not None]
        if not given:
            return {}
        for modifier, value, _ in damped:
            damping = DAMPING if value is None else value
            if damping != given[0][0]:
                raise RecipeError(
                    f"{given[0][1]}: dampening_frac is {given[0][0]} here and {damping} in {modifier}; one solver serves "
                    "pruning and quantization, so give both the same"
                )
        self.origins["solver", "damping"] = given[0][1]
        return {"solver": {"damping": given[0][0]}}


def _unknown(name: str) -> str:
    why = NO_COUNTERPART.get(name, f"which reads {', '.join(KNOWN)}")
    return f"{name} has no counterpart in sparsify, {why}"


def _written(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a modifier without those that are not set and those of when training starts. `actorder: null` says
    something else than nothing."""
    return {k: v for k, v in values.items() if k not in LIFECYCLE and (v is not None or k == "actorder")}


def _is_stage(key: str) -> bool:
    stem, _, number = key.rpartition("_")
    return key.endswith("_stage") or (stem.endswith("_stage") and number.isdecimal())


def _named(work: Work, module: str) -> bool:
    """Whether a modifier names a linear."""
    ignored = isinstance(work.ignore, list) and any(names(str(entry), module) for entry in work.ignore)
    return not ignored and any(rule.pattern is None or names(rule.pattern, module) for rule in work.rules)


def _effective(values: Body) -> Body:
    """Rounding to nearest visits columns in no order."""
    if values.get("method", ("", ""))[0] != "rtn":
        return values
    return {**values, "activation_order": (False, values["activation_order"][1])}
