"""A quantized checkpoint read as the dense model it stands for: each weight is dequantized when it is read."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.files import atomic_directory, cache_directory, write_json
from sparsify.formats.foreign.scheme import Found, Quantized, check_stored
from sparsify.formats.tensor_file import LazyTensor, read_tensor, write_shards
from sparsify.model.checkpoint import Checkpoint, TensorInfo, model_dtype, without_quantization
from sparsify.model.finite import all_finite
from sparsify.progress import stage

CACHE_VERSION = 1  # of what `loadable_directory` writes


@dataclass(frozen=True)
class DequantizedCheckpoint(Checkpoint):
    """Its tensors are those of the dense model: a quantized weight is dequantized in float32 as the software that wrote it
    does, and rounded once to the type of the model. `nbytes` is that of the dense model, `stored_nbytes` that of the files.
    """

    found: Found
    described: Checkpoint | None = None  # in place of the files, where only a config.json says what they would hold

    @cached_property
    def stored(self) -> Checkpoint:
        """The files as they are."""
        return self.described or Checkpoint(self.spec, self.directory)

    @property
    def config_file(self) -> Path:
        return self.stored.config_file

    @property
    def has_weights(self) -> bool:
        return self.stored.has_weights

    @property
    def quantization(self) -> str:
        return self.found.words

    @property
    def modules(self) -> Mapping[str, Quantized]:
        """The quantized weights."""
        return self.found.modules

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json without what it says of the quantization."""
        return without_quantization(self.stored.config)

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        check_stored(self.modules, self.stored.infos)
        taken = {f"{module}.{suffix}" for module, one in self.modules.items() for suffix in one.stored}
        taken |= set(self.found.left_out)
        infos = {name: info for name, info in self.stored.infos.items() if name not in taken}
        default = model_dtype(self.stored.config)
        for module, one in self.modules.items():
            name, dtype = f"{module}.weight", one.dtype or default
            if name in infos:
                raise CheckpointError(f"{self.spec}: {module} is stored twice, dense and quantized; get its own files")
            file = self.stored.infos[f"{module}.{next(iter(one.stored))}"].file
            infos[name] = TensorInfo(file, one.shape, dtype, one.shape[0] * one.shape[1] * dtype.itemsize)
        return infos

    def tensor(self, name: str) -> Tensor:
        module = name.removesuffix(".weight")
        if name not in self.infos or module not in self.modules or module == name:
            return super().tensor(name)
        one = self.modules[module]
        files = self.stored.infos
        names = {suffix: f"{module}.{suffix}" for suffix in one.stored}
        tensors = {suffix: read_tensor(files[full].file, full) for suffix, full in names.items()}
        return self._rounded(name, one.decode(module, tensors))

    def first_rows(self, name: str, rows: int) -> Tensor:
        module = name.removesuffix(".weight")
        one = self.modules.get(module)
        if one is None or module == name:
            return super().first_rows(name, rows)
        tensors = {}
        for suffix, stored in one.stored.items():
            full = f"{module}.{suffix}"
            axis, per_entry = stored.outputs or (None, 1)
            tensors[suffix] = read_tensor(self.stored.infos[full].file, full, axis, -(-rows // per_entry))
        return self._rounded(name, one.decode(module, tensors)[:rows])

    def _rounded(self, name: str, weight: Tensor) -> Tensor:
        rounded = weight.to(self.dtype(name))
        if not all_finite(rounded):
            raise CheckpointError(
                f"{self.spec}: {name} leaves the range of {str(rounded.dtype).removeprefix('torch.')} when it is dequantized; "
                "set torch_dtype in its config.json to bfloat16"
            )
        return rounded

    def stored_nbytes(self) -> int:
        return self.stored.nbytes()

    def sidecar_files(self, apart_from: Collection[Path] = ()) -> dict[str, Path]:
        return self.stored.sidecar_files(apart_from)

    def module_nbytes(self, module: str) -> int:
        """Bytes on the disk of one quantized weight."""
        return sum(self.stored.info(f"{module}.{suffix}").nbytes for suffix in self.modules[module].stored)

    def to_json(self) -> dict[str, Any]:
        """What metrics.json says of the source."""
        dtypes = sorted({str(self.dtype(f"{module}.weight")).removeprefix("torch.") for module in self.modules})
        return {
            "quantization": self.quantization,
            "dequantized_to": dtypes,
            "weights": len(self.modules),
            "stored_bytes": self.stored_nbytes(),
            "dense_bytes": self.nbytes(),
            "left_out": list(self.found.left_out),
        }

    def loadable_directory(self) -> Path:
        """The dense model as a directory in the cache, for what loads whole models; written once for the same bytes."""
        key = hashlib.sha256(f"{CACHE_VERSION} {self.fingerprint()}".encode()).hexdigest()[:32]
        target = cache_directory() / "dequantized" / f"{self.directory.resolve().name}-{key}"
        if target.exists():
            return target
        with stage(f"dequantizing {self.spec} (once; kept in {target.parent})"):
            try:
                with atomic_directory(target) as aside:
                    self._write(aside)
            except (CheckpointError, OSError):
                if not target.exists():  # otherwise another process wrote the same meanwhile
                    raise
        return target

    def _write(self, directory: Path) -> None:
        write_json(directory / "config.json", self.config, allow_nan=True)
        for name, file in self.sidecar_files().items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, directory / name)
        tensors = {n: LazyTensor(i.shape, i.dtype, partial(self.tensor, n)) for n, i in sorted(self.infos.items())}
        tensors |= {name: tensors[name].turned() for name in self.stored_transposed(tensors)}
        write_shards(directory, tensors)


def source_in_words(source: Mapping[str, Any]) -> str:
    """`GPTQ 4-bit symmetric, groups of 128 (5.7 GB, as bfloat16 16.1 GB); dequantized on reading`"""
    if not source["weights"]:
        return str(source["quantization"])
    dtypes = " and ".join(source["dequantized_to"])
    sizes = f"{source['stored_bytes'] / 1e6:.1f} MB, as {dtypes} {source['dense_bytes'] / 1e6:.1f} MB"
    left_out = f"; left out: {len(source['left_out'])} scales of activations" if source["left_out"] else ""
    return f"quantized: {source['quantization']} ({sizes}), dequantized on reading{left_out}"
