"""The output head: which tensor of a checkpoint turns hidden states into logits, found without architecture tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsify.errors import CheckpointError
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.decoder import meta_model, source_map


@dataclass(frozen=True)
class OutputHead:
    """The output head of a causal language model with N tokens and K hidden features.

    module: its name in checkpoint files, "lm_head" in most; source: the tensor with its weight; shape: (N, K);
    tied: the checkpoint stores no weight of its own for it, source is the embedding's
    """

    module: str
    source: str
    shape: tuple[int, int]
    tied: bool

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


def find_head(
    checkpoint: Checkpoint, model: nn.Module | None = None, sources: Mapping[str, tuple[str, bool]] | None = None
) -> OutputHead:
    """The output head of a checkpoint whose head is not compressed; CheckpointError when it has none that is a linear.

    model, sources: as in `BlockModel`, when they are at hand; otherwise the model is built on the meta device.
    """
    model = meta_model(checkpoint, torch.bfloat16) if model is None else model
    sources = source_map(model, checkpoint) if sources is None else sources
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    if type(head) is not nn.Linear:
        found = "none" if head is None else f"a {type(head).__name__}"
        raise CheckpointError(f"{checkpoint.spec}: the output head is {found}, no plain linear; leave head out")
    shape = (head.out_features, head.in_features)
    stored = {target: source for source, (target, same) in sources.items() if same}
    name = _name_of(model, head)
    if own := stored.get(f"{name}.weight"):
        return OutputHead(own.removesuffix(".weight"), own, shape, tied=False)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    source = stored.get(f"{_name_of(model, embedding)}.weight")
    if source is None or not is_tied(model):
        raise CheckpointError(
            f"{checkpoint.spec} lacks the tensor {name}.weight; is it complete and of this model type?"
        )
    if checkpoint.shape(source) != shape:
        raise CheckpointError(
            f"{checkpoint.spec}: {source} has shape {list(checkpoint.shape(source))}, but the output head that is tied "
            f"to it has {list(shape)}; config.json and the files do not belong together"
        )
    return OutputHead(_name_on_disk(model, name), source, shape, tied=True)


def is_tied(model: nn.Module) -> bool:
    config: Any = model.config
    return bool(config.get_text_config(decoder=True).tie_word_embeddings or config.tie_word_embeddings)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _name_on_disk(model: nn.Module, module: str) -> str:
    """What `save_pretrained` calls a module: some models have other names in their checkpoints than in transformers."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [r for r in rules if isinstance(r, WeightRenaming) and not isinstance(r, PrefixChange)]
    reverse: list[Any] = [rule.reverse_transform() for rule in reversed(renamings)]
    return rename_source_key(f"{module}.weight", reverse, [], reverse=True)[0].removesuffix(".weight")
