"""Attention by tiles against the formula in float64, and who gets it."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsify.compute import Choice, for_this_machine, using
from sparsify.model import attention
from sparsify.model.attention import tiled_attention
from sparsify.native import build

TILES = Choice(torch.bfloat16, "a test", tiles=True)


@pytest.fixture(autouse=True)
def tiles() -> Iterator[None]:
    """So that tiles are what is tested on every processor."""
    with using(TILES):
        yield


SHAPES = [  # B, H, H_kv, T, D, D_v: queries that do not fill their tiles, one head, values of another width
    (3, 6, 2, 300, 32, 32),
    (2, 4, 4, 128, 16, 24),
    (1, 5, 1, 1, 8, 8),
    (2, 1, 1, 7, 16, 16),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as models pass them: [B, T, heads, D] with two axes exchanged."""
    b, h, kv, t, d, dv = shape
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(b, t, *rest, generator=generator) for rest in ((h, d), (kv, d), (kv, dv)))
    q, k, v = (x.to(dtype).transpose(1, 2).requires_grad_() for x in made)
    return q, k, v


def formula(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale QK' + causal mask) V as it is written: [B, T, H, D_v]. The last query sees every key."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    later = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1 + scores.shape[3] - scores.shape[2])
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **given: object) -> Tensor:
    module = SimpleNamespace(is_causal=True, num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    output: Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, **given)[0]
    return output


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scores", [1, 1 << 21])
def test_outputs_and_gradients(shape: tuple[int, ...], scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORES", scores)  # one key after the other, or all together
    q, k, v = inputs(shape)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = formula(exact[0], exact[1], exact[2], 0.3)
    gradient = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with tiled_attention():
        found = attend(q, k, v, scaling=0.3)
    assert found.dtype == torch.bfloat16
    assert apart(found, wanted) < 0.006
    ours = torch.autograd.grad(found, (q, k, v), gradient.to(torch.bfloat16))
    theirs = torch.autograd.grad(wanted, exact, gradient)
    if shape[3] > 1:  # else there is nothing to choose from, and q and k have no gradient
        assert [apart(one, other) < 0.012 for one, other in zip(ours, theirs, strict=True)] == [True] * 3


def test_one_new_token() -> None:
    q, k, v = inputs((3, 6, 2, 50, 16, 16))
    last = q[:, :, -1:]
    with tiled_attention(), torch.no_grad():
        found = attend(last, k, v)
    assert apart(found, formula(last.double(), k.double(), v.double(), 0.25)) < 0.006


def test_a_mask_and_other_types_are_left_to_transformers() -> None:
    q, k, v = (x.detach() for x in inputs((2, 4, 2, 40, 16, 16)))
    mask = torch.rand(2, 1, 40, 40) > 0.3
    mask |= torch.eye(40, dtype=torch.bool)
    wide = [x.float() for x in (q, k, v)]
    wanted = [attend(q, k, v, mask), attend(*wide), attend(q, k, v, is_causal=False), attend(q[:, :, :5], k, v)]
    with tiled_attention():
        found = [attend(q, k, v, mask), attend(*wide), attend(q, k, v, is_causal=False), attend(q[:, :, :5], k, v)]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_it_ends_with_the_context() -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(KeyboardInterrupt), tiled_attention():
        inner = ALL_ATTENTION_FUNCTIONS["sdpa"]
        with tiled_attention():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is inner
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is inner is not before
        raise KeyboardInterrupt
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


@pytest.mark.parametrize("asked", ["", "bfloat16"])
def test_a_processor_that_multiplies_bfloat16_slowly(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no use for tiles, also where it is asked to compute in bfloat16; a run that was begun with them keeps them."""
    monkeypatch.setenv("SPARSIFY_COMPUTE", asked)
    monkeypatch.setenv("SPARSIFY_CPU_LEVEL", "avx2")
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with tiled_attention():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
    with using(for_this_machine()), tiled_attention():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


@pytest.fixture
def native() -> None:
    if build.load(attention.SOFTMAX) is None:
        pytest.skip("no C++ compiler")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("shape", "queries"), [((2, 6, 3), 3), ((1, 128, 300), 128), ((3, 130, 65), 65), ((1, 1, 1), 1)]
)
def test_softmax_against_float64(shape: tuple[int, ...], queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a rounding to bfloat16 of it; the same bits at every level and with any number of threads."""
    scores = (8 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).bfloat16()
    seen = shape[2] - queries + 1 + torch.arange(shape[1]) % queries
    later = torch.arange(shape[2]) >= seen[:, None]
    wanted = scores.double().masked_fill(later, -torch.inf).softmax(-1)
    found = attention.causal_softmax(scores.clone(), queries)
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8 + 1e-5, atol=1e-37)
    assert not found[later.expand(shape)].any()
    threads = torch.get_num_threads()
    for level in ("portable", "avx2", ""):
        monkeypatch.setenv("SPARSIFY_CPU_LEVEL", level)
        for count in (1, 3):
            try:
                torch.set_num_threads(count)
                assert torch.equal(attention.causal_softmax(scores.clone(), queries), found)
            finally:
                torch.set_num_threads(threads)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("place", [0, 70, 79])
def test_softmax_of_what_is_not_finite(place: int) -> None:
    """NaN and infinity make a row NaN, -infinity is a key that gets nothing; other rows never see them."""
    for value, expected in ((torch.nan, torch.nan), (-torch.nan, torch.nan), (torch.inf, torch.nan), (-torch.inf, 0.0)):
        scores = torch.randn(1, 3, 80, generator=torch.Generator().manual_seed(0)).bfloat16()
        rest = attention.causal_softmax(scores.clone(), 3)
        scores[0, 2, place] = value
        found = attention.causal_softmax(scores.clone(), 3)
        assert torch.equal(found[0, :2], rest[0, :2])
        if expected == 0:
            assert found[0, 2, place] == 0 and abs(float(found[0, 2].double().sum()) - 1) < 0.01
        else:
            assert found[0, 2].isnan().all()


def test_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.detach() for x in inputs(SHAPES[0]))
    with tiled_attention():
        found = attend(q, k, v)
        monkeypatch.setattr(attention.build, "load", lambda name: None)
        without = attend(q, k, v)
    assert apart(without, found.double()) < 0.004
