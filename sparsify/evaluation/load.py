"""Opens any model the project knows for evaluation: float32, on one device, ready to be called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify.data.fitting import context_of, vocabulary_of
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.formats.belonging import check_tensors
from sparsify.formats.foreign import dequantized, described, is_native, reads_foreign
from sparsify.model import pretrained
from sparsify.model.checkpoint import Checkpoint, open_checkpoint
from sparsify.model.experts import is_expert
from sparsify.progress import say, stage, without_bars
from sparsify.runtime.legacy import legacy_format

PACKED = ".weight_packed"


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory and what describes it on disk."""

    spec: str
    directory: Path
    model: nn.Module
    nbytes: int
    format: str


@dataclass(frozen=True)
class Servable:
    """A checkpoint that vLLM is to load. context: positions that its config says it has"""

    spec: str
    directory: Path
    context: int | None


def servable(spec: str | Path) -> Servable:
    """A checkpoint for vLLM, opened cheaply and checked."""
    checkpoint = open_checkpoint(spec)
    check_tensors(checkpoint)
    context = context_of(pretrained.load_config(checkpoint.directory, str(spec)))
    return Servable(str(spec), checkpoint.directory, context)


def format_name(config: dict[str, Any]) -> str:
    """`sparse24`, `pack-quantized`, ... as config.json declares it; `dense` when it declares nothing."""
    quantization = config.get("quantization_config") or {}
    return legacy_format(quantization) or str(quantization.get("format") or quantization.get("quant_method") or "dense")


def pick_device(device: str | None = None) -> torch.device:
    """The device asked for, else the accelerator, else the CPU."""
    if device:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(spec: str | Path, device: str | None = None) -> LoadedModel:
    """Loads a directory, a hub id, a .gguf file or `embedded:NAME` in float32."""
    checkpoint = open_checkpoint(spec)
    check_tensors(checkpoint)
    directory = _loadable(checkpoint)
    try:
        with stage(f"loading {spec}"), without_bars():
            model = pretrained.load_causal_lm(directory, str(spec), dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{spec}: transformers cannot load this model ({reason})") from error
    model.to(pick_device(device)).eval()
    return LoadedModel(
        str(spec),
        checkpoint.directory,
        model,
        checkpoint.nbytes(),
        format_name({"quantization_config": described(checkpoint)}),
    )


def _loadable(checkpoint: Checkpoint) -> Path:
    """The directory that transformers loads: that of the model, or its dequantized weights where transformers has no kernels
    for them on every machine, or reads something else than the packages that wrote them."""
    config = described(checkpoint)
    native = config is not None and is_native(config) and not _has_packed_experts(checkpoint)
    if legacy_format(config) is None and (config is None or not reads_foreign(config) or native):
        return checkpoint.directory
    opened = dequantized(checkpoint)
    say(f"{checkpoint.spec} is scored as dequantized weights ({opened.quantization})")
    return opened.loadable_directory()


def _has_packed_experts(checkpoint: Checkpoint) -> bool:
    """Whether experts are quantized: transformers then leaves what it puts together, routers too, in the type of the files."""
    return any(is_expert(name.removesuffix(PACKED)) for name in checkpoint.names() if name.endswith(PACKED))


def load_vocabulary(spec: str | Path) -> int | None:
    """How many tokens a model has an embedding for; None where its config does not say."""
    checkpoint = open_checkpoint(spec)
    try:
        return vocabulary_of(pretrained.load_config(checkpoint.directory, str(spec)))
    except SparsifyError:
        raise
    except Exception:
        return None  # loading the model says what is wrong


def load_tokenizer(spec: str | Path) -> Any:
    """The tokenizer that belongs to a model."""
    checkpoint = open_checkpoint(spec)
    try:
        return pretrained.load_tokenizer(checkpoint.directory, str(spec))
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise CheckpointError(
            f"{spec} has no usable tokenizer ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
            "copy tokenizer.json and tokenizer_config.json from the dense model"
        ) from error
