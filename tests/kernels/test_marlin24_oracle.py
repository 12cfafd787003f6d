"""Bytes that real GPUs executed, through the emulator: marlin-24, whose digests tests/formats/test_marlin24.py pins."""

import ctypes
from pathlib import Path

import pytest
import torch

from sparsify.files import cache_directory
from sparsify.formats import ModuleScheme, get_format
from sparsify.native.emulator import FLAGS, Emulated, EmulatorError, Memory, Sparse24, build
from tests.formats.test_marlin24 import PACKED, linear_of

SOURCE = Path(__file__).with_name("marlin24_fragments.cu")


@pytest.fixture(scope="module")
def warp() -> Emulated:
    quick = ["-O1" if flag == "-O2" else flag for flag in FLAGS]
    return Emulated(build(SOURCE, flags=quick, folder=cache_directory() / "emulated-tests"))


def product(warp: Emulated, packed: torch.Tensor, meta: torch.Tensor, x: torch.Tensor, n: int) -> torch.Tensor:
    with Memory(warp) as memory:
        y = memory.empty(8, n, dtype=torch.float32)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*map(memory.put, (packed, meta, x)), y)]
        warp.c.marlin24_product(*pointers, n, x.shape[1])
        warp.check()
        return y.clone()


@pytest.mark.parametrize("kind", [kind for kind in PACKED if kind[0] == 4], ids=str)
def test_a_warp_multiplies_checkpoint_bytes_as_the_old_kernel_did(
    warp: Emulated, kind: tuple[int, int, int, int]
) -> None:
    linear = linear_of(kind)
    packed = get_format("marlin-24").encode(linear)  # the wheel's own bytes, says their digest
    assert linear.codes is not None
    n, k = linear.shape
    x = torch.randint(-8, 9, (8, k), generator=torch.Generator().manual_seed(0)).to(torch.float16)
    found = product(warp, packed["weight_packed"], packed["meta"], x, n)
    assert torch.equal(found.double(), x.double() @ linear.codes.double().T)


def test_other_bytes_give_other_products(warp: Emulated) -> None:
    """So that the test above can fail: words of two lanes swapped, positions of one row given to the other."""
    linear = linear_of((4, 64, 256, 0))
    tensors = get_format("marlin-24").encode(linear)
    packed, meta = tensors["weight_packed"], tensors["meta"]
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    right = product(warp, packed, meta, x, 64)
    lanes = packed.view(8, 32, 4)[:, [1, 0, *range(2, 32)]].reshape(packed.shape)
    rows = meta.view(8, -1, 2).flip(2).reshape(meta.shape)
    for wrong in ((lanes, meta), (packed, rows)):
        assert not torch.allclose(product(warp, *wrong, x, 64), right)
    with pytest.raises(EmulatorError, match="invalid metadata"):
        product(warp, packed, meta ^ 4, x, 64)


@pytest.mark.parametrize("kind", [kind for kind in PACKED if kind[0] == 4 and kind[2] % 64 == 0], ids=str)
def test_our_kernel_multiplies_what_the_reader_reads(kind: tuple[int, int, int, int]) -> None:
    kernel = Sparse24(folder=cache_directory() / "emulated-tests")
    made = linear_of(kind)
    scheme, (n, k) = ModuleScheme.of(made), made.shape
    read = get_format("marlin-24").decode("linear", get_format("marlin-24").encode(made), scheme)
    packed = kernel.pack(get_format("sparse24").encode(read), made.group_size)
    x = torch.randint(-2, 3, (9, k), generator=torch.Generator().manual_seed(0)).to(torch.float16)
    assert made.codes is not None and made.scale is not None
    weight = made.codes.double() * made.scale.double().repeat_interleave(made.group_size, 1)
    found = kernel.linear(x, packed, n, made.group_size, torch.float16)
    assert torch.equal(found, (x.double() @ weight.T).to(torch.float16))
