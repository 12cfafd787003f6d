"""Packing against a slow and obvious reference written with Python integers."""

import itertools

import numpy
import pytest
import torch

from sparsify.formats import packing


@pytest.mark.parametrize("bits", [4, 8])
def test_words_match_python_integers(bits):
    offset, per_word = 1 << bits - 1, 32 // bits
    codes = torch.randint(-offset, offset, (5, 32), generator=torch.Generator().manual_seed(bits)).to(torch.int8)
    words = packing.pack_words(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (5, 32 // per_word)
    for row, stored in zip(codes.tolist(), words.tolist(), strict=True):
        for w, word in enumerate(stored):
            number = sum((q + offset) << bits * i for i, q in enumerate(row[w * per_word : (w + 1) * per_word]))
            assert number == word % 2**32
    assert torch.equal(packing.unpack_words(words, bits), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_the_extremes(bits):
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    codes = torch.tensor([[low] * 8 + [high] * 8 + [0] * 8 + [low, high] * 4], dtype=torch.int8)
    assert torch.equal(packing.unpack_words(packing.pack_words(codes, bits), bits), codes)


def test_every_two_four_quad_keeps_its_non_zeros_and_ascends():
    for quad in itertools.product([0, 3], repeat=4):
        weight = torch.tensor([quad * 2], dtype=torch.int8)
        if sum(q != 0 for q in quad) > 2:
            with pytest.raises(ValueError, match="more than two"):
                packing.kept_nibbles(weight)
            continue
        nibbles = packing.kept_nibbles(weight)
        first, second = int(nibbles[0, 0]) & 3, int(nibbles[0, 0]) >> 2
        nonzero = [i for i in range(4) if quad[i]]
        free = [i for i in range(4) if not quad[i]]
        assert [first, second] == sorted(nonzero + free[: 2 - len(nonzero)])
        assert packing.nibbles_ascend(nibbles)
        assert torch.equal(packing.put_kept(packing.take_kept(weight, nibbles), nibbles), weight)


def test_nibbles_pack_even_quad_low():
    nibbles = torch.tensor([[0x4, 0xE, 0x8, 0x9]], dtype=torch.uint8)
    meta = packing.pack_nibbles(nibbles)
    assert meta.tolist() == [[0xE4, 0x98]]
    assert torch.equal(packing.unpack_nibbles(meta), nibbles)


def test_ascending_accepts_exactly_the_six_legal_nibbles():
    legal = [n for n in range(16) if packing.nibbles_ascend(torch.tensor([[n]], dtype=torch.uint8))]
    assert legal == [a | b << 2 for b in range(4) for a in range(b)] and len(legal) == 6


@pytest.mark.parametrize("inputs", [1, 7, 8, 42, 64])
def test_bits_of_a_mask_are_those_of_numpy(inputs):
    mask = torch.rand(5, inputs, generator=torch.Generator().manual_seed(inputs)) < 0.5
    bits = packing.pack_bits(mask)
    expected = numpy.packbits(mask.numpy(), axis=1, bitorder="little")
    assert bits.dtype == torch.uint8 and bits.shape == (5, -(-inputs // 8))
    assert numpy.array_equal(bits.numpy(), expected)
    assert torch.equal(packing.unpack_bits(bits, inputs), mask)
