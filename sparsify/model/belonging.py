"""Whether the tensors of a checkpoint are those of the model that its config.json describes.

transformers fills what is missing with random numbers, leaves out what it does not know, and says so on a terminal at most.
Here both are errors, except for what the table below allows. Its own rules of renaming and assembling say which tensor goes
where: they are carried out on tensors without values.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.errors import CheckpointError
from sparsify.files import read_json
from sparsify.model.permissions import allows_unknown
from sparsify.progress import without_bars

if TYPE_CHECKING:
    from torch import nn

SHOWN = 3  # names in a message

# Buffers that older versions of transformers stored and that every version computes from config.json.
COMPUTED = (
    r"(^|\.)rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)$",
    r"(^|\.)position_ids$",
    r"(^|\.)(attn|attention|self_attn|self_attention)\.(masked_)?bias$",  # a causal mask and what stands for -inf
)
MAY_BE_MISSING = (*COMPUTED,)
MAY_BE_UNKNOWN = (
    *COMPUTED,
    r"(^|\.)mtp(_\w+)?\.",  # layers that predict further tokens; DeepSeek and others number them behind the last block,
)  # see `_numbered_behind`. What else a class of transformers ignores, it says itself.


@dataclass(frozen=True)
class Differences:
    """What does not fit, in the names of the model class.

    misfit: in words, name and shapes. model: the name of the class
    """

    model: str
    missing: list[str]
    unknown: list[str]
    misfit: list[str]

    def sentence(self) -> str:
        """All of it as the end of a sentence: `lacks the tensors a, b (and 4 more)`; "" when everything fits."""
        parts = []
        if self.missing:
            parts.append(f"lacks the tensor{'s' if len(self.missing) > 1 else ''} {_few(self.missing)}")
        if self.misfit:
            parts.append(_few(self.misfit, 1))
        if self.unknown:
            parts.append(f"holds {_few(self.unknown)}, which {self.model} does not know")
        return "; ".join(parts)


def _few(names: Collection[str], most: int = SHOWN) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" (and {len(names) - most} more)" if len(names) > most else "")


def carried_over(directory: str | Path) -> frozenset[str]:
    """Tensors unknown to the model class that a run carried over knowingly, as the metrics.json beside them says."""
    try:
        said = read_json(Path(directory) / "metrics.json")["carried"]["tensors"]
        return frozenset(name for name in said if isinstance(name, str))
    except (CheckpointError, OSError, KeyError, TypeError):
        return frozenset()


def differences(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], known: Collection[str] = ()) -> Differences:
    """Compare a model on the meta device, which stays as it is, with tensors by their names in the files.

    shapes: of all tensors, a compressed linear given as its dense weight. known: tensors of the files that a run carried
    over although the class does not know them
    """
    import torch
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    from sparsify.model.experts import assembled_shapes, conversion_rules

    skeleton: Any = copy.deepcopy(model)
    shapes = assembled_shapes(model, shapes)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if name not in known}
    with without_bars():
        info, _ = convert_and_load_state_dict_in_model(
            skeleton,
            state,
            LoadStateDictConfig(device_map={"": "meta"}, weight_mapping=conversion_rules(skeleton)),
        )
    skeleton.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    skeleton._adjust_missing_and_unexpected_keys(info)
    return _judged(skeleton, info.missing_keys, info.unexpected_keys, info.mismatched_keys, info.conversion_errors)


def _judged(
    model: Any,
    missing: Iterable[str],
    unknown: Iterable[str],
    misfit: Iterable[tuple[str, Iterable[int], Iterable[int]]],
    unassembled: Iterable[str] = (),
) -> Differences:
    """What transformers says of loading, less what the table allows."""
    allowed = [*MAY_BE_UNKNOWN, *_numbered_behind(model.config)]
    words = [
        f"{name} has shape {list(stored)}, but config.json asks for {list(asked)}" for name, stored, asked in misfit
    ]
    words += [f"{name} cannot be assembled from the tensors of the files" for name in unassembled]
    unassembled = set(unassembled)
    return Differences(
        type(model).__name__,
        sorted(name for name in missing if name not in unassembled and not _matches(name, MAY_BE_MISSING)),
        [] if allows_unknown() else sorted(name for name in unknown if not _matches(name, allowed)),
        sorted(words),
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _numbered_behind(config: Any) -> list[str]:
    """Layers for predicting further tokens that are numbered behind the last block, as many as config.json says."""
    text = config.get_text_config(decoder=True)
    count, blocks = (getattr(text, key, None) or 0 for key in ("num_nextn_predict_layers", "num_hidden_layers"))
    return [rf"(^|\.)layers\.{blocks + number}\." for number in range(count)]


def refuse(found: Differences, spec: str) -> None:
    """CheckpointError in one sentence for a checkpoint that does not fit its config.json."""
    if not (said := found.sentence()):
        return
    if found.missing or found.misfit:
        raise CheckpointError(f"{spec} {said}; is it complete and of this model type, with its own config.json?")
    raise CheckpointError(
        f"{spec} {said}; give it the config.json that belongs to them, or add --allow-unknown-tensors (in Python "
        "allow_unknown_tensors=True) to carry them over as they are, or leave them out where a model is only run"
    )


def refuse_badly_loaded(model: Any, info: Mapping[str, Any], directory: str | Path, spec: str | None = None) -> None:
    """The same for what `from_pretrained(output_loading_info=True)` says of a model that was loaded."""
    unknown = set(info["unexpected_keys"]) - carried_over(directory)
    refuse(_judged(model, info["missing_keys"], unknown, info["mismatched_keys"]), str(spec or directory))
