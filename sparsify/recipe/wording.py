"""Small wording helpers that every recipe error shares."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

LONGEST = 200  # characters of a value that an error repeats


def closest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'damping'?` for a near miss, else nothing."""
    word = word[:LONGEST]
    found = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean '{found[0]}'?" if found else ""


def shortened(text: str) -> str:
    """A text as an error repeats it: its beginning where it is long."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text)} characters)"


def either(options: Sequence[Any]) -> str:
    """`4 or 8`; what YAML 1.1 readers would misread is shown in quotes."""
    words = [f'"{option}"' if ":" in str(option) else str(option) for option in options]
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def shown(value: Any) -> str:
    """A value as an error names it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text '{shortened(value)}'"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return str(value)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
