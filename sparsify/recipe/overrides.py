"""`--set a.b=c`: one value of a recipe replaced from the command line, before validation sees it."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from sparsify.errors import RecipeError
from sparsify.recipe.document import Document, KeyPath, parse_value
from sparsify.recipe.explain import model_at, unknown_key


def override(document: Document, assignments: Sequence[str]) -> Document:
    """The document with every `path=value` set. List entries are named by index or, for passes, by kind:
    `passes.0.prune.damping=0.02` and `passes.prune.damping=0.02` are the same."""
    data, origins = deepcopy(document.data), dict(document.origins)
    for assignment in assignments:
        place = f"--set {assignment}"
        dotted, equals, text = assignment.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise RecipeError(f"{place}: write an override as path=value, for instance calibration.samples=64")
        path = _assign(data, keys, parse_value(text), place)
        origins = {known: origin for known, origin in origins.items() if known[: len(path)] != path}
        origins[path] = place
    return Document(document.name, data, origins)


def _assign(data: Any, keys: list[str], value: Any, place: str) -> KeyPath:
    """Set the value inside `data`, making the mappings on the way that the recipe language knows; return its path."""
    path: KeyPath = ()
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if isinstance(data, list):
            index = _index(data, key, path, place)
            path += (index,)
            if not key.isdecimal():  # passes.prune means the entry {prune: ...} and then its body
                data, path = data[index], (*path, key)
            if last:
                data[path[-1]] = value
            else:
                data = data[path[-1]]
        elif isinstance(data, dict):
            path += (key,)
            if last:
                data[key] = value
            elif data.get(key) is not None:
                data = data[key]
            elif (model := model_at(path[:-1])) is not None and key not in model.model_fields:
                raise RecipeError(f"{place}: {unknown_key(path)}")
            else:
                data[key] = {}
                data = data[key]
        else:
            raise RecipeError(f"{place}: {'.'.join(map(str, path))} is one value, so it has no '{key}' inside")
    return path


def _index(entries: list[Any], key: str, path: KeyPath, place: str) -> int:
    where = ".".join(map(str, path))
    kinds = [next(iter(entry)) if isinstance(entry, dict) and len(entry) == 1 else None for entry in entries]
    if key in kinds:
        return kinds.index(key)
    if key.isdecimal() and int(key) < len(entries):
        return int(key)
    names = [f"{index} ({kind})" if kind else str(index) for index, kind in enumerate(kinds)]
    raise RecipeError(f"{place}: {where} has no entry '{key}'; it has {', '.join(names) or 'none'}")
