"""A peer of a benchmark that is not measured: some three words for a table, the whole reason for its JSON."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.errors import SparsifyError
from sparsify.failure import in_few_words

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
    """What a peer's error means, in a few words and in full. peer: its name, which begins with that of its software."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, SparsifyError):
        reason = f"{type(error).__name__}: {reason}"
    why = error.why if isinstance(error, PeerMissing) else in_few_words(error, peer.split()[0])
    return Absence(peer, why, reason[:REASON_LENGTH], where)
