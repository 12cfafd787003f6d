"""What the products of one token depend on: never on the other tokens, and on how many there are as docs/serving.md says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.formats import ModuleScheme, get_format
from sparsify.processor import LEVELS
from sparsify.runtime.backends.cpu import Cpu, _library
from tests.helpers.compressed import round_linear

N, K = 96, 512
ROWS = (2, 5, 9, 33, 65, 130)
FOUR, EIGHT, HEAD = {"bits": 4}, {"bits": 8}, {"bits": 8, "pattern": "dense"}
Product = Callable[[Tensor], Tensor]


def product(level: str, kind: dict[str, Any], weight: Tensor) -> tuple[Product, Tensor]:
    """The kernels of a level, and the dense weights that they stand for."""
    library = _library()
    if library is None:
        pytest.skip("no C++ compiler")
    if library.sparse24_level(LEVELS.index(level)) < 0:
        pytest.skip(f"this processor has no {level}")
    weights = round_linear(weight, group_size=64, **kind)
    scheme = ModuleScheme.of(weights)
    prepared = Cpu().prepare(get_format("sparse24").encode(weights), scheme, torch.bfloat16)
    library.sparse24_set_options(prepared[0].data_ptr(), LEVELS.index(level) + 1)
    return lambda x: Cpu().linear(x, prepared, None, scheme), weights.dense(torch.float32)


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(ROWS), K, generator=generator).to(torch.bfloat16)
    return x, torch.randn(N, K, generator=generator)


@pytest.mark.parametrize(
    ("level", "kind"),
    [
        ("avxvnni", FOUR),
        ("avxvnni", EIGHT),
        ("avxvnni", HEAD),
        ("avx512", FOUR),
        ("avx512", EIGHT),
        ("avx2", FOUR),
        ("avx2", EIGHT),
    ],
    ids=str,
)
def test_integer_sums_depend_on_no_other_token(level: str, kind: dict[str, Any], inputs: tuple[Tensor, Tensor]) -> None:
    x, weight = inputs
    multiply, _ = product(level, kind, weight)
    alone = torch.cat([multiply(row) for row in x[: ROWS[3]].split(1)])
    for rows in ROWS:
        some = min(rows, len(alone))
        assert torch.equal(multiply(x[:rows])[:some], alone[:some]), f"{rows} rows"


@pytest.mark.parametrize("kind", [FOUR, EIGHT, HEAD], ids=str)
@pytest.mark.parametrize("level", ["amx", "avx512bf16"])
def test_of_the_others_only_their_number_counts(
    level: str, kind: dict[str, Any], inputs: tuple[Tensor, Tensor]
) -> None:
    """And it changes no more than a rounding of weights to bfloat16, 2^-9 of each, and of the result allows."""
    x, weight = inputs
    multiply, dense = product(level, kind, weight)
    alone = multiply(x[:1]).float()
    bound = 2**-9 * (x[:1].float().abs() @ dense.abs().T) + 2**-7 * alone.abs() + 1e-6
    for rows in ROWS:
        batch = multiply(x[:rows])
        among_others = x[:rows].flip(0).contiguous()
        assert torch.equal(multiply(among_others).flip(0), batch), f"the order of {rows} rows"
        assert ((batch[:1].float() - alone).abs() <= bound).all(), f"{rows} rows"
