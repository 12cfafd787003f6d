"""Regular expressions that come from outside: in recipes, and in the configs of checkpoints.

Python's `re` backtracks without end on expressions such as `(a+)+$`. A matcher that runs in linear time has no lookahead,
which the rules of GPTQModel and many lists of ignored layers use, so the expressions are run by `regex`, which takes a time
limit and agrees with `re` on all that is accepted here.
"""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Iterable

import regex

from sparsify.errors import SparsifyError

LONGEST = 1000  # characters of a pattern
MOST = 2000  # regular expressions of one list
REPEATS = 1000  # `regex` unrolls counted repetitions: a{9}{9}{9} takes the memory of 729 letters
SECONDS = 2.0  # of computing that all slow matches of one expression may take together
SLOW = 0.01  # seconds; a usual match takes a thousandth of it
COUNTED = re.compile(r"\{(\d*)(?:,(\d*))?\}")
OTHER_MEANING = re.compile(r"(?<!\\)\{[a-z]|\[:\^?\w+:\]")  # in `regex`: fuzzy matching and POSIX classes
LITERAL = re.compile(r"\^((?:[\w-]|\\\W)+)\$")  # ^one\.name$, of which GPTQModel's rules hold one for each linear
_spent: dict[str, float] = {}  # seconds of slow matches, by expression


class SlowPattern(SparsifyError):
    """A regular expression that takes too long."""


def pattern_problem(pattern: str) -> str | None:
    """Why a regular expression is not accepted, in words; None where it is."""
    try:
        _compiled(pattern)
    except ValueError as error:
        return str(error)
    return None


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression matches `name` from its beginning, as `re.match` decides it.

    ValueError where it is none or not accepted; SlowPattern where it takes too long.
    """
    if (literal := _literal(pattern)) is not None:
        return name == literal
    left = SECONDS - _spent.get(pattern, 0.0)
    started = time.process_time()
    try:
        found = _compiled(pattern).match(name, timeout=max(left, SLOW)) is not None
    except (TimeoutError, MemoryError):
        left = 0.0
    if (took := time.process_time() - started) > SLOW:
        _spent[pattern] = _spent.get(pattern, 0.0) + took
    if left <= 0:
        raise SlowPattern(
            f"the regular expression {pattern!r} takes too long on {name[:100]!r}; write it without repetitions inside of "
            "repetitions, or name the modules"
        )
    return found


def refuse_many(patterns: Iterable[str]) -> str | None:
    """Why a list has too many regular expressions to compare every module with; None where it has not."""
    count = sum(pattern.startswith("re:") and _literal(pattern[3:]) is None for pattern in patterns)
    return f"{count} regular expressions are more than the {MOST} that one list may hold" if count > MOST else None


@functools.lru_cache(maxsize=1 << 17)
def _literal(pattern: str) -> str | None:
    """The one name that `^name$` matches, where that is all that the expression is."""
    found = LITERAL.fullmatch(pattern)
    return re.sub(r"\\(\W)", r"\1", found[1]) if found else None


@functools.lru_cache(maxsize=2 * MOST)
def _compiled(pattern: str) -> regex.Pattern[str]:
    if len(pattern) > LONGEST:
        raise ValueError(f"it has {len(pattern)} characters, and at most {LONGEST} are read")
    if other := OTHER_MEANING.search(pattern):
        raise ValueError(f"{other[0]} has more than one meaning; put a backslash before it")
    counts = [
        max(int(number) for number in found.groups() if number)
        for found in COUNTED.finditer(pattern)
        if any(found.groups())
    ]
    if math.prod(max(count, 1) for count in counts) > REPEATS:
        raise ValueError(f"its counted repetitions multiply to more than {REPEATS}")
    try:
        re.compile(pattern)
        return regex.compile(pattern, regex.V0)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error) or type(error).__name__) from None
