"""float32 numbers that are hard to round, as bits, and their bfloat16 by integer arithmetic alone."""

import random

EXPONENT, FRACTION, SIGN = 0x7F800000, 0x007FFFFF, 0x80000000
# zero, denormals around every step and tie, what rounds up to a normal number, ties both ways, what overflows, Inf, NaN
_MAGNITUDES = (
    0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x17FFF, 0x18000, 0x18001, 0x28000, 0x3FFFFF, 0x400000, 0x7F7FFF, 0x7F8000,
    0x7FFFFF, 0x800000, 0x807FFF, 0x808000, 0x818000, 0x3EFF8000, 0x3F000000, 0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F808001,
    0x3F818000, 0x3FFF8000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7F80FFFF, 0x7FBFFFFF, 0x7FC00000,
    0x7FFF7FFF, 0x7FFFFFFF,
)  # fmt: skip


def hard_bits(count: int = 4096) -> list[int]:
    """Those of both signs, and random patterns up to `count`: each below 2^32."""
    chosen = [magnitude | sign for magnitude in _MAGNITUDES for sign in (0, SIGN)]
    numbers = random.Random(0)
    return chosen + [numbers.getrandbits(32) for _ in range(count - len(chosen))]


def is_nan(bits: int) -> bool:
    return bits & EXPONENT == EXPONENT and bits & FRACTION != 0


def to_bfloat16(bits: int) -> int:
    """The 16 bits of the nearest bfloat16, the even one of two. Not for NaN, of which any will do."""
    upper, rest = divmod(bits, 1 << 16)
    return upper + (rest > 0x8000 or (rest == 0x8000 and upper % 2 == 1))
