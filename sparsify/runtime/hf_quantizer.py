"""transformers: `AutoModelForCausalLM.from_pretrained` on a sparse24 directory.

`import sparsify` registers the classes below as soon as transformers' quantizers are imported (`import_hook.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.core_model_loading import WeightRenaming, build_glob_alternation, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsify.errors import CheckpointError
from sparsify.formats import ModuleScheme, get_format
from sparsify.formats.scheme import AGAIN
from sparsify.formats.sparse24 import Sparse24Config, tensor_layout
from sparsify.manifest import refuse_changed, verifies_on_loading
from sparsify.model.experts import conversion_rules, experts_of, is_expert, take_apart, without_assembling
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
        if verifies_on_loading():
            refuse_changed(Path(next(iter(checkpoint_files or ()), "the model")).parent)
        header = _read_headers(checkpoint_files)
        shapes = {name: info.shape for name, info in header.items()}
        schemes = get_format(METHOD).schemes(self.quantization_config.to_dict(), shapes)
        self._separate = any(map(is_expert, schemes))
        if self._separate:
            take_apart(model)
            for experts in experts_of(model):  # transformers would draw weights that are not there any more
                for place in (experts, experts.rpartition(".")[0]):
                    model.get_submodule(place)._is_hf_initialized = True  # type: ignore[assignment]
        self._wanted = _wanted_dtypes(model)
        rename = _renaming(model)
        for name, scheme in schemes.items():
            path = _module_path(model, rename(name))
            if path is None:
                continue  # a part this class of model does not have, as lm_head in AutoModel
            _refuse_other_than_linear(model, name, path, scheme)
            bias = model.get_submodule(path).bias is not None
            # transformers fills what is missing with noise and only warns
            for suffix in (*tensor_layout(scheme, torch.bfloat16), *(["bias"] if bias else [])):
                if f"{name}.{suffix}" not in header:
                    raise CheckpointError(f"{name}.{suffix} is missing from the files of the checkpoint; {AGAIN}")
            # Buffers get the type that is on disk, or transformers would round float16 scales to the model's bfloat16.
            # A type that cannot be right is refused by name when the tensors are checked after loading.
            scale = header[f"{name}.weight_values" if scheme.bits == 16 else f"{name}.weight_scale"]
            scale_dtype = scale.dtype or torch.float32
            linear = Sparse24Linear(name, scheme, scale_dtype, bias)
            linear._is_hf_initialized = True  # type: ignore[assignment]  # its tensors are all in the files
            model.set_submodule(path, linear)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        packed = {name for name, module in model.named_modules() if isinstance(module, Sparse24Linear)}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            # transformers leaves what it renames or assembles in the type of the files, as for any quantized checkpoint
            wanted, (module_name, _, leaf) = self._wanted.get(name), name.rpartition(".")
            if wanted is not None and (module_name not in packed or leaf == "bias") and not tensor.is_meta:
                tensor.data = tensor.data.to(wanted)
        for module in model.modules():
            if isinstance(module, Sparse24Linear):
                module.prepare(model.dtype)
        # Compressed weights have no gradient; the rest is frozen beside them until somebody asks for it
        return model.requires_grad_(False)

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module | None = None) -> list[Any]:
        """Experts that are taken apart are not put together. model: given by newer releases of transformers"""
        return without_assembling(weight_conversions) if self._separate else weight_conversions

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # with adapters: transformers' Trainer refuses a quantized model without any by itself

    @property
    def is_compileable(self) -> bool:
        return True


def _wanted_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """The type that every floating tensor of a dense model would be loaded in: its own here, or float32 by its class."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(model.dtype)  # type: ignore[operator]
    wide, groups, _ = build_glob_alternation([*plan]) if plan else (None, {}, None)
    wanted = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name in wanted if wide is not None else ():
        if (match := wide.search(name)) is not None:
            wanted[name] = plan[groups[match.lastgroup]]
    return wanted


@dataclass(frozen=True)
class _OnDisk:
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: one that no tensor of ours has


def _read_headers(files: list[str] | None) -> dict[str, _OnDisk]:
    """Every tensor of the checkpoint, from the headers of its files alone."""
    merged: dict[str, _OnDisk] = {}
    for file in map(Path, files or []):
        if file.suffix != ".safetensors":
            raise CheckpointError(f"{file.name} is no safetensors file, and sparse24 checkpoints hold no other weights")
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it cannot be iterated itself)
                    info = opened.get_slice(name)
                    merged[name] = _OnDisk(tuple(info.get_shape()), _DTYPES.get(info.get_dtype()))
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged ({error}); {AGAIN}") from None
    if not merged:
        raise CheckpointError("sparse24 models are loaded from a directory or hub id; no safetensors files were given")
    return merged


def _renaming(model: nn.Module) -> Callable[[str], str]:
    """What transformers calls a module of the checkpoint: GPT-NeoX's `embed_out` is `lm_head` to it."""
    rules = [rule for rule in conversion_rules(model) if isinstance(rule, WeightRenaming)]
    return lambda name: rename_source_key(f"{name}.weight", rules, [])[0].removesuffix(".weight")


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
    if isinstance(module, Conv1D):
        sizes = (module.nf, module.nx)
    elif isinstance(module, nn.Linear):
        sizes = (module.out_features, module.in_features)
    else:
        found = f"{type(module).__name__} in {type(model).__name__}"
        raise CheckpointError(f"{name} is compressed, but it is a {found}, no linear; is config.json its own?")
    if sizes != scheme.shape:
        raise CheckpointError(
            f"{name}: the checkpoint holds {list(scheme.shape)}, config.json says {list(sizes)}; the files do not belong together"
        )
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and module is getattr(model, "get_output_embeddings", lambda: None)():
        raise CheckpointError(f"{name} is compressed and tied to the embeddings; set tie_word_embeddings to false")
