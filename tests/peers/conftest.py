"""Environments of foreign packages, which exclude each other's and vLLM's versions: `make peers` makes them.

A test whose environment is missing is skipped, by name. SPARSIFY_PEERS names another folder than the repository's root.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Peer = Callable[[str], Path]


@pytest.fixture
def peer() -> Peer:
    """`peer("gptqmodel")`: the Python of the environment .venv-gptqmodel."""

    def find(name: str) -> Path:
        python = Path(os.environ.get("SPARSIFY_PEERS", ROOT)) / f".venv-{name}" / "bin" / "python"
        if not python.is_file():
            pytest.skip(f"no environment .venv-{name}; make peers makes it")
        return python

    return find
