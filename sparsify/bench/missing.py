"""Why a peer of a benchmark is not measured: three words for a table, the whole reason for its JSON."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparsify.errors import NumericalError, SparsifyError

REASON_LENGTH = 300


class PeerMissing(SparsifyError):
    """A peer cannot be measured here. why: some three words; the message is the whole reason."""

    def __init__(self, why: str, reason: str) -> None:
        super().__init__(reason)
        self.why = why


@dataclass(frozen=True)
class Absence:
    """A peer that was not measured. where: the linear, "" for all of them."""

    peer: str
    why: str
    reason: str
    where: str = ""


def absence(peer: str, error: Exception, where: str = "") -> Absence:
    """What a peer's error says, in three words and in full."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, SparsifyError):
        reason = f"{type(error).__name__}: {reason}"
    return Absence(peer, short(error), reason[:REASON_LENGTH], where)


def short(error: Exception) -> str:
    """Some three words for a table."""
    if isinstance(error, PeerMissing):
        return error.why
    if isinstance(error, NumericalError):
        return "wrong product"
    if isinstance(error, ImportError):
        return "import fails"
    if isinstance(error, OSError):
        return "does not load"
    if isinstance(error, AttributeError):
        name = re.search(r"no attribute '(\w+)'", str(error))
        return f"lacks {name[1]}" if name else "lacks an operator"
    if isinstance(error, NotImplementedError):
        return "not implemented here"
    if isinstance(error, MemoryError) or "alloc" in str(error).lower():
        return "out of memory"
    return f"fails ({type(error).__name__})"
