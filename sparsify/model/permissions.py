"""What the user permits for a while: running code that comes with a model, and tensors that its class does not know.

Both are variables of the environment, so that processes that are started meanwhile know it too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

TRUST = "SPARSIFY_TRUST_REMOTE_CODE"
ALLOW = "SPARSIFY_ALLOW_UNKNOWN_TENSORS"


def trusts_remote_code() -> bool:
    """Whether Python code that comes with a model may run."""
    return os.environ.get(TRUST, "0") not in ("", "0")


def trusting(trust: bool) -> AbstractContextManager[None]:
    """Let code that comes with models run inside of the block, in processes that it starts too."""
    return _switched_on(TRUST, trust)


def allows_unknown() -> bool:
    """Whether tensors that a model class does not know are no error."""
    return os.environ.get(ALLOW, "0") not in ("", "0")


def allowing_unknown(allow: bool) -> AbstractContextManager[None]:
    """Such tensors are no error inside of the block: they are carried over, or left out where a model is only run."""
    return _switched_on(ALLOW, allow)


@contextmanager
def _switched_on(variable: str, on: bool) -> Iterator[None]:
    """An environment variable is 1 inside of the block, if `on`."""
    before = os.environ.get(variable)
    if on:
        os.environ[variable] = "1"
    try:
        yield
    finally:
        if on:
            os.environ.pop(variable)
            os.environ.update({} if before is None else {variable: before})
