"""Bits of the formats: codes to int32 words and back, 2:4 positions to nibbles and back. Pure functions, any device.

Shapes: W: [N, K] holds at most two non-zero values in every 4 consecutive inputs (a *quad*); kept: [N, K/2] holds the
two kept values of every quad in ascending position; nibbles: uint8 [N, K/4] holds one position nibble per quad, the
first kept index in bits 0-1 and the second in bits 2-3; meta: uint8 [N, K/8] holds two nibbles, even quad low; bits: uint8
[N, ceil(K/8)] holds one bit per input, the first lowest.
"""

import torch
from torch import Tensor

INVALID = 0xFF


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Offset binary, first code in the lowest bits of its word.

    codes: int8 [N, C] in [-2^(bits-1), 2^(bits-1)). Returns int32 [N, C * bits / 32].
    """
    per_word = 32 // bits
    offset = 1 << (bits - 1)
    words = torch.zeros(codes.shape[0], codes.shape[1] // per_word, dtype=torch.int32, device=codes.device)
    for i in range(per_word):
        words |= (codes[:, i::per_word].to(torch.int32) + offset) << (bits * i)
    return words


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_words`. words: int32 [N, C * bits / 32]. Returns int8 [N, C]."""
    per_word = 32 // bits
    offset = 1 << (bits - 1)
    codes = torch.empty(words.shape[0], words.shape[1] * per_word, dtype=torch.int8, device=words.device)
    for i in range(per_word):
        # the shift of a negative word brings in ones from above: the mask takes them off again
        codes[:, i::per_word] = (((words >> (bits * i)) & ((1 << bits) - 1)) - offset).to(torch.int8)
    return codes


def _nibble_table() -> Tensor:
    """For each of the 16 sets of non-zero positions in a quad: its nibble, or INVALID for more than two members.

    A set with fewer than two members is filled up with the lowest free positions, so first < second always.
    """
    table = []
    for members in range(16):
        kept = [i for i in range(4) if members >> i & 1]
        kept += [i for i in range(4) if i not in kept][: max(0, 2 - len(kept))]
        first, second = sorted(kept)[:2]
        table.append(first | second << 2 if len(kept) == 2 else INVALID)
    return torch.tensor(table, dtype=torch.uint8)


def two_kept_nibbles(members: Tensor) -> Tensor:
    """Position nibbles of quads that name their two kept positions by bits. members: uint8, four bits each, any shape.

    INVALID where not exactly two bits are set.
    """
    table = _nibble_table()
    table[[bits for bits in range(16) if bits.bit_count() != 2]] = INVALID
    return table.to(members.device)[members.int()]


def kept_nibbles(weight: Tensor) -> Tensor:
    """Which two positions of every quad are kept. weight: [N, K], 2:4. Returns nibbles: uint8 [N, K/4].

    Raises ValueError when a quad holds more than two non-zero values.
    """
    quads = weight.reshape(weight.shape[0], -1, 4)
    members = torch.zeros(quads.shape[:2], dtype=torch.uint8, device=weight.device)
    for i in range(4):
        members |= (quads[:, :, i] != 0).to(torch.uint8) << i
    nibbles = _nibble_table().to(weight.device)[members.int()]
    if (nibbles == INVALID).any():
        raise ValueError("some group of 4 consecutive inputs holds more than two non-zero weights")
    return nibbles


def nibbles_ascend(nibbles: Tensor) -> bool:
    """Whether first < second in every nibble. nibbles: uint8, any shape."""
    return bool(((nibbles & 3) < (nibbles >> 2)).all())


def take_kept(weight: Tensor, nibbles: Tensor) -> Tensor:
    """The kept values. weight: [N, K]; nibbles: [N, K/4]. Returns [N, K/2], ascending inside each quad."""
    n, k = weight.shape
    quads = weight.reshape(n, k // 4, 4)
    first, second = nibbles & 3, nibbles >> 2
    kept = torch.empty(n, k // 4, 2, dtype=weight.dtype, device=weight.device)
    kept[:, :, 0], kept[:, :, 1] = quads[:, :, 0], quads[:, :, 1]
    for i in range(1, 4):
        kept[:, :, 0] = torch.where(first == i, quads[:, :, i], kept[:, :, 0])
        kept[:, :, 1] = torch.where(second == i, quads[:, :, i], kept[:, :, 1])
    return kept.reshape(n, k // 2)


def put_kept(kept: Tensor, nibbles: Tensor) -> Tensor:
    """Inverse of `take_kept`: zeros in place. kept: [N, K/2]; nibbles: [N, K/4]. Returns [N, K]."""
    n = kept.shape[0]
    pairs = kept.reshape(n, -1, 2)
    first, second = nibbles & 3, nibbles >> 2
    weight = torch.zeros(n, pairs.shape[1], 4, dtype=kept.dtype, device=kept.device)
    for i in range(4):
        weight[:, :, i] = torch.where(first == i, pairs[:, :, 0], weight[:, :, i])
        weight[:, :, i] = torch.where(second == i, pairs[:, :, 1], weight[:, :, i])
    return weight.reshape(n, -1)


def pack_nibbles(nibbles: Tensor) -> Tensor:
    """nibbles: uint8 [N, K/4]. Returns meta: uint8 [N, K/8]."""
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def unpack_nibbles(meta: Tensor) -> Tensor:
    """meta: uint8 [N, K/8]. Returns nibbles: uint8 [N, K/4]."""
    return torch.stack((meta & 15, meta >> 4), dim=2).reshape(meta.shape[0], -1)


def pack_bits(mask: Tensor) -> Tensor:
    """mask: bool [N, K]. Returns bits: uint8 [N, ceil(K/8)], zero past K."""
    filled = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8))
    bits = torch.zeros(mask.shape[0], filled.shape[1] // 8, dtype=torch.uint8, device=mask.device)
    for i in range(8):
        bits |= filled[:, i::8].to(torch.uint8) << i
    return bits


def unpack_bits(bits: Tensor, inputs: int) -> Tensor:
    """Inverse of `pack_bits`. bits: uint8 [N, ceil(inputs/8)]. Returns bool [N, inputs]."""
    mask = torch.empty(*bits.shape, 8, dtype=torch.bool, device=bits.device)
    for i in range(8):
        torch.ne(bits & (1 << i), 0, out=mask[:, :, i])
    return mask.flatten(1)[:, :inputs]
