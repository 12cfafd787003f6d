"""Checkpoints of compressed-tensors up to 0.14 whose kernels left vLLM: `marlin-24` and `sparse-24-bitmask`, served as sparse24.

Their tensors are tiled for a GPU or spread over a bit mask, so an engine cannot cut or merge them as they are. Each linear
of the checkpoint is decoded once all of its tensors have arrived, and goes on as the tensors of a sparse24 checkpoint.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.formats import get_format
from sparsify.formats.config_groups import is_described
from sparsify.formats.marlin24 import Marlin24, Marlin24Config, linear_shape
from sparsify.formats.scheme import AGAIN, Label
from sparsify.formats.sparse24_bitmask import ACTIVATIONS, BitmaskConfig, Sparse24Bitmask, is_bitmask

LegacyConfig = Marlin24Config | BitmaskConfig
OPTIONAL = {
    "weight_zero_point",
    *ACTIVATIONS,
}  # of a linear; a zero point must be 0, scales of activations are not used


def legacy_format(config: Mapping[str, Any] | None) -> str | None:
    """The name of the format of such a checkpoint, from its quantization_config; None for every other one."""
    if is_bitmask(config):
        return Sparse24Bitmask.name
    return Marlin24.name if is_described(config, Marlin24.name) else None


def legacy_config(config: Mapping[str, Any]) -> LegacyConfig:
    """Which linears of such a checkpoint are compressed, and how; CheckpointError for what cannot be served."""
    if config.get("kv_cache_scheme"):
        raise CheckpointError(
            "the checkpoint quantizes its key-value cache, which sparsify does not serve; write it anew: "
            "sparsify export DIR --format sparse24"
        )
    return BitmaskConfig.from_dict(config) if is_bitmask(config) else Marlin24Config.from_dict(config)


class LegacyShard:
    """The tensors of one linear of the checkpoint while they arrive. label: how it is compressed."""

    def __init__(self, name: str, format: str, label: Label) -> None:
        self.name = name
        self.format = format
        self.label = label
        self.tensors: dict[str, Tensor] = {}

    def missing(self) -> list[str]:
        """Suffixes of what has not come yet."""
        suffixes = get_format(self.format).suffixes - OPTIONAL
        # float8 has scales, and is told from plain 16-bit values by its tensors only
        stored = self.tensors.get("compressed")
        if self.format == Sparse24Bitmask.name and self.label.bits == 16 and (stored is None or stored.itemsize > 1):
            suffixes -= {"weight_scale"}
        return sorted(suffixes - set(self.tensors))

    def add(self, suffix: str, tensor: Tensor) -> dict[str, Tensor] | None:
        """Take one tensor; when it was the last, returns those of the sparse24 linear by suffix."""
        if suffix in self.tensors:
            raise CheckpointError(f"{self.name}.{suffix}: the checkpoint holds it twice; {AGAIN}")
        if suffix == "weight_zero_point" and tensor.any():
            raise CheckpointError(f"{self.name}.{suffix}: expected symmetric codes, found a zero point other than 0")
        if suffix in OPTIONAL:
            return None
        self.tensors[suffix] = tensor
        if self.missing():
            return None
        scheme = self.label.scheme(self._shape())
        linear = get_format(self.format).decode(self.name, self.tensors, scheme).validate(self.name)
        self.tensors.clear()
        return get_format("sparse24").encode(linear)

    def _shape(self) -> tuple[int, int]:
        """(N, K), as the stored tensors have it."""
        suffix = "weight_packed" if self.format == Marlin24.name else "compressed"
        shape = tuple(self.tensors[suffix].shape)
        if len(shape) != 2:
            raise CheckpointError(f"{self.name}.{suffix}: expected a matrix, found {list(shape)}; {AGAIN}")
        return linear_shape(shape, self.label.bits) if suffix == "weight_packed" else (shape[0], 2 * shape[1])
