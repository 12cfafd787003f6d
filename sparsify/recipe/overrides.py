"""`--set a.b=c`: one value of a recipe replaced from the command line, before validation sees it."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from sparsify.errors import RecipeError
from sparsify.recipe.document import Document, KeyPath, parse
from sparsify.recipe.explain import model_at, unknown_key
from sparsify.recipe.wording import shortened


def override(document: Document, assignments: Sequence[str]) -> Document:
    """The document with every `path=value` set. List entries are named by index or, for passes, by kind:
    `passes.0.prune.method=wanda` and `passes.prune.method=wanda` are the same."""
    data, origins = deepcopy(document.data), dict(document.origins)
    for assignment in assignments:
        place = f"--set {shortened(assignment)}"
        dotted, equals, text = assignment.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise RecipeError(f"{place}: write an override as path=value, for instance calibration.samples=64")
        path = _assign(data, keys, parse(text, place).data, place)
        origins = {known: origin for known, origin in origins.items() if known[: len(path)] != path}
        origins[path] = place
    return Document(document.name, data, origins)


def _assign(data: Any, keys: list[str], value: Any, place: str) -> KeyPath:
    """Set the value inside `data`, making the mappings on the way that the recipe language knows; return its path."""
    parent: Any = data
    path: KeyPath = ()
    for key in keys:
        if not isinstance(data, dict | list):
            raise RecipeError(f"{place}: {_dotted(path)} is one value, so it has no '{key}' inside")
        for step in _entry(data, key, path, place) if isinstance(data, list) else (key,):
            parent, path = data, (*path, step)
            if isinstance(parent, dict) and step not in parent:
                model = model_at(path[:-1])
                if model is not None and step not in model.model_fields:
                    raise RecipeError(f"{place}: {unknown_key(path)}")
                parent[step] = None
            if parent[step] is None:
                parent[step] = {}
            data = parent[step]
    parent[path[-1]] = value
    return path


def _entry(entries: list[Any], key: str, path: KeyPath, place: str) -> KeyPath:
    """Where `key` points in a list: an index, or the kind of a pass and then the body under that kind."""
    kinds = [next(iter(entry)) if isinstance(entry, dict) and len(entry) == 1 else None for entry in entries]
    if key in kinds:
        return kinds.index(key), key
    if key in map(str, range(len(entries))):
        return (int(key),)
    names = [f"{index} ({kind})" if kind else str(index) for index, kind in enumerate(kinds)]
    raise RecipeError(f"{place}: {_dotted(path)} has no entry '{shortened(key)}'; it has {', '.join(names) or 'none'}")


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))
