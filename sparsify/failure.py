"""Why one row of a table has no figures: a table of several models or peers outlives one that cannot run."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparsify.errors import SparsifyError

# The first pattern found in an error, with its type as in a traceback, gives the words for a cell.
KNOWN = (
    (r"multiplies .* wrongly", "wrong product"),
    (r"has no attribute|NotImplementedError|not implemented|Could not run '\w+::|Failed to find a kernel", "{who} lacks it"),
    (r"SIGKILL|MemoryError|OutOfMemory|out of memory|DefaultCPUAllocator|KV cache .* needed|[Cc]annot allocate", "too little memory"),
    (r"time limit", "took too long"),
    (r"ModuleNotFoundError|No module named", "package missing"),
    (r"ImportError", "import fails"),
    (r"OSError", "does not load"),
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
    return Failure(in_few_words(error, who), reason)


def in_few_words(error: object, who: str) -> str:
    """`vLLM lacks it`, `too little memory`, ... as far as an error or its message is known; else that `who` failed."""
    text = first_line(error) if isinstance(error, Exception) else str(error)
    found = (words for pattern, words in KNOWN if re.search(pattern, text))
    return next(found, "{who} failed").format(who=who)


def first_words(error: Exception, most: int = 200) -> str:
    """The first line of an exception, shortened to so many characters."""
    return (str(error).strip().splitlines() or [""])[0][:most]


def first_line(error: Exception) -> str:
    """The first line of an exception, shortened, behind its type unless the error is one of ours."""
    line = first_words(error)
    if isinstance(error, SparsifyError):
        return line
    return f"{type(error).__name__}: {line}"


def foot(failures: list[Failure]) -> str:
    """The reasons, a line each, to go below a table."""
    return "\n".join(dict.fromkeys(failure.reason for failure in failures))
