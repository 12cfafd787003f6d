"""The settings of one modifier: each is taken once, and what nobody took is refused."""

from typing import Any

from sparsify.recipe.document import Document, KeyPath

Body = dict[str, tuple[Any, str]]
"""Key of our recipe -> its value and the place where it was written."""


class Settings:
    """A mapping of a modifier, or one inside it. path: where it stands in the document."""

    def __init__(self, document: Document, modifier: str, values: dict[str, Any], path: KeyPath) -> None:
        self.document, self.modifier, self.path = document, modifier, path
        self.values = dict(values)
        self.written = set(values)
        self.given = {key for key, value in values.items() if value is not None}

    def refuse(self, key: str | None, message: str) -> None:
        path = self.path if key is None else (*self.path, key)
        raise self.document.error(path, f"{self.modifier}: {message}")

    def take(self, key: str, default: Any = None) -> Any:
        value = self.values.pop(key, default)
        return default if value is None else value

    def word(self, key: str, default: str | None = None) -> Any:
        """A setting that is compared without regard to capitals."""
        value = self.take(key, default)
        return value.lower() if isinstance(value, str) else value

    def place(self, *keys: str) -> str:
        return self.document.origin((*self.path, *keys))

    def drop(self, *keys: str) -> None:
        for key in keys:
            self.values.pop(key, None)

    def must_be(self, key: str, allowed: tuple[Any, ...], meaning: str, default: Any = None) -> Any:
        """Take a setting of which only some values have a counterpart."""
        value = self.word(key, default)
        if not any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in allowed):
            self.refuse(key, f"{key}: {value} has no counterpart in sparsify, which {meaning}")
        return value

    def nested(self, key: str, values: Any) -> "Settings":
        if not isinstance(values, dict):
            self.refuse(key, f"'{key}' must be a mapping")
        return Settings(self.document, self.modifier, values, (*self.path, key))

    def finish(self) -> None:
        for key, value in self.values.items():
            if value not in (None, False, {}):
                self.refuse(key, f"'{key}' has no counterpart in sparsify; remove it")
