"""Tokens that were expensive to get are kept, under a name that covers everything that decided them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sparsify.files import atomic_write

VERSION = 2  # raise it when sampling or packing changes, so that old entries are not found


def cached(cache_dir: Path | None, key: dict[str, Any], shape: tuple[int, int], make: Callable[[], Tensor]) -> Tensor:
    """The rows under `key`, made and kept when they are not there. A damaged entry is made again."""
    if cache_dir is None:
        return make()
    digest = hashlib.sha256(json.dumps({"version": VERSION, **key}, sort_keys=True).encode()).hexdigest()
    path = cache_dir / f"{digest[:32]}.safetensors"
    if (tokens := _read(path, shape)) is not None:
        return tokens
    tokens = make()
    cache_dir.mkdir(parents=True, exist_ok=True)
    atomic_write(path, save({"tokens": tokens.contiguous()}))
    return tokens


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    try:
        tokens = load(path.read_bytes()).get("tokens")
    except (OSError, SafetensorError):
        return None
    return tokens if tokens is not None and tokens.shape == shape and tokens.dtype == torch.long else None


def tokenizer_key(tokenizer: Any) -> str:
    """A digest of what a tokenizer does: the whole pipeline of a fast one, the vocabulary of a slow one, the template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pipeline = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    marks = [tokenizer.bos_token_id, tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps([pipeline, marks]).encode()).hexdigest()
