"""Triton kernels of the sparse24 linear: weights stay compressed in memory and are decoded in registers.

Layout of the weights (`packed_words`): a *unit* is 32 consecutive inputs of one output. It takes WORDS int32 words of
values (2:4: bits / 2, dense: bits), exactly as the checkpoint holds them, and for 2:4 one more word with a nibble of
positions for each of its 8 quads. Units lie in panels of 32 outputs: int32 [N/32, K/32, WORDS (+ 1), 32]. So neighbouring
lanes read neighbouring outputs, a program streams through contiguous memory, and no unit crosses a group of scales.

Positions are recoded such that a quad (x0 x1 x2 x3) needs three tests and four selections. With the bits `first` (the
first kept input is x0), `last` (the second kept input is x3) and `middle` (in between, x1 before x2):

    first kept input  = first ? x0 : (middle ? x1 : x2)
    second kept input = last  ? x3 : (middle ? x2 : x1)

Codes become floats without a conversion instruction: a code placed into the mantissa of 2^23 is a float, and one fused
multiply-add takes the offset away again, exactly. The constant 2^23 comes in as an argument (`magic`), because as a
register it shares one logic instruction with the mask, and as an immediate it does not.

Codes are multiplied as integers (exact in bfloat16 and float16); sums and scales are float32.
"""

import os

import triton
import triton.language as tl

INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # as triton itself read it when it decorated the functions below
MAGIC = 0x4B000000  # 2^23 as a float: its 23 mantissa bits count integers
PANEL = tl.constexpr(32)
UNIT = tl.constexpr(32)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _round(numbers, X: tl.constexpr):
    """float32 numbers in X, rounded to nearest even; NaN stays NaN.

    Triton's interpreter truncates to bfloat16 and misreads denormals (a zero with low bits set becomes 1.17e-38): there the
    bits are rounded as integers, and never pass through its conversion.
    """
    if _INTERPRETED and X == tl.bfloat16:
        bits = numbers.to(tl.int32, bitcast=True)
        rounded = tl.where(numbers != numbers, bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return numbers.to(X)


@triton.jit
def _wide(numbers):
    """16-bit or float32 numbers as float32. Triton's interpreter misreads denormals of bfloat16: it gets their bits."""
    if _INTERPRETED and numbers.dtype == tl.bfloat16:
        return (numbers.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return numbers.to(tl.float32)


@triton.jit
def _dot(a, b, total):
    """a @ b + total. Triton's interpreter would multiply the bit patterns of bfloat16."""
    if _INTERPRETED:
        return tl.dot(_wide(a), _wide(b), total)
    else:
        return tl.dot(a, b, total)


@triton.jit
def _code(words, magic, shift: tl.constexpr, BITS: tl.constexpr):
    """The offset-binary code in the bits [shift, shift + BITS) of each word as a float32. shift is a constant."""
    # only the 23 bits of the mantissa can hold a code: the upper ones are moved down by 12 first
    down: tl.constexpr = 0 if shift + BITS <= 20 else 12
    at: tl.constexpr = shift - down
    number = (((words >> down) & (((1 << BITS) - 1) << at)) | magic).to(tl.float32, bitcast=True)
    return number * (1.0 / (1 << at)) - (8388608.0 / (1 << at) + (1 << (BITS - 1)))


@triton.jit
def _half(words, VALUE: tl.constexpr):
    """The 16-bit float in the low half of each word as a float32."""
    if VALUE == tl.bfloat16:
        return (words << 16).to(tl.float32, bitcast=True)
    return (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _value(words, magic, shift: tl.constexpr, BITS: tl.constexpr, VALUE: tl.constexpr):
    """The stored value at a constant bit of each word as a float32."""
    if BITS == 16:
        return _half(words >> shift, VALUE)
    else:
        return _code(words, magic, shift, BITS)


@triton.jit
def _input(four, j: tl.constexpr, X: tl.constexpr):
    """Input j of 4 consecutive 16-bit activations that were read as one int64, as a float32."""
    return _half((four >> (16 * j)).to(tl.int32), X)


@triton.jit
def _dense_tile(
    words, positions, magic, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BITS: tl.constexpr, SPARSE: tl.constexpr,
    VALUE: tl.constexpr,
):  # fmt: skip
    """The weights as float32 [BLOCK_N, BLOCK_K], not yet scaled.

    words: [BLOCK_N, BLOCK_K / 32 * WORDS]; positions: [BLOCK_N, BLOCK_K / 32]. Every step is elementwise, a broadcast
    or a reshape, so Triton can carry the layout of the matrix instruction back to the words: lanes then shift out of a
    shared word the very quads that they multiply, and nothing is exchanged.
    """
    if SPARSE:
        quads: tl.constexpr = BLOCK_K // 4
        shifts = (tl.arange(0, 16 // BITS) * (2 * BITS))[None, None, :]
        pair = (words[:, :, None] >> shifts).reshape([BLOCK_N, quads])
        a = _value(pair, magic, 0, BITS, VALUE)
        b = _value(pair, magic, BITS, BITS, VALUE)
        bit = (1 << (tl.arange(0, 8) * 4))[None, None, :]
        middle = ((positions[:, :, None] & bit) != 0).reshape([BLOCK_N, quads])
        first = ((positions[:, :, None] & (bit << 1)) != 0).reshape([BLOCK_N, quads])
        last = ((positions[:, :, None] & (bit << 2)) != 0).reshape([BLOCK_N, quads])
        # differences of a number and itself or zero are exact, and keep the integer units free for the selections
        inner_a = tl.where(first, 0.0, a)
        outer_b = tl.where(last, b, 0.0)
        inner_b = b - outer_b
        w0 = a - inner_a
        w1 = tl.where(middle, inner_a, inner_b)
        w2 = tl.where(middle, inner_b, inner_a)
        return tl.join(tl.join(w0, w2), tl.join(w1, outer_b)).reshape([BLOCK_N, BLOCK_K])
    else:
        shifts = (tl.arange(0, 32 // BITS) * BITS)[None, None, :]
        return _value((words[:, :, None] >> shifts).reshape([BLOCK_N, BLOCK_K]), magic, 0, BITS, VALUE)


@triton.jit(do_not_specialize=["n_units", "n_groups", "n_fours"])
def gemv(
    x, words, scales, bias, y, n_outputs, n_padded, n_units, n_groups, n_fours, magic,
    GROUP_SHIFT: tl.constexpr, BITS: tl.constexpr, SPARSE: tl.constexpr, X: tl.constexpr, VALUE: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row per program: y[m, n] = sum_k w[n, k] x[m, k]. x: int64 [M, K / 4], four activations each.

    Multiplies what is stored and nothing else: the kept inputs are selected by the positions. Lanes run over outputs and
    units; the sum over units is taken once, at the end.
    """
    WORDS: tl.constexpr = BITS // 2 if SPARSE else BITS
    STRIDE: tl.constexpr = (WORDS + 1 if SPARSE else WORDS) * PANEL
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    unit = tl.arange(0, BLOCK_U)
    panel = n // PANEL
    word_at = words + (panel * (n_units * STRIDE) + n % PANEL)[None, :]
    scale_at = scales + (panel * (n_groups * PANEL) + n % PANEL)[None, :]
    x_at = x + row * n_fours
    inside_n = (n < n_padded)[None, :]
    total = tl.full([BLOCK_U, BLOCK_N], 0.0, tl.float32)
    for start in tl.range(0, n_units, BLOCK_U, num_stages=STAGES):
        u = start + unit
        inside = (u < n_units)[:, None] & inside_n
        at = word_at + (u * STRIDE)[:, None]
        if BITS < 16:
            scale = tl.load(scale_at + ((u >> GROUP_SHIFT) * PANEL)[:, None], mask=inside, other=0.0)
        if SPARSE:
            positions = tl.load(at + WORDS * PANEL, mask=inside, other=0)
        # two sums, so that additions need not wait for each other
        part_a = tl.full([BLOCK_U, BLOCK_N], 0.0, tl.float32)
        part_b = tl.full([BLOCK_U, BLOCK_N], 0.0, tl.float32)
        for i in tl.static_range(WORDS):
            word = tl.load(at + i * PANEL, mask=inside, other=0)
            if SPARSE:
                for t in tl.static_range(16 // BITS):  # quads of this word
                    place = u * 8 + (i * (16 // BITS) + t)
                    four = tl.load(x_at + place, mask=place < n_fours, other=0)
                    x0 = _input(four, 0, X)[:, None]
                    x1 = _input(four, 1, X)[:, None]
                    x2 = _input(four, 2, X)[:, None]
                    x3 = _input(four, 3, X)[:, None]
                    middle = (positions & (1 << (4 * (i * (16 // BITS) + t)))) != 0
                    first = (positions & (2 << (4 * (i * (16 // BITS) + t)))) != 0
                    last = (positions & (4 << (4 * (i * (16 // BITS) + t)))) != 0
                    x_a = tl.where(first, x0, tl.where(middle, x1, x2))
                    x_b = tl.where(last, x3, tl.where(middle, x2, x1))
                    part_a += _value(word, magic, 2 * BITS * t, BITS, VALUE) * x_a
                    part_b += _value(word, magic, 2 * BITS * t + BITS, BITS, VALUE) * x_b
            else:
                for t in tl.static_range(8 // BITS):  # fours of this word
                    place = u * 8 + (i * (8 // BITS) + t)
                    four = tl.load(x_at + place, mask=place < n_fours, other=0)
                    part_a += _value(word, magic, 4 * BITS * t, BITS, VALUE) * _input(four, 0, X)[:, None]
                    part_b += _value(word, magic, 4 * BITS * t + BITS, BITS, VALUE) * _input(four, 1, X)[:, None]
                    part_a += _value(word, magic, 4 * BITS * t + 2 * BITS, BITS, VALUE) * _input(four, 2, X)[:, None]
                    part_b += _value(word, magic, 4 * BITS * t + 3 * BITS, BITS, VALUE) * _input(four, 3, X)[:, None]
        if BITS < 16:
            total += (part_a + part_b) * _wide(scale)
        else:
            total += part_a + part_b
    result = tl.reduce(total, 0, _add)
    inside_y = n < n_outputs
    if HAS_BIAS:
        result += _wide(tl.load(bias + n, mask=inside_y, other=0.0))
    tl.store(y + row * n_outputs + n, _round(result, X), mask=inside_y)


@triton.jit
def _tile_sum(
    x_at, inside_m, n, words, scales, n_padded, n_inputs, n_units, n_groups, k_start, k_stop, magic,
    GROUP_SHIFT: tl.constexpr, BITS: tl.constexpr, SPARSE: tl.constexpr, X: tl.constexpr, VALUE: tl.constexpr,
    ONE_GROUP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sum_k w[n, k] x[m, k] over the inputs [k_start, k_stop), float32 [BLOCK_N, BLOCK_M].

    The weights are the left operand, which may come from registers on every architecture. BLOCK_K never exceeds the group,
    so one scale per output serves a tile. x_at: where input 0 of each row lies, [1, BLOCK_M].
    """
    WORDS: tl.constexpr = BITS // 2 if SPARSE else BITS
    STRIDE: tl.constexpr = (WORDS + 1 if SPARSE else WORDS) * PANEL
    UNITS: tl.constexpr = BLOCK_K // UNIT
    k = tl.arange(0, BLOCK_K)
    unit = tl.arange(0, UNITS)
    word = tl.arange(0, UNITS * WORDS)
    panel = n // PANEL
    base = words + (panel * (n_units * STRIDE) + n % PANEL)[:, None]
    word_at = base + (word // WORDS * STRIDE + word % WORDS * PANEL)[None, :]
    position_at = base + (unit * STRIDE + WORDS * PANEL)[None, :]
    scale_at = scales + panel * (n_groups * PANEL) + n % PANEL
    inside_n = n < n_padded
    x_at += k[:, None]

    total = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
    # a scale is read one step ahead: Triton pipelines the operands of a product, not what multiplies it
    if BITS < 16:
        group = tl.minimum(k_start // UNIT >> GROUP_SHIFT, n_groups - 1)  # of the last splits some may be empty
        scale = tl.load(scale_at + group * PANEL, mask=inside_n, other=0.0)
    for k0 in tl.range(k_start, k_stop, BLOCK_K):
        u = k0 // UNIT
        if EVEN_K:
            tile = tl.load(word_at + u * STRIDE, mask=inside_n[:, None], other=0)
            x_tile = tl.load(x_at + k0, mask=inside_m[None, :], other=0.0)
        else:
            tile = tl.load(
                word_at + u * STRIDE, mask=inside_n[:, None] & (u + word // WORDS < n_units)[None, :], other=0
            )
            x_tile = tl.load(x_at + k0, mask=inside_m[None, :] & (k0 + k < n_inputs)[:, None], other=0.0)
        if SPARSE:
            if EVEN_K:
                positions = tl.load(position_at + u * STRIDE, mask=inside_n[:, None], other=0)
            else:
                positions = tl.load(
                    position_at + u * STRIDE, mask=inside_n[:, None] & (u + unit < n_units)[None, :], other=0
                )
        else:
            positions = tile
        weights = _round(_dense_tile(tile, positions, magic, BLOCK_N, BLOCK_K, BITS, SPARSE, VALUE), X)
        if ONE_GROUP:
            total = _dot(weights, x_tile, total)
        else:
            ahead = tl.minimum((u + UNITS) >> GROUP_SHIFT, n_groups - 1)
            following = tl.load(scale_at + ahead * PANEL, mask=inside_n, other=0.0)
            nothing = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
            total += _dot(weights, x_tile, nothing) * _wide(scale)[:, None]
            scale = following
    if ONE_GROUP and BITS < 16:
        total *= _wide(scale)[:, None]
    return total


@triton.jit(do_not_specialize=["n_rows", "n_units", "n_groups"])
def gemm(
    x, words, scales, bias, y, partial, n_rows, n_outputs, n_padded, n_inputs, n_units, n_groups, inputs_per_split, magic,
    GROUP_SHIFT: tl.constexpr, BITS: tl.constexpr, SPARSE: tl.constexpr, X: tl.constexpr, VALUE: tl.constexpr,
    HAS_BIAS: tl.constexpr, ONE_GROUP: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k w[n, k] x[m, k] on tensor cores, a tile [BLOCK_N, BLOCK_M] of the transposed result per program.

    x: [M, K]. With SPLIT the inputs are shared among programs, whose sums go to partial: float32 [splits, M, N] (see
    `add_partials`).
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    k_start = split * inputs_per_split
    k_stop = tl.minimum(k_start + inputs_per_split, n_inputs)
    inside_m = m < n_rows
    total = _tile_sum(
        x + m.to(tl.int64)[None, :] * n_inputs, inside_m, n, words, scales, n_padded, n_inputs, n_units, n_groups,
        k_start, k_stop, magic, GROUP_SHIFT, BITS, SPARSE, X, VALUE, ONE_GROUP, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    result = tl.trans(total)
    inside_y = n < n_outputs
    inside = inside_m[:, None] & inside_y[None, :]
    at = m.to(tl.int64)[:, None] * n_outputs + n[None, :]
    if SPLIT:
        tl.store(partial + split.to(tl.int64) * n_rows * n_outputs + at, result, mask=inside)
    else:
        if HAS_BIAS:
            result += _wide(tl.load(bias + n, mask=inside_y, other=0.0))[None, :]
        tl.store(y + at, _round(result, X), mask=inside)


@triton.jit(do_not_specialize=["n_units", "n_groups"])
def experts(
    x, words, scales, bias, order, starts, block_expert, block_start, gates, y, words_stride, scales_stride, n_outputs,
    n_padded, n_inputs, n_units, n_groups, magic,
    GROUP_SHIFT: tl.constexpr, BITS: tl.constexpr, SPARSE: tl.constexpr, X: tl.constexpr, VALUE: tl.constexpr,
    FIRST: tl.constexpr, CHOSEN: tl.constexpr, EXPERTS: tl.constexpr, ONE_GROUP: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One linear of every expert, each on its tokens, in one launch; tiles as those of `gemm`.

    An entry is one choice of one token, number token * CHOSEN + place. order: the entries sorted by expert, [entries];
    starts: where those of each expert begin there, [EXPERTS + 1]; block_expert, block_start: the expert of each block of
    rows and where in `order` it begins; an expert number of EXPERTS ends a program at once.

    FIRST: row i of y, in X, is of the token of order[i]; x: [tokens, K]. Otherwise x: row i is of order[i], and row order[i]
    of y, float32, is multiplied by its gate; gates: float32 [entries]. bias: [EXPERTS, N], added before.
    """
    expert = tl.load(block_expert + tl.program_id(0))
    if expert == EXPERTS:
        return
    row = tl.load(block_start + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    inside_m = row < tl.load(starts + expert + 1)
    entry = tl.load(order + row, mask=inside_m, other=0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    read = entry // CHOSEN if FIRST else row
    number = expert.to(tl.int64)
    total = _tile_sum(
        x + read.to(tl.int64)[None, :] * n_inputs, inside_m, n, words + number * words_stride,
        scales + number * scales_stride, n_padded, n_inputs, n_units, n_groups, 0, n_inputs, magic,
        GROUP_SHIFT, BITS, SPARSE, X, VALUE, ONE_GROUP, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    result = tl.trans(total)
    inside = inside_m[:, None] & (n < n_outputs)[None, :]
    if HAS_BIAS:
        result += _wide(tl.load(bias + number * n_outputs + n, mask=n < n_outputs, other=0.0))[None, :]
    if FIRST:
        tl.store(y + row.to(tl.int64)[:, None] * n_outputs + n[None, :], _round(result, X), mask=inside)
    else:
        result *= tl.load(gates + entry, mask=inside_m, other=0.0)[:, None]
        tl.store(y + entry.to(tl.int64)[:, None] * n_outputs + n[None, :], result, mask=inside)


@triton.jit(do_not_specialize=["n_rows", "n_splits"])
def add_partials(
    partial, bias, y, n_rows, n_outputs, n_splits, X: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """y[m, n] = sum of partial[:, m, n] + bias[n], always in the same order. partial: float32 [splits, M, N]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    inside = n < n_outputs
    total = tl.full([BLOCK_N], 0.0, tl.float32)
    step = n_rows.to(tl.int64) * n_outputs
    for split in tl.range(0, n_splits):
        total += tl.load(partial + split * step + row * n_outputs + n, mask=inside, other=0.0)
    if HAS_BIAS:
        total += _wide(tl.load(bias + n, mask=inside, other=0.0))
    tl.store(y + row * n_outputs + n, _round(total, X), mask=inside)


@triton.jit(do_not_specialize=["n_units", "n_groups"])
def decode(
    words, scales, weight, n_outputs, n_padded, n_inputs, n_units, n_groups, magic,
    GROUP_SHIFT: tl.constexpr, BITS: tl.constexpr, SPARSE: tl.constexpr, X: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """weight[n, k]: the dense weights, rounded once to X. For products with so many rows that a dense GEMM pays."""
    WORDS: tl.constexpr = BITS // 2 if SPARSE else BITS
    STRIDE: tl.constexpr = (WORDS + 1 if SPARSE else WORDS) * PANEL
    UNITS: tl.constexpr = BLOCK_K // UNIT
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    word = tl.arange(0, UNITS * WORDS)
    word_unit = tl.program_id(0) * UNITS + word // WORDS
    panel = n // PANEL
    inside_n = (n < n_padded)[:, None]
    base = words + (panel * (n_units * STRIDE) + n % PANEL)[:, None]
    word_at = base + (word_unit * STRIDE + word % WORDS * PANEL)[None, :]
    tile = tl.load(word_at, mask=inside_n & (word_unit < n_units)[None, :], other=0)
    positions = tile
    if SPARSE:
        position_at = base + (unit * STRIDE + WORDS * PANEL)[None, :]
        positions = tl.load(position_at, mask=inside_n & (unit < n_units)[None, :], other=0)
    dense = _dense_tile(tile, positions, magic, BLOCK_N, BLOCK_K, BITS, SPARSE, VALUE)
    if BITS < 16:
        scale_at = scales + (panel * (n_groups * PANEL) + n % PANEL)[:, None]
        group = (unit >> GROUP_SHIFT)[None, :]
        scale = _wide(tl.load(scale_at + group * PANEL, mask=inside_n & (unit < n_units)[None, :], other=0.0))
        dense = (dense.reshape([BLOCK_N, UNITS, UNIT]) * scale[:, :, None]).reshape([BLOCK_N, BLOCK_K])
    at = weight + n.to(tl.int64)[:, None] * n_inputs + k[None, :]
    tl.store(at, _round(dense, X), mask=(n < n_outputs)[:, None] & (k < n_inputs)[None, :])
