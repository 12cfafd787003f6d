"""transformers: `AutoModelForCausalLM.from_pretrained` on a sparse24 directory.

`import sparsify` registers the classes below as soon as transformers' quantizers are imported (`lazy.py`).
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsify.errors import CheckpointError
from sparsify.formats import ModuleScheme, get_format
from sparsify.formats.sparse24 import Sparse24Config
from sparsify.runtime.module import Sparse24Linear

METHOD = "sparse24"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@register_quantization_config(METHOD)
class Sparse24QuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` of a sparse24 checkpoint; its attributes are exactly the keys of config.json."""

    def __init__(self, **config: Any) -> None:
        config.setdefault("quant_method", METHOD)
        Sparse24Config.from_dict(config)  # refuses what cannot be read
        self.__dict__.update(config)


@register_quantizer(METHOD)
class Sparse24Quantizer(HfQuantizer):
    """Puts a `Sparse24Linear` where the checkpoint holds a compressed linear, before the weights are read."""

    # transformers then refuses to compress a dense model on the fly: `sparsify apply` does that
    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        header = _read_headers(checkpoint_files)
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        schemes = get_format(METHOD).schemes(self.quantization_config.to_dict(), shapes)
        for name, scheme in schemes.items():
            path = _module_path(model, name)
            if path is None:
                continue  # a part this class of model does not have, as lm_head in AutoModel
            _refuse_other_than_linear(model, name, path, scheme)
            scale = header[f"{name}.weight_values" if scheme.bits == 16 else f"{name}.weight_scale"]
            # An impossible dtype is refused by name when the tensors are checked after loading.
            scale_dtype = _DTYPES.get(scale["dtype"], torch.float32)
            bias = model.get_submodule(path).bias is not None
            model.set_submodule(path, Sparse24Linear(name, scheme, scale_dtype, bias))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for module in model.modules():
            if isinstance(module, Sparse24Linear):
                module.prepare(model.dtype)
        # Nothing here can be trained; activations that asked for gradients would only fail later.
        return model.requires_grad_(False)

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _read_headers(files: list[str] | None) -> dict[str, dict[str, Any]]:
    """Name -> {dtype, shape} of every tensor, from the headers of the safetensors files alone."""
    merged: dict[str, dict[str, Any]] = {}
    for file in map(Path, files or []):
        if file.suffix != ".safetensors":
            raise CheckpointError(f"{file.name} is no safetensors file, and sparse24 checkpoints hold no other weights")
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > file.stat().st_size:
                raise CheckpointError(f"{file} is truncated or damaged; download or create the checkpoint again")
            try:
                merged |= json.loads(stream.read(size))
            except ValueError as error:
                raise CheckpointError(f"{file} is damaged ({error}); download or create the checkpoint again") from None
    merged.pop("__metadata__", None)
    if not merged:
        raise CheckpointError("sparse24 models are loaded from a directory or hub id; no safetensors files were given")
    return merged


def _module_path(model: nn.Module, name: str) -> str | None:
    """Where the checkpoint's module `name` lies in `model`, which may lack or add the prefix of the base model."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    for path in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(path)
        except AttributeError:
            continue
        return path
    return None


def _refuse_other_than_linear(model: nn.Module, name: str, path: str, scheme: ModuleScheme) -> None:
    module = model.get_submodule(path)
    if not isinstance(module, nn.Linear):
        found = f"{type(module).__name__} in {type(model).__name__}"
        raise CheckpointError(f"{name} is compressed, but it is a {found}, no linear; is config.json its own?")
    if (module.out_features, module.in_features) != scheme.shape:
        raise CheckpointError(
            f"{name}: the checkpoint holds {list(scheme.shape)}, config.json says "
            f"{[module.out_features, module.in_features]}; the files do not belong together"
        )
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and module is getattr(model, "get_output_embeddings", lambda: None)():
        raise CheckpointError(f"{name} is compressed and tied to the embeddings; set tie_word_embeddings to false")
