"""The emulator itself: each instruction against a formula written here, and each thing that it must refuse.

emulator_primitives.cu has the kernels. What the real kernel computes is test_emulated_sparse24.py's matter.
"""

import ctypes
import math
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsify.files import cache_directory
from sparsify.native.emulator import FLAGS, Emulated, EmulatorError, Memory, build

SOURCE = Path(__file__).with_name("emulator_primitives.cu")
BF16, F16, F32, I32 = torch.bfloat16, torch.float16, torch.float32, torch.int32
Dim = tuple[int, int, int]


class Primitives:
    """The kernels of emulator_primitives.cu, called by name."""

    def __init__(self, flags: tuple[str, ...] = (), copy_in: Path | None = None) -> None:
        """copy_in: a folder to load a copy from, that is a machine of its own on which nothing has run."""
        quick = ["-O1" if flag == "-O2" else flag for flag in FLAGS]
        library = build(SOURCE, flags=(*quick, *flags), folder=cache_directory() / "emulated-tests")
        self.emulated = Emulated(Path(shutil.copy(library, copy_in)) if copy_in else library)
        self.c = self.emulated.c

    def run(
        self,
        name: str,
        given: Tensor | None = None,
        *shape: int,
        dtype: torch.dtype = I32,
        mode: int = 0,
        grid: int | Dim = 1,
        block: int | Dim = 32,
        shared: int = 0,
    ) -> Tensor:
        """The output [shape] of a kernel that was given a tensor. Raises EmulatorError for what the emulator refuses."""
        grid = (grid, 1, 1) if isinstance(grid, int) else grid
        block = (block, 1, 1) if isinstance(block, int) else block
        with Memory(self.emulated) as memory:
            given = memory.put(torch.zeros(1) if given is None else given)
            out = memory.empty(*(shape or (math.prod(grid) * math.prod(block),)), dtype=dtype)
            self.launch(name, given, out, mode, grid, block, shared)
            return out.clone()

    def launch(
        self,
        name: str,
        given: Tensor,
        out: Tensor,
        mode: int = 0,
        grid: Dim = (1, 1, 1),
        block: Dim = (32, 1, 1),
        shared: int = 0,
    ) -> None:
        three = ctypes.c_uint * 3
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (given, out)]
        status = self.c.primitive(name.encode(), *pointers, mode, three(*grid), three(*block), shared)
        self.emulated.check()
        assert status == 0, name

    def refuses(self, match: str, name: str, given: Tensor | None = None, *shape: int, **options: object) -> None:
        with pytest.raises(EmulatorError, match=match):
            self.run(name, given, *shape, **options)


@pytest.fixture(scope="module")
def gpu() -> Primitives:
    return Primitives()


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize(("kernel", "dtype"), [("widen_bf16", BF16), ("widen_f16", F16)])
def test_every_16_bit_number_widens_as_torch_widens_it(gpu: Primitives, kernel: str, dtype: torch.dtype) -> None:
    every = torch.arange(65536, dtype=I32).to(torch.uint16)
    found = gpu.run(kernel, every, 65536, dtype=F32, grid=64, block=1024)
    expected = every.view(dtype).float()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.view(I32)[~found.isnan()], expected.view(I32)[~expected.isnan()])


@pytest.mark.parametrize(("kernel", "dtype"), [("round_bf16", BF16), ("round_f16", F16)])
def test_floats_round_as_torch_rounds_them(gpu: Primitives, kernel: str, dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31, (30000,), generator=random(), dtype=torch.int64).to(I32)
    every = torch.arange(65536, dtype=I32).to(torch.uint16).view(dtype).float()
    every = every[every.isfinite()]
    halfway = (
        every[:-1].double() + every[1:].double()
    ) / 2  # exactly between neighbours, in a row of falling or rising bits
    near = torch.cat(
        [halfway.float(), halfway.float().nextafter(every[1:]), every, torch.tensor([1e-45, 65519.9, 65520.0, 3.4e38])]
    )
    given = torch.cat([bits.view(F32), near, -near, torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0])])
    given = torch.cat([given, torch.zeros(-len(given) % 512)])
    found = gpu.run(kernel, given, len(given), dtype=dtype, grid=len(given) // 512, block=512)
    expected = given.to(dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.view(torch.int16)[~found.isnan()], expected.view(torch.int16)[~expected.isnan()])
    assert (found.view(torch.int16)[found.isnan()] == 0x7FFF).all()


def nearest(value: Fraction, mantissa: int, least: int) -> Fraction:
    """`value` rounded to nearest even among numbers of `mantissa` bits behind the point and exponents from `least` on."""
    if value == 0:
        return value
    exponent = max(math.floor(math.log2(abs(value))), least)
    exponent += abs(value) >= Fraction(2) ** (exponent + 1)  # log2 of a double may be off by one
    exponent -= exponent > least and abs(value) < Fraction(2) ** exponent
    unit = Fraction(2) ** (exponent - mantissa)
    return round(value / unit) * unit  # Python rounds fractions half to even


@pytest.mark.parametrize(("dtype", "mode", "mantissa", "least"), [(BF16, 0, 7, -126), (F16, 1, 10, -14)])
def test_packed_fma_rounds_once(gpu: Primitives, dtype: torch.dtype, mode: int, mantissa: int, least: int) -> None:
    generator = random(1)
    count = 1024
    factors = torch.randn(count, 3, 2, generator=generator) * 2.0 ** torch.randint(
        -12, 13, (count, 3, 2), generator=generator
    )
    # c near -a b and c far below the last bit of a b: where rounding twice would show
    factors[::3, 2] = -(factors[::3, 0] * factors[::3, 1]).to(dtype).float()
    factors[1::3, 2] *= 2.0**-14
    given = factors.clamp(-60000, 60000).to(dtype)
    found = gpu.run("fma_pairs", given.view(I32).flatten(), count, 2, dtype=dtype, mode=mode, grid=2, block=512)
    for (a, b, c), got in zip(given.transpose(1, 2).reshape(-1, 3).tolist(), found.flatten().tolist(), strict=True):
        exact = nearest(Fraction(a) * Fraction(b) + Fraction(c), mantissa, least)
        assert Fraction(got) == exact if abs(exact) < 65520 or dtype == BF16 else math.isinf(got), (a, b, c, got)


def test_logic_of_three_words(gpu: Primitives) -> None:
    words = torch.randint(-(2**31), 2**31, (3,), generator=random(2), dtype=torch.int64).to(I32)
    assert gpu.run("logic", words)[0] == words[0] & words[1] | words[2]


# ---------------------------------------------------------------------------------------------------- the grid
@pytest.mark.parametrize("descending", [False, True])
def test_every_thread_of_every_block_runs_once_and_knows_its_place(gpu: Primitives, descending: bool) -> None:
    gpu.emulated.block_order(descending=descending)
    found = gpu.run("indices", None, 3 * 2 * 2 * 5 * 3 * 2, 6, grid=(3, 2, 2), block=(5, 3, 2))
    gpu.emulated.block_order(descending=False)
    ranges = [torch.arange(count) for count in (2, 2, 3, 2, 3, 5)]  # the last runs fastest
    expected = torch.cartesian_prod(*ranges)[:, [2, 1, 0, 5, 4, 3]]
    assert torch.equal(found, expected.to(I32))


def test_a_launch_that_hardware_refuses(gpu: Primitives) -> None:
    gpu.refuses("blocks of", "indices", None, 6, block=1025)
    gpu.refuses("blocks of", "indices", None, 6, grid=(1, 65536, 1))
    gpu.refuses("50000 bytes of shared memory, but 49152 without", "indices", None, 6, block=1, shared=50000)
    assert gpu.c.allow_shared(b"indices", 60000) == 0
    gpu.run("indices", None, 6, block=1, shared=50000)
    gpu.refuses("70000 bytes of shared memory", "indices", None, 6, block=1, shared=70000)
    assert gpu.c.allow_shared(b"indices", 300000) != 0


def test_after_an_error_nothing_runs_until_it_is_cleared(gpu: Primitives) -> None:
    with Memory(gpu.emulated) as memory:
        given, out = memory.put(torch.zeros(8)), memory.put(torch.zeros(8, dtype=I32))
        arguments = (given.data_ptr(), out.data_ptr())
        three = (ctypes.c_uint * 3)(1, 1, 1)
        pointers = [ctypes.c_void_p(pointer) for pointer in arguments]
        assert gpu.c.primitive(b"uninitialised", *pointers, 0, three, three, 64) == 719  # cudaErrorLaunchFailure
        first = gpu.c.emulator_error()
        assert gpu.c.primitive(b"logic", *pointers, 0, three, three, 64) == 719
        assert gpu.c.emulator_error() == first
        with pytest.raises(EmulatorError):
            gpu.emulated.check()
        gpu.launch("logic", given, out, block=(1, 1, 1))


def test_thousands_of_refusals_leave_nothing_behind(gpu: Primitives) -> None:
    for _ in range(2000):
        gpu.refuses("uninitialised", "uninitialised", None, 1, shared=64, block=256)
    assert gpu.run("shuffles", torch.arange(32.0), 32, dtype=F32, mode=1)[0] == 1


# ---------------------------------------------------------------------------------------------------- mma.sp
# Fragments by the layouts that CUTLASS gives for this instruction (cute/atom/mma_traits_sm80_sparse.hpp): strides of lane and
# value in a column-major matrix. The emulator was written from the PTX ISA's formulas, so the two check each other.
def quads(lane: int, half: int, step: int) -> tuple[int, int]:
    """Row and first column of the quad that a lane holds in register half + 2 step of A [16, 32]."""
    at = lane % 4 * 64 + lane // 4 + 8 * half + 256 * step
    return at % 16, at // 16


def fragments(a: Tensor, b: Tensor, d: Tensor, selector: int, dtype: torch.dtype) -> Tensor:
    """A [16, 32] with two nonzeros in every quad, B [32, 8], D [16, 8] -> the 13 words of each lane, int32 [32, 13].

    The lanes that the selector does not name get metadata that the instruction must not look at.
    """
    words = torch.zeros(32, 13, dtype=I32)
    for lane in range(32):
        for value in range(4):
            at = lane % 4 * 32 + lane // 4 + value % 2 * 16 + value // 2 * 8  # D: 16 rows
            words[lane, value] = d[at % 16, at // 16].float().view(I32)
            row, column = quads(lane, value % 2, value // 2)
            kept = a[row, column : column + 4]
            words[lane, 4 + value] = kept[kept != 0].to(dtype).view(I32)[0]
            at = lane % 4 * 16 + lane // 4 + 64 * value  # B': 8 columns of B; two values 8 apart
            words[lane, 8 + value] = torch.stack([b[at // 8, at % 8], b[at // 8 + 1, at % 8]]).to(dtype).view(I32)[0]
        if lane % 4 // 2 == selector:
            bits = 0
            for half in range(2):
                for quad in range(4):
                    at = lane % 2 * 256 + lane // 4 + 8 * half
                    places = a[at % 16, at // 16 + 4 * quad :][:4].nonzero().flatten().tolist()
                    bits |= (places[0] | places[1] << 2) << (16 * half + 4 * quad)
            words[lane, 12] = bits - (bits >> 31 << 32)
    return words


def sparse(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Integers from 1 to 8 and -8 to -1 in two of every four columns, float64 [rows, columns]."""
    kept = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1) < 2
    values = torch.randint(1, 9, kept.shape, generator=generator) * (
        1 - 2 * torch.randint(0, 2, kept.shape, generator=generator)
    )
    return (values * kept).view(rows, columns).double()


def unfold(found: Tensor) -> Tensor:
    """What the lanes hold of D, float32 [32, 4] -> [16, 8]."""
    return found.view(8, 4, 2, 2).permute(2, 0, 1, 3).reshape(16, 8)


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize(("kernel", "dtype"), [("mma_bf16", BF16), ("mma_f16", F16)])
def test_mma_sp_multiplies_by_the_tables(gpu: Primitives, kernel: str, dtype: torch.dtype, selector: int) -> None:
    for seed in range(4):
        generator = random(seed)
        a, d = sparse(16, 32, generator), torch.randn(16, 8, generator=generator).double()
        b = torch.randint(-100, 101, (32, 8), generator=generator).double() / 8
        d = (d * 64).round() / 64
        found = gpu.run(kernel, fragments(a, b, d, selector, dtype).flatten(), 32, 4, dtype=F32, mode=selector)
        assert torch.equal(unfold(found).double(), a @ b + d)


@pytest.mark.parametrize(("kernel", "dtype"), [("mma_bf16", BF16), ("mma_f16", F16)])
def test_mma_sp_rounds_its_sum_once(gpu: Primitives, kernel: str, dtype: torch.dtype) -> None:
    generator = random(7)
    a = (sparse(16, 32, generator) * torch.rand(16, 32, generator=generator)).to(dtype).double()
    b, d = torch.randn(32, 8, generator=generator).to(dtype).double(), torch.randn(16, 8, generator=generator).double()
    found = gpu.run(kernel, fragments(a, b, d, 0, dtype).flatten(), 32, 4, dtype=F32)
    assert torch.equal(unfold(found), (a @ b + d.float()).float())


def test_mma_sp_leaves_out_what_the_metadata_leaves_out(gpu: Primitives) -> None:
    a, b = sparse(16, 32, random()), torch.ones(32, 8)
    a[:, :4] = torch.tensor([1.0, 0, 2, 0])
    b[1], b[3] = math.nan, math.inf
    found = gpu.run("mma_bf16", fragments(a, b, torch.zeros(16, 8), 1, BF16).flatten(), 32, 4, dtype=F32, mode=1)
    assert torch.equal(unfold(found)[:, 0].double(), a.sum(1))


@pytest.mark.parametrize("nibble", [0x0, 0x1, 0x2, 0x3, 0x5, 0x6, 0x7, 0xA, 0xB, 0xF])
def test_metadata_that_does_not_ascend_is_refused(gpu: Primitives, nibble: int) -> None:
    words = fragments(sparse(16, 32, random()), torch.ones(32, 8), torch.zeros(16, 8), 0, BF16)
    words[21, 12] = words[21, 12] & ~0xF00000 | nibble << 20  # lane 21: row 5 + 8, quad 4 + 1
    gpu.refuses(
        rf"thread 21: mma_sp: invalid metadata 0x{nibble:x} for quad 5 of row 13",
        "mma_bf16",
        words.flatten(),
        128,
        dtype=F32,
    )


def test_the_other_selector_reads_other_lanes(gpu: Primitives) -> None:
    words = fragments(sparse(16, 32, random()), torch.ones(32, 8), torch.zeros(16, 8), 0, BF16)
    gpu.refuses("invalid metadata 0x0 for quad 0 of row 0", "mma_bf16", words.flatten(), 128, dtype=F32, mode=1)


# ---------------------------------------------------------------------------------------------------- other instructions
def test_ldmatrix_gives_each_lane_its_pairs(gpu: Primitives) -> None:
    content = torch.randint(0, 256, (2048,), generator=random(), dtype=torch.uint8)
    offsets = torch.randperm(128, generator=random(3))[:32] * 16
    given = torch.cat([offsets.to(I32).view(torch.uint8), content])
    gpu.emulated.reset_counters()
    found = gpu.run("matrices", given, 32, 4, mode=2048, shared=2048)
    rows = torch.stack([content[start : start + 16] for start in offsets.tolist()]).view(torch.int16).view(4, 8, 4, 2)
    assert torch.equal(found.view(torch.int16).view(8, 4, 4, 2).permute(2, 0, 1, 3), rows)  # [row, pair, matrix, 2]
    banks = offsets.view(4, 8) // 16 % 8
    passes = sum(int(torch.bincount(eight).max()) for eight in banks)
    counters = gpu.emulated.counters()
    assert (counters.ldmatrix, counters.ldmatrix_conflicts) == (1, passes - 4)


def test_ldmatrix_refuses_rows_that_are_misaligned_outside_or_unwritten(gpu: Primitives) -> None:
    content = torch.zeros(2048, dtype=torch.uint8)
    for offset, match in ((24, "misaligned"), (2048, "out of bounds"), (-16, "out of bounds"), (1024, "uninitialised")):
        offsets = torch.arange(32, dtype=I32) * 16
        offsets[19] = offset
        given = torch.cat([offsets.view(torch.uint8), content])
        gpu.refuses(f"thread 19: ldmatrix_x4: .*{match}", "matrices", given, 32, 4, mode=1024, shared=2048)


@pytest.mark.parametrize("mask", [1, 2, 4, 8, 16, 31])
def test_shuffle_xor(gpu: Primitives, mask: int) -> None:
    given = torch.randn(32, generator=random())
    assert torch.equal(gpu.run("shuffles", given, 32, dtype=F32, mode=mask), given[torch.arange(32) ^ mask])


@pytest.mark.parametrize("delta", [1, 2, 4, 8, 16])
def test_shuffle_down_keeps_what_comes_from_beyond_the_warp(gpu: Primitives, delta: int) -> None:
    given = torch.randn(64, generator=random())
    found = gpu.run("shuffles", given, 64, dtype=F32, mode=100 + delta, block=64)
    lanes = torch.arange(64)
    assert torch.equal(found, given[torch.where(lanes % 32 + delta < 32, lanes + delta, lanes)])


@pytest.mark.parametrize(
    ("stride", "stores", "copies", "loads"),
    [
        (16, 3, 0, 2),  # 16 bytes side by side fill the banks, of less a part is used
        (32, 7, 4, 6),  # four quarters of a warp for 16 bytes, two halves for 8
        (128, 31, 28, 30),  # every lane in the same banks
        (144, 3, 0, 2),  # padded by 16 bytes
    ],
)
def test_bank_conflicts_are_counted(gpu: Primitives, stride: int, stores: int, copies: int, loads: int) -> None:
    gpu.emulated.reset_counters()
    gpu.run("strided", None, 1, mode=stride, shared=32 * stride)
    counters = gpu.emulated.counters()
    assert (counters.store_conflicts, counters.copy_conflicts, counters.load_conflicts) == (stores, copies, loads)


# ---------------------------------------------------------------------------------------------------- cp.async
def chunks() -> Tensor:
    return torch.randint(-(2**31), 2**31, (3 * 32, 4), generator=random(), dtype=torch.int64).to(I32)


@pytest.mark.parametrize("mode", [0, 1, 3])
def test_copies_that_were_waited_for_are_there_after_a_barrier(gpu: Primitives, mode: int) -> None:
    groups = {0: 3, 1: 2, 3: 1}[mode]
    given = chunks()
    found = gpu.run("copies", given, groups, 32, 4, mode=mode, shared=3 * 512)
    valid = (torch.arange(3)[:, None] + torch.arange(32)) % 5 != 0
    expected = (given.view(3, 32, 4) * valid[..., None])[:groups, [max(i - 1, 0) for i in range(32)]]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("mode", "match"),
    [
        (2, "target of a cp.async of thread . that was not waited for"),
        (4, "target of a cp.async of thread . that was not waited for"),
        (5, "race: shared_load reads byte .*, written by thread 0 with no barrier"),
        (6, "race: shared_load reads byte .*, written by thread 0 with no barrier"),
    ],
    ids=["not committed", "not waited for", "no barrier", "barrier before the wait"],
)
def test_copies_that_others_cannot_see_yet(gpu: Primitives, mode: int, match: str) -> None:
    gpu.refuses(match, "copies", chunks(), 3, 32, 4, mode=mode, shared=3 * 512)


def test_a_thread_sees_its_own_copy_after_the_wait(gpu: Primitives) -> None:
    given = chunks()[:32]
    assert torch.equal(gpu.run("own_copies", given, 32, 4, shared=512), given)


# ---------------------------------------------------------------------------------------------------- order
NOTHING, WARP, BLOCK = 0, 1, 2


@pytest.mark.parametrize(
    ("kernel", "block", "bytes_", "enough"),
    [
        ("write_read_near", 32, 4, WARP),
        ("write_read_far", 64, 4, BLOCK),
        ("read_write", 32, 4, WARP),
        ("read_write", 64, 4, BLOCK),
        ("read_copy", 32, 16, WARP),
        ("read_copy", 64, 16, BLOCK),
        ("write_write", 32, 4, WARP),
        ("write_write", 64, 4, BLOCK),
        ("write_ldmatrix", 32, 16, WARP),
    ],
)
def test_a_race_is_found_unless_a_barrier_stands_between(
    gpu: Primitives, kernel: str, block: int, bytes_: int, enough: int
) -> None:
    given = torch.zeros(block, 4)
    for barrier in (NOTHING, WARP, BLOCK):
        if barrier >= enough:
            gpu.run(kernel, given, mode=barrier, block=block, shared=block * bytes_)
        else:
            gpu.refuses(
                "race: .* of shared memory, (read|written) by .* with no barrier in between",
                *(kernel, given),
                **{"mode": barrier, "block": block, "shared": block * bytes_},
            )


def test_neighbouring_bytes_are_no_race(gpu: Primitives) -> None:
    found = gpu.run("bytes_of_a_word", None, 64, dtype=torch.uint8, block=64, shared=64)
    assert torch.equal(found, torch.arange(64, dtype=torch.uint8))


def test_warps_may_go_different_ways(gpu: Primitives) -> None:
    found = gpu.run("uneven_warps", None, 96, dtype=F32, block=96)
    assert torch.equal(found, torch.tensor([32.0, 32.0**2, 32.0**3]).repeat_interleave(32))


def test_a_first_launch_may_be_of_the_largest_block(gpu: Primitives, tmp_path: Path) -> None:
    """Threads that wait keep their stacks, however many stacks there were before the launch: none."""
    new = Primitives(copy_in=tmp_path)
    new.run("half_a_barrier", mode=1024, block=1024)
    new.refuses("thread 512 has left|thread 1023 has left", "half_a_barrier", mode=512, block=1024)


@pytest.mark.parametrize(
    ("mode", "match"),
    [
        (0, r"divergence: lane 0 of warp 0 waits at shuffle_xor, but lane 16 has left the kernel"),
        (1, r"divergence: lane 16 of warp 0 reaches shuffle_xor \(2\) while lane 0 waits at shuffle_xor \(1\)"),
        (2, r"divergence: lane 16 of warp 0 reaches shuffle_down \(1\) while lane 0 waits at shuffle_xor \(1\)"),
        (3, r"divergence: lane 16 of warp 0 waits at warp_barrier, but lane 0 waits at block_barrier"),
    ],
)
def test_lanes_that_part_before_an_instruction_of_the_warp(gpu: Primitives, mode: int, match: str) -> None:
    gpu.refuses(match, "half_a_warp", None, 64, dtype=F32, mode=mode, block=64)


@pytest.mark.parametrize(("waiting", "block"), [(16, 32), (32, 64), (63, 64)])
def test_a_barrier_that_some_threads_never_reach(gpu: Primitives, waiting: int, block: int) -> None:
    gpu.refuses(
        "block_barrier: thread .* waits, but thread .* has left", "half_a_barrier", None, mode=waiting, block=block
    )


def test_warps_of_fewer_than_32_threads_meet_at_barriers_only(gpu: Primitives) -> None:
    gpu.run("half_a_barrier", None, mode=48, block=48)
    gpu.refuses("fewer than 32 threads", "shuffles", torch.zeros(48), dtype=F32, mode=1, block=48)


# ---------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize(
    ("offset", "match"), [(64, "out of bounds"), (61, "out of bounds"), (-4, "out of bounds"), (2, "misaligned")]
)
def test_shared_memory_ends_where_it_ends(gpu: Primitives, offset: int, match: str) -> None:
    gpu.run("shared_access", None, 1, mode=60, shared=64, block=1)
    gpu.refuses(f"thread 0: shared_store: .*{match}", "shared_access", None, 1, mode=offset, shared=64, block=1)


@pytest.mark.parametrize(
    ("offset", "match"), [(64, "0 bytes behind its end"), (-4, "4 bytes before its begin"), (8, "byte 8 .* without")]
)
def test_a_write_through_a_plain_pointer_is_found_afterwards(gpu: Primitives, offset: int, match: str) -> None:
    gpu.refuses(match, "raw_write", None, 1, mode=offset, shared=64, block=1)


@pytest.mark.parametrize("kernel", ["global_access", "global_write", "global_copy"])
def test_global_memory_ends_where_it_ends(gpu: Primitives, kernel: str) -> None:
    wide = 16 if kernel == "global_copy" else 4
    given, options = torch.zeros(64, dtype=torch.uint8), {"shared": 64, "block": 1}
    gpu.run(kernel, given, 16, mode=64 - wide, **options)
    gpu.refuses("64 of an allocation of 64 bytes", kernel, given, 16, mode=64, **options)
    gpu.refuses(f"{wide} bytes before an allocation", kernel, given, 16, mode=-wide, **options)
    gpu.refuses("misaligned", kernel, given, 16, mode=wide // 2, **options)
    with pytest.raises(EmulatorError, match="no global memory is registered"):
        gpu.launch(kernel, given, given, 0, shared=64)


def test_a_copy_of_nothing_reads_nothing(gpu: Primitives) -> None:
    gpu.run("empty_copy", None, 1, mode=1 << 20, shared=16, block=1)
    gpu.refuses("misaligned", "empty_copy", None, 1, mode=8, shared=16, block=1)


def test_global_memory_must_be_written_before_it_is_read(gpu: Primitives) -> None:
    with Memory(gpu.emulated) as memory:
        given, out = memory.empty(4, dtype=I32), memory.empty(1, dtype=I32)
        with pytest.raises(
            EmulatorError, match="global_load: byte 0 of an allocation of 16 bytes in global memory is uninit"
        ):
            gpu.launch("global_access", given, out)
        assert gpu.c.clear_bytes(ctypes.c_void_p(given.data_ptr()), 1, ctypes.c_int64(4)) == 0
        gpu.launch("global_access", given, out, 0, block=(1, 1, 1))
        assert out.item() == 0x01010101
        assert gpu.c.clear_bytes(ctypes.c_void_p(given.data_ptr()), 1, ctypes.c_int64(17)) != 0


def test_the_read_only_path_refuses_what_the_launch_has_written(gpu: Primitives) -> None:
    assert gpu.run("read_only", torch.arange(5, dtype=I32), 5, block=1).tolist() == [0, 1, 2, 3, 1]
    gpu.refuses("load_nc_u32: .* was written by this launch", "read_only_of_written", None, 8, mode=0, block=1)
    gpu.refuses("load_nc_u128: .* was written by this launch", "read_only_of_written", None, 8, mode=1, block=1)


@pytest.mark.parametrize("descending", [False, True])
def test_blocks_meet_by_a_fence_and_an_atomic_operation(gpu: Primitives, descending: bool) -> None:
    parts = torch.randint(-100, 100, (5,), generator=random(), dtype=I32)
    gpu.emulated.block_order(descending=descending)
    try:
        for mode, match in (
            (0, None),
            (1, "written by block"),
            (2, "race|uninitialised"),
            (3, "race: global_store writes byte 8"),
        ):
            with Memory(gpu.emulated) as memory:
                given, out = memory.put(parts), memory.empty(7, dtype=I32)
                gpu.c.clear_bytes(ctypes.c_void_p(out.data_ptr()), 0, ctypes.c_int64(4))
                if match is None:
                    gpu.launch("last_sums", given, out, mode, grid=(5, 1, 1), block=(64, 1, 1))
                    assert (out[0], out[1]) == (5, parts.sum())
                else:
                    with pytest.raises(EmulatorError, match=match):
                        gpu.launch("last_sums", given, out, mode, grid=(5, 1, 1), block=(64, 1, 1))
    finally:
        gpu.emulated.block_order(descending=False)


def test_fibers_of_ucontext_do_the_same(gpu: Primitives) -> None:
    """On processors other than x86-64 the C library switches the fibers."""
    portable = Primitives(("-DSPARSIFY_EMULATOR_UCONTEXT",))
    given = torch.randn(64, generator=random())
    for kernel, mode in (("shuffles", 3), ("uneven_warps", 0)):
        results = [each.run(kernel, given, 64, dtype=F32, mode=mode, block=64) for each in (gpu, portable)]
        assert torch.equal(*results)
    portable.refuses("divergence", "half_a_warp", None, 64, dtype=F32, mode=1, block=64)
    portable.refuses("with no barrier in between", "write_read_near", None, 64, mode=0, block=64, shared=256)
