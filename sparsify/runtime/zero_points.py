"""Zero points at load time. No kernel knows them: an asymmetric linear is held in a symmetric form of the very same weights."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsify.formats import ModuleScheme, get_format
from sparsify.formats.scheme import FLOATS
from sparsify.model.linear import LinearWeights

NO_ZERO_POINTS = "it knows no zero points"  # why a kernel does not serve what could not be made symmetric


def without_zero_points(
    tensors: Mapping[str, Tensor], scheme: ModuleScheme, dtype: torch.dtype
) -> tuple[dict[str, Tensor], ModuleScheme]:
    """The tensors of a sparse24 linear, checked, and its scheme, as kernels take them. dtype: of the activations.

    With 4 bits a code less its zero point lies in [-15, 15]: a code of 8 bits with the same scale. With 8 bits it lies in
    [-255, 255]: 2:4 weights become values of 16 bits, rounded once to the type of the activations as `Reference` rounds them.
    What has no such form, dense 8-bit weights and those of float32 activations, stays as it is.
    """
    if scheme.symmetric or (scheme.bits == 8 and (scheme.pattern == "dense" or dtype not in FLOATS)):
        return dict(tensors), scheme
    format = get_format("sparse24")
    linear = format.decode("zero points", tensors, scheme)
    if scheme.bits == 4:
        codes = linear.unscaled().to(torch.int8)
        held = LinearWeights(8, scheme.pattern, scheme.group_size, codes=codes, scale=linear.scale)
    else:
        held = LinearWeights(16, scheme.pattern, scheme.shape[1], values=linear.dense(dtype))
    return format.encode(held), ModuleScheme.of(held)


def held_in_words(stored: ModuleScheme, held: ModuleScheme, dtype: torch.dtype) -> str:
    """`asymmetric 4-bit 2:4 linears are held with 8 bits: 5 bits per weight in memory, 3 on disk`, scales aside."""
    form = f"with {held.bits} bits" if held.symmetric else "dense"
    memory = _bits(held) if held.symmetric else 8 * dtype.itemsize
    kind = f"asymmetric {stored.bits}-bit {stored.pattern} linears"
    return f"{kind} are held {form}: {memory} bits per weight in memory, {_bits(stored)} on disk"


def _bits(scheme: ModuleScheme) -> int:
    return scheme.bits // 2 + 1 if scheme.pattern == "2:4" else scheme.bits
