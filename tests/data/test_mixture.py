"""The order in which rows of several sources are drawn."""

from collections import Counter

import pytest
import torch

from sparsify.data.mixture import draw, interleave


def drawn(counts, weights, total, seed=0):
    return draw(counts, weights, total, torch.Generator().manual_seed(seed)).tolist()


def test_each_source_gives_its_share_and_all_its_rows_before_any_again():
    order = drawn([40, 10], [2, 1], 90)
    first, second = [n for n in order if n < 40], [n for n in order if n >= 40]
    assert len(first) == 60 and len(second) == 30
    assert sorted(first[:40]) == list(range(40)) and len(set(first[40:])) == 20
    for start in (0, 10, 20):
        assert sorted(second[start : start + 10]) == list(range(40, 50))
    assert second[:10] != second[10:20]
    assert Counter(n >= 40 for n in order[:45]) != Counter({False: 45})  # shuffled, not one after another


def test_the_seed_decides_and_nothing_else():
    assert drawn([7, 5], [1, 1], 30) == drawn([7, 5], [1, 1], 30) != drawn([7, 5], [1, 1], 30, seed=1)


def test_one_source_is_drawn_as_permutations():
    generator = torch.Generator().manual_seed(3)
    expected = torch.cat([torch.randperm(6, generator=generator) for _ in range(3)])[:15]
    assert drawn([6], [1.0], 15, seed=3) == expected.tolist()


@pytest.mark.parametrize("total", [1, 7, 100])
def test_a_source_whose_share_is_less_than_a_row_gives_none(total):
    order = drawn([3, 3], [1000, 1], total)
    assert len(order) == total and all(n < 3 for n in order)


def test_interleaving_keeps_the_order_within_a_source():
    parts = [torch.arange(5)[:, None], 100 + torch.arange(3)[:, None]]
    mixed = interleave(parts, 0)[:, 0].tolist()
    assert [n for n in mixed if n < 100] == list(range(5)) and [n for n in mixed if n >= 100] == [100, 101, 102]
