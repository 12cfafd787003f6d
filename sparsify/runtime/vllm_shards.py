"""What the vLLM plugin does with the tensors of any compressed layer: one rank's part of it, and weights of nobody's."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.formats import ModuleScheme
from sparsify.formats.scheme import INPUT_MULTIPLE

FIRST_TWO_OF_FOUR = 0x44  # a valid pair of meta nibbles: inputs 0 and 1 of both quads


def shard_scheme(prefix: str, whole: ModuleScheme, n: int, k: int) -> ModuleScheme:
    """The scheme of one rank's [n, k] of the linear `whole`."""
    inputs = whole.shape[1]
    if k == inputs:
        return replace(whole, shape=(n, k))
    if whole.bits == 16 or whole.group_size == inputs:
        multiple, group_size = INPUT_MULTIPLE, k
    else:
        multiple = max(INPUT_MULTIPLE, whole.group_size)
        group_size = whole.group_size
    if k % multiple:
        raise CheckpointError(
            f"{prefix}: tensor parallel {inputs // k} gives each rank {k} of {inputs} inputs, which must be a multiple "
            f"of {multiple} (16 and the group size); use fewer ranks, or compress with smaller groups or per channel"
        )
    return replace(whole, group_size=group_size, shape=(n, k))


def fill_with_noise(tensors: Mapping[str, Tensor]) -> None:
    """`--load-format dummy`: small random weights in valid bytes, to measure the speed of a model one does not have."""
    for suffix, tensor in tensors.items():
        if suffix == "weight_meta":
            tensor.fill_(FIRST_TWO_OF_FOUR)
        elif suffix == "weight_packed":
            tensor.random_()
        elif suffix == "weight_zero_point":
            tensor.zero_()
        else:
            tensor.uniform_(-1e-3, 1e-3)
