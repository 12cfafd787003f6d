"""Recipes of llm-compressor (`*_stage: *_modifiers: SparseGPTModifier: ...`) read as ours.

One-shot pruning to 2:4 and weights of 4 or 8 bits have a counterpart here: the same linears, bits, groups, order and damping,
defaults included, as llm-compressor 0.14.0.1 reads the recipe. Settings that change how it computes but not what (block sizes,
offloading) are dropped; everything else without a counterpart is refused by name, because a recipe that silently does
something else is worse than none.
"""

import re
from collections.abc import Iterable
from enum import Enum
from typing import Any

from sparsify.errors import RecipeError
from sparsify.recipe.document import Document
from sparsify.recipe.llmcompressor.translate import translate

__all__ = ["from_modifiers", "is_modifier", "recognised", "translate"]

# Stages are numbered where llm-compressor appends one recipe to another.
_KEY = re.compile(r".*_stage(_\d+)?|.*_modifiers|\w*Modifier")


def recognised(document: Document) -> bool:
    """Whether the document is written in llm-compressor's dialect."""
    return any(_KEY.fullmatch(str(key)) for key in document.data)


def is_modifier(value: Any) -> bool:
    """Whether a Python object is a modifier of llm-compressor or a list of them: known by their names and `model_dump`, nothing is
    imported."""
    if isinstance(value, list | tuple):
        return any(is_modifier(entry) for entry in value)
    return type(value).__name__.endswith("Modifier") and hasattr(value, "model_dump")


def from_modifiers(modifiers: Iterable[Any]) -> dict[str, Any]:
    """The recipe that llm-compressor makes of `oneshot(recipe=[GPTQModifier(...), ...])`, as plain data; lists may be nested.

    Raises RecipeError for an entry that is no modifier."""
    groups = {
        f"{index}_modifiers": {type(modifier).__name__: _plain(_settings(modifier))}
        for index, modifier in enumerate(_flat(modifiers))
    }
    return {"default_stage": groups}


def _settings(modifier: Any) -> dict[str, Any]:
    """Its fields without those that record progress, which end in an underscore."""
    if not is_modifier(modifier):
        raise RecipeError(
            f"a list of modifiers holds a {type(modifier).__name__}, which is no modifier of llm-compressor"
        )
    return {key: value for key, value in modifier.model_dump().items() if not key.endswith("_")}


def _flat(modifiers: Iterable[Any]) -> list[Any]:
    return [
        modifier for entry in modifiers for modifier in (_flat(entry) if isinstance(entry, list | tuple) else [entry])
    ]


def _plain(value: Any) -> Any:
    """Members of enumerations as their values, whatever YAML does not know as text."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
