"""Writing safetensors files tensor by tensor, so that no file has to fit into memory, with bytes that never vary.

The library's own writer wants all tensors at once; and with several metadata keys its header comes in random order,
while a resumed run has to end with the same bytes.
"""

import contextlib
import errno
import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsify.errors import CheckpointError
from sparsify.files import write_json
from sparsify.model.checkpoint import DTYPES, INDEX, MODEL

CODES = {dtype: code for code, dtype in DTYPES.items()}
SHARD_BYTES = 2_000_000_000
METADATA = {"format": "pt"}  # what transformers expects in the header of a weights file
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when its turn to be written comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def turned(self) -> "LazyTensor":
        """A matrix with its two axes exchanged."""
        return LazyTensor(self.shape[::-1], self.dtype, lambda: self.load().t().contiguous())

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the file system into one sentence."""
    try:
        yield
    except OSError as error:
        hint = "free some disk space or choose another output" if error.errno in NO_SPACE else "choose another output"
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}; {hint}") from None


def written_order(tensors: Mapping[str, LazyTensor]) -> list[str]:
    """The names in the order in which `write_tensors` asks for the tensors."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def write_tensors(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file. Widest types come first, as in the library, so that every tensor is aligned.

    Returns the SHA-256 of what was written.
    """
    order = written_order(tensors)
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in CODES:
            raise CheckpointError(f"{name} has type {tensor.dtype}, which safetensors cannot hold; convert it first")
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    prefix = struct.pack("<Q", len(text)) + text
    digest = hashlib.sha256(prefix)
    with writing(path), path.open("wb") as file:
        file.write(prefix)
        for name in order:
            raw = _raw(name, tensors[name])
            digest.update(raw)
            file.write(raw)
    return digest.hexdigest()


def write_shards(directory: Path, tensors: Mapping[str, LazyTensor]) -> dict[str, str]:
    """model.safetensors, or shards of at most SHARD_BYTES with their index. A tensor is never split.

    Returns the SHA-256 of each file with tensors, by its name.
    """
    shards: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {MODEL: write_tensors(directory / MODEL, shards[0], METADATA)}
    weight_map: dict[str, str] = {}
    digests: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        digests[file] = write_tensors(directory / file, shard, METADATA)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    with writing(directory / INDEX):
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return digests


def _raw(name: str, tensor: LazyTensor) -> memoryview:
    loaded = tensor.load()
    if tuple(loaded.shape) != tensor.shape or loaded.dtype != tensor.dtype:
        raise CheckpointError(f"{name} changed while it was written; was its file replaced?")
    return loaded.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_tensor(file: Path, name: str, axis: int | None = None, count: int = 0) -> Tensor:
    """Read one tensor of one safetensors file, or its first `count` entries along an axis; CheckpointError when it cannot be
    read."""
    try:
        with safe_open(file, framework="pt") as opened:
            if axis is None:
                return opened.get_tensor(name)
            part = opened.get_slice(name)
            return part[:count] if axis == 0 else part[:, :count]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot read {name} ({error}); download or create it again") from None
