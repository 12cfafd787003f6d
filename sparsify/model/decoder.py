"""The decoder blocks of any Hugging Face decoder: finding them, and loading them one at a time.

Nothing here knows an architecture by name. The model is built on the meta device, and its decoder blocks are the module
list that holds most of its parameters.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsify import compute
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.failure import first_words
from sparsify.model.belonging import carried_over, differences, refuse
from sparsify.model.checkpoint import Checkpoint, levels_of
from sparsify.model.experts import (
    FusedTensor,
    conversion_rules,
    experts_of,
    fused_experts,
    fused_tensors,
    is_expert,
    refuse_unlike_counts,
    take_apart,
    turned_on_loading,
)
from sparsify.model.linear import is_plain_linear
from sparsify.model.pretrained import LONGEST, causal_lm_of, load_config
from sparsify.model.separated import SeparatedCheckpoint
from sparsify.model.transposed import straighten
from sparsify.progress import without_bars

ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)$")  # of a mixture of experts
ROUTES = "routes tokens to experts"  # why one stays dense


@dataclass
class BlockModel:
    """A model whose parameters are on the meta device until a block is loaded.

    model:   the transformers model
    blocks:  names of the decoder blocks in order, e.g. "model.layers.0"
    sources: checkpoint tensor name -> (parameter name in the model, whether it is the same tensor under that name)
    dtype:   the type the walk computes in
    fused:   why the experts of a mixture are not taken apart into linears; None where they are, or where there are none
    """

    checkpoint: Checkpoint
    model: nn.Module
    blocks: list[str]
    sources: dict[str, tuple[str, bool]]
    dtype: torch.dtype
    fused: str | None = None

    @cached_property
    def kept_wide(self) -> set[str]:
        """Checkpoint tensors that the model class keeps in float32 whatever it is loaded in (`_keep_in_fp32_modules`)."""
        wide = kept_wide(self.model)
        return {source for source, (target, _) in self.sources.items() if wide is not None and wide.search(target)}

    def head_weights(self) -> int:
        """Weights of the output head, whether they are tied to the embedding or not."""
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        return 0 if head is None else sum(p.numel() for p in head.parameters())

    def block(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.blocks[index])

    @cached_property
    def weights(self) -> list[int]:
        """Of each block the number of its parameters, those of plain linears or not."""
        return [sum(p.numel() for p in self.block(index).parameters()) for index in range(len(self.blocks))]

    @cached_property
    def expert_weights(self) -> list[tuple[int, int]]:
        """Of each block the number of the parameters of its experts that are taken apart, and of a single one of them."""
        found = []
        for index in range(len(self.blocks)):
            mixtures = experts_of(self.block(index)).values()
            shared = sum(p.numel() for experts in mixtures for p in experts.parameters())
            single = (sum(p.numel() for p in experts.expert(0).parameters()) for experts in mixtures)
            found.append((shared, max(single, default=0)))
        return found

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.blocks)}

    def owner(self, parameter: str) -> int | None:
        """Index of the block that holds a parameter, None when it lies outside the blocks."""
        prefix = self.blocks[0].rpartition(".")[0] + "."
        if not parameter.startswith(prefix):
            return None
        number, dot, _ = parameter.removeprefix(prefix).partition(".")
        return self._indices.get(prefix + number) if dot else None

    @cached_property
    def _by_owner(self) -> dict[int | None, list[str]]:
        found: dict[int | None, list[str]] = {}
        for source, (target, _) in self.sources.items():
            found.setdefault(self.owner(target), []).append(source)
        return found

    def source_names(self, index: int | None) -> list[str]:
        """Checkpoint tensors that belong to one block, or with None to none of them."""
        return self._by_owner.get(index, [])

    @cached_property
    def _source_of(self) -> dict[str, str]:
        return {target: source for source, (target, same) in reversed(self.sources.items()) if same}

    def source_of(self, parameter: str) -> str | None:
        """The checkpoint tensor stored as is for a parameter; None when transformers assembles it from several."""
        return self._source_of.get(parameter)

    def without_head(self) -> list[str]:
        """Checkpoint tensors outside the blocks but for those of an output head that is not tied to the embedding."""
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        names = self.source_names(None)
        return [
            name for name in names if self.model.get_submodule(self.sources[name][0].rpartition(".")[0]) is not head
        ]

    def load(self, index: int | None, head: bool = True) -> None:
        """Read the parameters of one block (None: everything outside the blocks, with or without the output head) from the
        checkpoint."""
        names = self.source_names(index) if head or index is not None else self.without_head()
        load_state(self.model, {name: self.checkpoint.tensor(name) for name in names}, self.dtype)
        if index is None:
            return  # what is missing there (an untied lm_head, say) is noticed only if the walk needs it
        for name, parameter in self.block(index).named_parameters():
            if parameter.is_meta:
                raise CheckpointError(
                    f"{self.checkpoint.spec} lacks the tensor {self.blocks[index]}.{name}; is it complete and of this model type?"
                )

    def to(self, device: str) -> None:
        """Move what is loaded; what is on the meta device stays there, where `nn.Module.to` would raise."""
        self.model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))

    def load_outside(self, device: str) -> None:
        """Read what lies before and after the blocks, a tied output head too, and move it."""
        self.load(None)
        self.to(device)
        self.model.tie_weights()  # type: ignore[operator]

    def unload(self, index: int | None) -> None:
        """Return the parameters of a block, or with None all outside of the blocks, to the meta device, which frees them."""
        if index is None:
            inside = {id(module) for name in self.blocks for module in self.model.get_submodule(name).modules()}
            modules = [module for module in self.model.modules() if id(module) not in inside]
        else:
            modules = [*self.block(index).modules()]
        for module in modules:
            for name, parameter in list(module.named_parameters(recurse=False)):
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Plain linears of a block by their name inside the block, in definition order."""
        return {name: m for name, m in self.block(index).named_modules() if is_plain_linear(m)}

    def other_parameters(self, index: int) -> list[str]:
        """Names inside the block of weight matrices that belong to no plain linear: fused experts, routers, convolutions."""
        linears = set(self.linears(index))
        return [
            name
            for name, parameter in self.block(index).named_parameters()
            if parameter.dim() >= 2 and name.rsplit(".", 1)[0] not in linears
        ]


def kept_wide(model: nn.Module) -> re.Pattern[str] | None:
    """What names of parameters a model class keeps in float32 whatever it is loaded in (`_keep_in_fp32_modules`); None: none."""
    from transformers.core_model_loading import build_glob_alternation

    kinds = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    patterns = sorted({pattern for kind in kinds for pattern in getattr(model, kind, None) or ()})
    found: re.Pattern[str] | None = build_glob_alternation(patterns)[0] if patterns else None
    return found


def load_state(model: nn.Module, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Put checkpoint tensors into a model on the meta device, as transformers would: renamed, assembled, in `dtype` but for
    what the model class keeps in float32."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    with without_bars():
        info, _ = convert_and_load_state_dict_in_model(
            model=model,
            state_dict=state,
            load_config=LoadStateDictConfig(
                dtype=dtype,
                dtype_plan=model._get_dtype_plan(dtype),  # type: ignore[operator]
                weight_mapping=conversion_rules(model),
            ),
        )
    if info.mismatched_keys or info.conversion_errors:
        problem = sorted(map(str, info.mismatched_keys or info.conversion_errors))[0]
        raise CheckpointError(f"checkpoint tensor {problem} does not fit the model that config.json describes")


def source_map(model: nn.Module, checkpoint: Checkpoint) -> dict[str, tuple[str, bool]]:
    """Where transformers puts each checkpoint tensor, by its own renaming rules."""
    return target_names(model, checkpoint.names())


def target_names(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """Checkpoint tensor name -> (name in the model, whether it is the same tensor), for the names that the model knows."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = conversion_rules(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers()])
    sources = {}
    for name in names:
        target, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, converter = name, None
        if target in state:
            sources[name] = (target, converter is None)
    return sources


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the decoder blocks: the outermost module list that holds most parameters, of the text tower where a model has
    others too."""
    tower = _text_tower(model)
    lists = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) and (tower is None or name.startswith(f"{tower}."))
    }
    outer = {name: m for name, m in lists.items() if not any(name.startswith(other + ".") for other in lists)}
    if not outer:
        raise CheckpointError(
            f"{type(model).__name__} has no list of decoder blocks; only decoder models can be compressed"
        )
    best = max(outer, key=lambda name: sum(p.numel() for p in outer[name].parameters()))
    return [f"{best}.{index}" for index in range(len(outer[best]))]


def _text_tower(model: Any) -> str | None:
    """Path of the module that reads text, in a model whose config has a part for text; None where it has no such."""
    if not hasattr(model, "get_decoder") or model.config.get_text_config() is model.config:
        return None
    tower = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is tower and name), None)


def refuse_changing_weights(model: nn.Module, spec: str) -> None:
    """CheckpointError for a model class that changes the weights of its blocks while it runs, which no compressed one can."""
    every = getattr(model.config, "rescale_every", 0)
    if isinstance(every, int) and every > 0:
        raise CheckpointError(
            f"{spec}: {type(model).__name__} divides weights by two every {every} blocks while it runs (rescale_every in "
            "config.json, a guard of float16 against overflow), which compressed weights cannot; set it to 0, which changes "
            "nothing in bfloat16 and float32"
        )


HUGE = 2**28  # elements; only parameters have more


# torch's names; transformers puts its own functions in their place
DRAWN = {"normal_", "trunc_normal_", "uniform_", "kaiming_uniform_"}


class _HugeOnMeta(TorchFunctionMode):
    """Tensors that only parameters are as large as take no memory from the beginning. accelerate puts parameters on the meta
    device once they are made, and Llama 4 makes those of its experts of zeros: 5 GB for a layer, which were written first. Nor are
    first weights drawn of parameters without numbers, which takes long in models of many modules."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) in DRAWN:
            drawn = args[0] if args else kwargs.get("tensor")
            if isinstance(drawn, Tensor) and drawn.is_meta:
                return drawn
        if func in (torch.zeros, torch.ones, torch.empty) and kwargs.get("device") is None:
            sizes = kwargs["size"] if "size" in kwargs else args[0] if args and isinstance(args[0], Sequence) else args
            if math.prod(sizes) > HUGE:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def meta_model(checkpoint: Checkpoint, dtype: torch.dtype, described: dict[str, Any] | None = None) -> nn.Module:
    """The model that config.json describes, its parameters on the meta device. A compressed one is built as if dense.

    described: another config.json than the one in the directory
    """
    from accelerate import init_empty_weights

    place = checkpoint.config_place
    try:
        config = load_config(place, checkpoint.spec)
        if described is not None:
            config = type(config).from_dict(described)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False), _HugeOnMeta():
            model: nn.Module = straighten(causal_lm_of(config, place, checkpoint.spec, dtype=dtype))
    except SparsifyError:
        raise
    except Exception as error:  # a config decides what of transformers runs, and what it runs into
        told = first_words(error, LONGEST)
        raise CheckpointError(
            f"{checkpoint.spec}: transformers cannot build this model from config.json: {told or type(error).__name__}"
        ) from None
    return model.eval().requires_grad_(False)


def open_blocks(checkpoint: Checkpoint, dtype: torch.dtype | None = None, separate: bool = False) -> BlockModel:
    """Build the model of a checkpoint on the meta device, with the rules of where each tensor goes.

    dtype: what to compute in; default as `compute.for_model` chooses for this machine or the run that is going on.
    separate: take the experts of a mixture apart into linears, where that is possible (`BlockModel.fused`)
    """
    if "quantization_config" in checkpoint.config:
        said = checkpoint.config["quantization_config"]
        method = said.get("quant_method", "an unknown method") if isinstance(said, dict) else "an unknown method"
        raise CheckpointError(
            f"{checkpoint.spec} is compressed already ({method}); give the dense model it was made from"
        )
    if dtype is None:
        dtype = compute.for_model(checkpoint.dtypes()).dtype
    refuse_unlike_counts(levels_of(checkpoint.config), checkpoint.spec)
    model = meta_model(checkpoint, dtype)
    refuse_changing_weights(model, checkpoint.spec)
    opened = BlockModel(checkpoint, model, find_blocks(model), source_map(model, checkpoint), dtype)
    _refuse_shared_weights(opened)
    if checkpoint.has_weights:
        refuse_other_tensors(model, checkpoint)
    return _taken_apart(opened) if separate and fused_experts(model) else opened


def _taken_apart(opened: BlockModel) -> BlockModel:
    """The model with its experts as linears; as it was, with the reason, where its files do not allow that."""
    checkpoint = opened.checkpoint
    stored: dict[str, FusedTensor] = {}
    rules = conversion_rules(opened.model)
    for name, fused in fused_tensors(opened.model).items():
        source = opened.source_of(name)
        if source is None and turned_on_loading(rules, name):
            source = next((given for given, (target, _) in opened.sources.items() if target == name), None)
        if source is not None:
            as_it_is = checkpoint.shape(source) == fused.shape
            stored[source] = fused if as_it_is else fused.turned()
    if stored and checkpoint.quantization is not None:
        return replace(opened, fused="fused experts of a quantized source stay as they are")
    if stored:
        checkpoint = SeparatedCheckpoint(checkpoint.spec, checkpoint.directory, stored, checkpoint)
    model = take_apart(copy.deepcopy(opened.model))
    separate = BlockModel(checkpoint, model, opened.blocks, source_map(model, checkpoint), opened.dtype)
    if any(
        separate.source_of(name) is None for name, _ in model.named_parameters() if is_expert(name.rpartition(".")[0])
    ):
        return replace(opened, fused="its files hold experts in a form that cannot be taken apart")
    return separate


def refuse_other_tensors(
    model: nn.Module, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> None:
    """CheckpointError where the tensors of a checkpoint are not those of the model, which is on the meta device.

    shapes: of its tensors, compressed linears as dense ones; default: as they are in the files
    """
    stored = shapes if shapes is not None else {name: info.shape for name, info in checkpoint.infos.items()}
    refuse(differences(model, stored, carried_over(checkpoint.directory)), checkpoint.spec)


def _refuse_shared_weights(opened: BlockModel) -> None:
    """CheckpointError for a model that stores weights of one block and uses them in others too (Zamba)."""
    ties: dict[str, str] = getattr(opened.model, "all_tied_weights_keys", None) or {}
    shared = sorted(name for name in ties if opened.owner(name) is not None)
    if shared:
        raise CheckpointError(
            f"{opened.checkpoint.spec}: {type(opened.model).__name__} uses the same weights in several blocks "
            f"({shared[0]} is {ties[shared[0]]}), and each block is compressed by itself; it is not supported"
        )
