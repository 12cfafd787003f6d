"""The back ends that can serve on the processor of this machine, and a tiny model for them."""

from pathlib import Path

import pytest

from sparsify.runtime.backends import ENVIRONMENT_VARIABLE, get_backend
from tests.helpers.agreement import Agree, bits, close
from tests.helpers.compressed import MIXED, compress, make_dense


@pytest.fixture(params=["reference", "cpu"])
def agree(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Agree:
    """Forces a back end; returns how its results are compared with those of the dense weights."""
    if reason := get_backend(request.param).reason_unavailable():
        pytest.skip(reason)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, request.param)
    return bits if request.param == "reference" else close


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with linears of every kind: `sparse24` and `dense` in one folder."""
    root = tmp_path_factory.mktemp("llama")
    make_dense("llama", root / "model")
    for format in ("sparse24", "dense"):
        compress(root / "model", root / format, format, MIXED)
    return root
