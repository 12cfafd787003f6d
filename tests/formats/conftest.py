"""Random linears of every kind that formats store, and small checkpoints made of them."""

import pytest
import torch
from torch import Tensor

from sparsify.model.linear import CODE_RANGE, LinearWeights


def _two_four(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Zero two random positions of every quad, and in some quads three or four."""
    n, k = weight.shape
    order = torch.rand(n, k // 4, 4, generator=generator).argsort(2)
    extra = torch.rand(n, k // 4, 4, generator=generator) < 0.2
    return weight.masked_fill(((order >= 2) | extra).reshape(n, k), 0)


def _make_linear(
    n: int = 24,
    k: int = 128,
    bits: int = 4,
    group_size: int = 64,
    pattern: str = "2:4",
    bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> LinearWeights:
    generator = torch.Generator().manual_seed(seed)
    offset = torch.randn(n, generator=generator).to(dtype) if bias else None
    if bits == 16:
        values = _two_four(torch.randn(n, k, generator=generator), generator).to(dtype)
        return LinearWeights(16, pattern, k, values=values, bias=offset)
    low, high = CODE_RANGE[bits]
    codes = torch.randint(low, high + 1, (n, k), generator=generator)
    if pattern == "2:4":
        codes = _two_four(codes, generator)
    scale = (torch.rand(n, k // group_size, generator=generator) * 0.1 + 0.001).to(dtype)
    return LinearWeights(bits, pattern, group_size, codes=codes.to(torch.int8), scale=scale, bias=offset)


def _same(a: LinearWeights, b: LinearWeights) -> bool:
    """Whether two linears are equal to the bit."""

    def equal(x: Tensor | None, y: Tensor | None) -> bool:
        if x is None or y is None:
            return x is y
        return x.dtype == y.dtype and torch.equal(x, y)

    scheme = (a.bits, a.pattern, a.group_size) == (b.bits, b.pattern, b.group_size)
    return scheme and all(equal(getattr(a, name), getattr(b, name)) for name in ("codes", "scale", "values", "bias"))


@pytest.fixture(autouse=True)
def single_thread():
    """Tiny tensors: threads only cost, and tests of others run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_linear():
    """`make_linear(n, k, bits, group_size, pattern, bias, dtype, seed)`: a random linear."""
    return _make_linear


@pytest.fixture
def same():
    """`same(a, b)`: whether two linears are equal to the bit."""
    return _same
