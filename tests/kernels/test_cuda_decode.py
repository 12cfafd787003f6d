"""kernels/cuda/sparse24_decode.h in the emulator: the packed weight back as a dense matrix, to the last bit."""

import ctypes

import pytest
import torch

from sparsify import native
from sparsify.emulation import TYPES, Memory, Sparse24
from sparsify.formats import ModuleScheme
from tests.runtime.test_op import on_disk


@pytest.fixture(scope="module")
def kernel() -> Sparse24:
    if native.find_compiler() is None:
        pytest.skip("no C++ compiler")
    kernel = Sparse24()
    integer, word, pointer = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
    kernel.c.sparse24_cuda_decode.argtypes = [pointer, integer, integer, integer, word, word, pointer, pointer]
    return kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k", "group_size"), [(64, 64, 64), (128, 192, 32), (64, 256, 128), (192, 320, 320)])
def test_gives_the_dense_weight(
    kernel: Sparse24, n: int, k: int, group_size: int, dtype: torch.dtype, scale_dtype: torch.dtype
) -> None:
    tensors, weight = on_disk(ModuleScheme(4, group_size, "2:4", (n, k)), seed=n + k)
    tensors["weight_scale"] = tensors["weight_scale"].to(
        scale_dtype
    )  # their values are bfloat16, and in float16's range
    packed = kernel.pack(tensors, group_size)
    with Memory(kernel.emulated) as memory:
        held, found = memory.put(packed), memory.empty(n, k, dtype=dtype)
        status = kernel.c.sparse24_cuda_decode(
            held.data_ptr(), n, k, group_size, TYPES[scale_dtype], TYPES[dtype], found.data_ptr(), None
        )
        kernel.emulated.check()
        assert status == 0 and torch.equal(found, weight.to(dtype))
    assert kernel.c.sparse24_cuda_decode(None, 96, k, group_size, 0, 0, None, None) == 1
