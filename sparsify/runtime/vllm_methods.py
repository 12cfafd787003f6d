"""A method of a vLLM class in place of its own, where this process has that class."""

import sys
from collections.abc import Callable
from typing import Any


def wrap_method(module: str, kind: str, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Put `wrapper` of the method `name` of the class `kind` in its place, once. wrapper: made with functools.wraps, whose mark
    tells that this was done; nothing where the module was not imported or has no such class or method."""
    found = getattr(sys.modules.get(module), kind, None)
    own = getattr(found, name, None)
    if own is not None and not hasattr(own, "__wrapped__"):
        setattr(found, name, wrapper(own))
