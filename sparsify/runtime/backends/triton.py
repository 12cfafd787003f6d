"""The Triton back end: 2:4 and dense quantized linears on any GPU that Triton compiles for, NVIDIA or AMD.

The number of rows chooses among three kernels (the rule is in `triton_config.py`, measurements in `triton_tuning.py`): a
matrix-vector kernel that selects the kept inputs; a tile kernel that decodes weights in registers for the tensor cores;
and, for the very many rows of long prompts, one that decodes the weights into a temporary tensor for PyTorch's dense
product. Nothing synchronises with the device, and
nothing is shared between calls, so everything may be captured into CUDA graphs and run on several streams.

Triton comes with torch where there is a GPU. It is imported when the back end is asked whether it can serve.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.formats import ModuleScheme
from sparsify.runtime.backends.triton_launch import DTYPES, PANEL, UNIT, on_device, run
from sparsify.runtime.backends.triton_tuning import choose_config
from sparsify.runtime.zero_points import NO_ZERO_POINTS


class Triton:
    """2:4 linears with 4, 8 and 16 bits and dense ones with 4 and 8, activations in bfloat16 or float16."""

    name = "triton"

    def reason_unavailable(self) -> str | None:
        if find_spec("triton") is None:
            return "the package triton is not installed; torch brings it where there is a GPU (pip install triton)"
        if not torch.cuda.is_available() and not _interpreting():
            return "there is no GPU that torch can use"
        return None

    def supports(self, scheme: ModuleScheme, device: torch.device, dtype: torch.dtype) -> str | None:
        if not scheme.symmetric:
            return NO_ZERO_POINTS
        if dtype not in DTYPES:
            return f"activations must be bfloat16 or float16, not {dtype}"
        if device.type != "cuda" and not (device.type == "cpu" and _interpreting()):
            return f"it runs on GPUs, not on {device.type}"
        if device.type == "cuda" and torch.version.hip is None and _capability(device) < (8, 0):
            return "it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer"
        return None

    def prepare(self, tensors: Mapping[str, Tensor], scheme: ModuleScheme, dtype: torch.dtype) -> list[Tensor]:
        """Two tensors: the words in panels of 32 outputs (triton_kernels.py) and the scales [N/32, groups, 32].

        With 16 bits there are no scales; the second tensor is then empty and has the type of the values.
        """
        n, k = scheme.shape
        units = -(-k // UNIT)
        if scheme.bits == 16:
            stored = tensors["weight_values"].contiguous().view(torch.int32)
            scales = tensors["weight_values"].new_empty(0)
        else:
            stored = tensors["weight_packed"]
            scale = _pad(tensors["weight_scale"], PANEL, 1)
            scales = scale.reshape(-1, PANEL, scale.shape[1]).transpose(1, 2).contiguous()
        sparse = scheme.pattern == "2:4"
        words = _panels(stored, units, scheme.bits // 2 if sparse else scheme.bits)
        if sparse:
            table = _position_table().to(stored.device)
            positions = _pad(table[tensors["weight_meta"].int()], 1, UNIT // 8).view(torch.int32)
            words = torch.cat([words, _panels(positions, units, 1)], 2)
        return [words.contiguous(), scales]

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, scheme: ModuleScheme) -> Tensor:
        n, k = scheme.shape
        y = x.new_empty((*x.shape[:-1], n))
        rows = x.numel() // k
        if rows == 0:
            return y
        x = x.reshape(rows, k).contiguous()
        if x.data_ptr() % 16:  # a view that begins anywhere: the kernels read 8 activations at once
            x = x.clone()
        config = choose_config(rows, scheme, x.device)
        with on_device(x.device):
            run(config, x, prepared, bias, scheme, y)
        return y


def _pad(matrix: Tensor, row_multiple: int, column_multiple: int) -> Tensor:
    """Zeros below and to the right, up to multiples."""
    rows, columns = matrix.shape
    return functional.pad(matrix, (0, -columns % column_multiple, 0, -rows % row_multiple))


def _panels(stored: Tensor, units: int, per_unit: int) -> Tensor:
    """int32 [N, words of a row] as int32 [N/32, units, words of a unit, 32]; a last half unit is filled with zeros."""
    stored = _pad(stored, PANEL, units * per_unit)
    return stored.reshape(-1, PANEL, units, per_unit).permute(0, 2, 3, 1)


@functools.cache
def _position_table() -> Tensor:
    """For every byte of weight_meta, two nibbles (first, second << 2), the two nibbles that the kernels test.

    Bit 0 `middle`: between them, x1 comes as first or x2 as second; bit 1 `first`: x0 is kept; bit 2 `last`: x3 is.
    """
    nibbles = []
    for nibble in range(16):
        first, second = nibble & 3, nibble >> 2
        nibbles.append(int(first == 1 or second == 2) | (first == 0) << 1 | (second == 3) << 2)
    return torch.tensor([nibbles[byte & 15] | nibbles[byte >> 4] << 4 for byte in range(256)], dtype=torch.uint8)


def _interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU, one instruction at a time: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
