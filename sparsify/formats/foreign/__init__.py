"""Quantized checkpoints as sources: whatever software wrote them, they are read as the dense model that they stand for.

A scheme that others write is one file here and one line below; the formats of this project come along by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsify.errors import CheckpointError
from sparsify.files import read_json
from sparsify.formats import get_format, known_formats
from sparsify.formats.foreign.awq import Awq
from sparsify.formats.foreign.checkpoint import DequantizedCheckpoint, source_in_words
from sparsify.formats.foreign.compressed_tensors import CompressedTensors
from sparsify.formats.foreign.fp8 import Fp8
from sparsify.formats.foreign.gptq import Gptq
from sparsify.formats.foreign.own import find_own
from sparsify.formats.foreign.scheme import Found, Infos, Scheme
from sparsify.formats.scheme import AGAIN, FLOATS, in_block
from sparsify.model.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from sparsify.model.decoder import ROUTER
from sparsify.model.described import open_described

__all__ = [
    "DequantizedCheckpoint",
    "dequantized",
    "described",
    "is_native",
    "is_only_dequantized",
    "open_dense",
    "open_described_dense",
    "reads_foreign",
    "source_in_words",
]

SCHEMES: tuple[Scheme, ...] = (CompressedTensors(), Fp8(), Gptq(), Awq())
BESIDE = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}  # of AutoGPTQ and AutoAWQ, where config.json says nothing
WORDS = ("quant_method", "format", "checkpoint_format", "strategy", "type")  # keys whose values are text
GENERIC = {"weight", "meta", "shape", "compressed", "scales"}  # last components that an ordinary tensor may have
READ_BY = {
    "aqlm": "transformers with aqlm", "bitnet": "transformers", "bitsandbytes": "transformers with bitsandbytes",
    "eetq": "transformers with eetq", "exl2": "exllamav2", "exl3": "exllamav3", "higgs": "transformers with flute",
    "hqq": "transformers with hqq", "marlin": "vLLM", "modelopt": "vLLM", "modelopt_fp4": "vLLM",
    "mxfp4": "transformers (Mxfp4Config(dequantize=True))", "quanto": "transformers with optimum-quanto",
    "quark": "transformers with amd-quark", "spqr": "transformers with spqr_quant", "torchao": "transformers with torchao",
    "vptq": "transformers with vptq",
}  # fmt: skip


def open_dense(spec: str | Path) -> Checkpoint:
    """Open any model for reading its dense weights, quantized ones too; spec as `open_checkpoint` takes it.

    CheckpointError names a scheme that is not read, and tensors that do not fit what the config says.
    """
    return dequantized(open_checkpoint(spec))


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose weights are dequantized when they are read; the same one where it is not quantized."""
    if isinstance(checkpoint, DequantizedCheckpoint) or (config := described(checkpoint)) is None:
        return checkpoint
    scheme = _scheme(config)
    try:
        found: Found | None = scheme.find(config, checkpoint.infos) if scheme else find_own(config, checkpoint.infos)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.spec}: {error}") from None
    if found is None:
        raise unread(checkpoint, config)
    files = None if checkpoint.has_weights else checkpoint
    opened = DequantizedCheckpoint(checkpoint.spec, checkpoint.directory, found, files)
    try:
        _ = opened.infos
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.spec}: {error}") from None
    return opened


def open_described_dense(spec: str | Path) -> Checkpoint:
    """As `open_dense`, from config.json alone (`open_described`): tensors have names, shapes and types, and no values.

    What its files would hold follows from what the config says of their quantization. A scheme that nothing here reads is named
    in `unread` of what is returned, which is then the dense model. CheckpointError for what a config alone does not tell.
    """
    checkpoint = open_described(spec)
    if (config := described(checkpoint)) is None:
        return checkpoint
    own = next((name for name in known_formats() if get_format(name).recognises(config)), None)
    if (scheme := _scheme(config)) is None and own is not None:
        raise CheckpointError(
            f"{spec} is compressed as {own}, and its config.json alone does not tell the tensors of its files; plan with the "
            "files, without --config-only, or give the config.json of the dense model"
        )
    if scheme is None:
        return replace(checkpoint, unread=f"{_unread_in_words(config)} start from the dense model")
    found: dict[str, TensorInfo] = {}
    for name, info in checkpoint.infos.items():
        module, _, last = name.rpartition(".")
        is_linear = last == "weight" and len(info.shape) == 2 and in_block(module) and not ROUTER.search(module)
        stored = scheme.tensors(config, module, (info.shape[0], info.shape[1])) if is_linear else None
        for suffix, (dtype, shape) in ({last: (info.dtype, info.shape)} if stored is None else stored).items():
            nbytes = math.prod(shape) * dtype.itemsize
            found[f"{module}.{suffix}"] = TensorInfo(info.file, shape, dtype, nbytes)
    return dequantized(replace(checkpoint, quantized=found))


def reads_foreign(config: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is of a scheme that is read only by dequantizing."""
    return _scheme(config) is not None


def is_only_dequantized(config: Mapping[str, Any], infos: Infos) -> bool:
    """Whether no format of this project holds its codes: in an activation order, with scales of other types than ours have, or
    GPTQ with zero points of version 1, of which it depends on the writer what they mean."""
    if any(name.endswith(".weight_g_idx") for name in infos):
        return True
    if any(name.endswith((".weight_scale", ".scales")) and info.dtype not in FLOATS for name, info in infos.items()):
        return True
    asymmetric = config.get("sym") is False and config.get("checkpoint_format", config.get("format")) != "gptq_v2"
    return config.get("quant_method") == "gptq" and (bool(config.get("desc_act")) or asymmetric)


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether transformers itself loads this scheme on any machine, through compressed-tensors."""
    scheme = _scheme(config)
    return isinstance(scheme, CompressedTensors) and scheme.is_native(config)


def _scheme(config: Mapping[str, Any]) -> Scheme | None:
    return next((scheme for scheme in SCHEMES if scheme.recognises(config)), None)


def described(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What the directory says of its quantization: config.json, else the file that AutoGPTQ or AutoAWQ writes beside it.

    None for a dense model. CheckpointError where tensors are those of quantized weights and nothing explains them.
    """
    text = checkpoint.config.get("text_config")
    levels = (checkpoint.config, text if isinstance(text, dict) else {})
    for level in levels:
        for key in ("quantization_config", "compression_config"):
            if (config := level.get(key)) is not None:
                if not isinstance(config, dict):
                    raise CheckpointError(f"{checkpoint.spec}: {key} in config.json must be an object")
                _refuse_other_kinds(checkpoint, config)
                _refuse_transforms(checkpoint, config)
                return config
    marks = {mark for scheme in SCHEMES for mark in scheme.marks}
    marks |= {suffix for name in known_formats() for suffix in get_format(name).suffixes}
    odd = next((name for name in sorted(checkpoint.infos) if name.rpartition(".")[2] in marks - GENERIC), None)
    if odd is None:
        return None
    for name, method in BESIDE.items():
        if (checkpoint.directory / name).is_file():
            config = read_json(checkpoint.directory / name)
            if isinstance(config, dict):
                _refuse_other_kinds(checkpoint, config)
                return {"quant_method": method, **config}
    raise CheckpointError(
        f"{checkpoint.spec} holds {odd}, a tensor of a quantized weight, but its config.json has no quantization_config that "
        "says how; get the config.json that belongs to these files"
    )


def _refuse_other_kinds(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """CheckpointError where what every scheme compares with words is no word."""
    groups = config.get("config_groups")
    levels = [config, config.get("sparsity_config"), *(groups.values() if isinstance(groups, dict) else ())]
    levels += [level.get("weights") for level in levels[2:] if isinstance(level, dict)]
    for level in levels:
        for key in WORDS:
            value = level.get(key) if isinstance(level, dict) else None
            if value is not None and not isinstance(value, str):
                raise CheckpointError(
                    f"{checkpoint.spec}: {key} in what its config says of the quantization must be text, not "
                    f"{str(value)[:100]}; {AGAIN}"
                )


def _refuse_transforms(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """CheckpointError where compressed-tensors turns activations while the model runs (QuIP, rotation R4 of SpinQuant): the
    weights alone are then another model."""
    transforms = config.get("transform_config")
    groups = transforms.get("config_groups") if isinstance(transforms, dict) else None
    for name, group in (groups if isinstance(groups, dict) else {}).items():
        apply = group.get("apply") if isinstance(group, dict) else None
        places = [one.get("location") for one in apply or [] if isinstance(one, dict)]
        online = [place for place in places if place not in ("weight_input", "weight_output")]
        if online or not places:
            raise CheckpointError(
                f"{checkpoint.spec}: transform_config in config.json turns activations while the model runs ({name}: "
                f"{', '.join(map(str, online)) or 'no place is named'}), which nothing here does; start from the dense model"
            )


def unread(checkpoint: Checkpoint, config: Mapping[str, Any]) -> CheckpointError:
    """The refusal of a scheme that nothing here reads, with what reads it."""
    return CheckpointError(f"{checkpoint.spec} is {_unread_in_words(config)} start from the dense model")


def _unread_in_words(config: Mapping[str, Any]) -> str:
    """`quantized with mxfp4, which sparsify cannot read; ... reads it: load it there and save it dequantized, or`"""
    keys = ("quant_method", "quant_algo", "format")
    words = [str(config[key]) for key in keys if config.get(key) is not None]
    sparsity = config.get("sparsity_config")
    words += [str(sparsity["format"])] if isinstance(sparsity, dict) and sparsity.get("format") else []
    method = " ".join(words) or "an unnamed method"
    reader = READ_BY.get(str(config.get("quant_method")))
    what = f"; {reader} reads it: load it there and save it dequantized, or" if reader else ";"
    return f"quantized with {method}, which sparsify cannot read{what}"
