"""The torch24 back end: 16-bit 2:4 weights on NVIDIA GPUs through PyTorch's own semi-structured tensors.

PyTorch hands the product to cuSPARSELt, or to CUTLASS in builds without it (torch.sparse.to_sparse_semi_structured). The
weights are held in its compressed form, 9 bits each.
"""

import functools
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from sparsify.formats import ModuleScheme, get_format
from sparsify.runtime.zero_points import NO_ZERO_POINTS

DTYPES = (torch.bfloat16, torch.float16)
CUTLASS_CAPABILITIES = (8,)  # the major ones that torch's CUTLASS kernels were written for


class Torch24:
    """16-bit 2:4 linears on 2:4 tensor cores, multiplied by what PyTorch brings."""

    name = "torch24"

    def reason_unavailable(self) -> str | None:
        if torch.version.hip or not torch.cuda.is_available():
            return "it needs an NVIDIA GPU that torch can use, from Ampere (sm_80) on"
        return None

    def describe(self) -> str:
        return "cuSPARSELt" if _has_cusparselt() else "CUTLASS"

    def supports(self, scheme: ModuleScheme, device: torch.device, dtype: torch.dtype) -> str | None:
        if not scheme.symmetric:
            return NO_ZERO_POINTS
        if device.type != "cuda":
            return f"it runs on NVIDIA GPUs, not on {device.type}"
        major, minor = _capability(device)
        if major < 8:
            return f"2:4 tensor cores begin with sm_80 (Ampere), and this GPU is sm_{major}{minor}"
        if not _has_cusparselt() and major not in CUTLASS_CAPABILITIES:
            return f"this torch has no cuSPARSELt, and its CUTLASS kernels do not run on sm_{major}{minor}"
        if scheme.bits != 16 or scheme.pattern != "2:4":
            return f"it multiplies 16-bit 2:4 weights, not {scheme.bits}-bit {scheme.pattern} ones"
        if dtype not in DTYPES:
            return f"activations must be bfloat16 or float16, not {dtype}"
        smallest = _kind()._DTYPE_SHAPE_CONSTRAINTS[dtype]
        n, k = scheme.shape
        if n % smallest.sparse_min_rows or k % smallest.sparse_min_cols:
            rows, columns = smallest.sparse_min_rows, smallest.sparse_min_cols
            return f"outputs must be a multiple of {rows} and inputs of {columns}, not {n} and {k}"
        return None

    def prepare(self, tensors: Mapping[str, Tensor], scheme: ModuleScheme, dtype: torch.dtype) -> list[Tensor]:
        """What PyTorch's conversion makes of the weight: values and metadata in one tensor, or in two (CUTLASS)."""
        weight = get_format("sparse24").decode("torch24", tensors, scheme).dense(dtype)
        return _compress(weight)

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, scheme: ModuleScheme) -> Tensor:
        weight = _wrap(prepared, scheme.shape)
        rows = x.reshape(-1, x.shape[-1])
        if not rows.shape[0]:
            return x.new_empty((*x.shape[:-1], scheme.shape[0]))
        return functional.linear(rows.contiguous(), weight, bias).reshape(*x.shape[:-1], scheme.shape[0])


def _compress(weight: Tensor) -> list[Tensor]:
    """weight: [N, K], 2:4. The tensors of PyTorch's compressed form."""
    with warnings.catch_warnings():  # it warns once that its interface is a prototype; a user can do nothing about that
        warnings.simplefilter("ignore", UserWarning)
        compressed = _kind().from_dense(weight)
    return [part for part in (compressed.packed, compressed.meta) if part is not None]


def _wrap(prepared: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """The semi-structured tensor [N, K] that those tensors are the contents of; holds no data of its own."""
    return _kind()(
        torch.Size(shape),
        packed=prepared[0],
        meta=prepared[1] if len(prepared) > 1 else None,
        packed_t=None,
        meta_t=None,
        compressed_swizzled_bitmask=None,
    )


def _kind() -> type[SparseSemiStructuredTensorCUSPARSELT] | type[SparseSemiStructuredTensorCUTLASS]:
    return SparseSemiStructuredTensorCUSPARSELT if _has_cusparselt() else SparseSemiStructuredTensorCUTLASS


@functools.cache
def _has_cusparselt() -> bool:
    return bool(torch.backends.cusparselt.is_available())


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
