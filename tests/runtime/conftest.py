"""The back ends that can serve on the processor of this machine."""

import pytest

from sparsify.runtime.backends import ENVIRONMENT_VARIABLE, get_backend
from tests.helpers.agreement import Agree, bits, close


@pytest.fixture(params=["reference", "cpu"])
def agree(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Agree:
    """Forces a back end; returns how its results are compared with those of the dense weights."""
    if reason := get_backend(request.param).reason_unavailable():
        pytest.skip(reason)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, request.param)
    return bits if request.param == "reference" else close
