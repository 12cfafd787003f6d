"""The words of AutoGPTQ against a loop written from the layout alone."""

import numpy as np
import pytest
import torch

from sparsify.formats.gptq_packing import (
    group_indices,
    pack_codes,
    pack_zero_points,
    unpack_codes,
    unpack_zero_points,
)


def words(rows: np.ndarray, bits: int) -> np.ndarray:
    """rows: unsigned numbers; every 32 / bits consecutive ones of a row become a word, the first in its lowest bits."""
    packed = []
    for row in rows:
        for start in range(0, len(row), 32 // bits):
            packed.append(sum(int(u) << bits * i for i, u in enumerate(row[start : start + 32 // bits])))
    return np.array(packed, dtype=np.uint32).view(np.int32).reshape(len(rows), -1)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_and_zero_points_are_stored_as_autogptq_stores_them(bits: int) -> None:
    half, chance = 1 << bits - 1, np.random.default_rng(0)
    u = chance.integers(0, 2 * half, (24, 64))
    codes = torch.from_numpy(u - half).to(torch.int8)
    qweight = pack_codes(codes, bits)
    assert qweight.is_contiguous() and np.array_equal(qweight.numpy(), words(u, bits).T)
    assert torch.equal(unpack_codes(qweight, bits), codes)
    z = chance.integers(1, 2 * half, (24, 2))
    zero_points = torch.from_numpy(z - half).to(torch.int8)
    for version in (1, 2):
        qzeros = pack_zero_points(zero_points, bits, version)
        assert np.array_equal(qzeros.numpy(), words(z.T - (version == 1), bits))
        assert torch.equal(unpack_zero_points(qzeros, bits, version), zero_points)


def test_symmetric_zero_points_are_the_known_words() -> None:
    nothing = torch.zeros(8, 1, dtype=torch.int8)
    assert pack_zero_points(nothing, 4).tolist() == [[0x77777777]]
    assert pack_zero_points(nothing, 8).tolist() == [[0x7F7F7F7F] * 2]
    assert pack_zero_points(nothing, 4, version=2).tolist() == [[0x88888888 - (1 << 32)]]


def test_the_highest_stored_zero_point_of_version_1_is_zero() -> None:
    """AutoGPTQ adds one and masks."""
    assert unpack_zero_points(torch.tensor([[-1]], dtype=torch.int32), 4).tolist() == [[-8]] * 8


def test_group_indices() -> None:
    assert group_indices(8, 4).tolist() == [0, 0, 0, 0, 1, 1, 1, 1] and group_indices(8, 4).dtype == torch.int32
