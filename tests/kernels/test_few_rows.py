"""Products with few rows: against float64, the same bits for any threads, level and neighbours, and inside a model."""

import pytest
import torch
from torch import nn

from sparsify import processor
from sparsify.model import few_rows
from sparsify.model.few_rows import LEAST, MOST, few_rows_linears, few_rows_product
from sparsify.native import build

WITH_KERNEL = [level for level in processor.available_levels() if level != "portable"]
SHAPES = [(16, 1, 1), (17, 3, 5), (24, 64, 256), (37, 61, 577), (64, 130, 300), (72, 192, 576), (200, 70, 1100)]


@pytest.fixture
def kernel(monkeypatch):
    """The library of the kernel."""
    if not WITH_KERNEL:
        pytest.skip("products with few rows need AVX2")
    if (library := build.load(few_rows.KERNEL)) is None:
        pytest.skip("products with few rows need a C++ compiler")
    return library


def operands(m, n, k):
    generator = torch.Generator().manual_seed(m)
    return torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("level", processor.LEVELS)
def test_products_are_right_and_the_same_at_every_level(kernel, monkeypatch, level, m, n, k):
    if level not in processor.available_levels():
        pytest.skip(f"this processor lacks {level}")
    X, W = operands(m, n, k)
    exact = X.double() @ W.double().t()
    bound = X.double().abs() @ W.double().abs().t() * k * 2.0**-24
    monkeypatch.setenv(processor.FORCE, WITH_KERNEL[0])
    first = few_rows_product(X, W)
    monkeypatch.setenv(processor.FORCE, level)
    assert ((first - exact).abs() <= bound).all()
    assert torch.equal(few_rows_product(X, W), first)


def test_each_sum_is_one_chain_of_fused_multiply_adds(kernel):
    """A product that is added unrounded shows: (1 + 2^-12)^2 - 1 - 2^-11 is 2^-24, and 0 after rounding to 24 bits."""
    X = torch.tensor([[1.0, 1.0 + 2.0**-12]] * LEAST)
    W = torch.tensor([[-1.0 - 2.0**-11, 1.0 + 2.0**-12]])
    assert (few_rows_product(X, W) == 2.0**-24).all()


def test_threads_and_other_rows_change_no_bit(kernel):
    X, W = operands(100, 333, 577)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = few_rows_product(X, W)
        torch.set_num_threads(3)
        assert torch.equal(few_rows_product(X, W), alone)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(few_rows_product(X[7:30], W), alone[7:30])


def test_operands_inside_larger_ones(kernel):
    X, W = operands(40, 50, 64)
    wide = torch.full((40, 100), float("nan"))
    wide[:, 3:67] = X
    padded = torch.full((50, 70), float("nan"))
    padded[:, :64] = W
    assert torch.equal(few_rows_product(wide[:, 3:67], padded[:, :64]), few_rows_product(X, W))
    assert torch.allclose(few_rows_product(X.t().contiguous().t(), W), X @ W.t(), atol=1e-4)  # PyTorch's


@pytest.mark.parametrize("bias", [True, False])
def test_linears_of_a_model_take_few_rows_by_the_kernel(kernel, monkeypatch, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 80, bias=bias), nn.Tanh(), nn.Linear(80, 8, bias=bias)).eval()
    x = torch.randn(LEAST, 3, 48)
    calls = []
    product = few_rows.few_rows_product
    monkeypatch.setattr(few_rows, "few_rows_product", lambda X, W: calls.append(X.shape[0]) or product(X, W))
    capability = ["AVX2"]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability[0])
    with torch.inference_mode():
        expected = model(x)
        with few_rows_linears(model):
            found = model(x)
            model(x[:1, :1]), model(x.repeat(MOST, 1, 1))
        assert torch.allclose(found, expected, atol=1e-5) and calls == [3 * LEAST] * 2
        assert torch.equal(model(x), expected) and len(calls) == 2
        capability[0] = "AVX512"
        with few_rows_linears(model):
            model(x)
        capability[0] = "AVX2"
        with few_rows_linears(model.bfloat16()):
            model(x.bfloat16())
    assert len(calls) == 2


def test_without_the_kernel_it_is_pytorch(monkeypatch):
    monkeypatch.setattr(few_rows.build, "load", lambda name: None)
    X, W = operands(20, 30, 40)
    assert torch.equal(few_rows_product(X, W), X @ W.t())
