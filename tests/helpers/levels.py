"""Instruction sets in tests: a test that executes one is skipped by name where it cannot be, and the end of a run lists them.

A level that SPARSIFY_CPU_LEVEL forces makes every higher one count as absent, so that a newer machine shows what an older
one does.
"""

import re
from collections import Counter
from collections.abc import Iterable

import pytest

from sparsify.processor import FORCE, LEVELS, forced_level

FORCED = forced_level()  # of the whole run; single tests set the variable to something else
_REASON = re.compile(rf"(?:this processor has no|{FORCE}=\w+ rules out) ({'|'.join(LEVELS)})$")


def ruled_out(level: str) -> bool:
    """Whether a lower level is forced on this run."""
    return FORCED is not None and LEVELS.index(level.replace("_", "")) > LEVELS.index(FORCED)


def need(level: str, runs: bool) -> None:
    """Skip the test that asks unless `level` can be executed. runs: whether this processor can, as the kernel says."""
    name = level.replace("_", "")
    if ruled_out(name):
        pytest.skip(f"{FORCE}={FORCED} rules out {name}")
    if not runs:
        pytest.skip(f"this processor has no {name}")


def not_executed(reasons: Iterable[str]) -> str | None:
    """The levels that skips were for and how many tests each, in one line; None where there was no such skip."""
    found = Counter(match[1] for reason in reasons if (match := _REASON.search(reason)))
    if not found:
        return None
    told = (f"{level} ({found[level]} test{'s' * (found[level] > 1)})" for level in LEVELS if level in found)
    return f"not executed here: {', '.join(told)}"
