"""Why one row of a table has no figures: a table of several models outlives one that cannot run."""

from __future__ import annotations

import re
from dataclasses import dataclass

# The first pattern that fits says it in a few words; what vLLM's builds lack shows in many ways.
KNOWN = (
    (r"has no attribute|NotImplementedError|not implemented|Could not run '\w+::|Failed to find a kernel", "{who} lacks it"),
    (r"SIGKILL|MemoryError|OutOfMemory|out of memory|DefaultCPUAllocator|KV cache .* needed", "too little memory"),
    (r"time limit", "took too long"),
    (r"ModuleNotFoundError|No module named", "package missing"),
    (r"NaN", "NaN or infinite"),
)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """short: a few words for a cell.  reason: a sentence that names the model, for the foot of the table and for JSON."""

    short: str
    reason: str


def failure_of(error: object, who: str) -> Failure:
    """The failure behind an error message or exception, of which the first line counts. who: what failed, as `vLLM`."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return Failure(in_few_words(reason, who), reason)


def in_few_words(reason: str, who: str) -> str:
    """`vLLM lacks it`, `too little memory`, ... as far as a sentence of an error is known; else that `who` failed."""
    found = (words for pattern, words in KNOWN if re.search(pattern, reason))
    return next(found, "{who} failed").format(who=who)


def foot(failures: list[Failure]) -> str:
    """The reasons, a line each, to go below a table."""
    return "\n".join(dict.fromkeys(failure.reason for failure in failures))
