"""config.json of a shortened model."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from sparsify.depth.layers import Layer
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.pretrained import load_config
from sparsify.model.sublayers import FEED_FORWARD, KINDS

FEED_FORWARD_SETTING = re.compile(r"mlp|moe|ffn|feed_forward|intermediate|expert")


def shortened_config(checkpoint: Checkpoint, layers: Sequence[Layer], blocks: int) -> dict[str, Any]:
    """config.json for the layers that are left: their number, and every setting that lists a value per layer."""
    config = copy.deepcopy(checkpoint.config)
    whole: Any = load_config(checkpoint.directory, checkpoint.spec)
    text = whole.get_text_config(decoder=True)
    level = config["text_config"] if text is not whole and isinstance(config.get("text_config"), dict) else config
    level[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    for key, value in text.to_dict().items():
        if not isinstance(value, list) or "token_id" in key or key == "architectures":
            continue
        kind = FEED_FORWARD if FEED_FORWARD_SETTING.search(key) else KINDS[0]
        if len(value) == blocks and (key in level or any(entry != value[0] for entry in value)):
            level[key] = [value[layer.source(kind)] for layer in layers]
        elif key.endswith("_layers") and value and all(type(entry) is int and 0 <= entry < blocks for entry in value):
            level[key] = [number for number, layer in enumerate(layers) if layer.source(kind) in value]
    return config
