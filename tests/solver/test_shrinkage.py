"""The Hessian of an expert with few tokens: the formula in float64, and what it does to tokens that were not seen."""

import pytest
import torch

from sparsify.solver.hessian import HessianAccumulator, Statistics, accumulated
from sparsify.solver.shrinkage import expert_statistics
from sparsify.solver.solve import Scheme, solve_layer

K = 64


def moments(*parts):
    """X'X / M in float64."""
    X = torch.cat(parts).double()
    return X.t() @ X / len(X)


def batches(X, Xd=None):
    return (
        (x, None if Xd is None else d) for x, d in zip(X.split(20), (X if Xd is None else Xd).split(20), strict=True)
    )


@pytest.mark.parametrize("tokens", [1, K - 1, 2 * K - 1])
def test_few_tokens_are_shrunk_toward_the_layer(tokens):
    generator = torch.Generator().manual_seed(tokens)
    X, layer = (torch.randn(n, K, generator=generator) for n in (tokens, 500))
    Xd, layer_dense = X + 0.1, layer + 0.2
    found = expert_statistics(batches(X, Xd), lambda: batches(layer, layer_dense))
    s = K / (tokens + K)
    assert found.tokens == tokens and found.shrinkage == pytest.approx(s)
    torch.testing.assert_close(
        found.statistics.H.double(), (1 - s) * moments(X) + s * moments(layer), rtol=1e-4, atol=1e-5
    )
    cross, layer_cross = (a.double().t() @ b.double() / len(b) for a, b in ((Xd, X), (layer_dense, layer)))
    torch.testing.assert_close(found.statistics.C.double(), (1 - s) * cross + s * layer_cross, rtol=1e-4, atol=1e-5)


def test_enough_tokens_speak_for_themselves_and_none_leave_it_to_the_layer():
    X, layer = torch.randn(2 * K, K), torch.randn(300, K)

    def unwanted():
        raise AssertionError("the layer is not asked")

    own = expert_statistics(batches(X), unwanted)
    assert own.shrinkage == 0 and torch.equal(own.statistics.H, accumulated(batches(X)).H)
    other = HessianAccumulator().add(X[:0]).add(X).mean()  # a process that has none of the tokens
    torch.testing.assert_close(other.H, own.statistics.H)
    none = expert_statistics(batches(X[:0]), lambda: batches(layer))
    assert (none.tokens, none.shrinkage) == (0, 1) and torch.equal(none.statistics.H, accumulated(batches(layer)).H)


@pytest.mark.parametrize("tokens", [8, 32, K - 1])
def test_the_shrunk_hessian_lowers_the_error_on_tokens_that_were_not_seen(tokens):
    """The expert's tokens have moments of their own, half those of the layer."""
    generator = torch.Generator().manual_seed(0)

    def half():
        Q = torch.linalg.qr(torch.randn(K, K, generator=generator))[0]
        return Q * torch.arange(1, K + 1) ** -0.5 @ Q.t()

    shared = half()
    mixed = (shared + half()) / 2
    seen, held_out = (torch.randn(n, K, generator=generator) @ mixed for n in (tokens, 2000))
    layer = torch.cat([torch.randn(2000, K, generator=generator) @ shared, seen])
    W = torch.randn(64, K, generator=generator)
    scheme = Scheme("sparsegpt", "gptq", 4, 32)

    def lost(statistics):
        new = solve_layer({"w": W}, scheme, statistics)[0]["w"].dense(torch.float32)
        H = moments(held_out)
        return float((((W - new).double() @ H) * (W - new).double()).sum())

    shrunk = expert_statistics(batches(seen), lambda: batches(layer)).statistics
    assert lost(shrunk) < 0.9 * lost(Statistics(accumulated(batches(seen)).H))
