"""The vLLM plugin: `vllm serve DIR` on a sparse24 directory, found through the entry point `vllm.general_plugins`.

vLLM shards and merges linears while it loads: `qkv_proj` is q, k and v stacked on the outputs, tensor parallelism
splits outputs (column parallel) or inputs (row parallel). Every tensor of sparse24 has the outputs in its first
dimension and the inputs, packed, in its second, so vLLM's own parameter classes do the slicing; what is left to do here
is to say which linears are compressed and how, to check the bytes once they have arrived, and to hand them to a back
end.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import (
    WEIGHT_LOADER_V2_SUPPORTED,
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.parameter import ChannelQuantScaleParameter, GroupQuantScaleParameter, PackedvLLMParameter

from sparsify import manifest
from sparsify.errors import CheckpointError
from sparsify.formats import ModuleScheme, get_format
from sparsify.formats.scheme import AGAIN, FLOATS, Label, scheme_problem
from sparsify.formats.sparse24 import Sparse24Config as ConfigOnDisk
from sparsify.formats.sparse24 import all_zero, checked_tensors, tensor_layout
from sparsify.model.experts import is_expert
from sparsify.runtime.backends import announce, announce_zero_points, choose_backend, get_backend
from sparsify.runtime.dequantized import DequantizedWeight
from sparsify.runtime.legacy import LegacyConfig, LegacyShard, legacy_config, legacy_format
from sparsify.runtime.op import sparse24_linear
from sparsify.runtime.vllm_embedding import embedding_method
from sparsify.runtime.vllm_metrics import LOADING, SKIPPED, VLLMS, Served, share
from sparsify.runtime.vllm_rotary import reorder_all
from sparsify.runtime.vllm_shards import FIRST_TWO_OF_FOUR, fill_with_noise, shard_scheme
from sparsify.runtime.zero_points import without_zero_points

METHOD = "sparse24"
TENSOR = ".weight_packed"
DRAFT = "draft_model."  # what vLLM puts before the names of a draft's modules; no checkpoint has it

# vLLM prints the records of loggers below "vllm" only
logger = logging.getLogger("vllm.sparsify")


def register() -> None:
    """Entry point. vLLM calls it in every process, some call it twice."""
    register_quantization_config(METHOD)(Sparse24Config)
    for method in (Sparse24LinearMethod, LegacyMethod):
        if method.__name__ not in WEIGHT_LOADER_V2_SUPPORTED:
            WEIGHT_LOADER_V2_SUPPORTED.append(method.__name__)
    share()


class Sparse24Config(QuantizationConfig):
    """Which modules are compressed, and how. vLLM pickles it by name for its workers."""

    def __init__(
        self, on_disk: ConfigOnDisk | LegacyConfig, legacy: str | None = None, holds_experts: bool = False
    ) -> None:
        """legacy: the format of compressed-tensors that the checkpoint is in, where it is not sparse24.

        holds_experts: it has compressed experts
        """
        super().__init__()
        self.holds_experts = holds_experts
        self.on_disk = on_disk
        self.legacy = legacy
        self.manifest = "none"  # what /metrics says of the checkpoint's files

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # the reference back end runs everywhere; every other one says itself what it needs

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # everything is in config.json

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None) -> Any:
        """Claim the sparse checkpoints of compressed-tensors: vLLM asks methods of plugins before its own, which refuses."""
        return METHOD if isinstance(hf_quant_cfg, dict) and legacy_format(hf_quant_cfg) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Sparse24Config":
        if (format := legacy_format(config)) is not None:
            return cls(legacy_config(config), format)
        return cls(ConfigOnDisk.from_dict(config), holds_experts=bool(config.get("experts")))

    def maybe_update_config(self, model_name: str, *known: Any, **more: Any) -> None:
        """vLLM says here, once and before it starts its workers, where the checkpoint lies."""
        if manifest.verifies_on_loading():
            manifest.refuse_changed(model_name)
        self.manifest = manifest.state(model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename modules as vLLM's model class does."""
        if not isinstance(self.on_disk, ConfigOnDisk):
            self.on_disk = self.on_disk.renamed(hf_to_vllm_mapper.apply_list)
            return

        def renamed(modules: Mapping[str, Any]) -> dict[str, Any]:
            # of an expert as its tensors are: gpt-oss's class has other names for the linears of all experts in one
            tensors = {f"{name}{TENSOR}" if is_expert(name) else name: what for name, what in modules.items()}
            return {name.removesuffix(TENSOR): what for name, what in hf_to_vllm_mapper.apply_dict(tensors).items()}

        ignore = frozenset(renamed(dict.fromkeys(sorted(self.on_disk.ignore))))
        self.on_disk = ConfigOnDisk(self.on_disk.default, ignore, renamed(self.on_disk.modules))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        LOADING.manifest = self.manifest
        prefix = prefix.removeprefix(DRAFT)
        reorder_all()
        if isinstance(layer, LinearBase):
            label = self._label(prefix, layer.input_size)
            if label is not None:
                return self._method(label, prefix)
            _count_dense(layer, prefix)
            return UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding) and prefix in self.on_disk.modules:
            if not isinstance(layer, ParallelLMHead):
                raise CheckpointError(f"{prefix}: compressed embeddings cannot be served; add {prefix} to ignore")
            return self._method(self.on_disk.modules[prefix], prefix)
        if isinstance(layer, VocabParallelEmbedding):
            if isinstance(layer, ParallelLMHead):
                _count_dense(layer, prefix)
            return embedding_method(prefix)
        if self.holds_experts:
            # a vLLM that holds experts in another class serves all other models still
            from vllm.model_executor.layers.fused_moe import RoutedExperts

            if isinstance(layer, RoutedExperts):
                return self._method_of_experts(layer, prefix)
        return None  # attention, dense experts: as in the dense model

    def _method_of_experts(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        """For the experts of a layer, None where they are dense; CheckpointError for those that cannot be served."""
        from sparsify.runtime.vllm_experts import Sparse24MoEMethod, unserved

        moe = layer.moe_config
        named = {"w1": layer.ckpt_gate_proj_name, "w3": layer.ckpt_up_proj_name, "w2": layer.ckpt_down_proj_name}
        leaves = {shard: leaf for shard, leaf in named.items() if leaf is not None}
        names = [
            (f"{prefix}.{e}.{leaf}", shard) for e in range(moe.num_logical_experts) for shard, leaf in leaves.items()
        ]
        labels = {name: self.on_disk.label(name) for name, _ in names}
        if not any(labels.values()):
            return None
        if problem := unserved(layer, moe):
            raise CheckpointError(
                f"{prefix}: vLLM cannot serve these compressed experts: {problem}; transformers runs them (after import "
                "sparsify), and sparsify export writes them dense"
            )
        found: dict[str, Label] = {}
        for name, shard in names:
            stack, inputs = ("w2", moe.intermediate_size) if shard == "w2" else ("w13", moe.hidden_dim)
            label = labels[name]
            first = label and found.setdefault(stack, label)
            if label is None or first is None or label.scheme((1, inputs)) != first.scheme((1, inputs)):
                raise CheckpointError(
                    "vLLM holds a linear of all experts of a layer as one, gate and up beside each other, so they must be "
                    f"compressed alike; found {name}: {label or 'dense'}, another: {found.get(stack)}; transformers runs "
                    "this checkpoint"
                )
        return Sparse24MoEMethod(moe, found, prefix, leaves)

    def _method(self, label: Label, prefix: str) -> "Sparse24LinearMethod":
        return Sparse24LinearMethod(label, prefix) if self.legacy is None else LegacyMethod(label, prefix, self.legacy)

    def _label(self, prefix: str, inputs: int) -> Label | None:
        """How the linear `prefix` is compressed; linears that vLLM merges must all be compressed alike."""
        parent, dot, last = prefix.rpartition(".")
        parts = [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(last, [last])]
        labels = {part: self.on_disk.label(part) for part in parts}
        # "channel" and a group of all inputs are one scheme, so compare what the labels mean for this many inputs
        if len({label and label.scheme((1, inputs)) for label in labels.values()}) > 1:
            found = "; ".join(f"{part}: {label or 'dense'}" for part, label in labels.items())
            hint = "use one setting for all of them in the recipe"
            if self.legacy is not None:
                hint = "sparsify export writes such a checkpoint as dense, which is served"
            raise CheckpointError(
                f"vLLM merges {', '.join(parts)} into one linear, so they must be compressed alike, found {found}; {hint}"
            )
        return labels[parts[0]]


class Sparse24LinearMethod(LinearMethodBase):
    """Loads, checks and runs one (possibly merged, possibly sharded) sparse24 linear."""

    def __init__(self, label: Label, prefix: str) -> None:
        self.label = label
        self.prefix = prefix
        self.scheme: ModuleScheme  # of this rank's shard
        self.held: ModuleScheme  # the same as the back end has it
        self.backend: str | None = None
        self.buffers: tuple[str, ...] = ()  # names on the layer of what the back end prepared
        self.loaded: dict[str, set[Any]] = {}  # suffix -> the shards that have arrived
        self.merged = 1  # how many linears of the checkpoint make up this one
        self.dummy = False
        self.zero: bool | None = None  # nothing to multiply with: a sublayer that depth pruning removed

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        n, k = sum(output_partition_sizes), input_size_per_partition
        whole = self.label.scheme((output_size, input_size))
        if problem := scheme_problem(whole):
            raise CheckpointError(f"{self.prefix}: {problem}; config.json and the model do not belong together")
        self.scheme = shard_scheme(self.prefix, whole, n, k)
        self.merged = len(output_partition_sizes)
        config = get_current_vllm_config_or_none()
        self.dummy = config is not None and config.load_config.load_format == "dummy"
        LOADING.begin(config and config.parallel_config)
        scales_per_channel = whole.bits < 16 and whole.group_size == input_size
        for suffix, (shape, dtype) in tensor_layout(self.scheme, FLOATS[0]).items():
            arguments = {
                "data": torch.empty(shape, dtype=dtype),
                "output_dim": 0,
                "weight_loader": self._checked_loader(suffix, extra_weight_attrs["weight_loader"]),
            }
            parameter: nn.Parameter
            if suffix not in ("weight_scale", "weight_zero_point"):
                per_column = k // shape[1]
                parameter = PackedvLLMParameter(input_dim=1, packed_dim=1, packed_factor=per_column, **arguments)
            elif scales_per_channel:  # no inputs to split: each row-parallel rank needs all of them
                parameter = ChannelQuantScaleParameter(**arguments)
            else:
                parameter = GroupQuantScaleParameter(input_dim=1, **arguments)
            layer.register_parameter(suffix, parameter)

    def _checked_loader(self, suffix: str, load: Callable[..., None]) -> Callable[..., None]:
        """vLLM's loader with what it lacks: it converts types silently and asserts shapes without a name."""
        name = f"{self.prefix}.{suffix}"

        # vLLM finds the parameter by the name of this argument when it loads again
        def checked(param: nn.Parameter, loaded: Tensor, *shard: Any, **keywords: Any) -> None:
            if suffix in ("weight_scale", "weight_values") and loaded.dtype in FLOATS and not self.loaded.get(suffix):
                param.data = param.data.to(loaded.dtype)  # which of the two floats is not known before
            if loaded.dtype != param.dtype:
                found = f"expected {param.dtype}, found {loaded.dtype}"
                raise CheckpointError(f"{name}: {found}; the checkpoint is damaged")
            try:
                load(param, loaded, *shard, **keywords)
            except (AssertionError, RuntimeError) as error:
                raise CheckpointError(
                    f"{name}: {list(loaded.shape)} from the checkpoint does not fit into {list(param.shape)} "
                    f"({str(error) or 'other shape'}); config.json and the files do not belong together"
                ) from error
            self.loaded.setdefault(suffix, set()).add(shard[0] if shard else None)

        return checked

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        began = time.monotonic()
        self._prepare(layer)
        LOADING.add(self, self._served(layer), time.monotonic() - began)

    def _served(self, layer: nn.Module) -> Served:
        """What /metrics says of this linear."""
        scheme = self.scheme if self.zero else self.held
        nbytes = sum(getattr(layer, name).nbytes for name in self.buffers)
        return Served(_last(self.prefix), scheme.pattern, scheme.bits, self.backend or SKIPPED, nbytes)

    def _prepare(self, layer: nn.Module) -> None:
        """Check the weights that have arrived and let a back end put them into its own layout."""
        tensors = {suffix: getattr(layer, suffix).data for suffix in tensor_layout(self.scheme, FLOATS[0])}
        if self.dummy and not self.loaded:
            fill_with_noise(tensors)
        else:
            self._refuse_missing(tensors)
        if isinstance(layer, ParallelLMHead) and "weight_meta" in tensors:
            # vLLM pads the vocabulary with rows of zero bytes, which are no positions
            tensors["weight_meta"][layer.num_org_embeddings_per_partition :] = FIRST_TWO_OF_FOUR
        device = next(iter(tensors.values())).device
        checked_tensors(self.prefix, tensors, self.scheme)
        zero = all_zero(tensors, self.scheme)
        if self.zero and not zero:
            raise CheckpointError(
                f"{self.prefix}: had no weights when the engine started; start it again to serve others"
            )
        for suffix in tensors:
            delattr(layer, suffix)
        self.loaded.clear()  # other weights may follow, which vLLM copies into the buffers that are there
        dtype: torch.dtype = layer.params_dtype  # type: ignore[assignment]
        layer.weight = DequantizedWeight(  # LoRA and DeepSeek's attention ask for it
            self.prefix, self.scheme.shape, dtype, device, lambda: self._dense(layer, dtype, device)
        )
        self.zero = zero and not self.buffers  # a captured graph goes on multiplying
        if self.zero:
            logger.info("%s: all weights are zero, its products are skipped", self.prefix)
            return
        tensors, self.held = without_zero_points(tensors, self.scheme, dtype)
        backend = get_backend(self.backend) if self.backend else choose_backend(self.held, device, dtype)
        prepared = backend.prepare(tensors, self.held, dtype)
        self.buffers = tuple(f"sparse24_{i}" for i in range(len(prepared)))
        for name, tensor in zip(self.buffers, prepared, strict=True):
            layer.register_buffer(name, tensor)  # a persistent one: vLLM updates no others
        self.backend = backend.name
        announce(logger, backend, self.held, device)
        announce_zero_points(logger, self.scheme, self.held, dtype)

    def _dense(self, layer: nn.Module, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[N, K]: the products of the unit vectors, since only the back end can read what it prepared."""
        return self.apply(layer, torch.eye(self.scheme.shape[1], dtype=dtype, device=device)).T

    def _refuse_missing(self, tensors: dict[str, Tensor]) -> None:
        """vLLM does not notice when tensors of a quantized model are missing and would serve uninitialised memory."""
        for suffix in tensors:
            shards = self.loaded.get(suffix, set())
            arrived = sum(len(shard) if isinstance(shard, tuple) else 1 for shard in shards)
            if arrived < self.merged and None not in shards:
                raise CheckpointError(
                    f"{self.prefix}.{suffix}: the checkpoint holds {arrived} of the {self.merged} tensors it needs; "
                    "download or create it again"
                )

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.zero:
            nothing = x.new_zeros(*x.shape[:-1], self.scheme.shape[0])
            return nothing if bias is None else nothing + bias
        prepared = [getattr(layer, name) for name in self.buffers]
        assert self.backend is not None
        return sparse24_linear(x, prepared, bias, self.held, self.backend)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        raise CheckpointError(
            f"{self.prefix} is compressed and tied to the embeddings; set tie_word_embeddings to false in config.json"
        )


class LegacyMethod(Sparse24LinearMethod):
    """Loads a linear of a legacy format: each of its parts is decoded when it is complete, then cut and merged as sparse24.

    The layer has a parameter without numbers for every tensor of the checkpoint, which takes it in; those of sparse24, whose
    names are partly the same, stand aside until all have arrived.
    """

    def __init__(self, label: Label, prefix: str, format: str) -> None:
        super().__init__(label, prefix)
        self.format = format
        self.parts: dict[Any, LegacyShard] = {}  # by the shard of the merged linear
        self.aside: dict[str, nn.Parameter] = {}

    def create_weights(self, layer: nn.Module, *sizes: Any, **settings: Any) -> None:
        super().create_weights(layer, *sizes, **settings)
        for suffix in tensor_layout(self.scheme, FLOATS[0]):
            self.aside[suffix] = getattr(layer, suffix)
            delattr(layer, suffix)
        for suffix in sorted(get_format(self.format).suffixes):
            taker = nn.Parameter(torch.empty(0), requires_grad=False)
            taker.weight_loader = self._taking(suffix)  # type: ignore[attr-defined]
            layer.register_parameter(suffix, taker)

    def _taking(self, suffix: str) -> Callable[..., None]:
        def take(param: nn.Parameter, loaded: Tensor, *shard: Any, **keywords: Any) -> None:
            name = f"{self.prefix} ({shard[0]})" if shard else self.prefix
            part = self.parts.setdefault(shard, LegacyShard(name, self.format, self.label))
            for target, tensor in (part.add(suffix, loaded) or {}).items():
                parameter = self.aside[target]
                parameter.weight_loader(parameter, tensor.to(parameter.device), *shard, **keywords)  # type: ignore[attr-defined]

        return take

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if not self.aside:
            hint = "start it again, or write the checkpoint as sparse24: sparsify export DIR --format sparse24"
            raise CheckpointError(f"{self.prefix}: {self.format} cannot be loaded into a running engine; {hint}")
        for part in self.parts.values():
            if part.tensors:
                raise CheckpointError(f"{part.name}.{part.missing()[0]}: the checkpoint does not hold it; {AGAIN}")
        for suffix in get_format(self.format).suffixes:
            delattr(layer, suffix)
        for suffix, parameter in self.aside.items():
            layer.register_parameter(suffix, parameter)
        self.aside.clear()
        self.parts.clear()
        super().process_weights_after_loading(layer)


def _last(prefix: str) -> str:
    return prefix.rpartition(".")[2]


def _count_dense(layer: nn.Module, prefix: str) -> None:
    """Let /metrics count a linear that is not compressed."""
    bits = torch.finfo(torch.get_default_dtype()).bits  # vLLM makes a model in the type that it computes in
    LOADING.add(layer, Served(_last(prefix), "dense", bits, VLLMS))
