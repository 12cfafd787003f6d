import math

import pytest
import torch

from sparsify.model.finite import all_finite

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.0])
def test_agrees_with_every_number(dtype: torch.dtype, value: float) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    x[1, 7] = value
    x = x.to(dtype)
    assert all_finite(x) == bool(torch.isfinite(x.float()).all())
    assert all_finite(x.t()) == all_finite(x)
    assert all_finite(x[2])


def test_nothing_and_integers_are_finite() -> None:
    assert all_finite(torch.empty(0, 4)) and all_finite(torch.arange(3))
