"""Mixtures of experts in vLLM: the compressed experts of a layer, of which a batch computes those that it is routed to.

vLLM's layer keeps everything around the experts: its router gives each token's experts and their weights, it adds shared
experts and sums over ranks. Tensor parallelism splits every expert along its intermediate size, expert parallelism gives
each rank some whole experts.

vLLM names the linears of an expert w1 (gate), w3 (up) and w2 (down), and the first two together, side by side, w13.
"""

import functools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from sparsify.errors import CheckpointError
from sparsify.formats import ModuleScheme
from sparsify.formats.scheme import AGAIN, FLOATS, Label, finite, scheme_problem
from sparsify.formats.sparse24 import checked_tensors, tensor_layout
from sparsify.model.experts import given
from sparsify.runtime.backends import (
    ENVIRONMENT_VARIABLE,
    Backend,
    announce,
    announce_zero_points,
    choose_backend,
    get_backend,
)
from sparsify.runtime.backends.triton import Triton
from sparsify.runtime.backends.triton_experts import routed_experts
from sparsify.runtime.op import sparse24_linear
from sparsify.runtime.vllm_gpt_oss import MODULE as GPT_OSS
from sparsify.runtime.vllm_gpt_oss import hand_over_experts
from sparsify.runtime.vllm_metrics import LOADING, Served
from sparsify.runtime.vllm_shards import fill_with_noise, shard_scheme
from sparsify.runtime.zero_points import without_zero_points

NAME = "sparsify::sparse24_experts"
SCHEMA = (
    "sparse24_experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, Tensor[] gate_up, "
    "Tensor[] down, Tensor? gate_up_bias, Tensor? down_bias, str gate_up_form, str down_form, str activation, float[] clamp) "
    "-> Tensor"
)
PLAIN = ("silu", "gelu", "gelu_tanh")  # activations, by vLLM's names
CLAMPED = ("silu", "swigluoai", "swigluoai_uninterleave")
OF_GPT_OSS = (7.0, 1.702, 1.0)  # vLLM has these in its kernels, and no setting for them
OWN = ("load_weights", "weight_loader", "forward_modular")  # where a class of experts has its own, it is no common one
CACHE_LINE = 64  # bytes; kernels read a weight from the start of one

# vLLM prints the records of loggers below "vllm" only
logger = logging.getLogger("vllm.sparsify")


@dataclass(frozen=True)
class Form:
    """How a back end holds one linear of every expert. Written as text, it is an argument of the op."""

    backend: str
    scheme: ModuleScheme

    def __str__(self) -> str:
        s = self.scheme
        return " ".join(map(str, (self.backend, s.bits, s.group_size, s.pattern, *s.shape, int(s.symmetric))))

    @staticmethod
    @functools.cache
    def parse(text: str) -> "Form":
        backend, bits, group_size, pattern, n, k, symmetric = text.split()
        scheme = ModuleScheme(int(bits), int(group_size), pattern, (int(n), int(k)), symmetric == "1")
        return Form(backend, scheme)


def _sparse24_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_form: str,
    down_form: str,
    activation: str,
    clamp: Sequence[float],
) -> Tensor:
    experts = gate_up[0].shape[0]
    kind, first, second = MoEActivation(activation), Form.parse(gate_up_form), Form.parse(down_form)
    ids = _local_ids(topk_ids, expert_map, experts)

    def activate(both: Tensor) -> Tensor:
        if clamp:
            return _clamped(both, *clamp)
        return apply_moe_activation(kind, both.new_empty(len(both), both.shape[1] // 2), both)

    if first.backend == second.backend == Triton.name:
        schemes = (first.scheme, second.scheme)
        biases = (gate_up_bias, down_bias)
        return routed_experts(x, ids, topk_weights, gate_up, down, biases, schemes, activate)
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for number, tokens, places in given(ids, experts):
        rows = x if len(x) == 1 else x[tokens]
        first_bias, second_bias = (None if bias is None else bias[number] for bias in (gate_up_bias, down_bias))
        both = sparse24_linear(rows, [part[number] for part in gate_up], first_bias, first.scheme, first.backend)
        y = sparse24_linear(activate(both), [part[number] for part in down], second_bias, second.scheme, second.backend)
        output.index_add_(0, tokens, y.float() * topk_weights[tokens, places, None])
    return output.to(x.dtype)


def _clamped(both: Tensor, limit: float, alpha: float, beta: float) -> Tensor:
    """min(g, limit) sigmoid(alpha min(g, limit)) (u + beta), u between -limit and limit. both: [tokens, 2I], g beside u."""
    gate, up = both.float().chunk(2, -1)
    gate = gate.clamp(max=limit)
    return (gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + beta)).to(both.dtype)


def _local_ids(topk_ids: Tensor, expert_map: Tensor | None, experts: int) -> Tensor:
    """The numbers of the chosen experts on this rank, which has so many; that many stands for one that it has not."""
    if expert_map is not None:
        topk_ids = expert_map[topk_ids.clamp(min=0).long()].masked_fill(topk_ids < 0, -1)
    return topk_ids.masked_fill(topk_ids < 0, experts)


# The registration lives as long as this object.
_LIBRARY = torch.library.Library("sparsify", "FRAGMENT")
_LIBRARY.define(SCHEMA)
_LIBRARY.impl("sparse24_experts", _sparse24_experts, "CompositeExplicitAutograd")
torch.library.register_fake(NAME, lambda x, *rest: torch.empty_like(x), lib=_LIBRARY)
_OP = torch.ops.sparsify.sparse24_experts.default


def sparse24_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    gate_up: list[Tensor],
    down: list[Tensor],
    forms: tuple[str, str],
    activation: str,
    biases: Sequence[Tensor | None] = (None, None),
    clamp: Sequence[float] = (),
) -> Tensor:
    """The weighted sum of what the chosen experts of each token make of it; only chosen experts are computed.

    x:              [T, K]
    topk_weights:   [T, chosen experts]; topk_ids: the same shape, -1 for none
    expert_map:     [all experts], the number on this rank or -1; None where this rank has all experts
    gate_up, down:  what the back ends made of [E, 2I, K] and [E, K, I], every part with E along its first axis
    forms:          of gate_up and down, as `Form` writes them
    activation:     between them, by vLLM's name; clamp: what `clamp_of` says of it
    biases:         of gate_up [E, 2I] and of down [E, K]

    Returns [T, K] in the type of x, summed in float32.
    """
    return _OP(x, topk_weights, topk_ids, expert_map, gate_up, down, *biases, *forms, activation, list(clamp))


def clamp_of(layer: RoutedExperts, moe: FusedMoEConfig) -> list[float]:
    """The limit, alpha and beta of a clamped activation (`_clamped`); none of one that is not."""
    if moe.activation.value == "swigluoai":
        return list(OF_GPT_OSS)
    limit, alpha, beta = (
        getattr(moe, key, None) if getattr(layer, key, None) is None else getattr(layer, key)
        for key in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")
    )
    if limit is None:
        return []
    if moe.activation.value == "silu":
        return [limit, 1.0, 0.0]
    return [limit, 1.0 if alpha is None else alpha, 0.0 if beta is None else beta]


def unserved(layer: RoutedExperts, moe: FusedMoEConfig) -> str | None:
    """Why compressed experts of this layer cannot be served, or None."""
    hand_over_experts()
    own = any(getattr(type(layer), name) is not getattr(RoutedExperts, name) for name in OWN)
    if own and type(layer).__module__ != GPT_OSS:
        return f"vLLM reads the experts of this model in a way of its own ({type(layer).__name__}), in one tensor only"
    clamped = bool(clamp_of(layer, moe))
    if moe.activation.value not in (CLAMPED if clamped else PLAIN):
        return f"their activation is {moe.activation.value}{', clamped' if clamped else ''}"
    if layer.apply_router_weight_on_input and moe.experts_per_token != 1:
        return "the router's weights are multiplied into what the experts read, and a token has several"
    if moe.is_lora_enabled:
        return "vLLM adds adapters of LoRA to experts in kernels of its own; start it without --enable-lora"
    return None


def experts_backend(scheme: ModuleScheme, device: torch.device, dtype: torch.dtype) -> Backend:
    """Of one linear of every expert. On a GPU the Triton one, which takes all experts in one launch, where it serves the
    linear and SPARSIFY_BACKEND asks for no other; the times of single linears say nothing of it."""
    triton = get_backend(Triton.name)
    serves = not (triton.reason_unavailable() or triton.supports(scheme, device, dtype))
    if serves and device.type != "cpu" and not os.environ.get(ENVIRONMENT_VARIABLE):
        return triton
    return choose_backend(scheme, device, dtype)


@dataclass(eq=False)
class Stack:
    """One linear, gate and up being one, of all experts of a layer on this rank.

    name: w13 or w2; parts: the linears of the checkpoint that it consists of, along the outputs, by vLLM's name of a shard
    """

    name: str
    parts: Mapping[str, str]
    part: ModuleScheme  # of one of them, whole
    shard: ModuleScheme  # of one of them, on this rank
    bias: torch.dtype | None  # of its biases; None where it has none
    loaded: set[tuple[int, str, str]] = field(default_factory=set)  # expert on this rank, shard, suffix
    backend: str | None = None
    held: ModuleScheme | None = None  # as the back end has it
    buffers: tuple[str, ...] = ()  # names on the layer of what the back end prepared

    @property
    def scheme(self) -> ModuleScheme:
        """Of one expert's linear on this rank."""
        n, k = self.shard.shape
        return replace(self.shard, shape=(n * len(self.parts), k))

    def layout(self, scheme: ModuleScheme) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every tensor of a linear of this scheme, the bias too."""
        bias = {} if self.bias is None else {"bias": ((scheme.shape[0],), self.bias)}
        return {**tensor_layout(scheme, FLOATS[0]), **bias}

    def of_part(self, tensor: Tensor, part: str) -> Tensor:
        """The outputs of one of the parts. tensor: [outputs of all of them, ...]"""
        n, first = self.shard.shape[0], list(self.parts).index(part) * self.shard.shape[0]
        return tensor[first : first + n]

    @property
    def form(self) -> Form:
        assert self.backend is not None and self.held is not None
        return Form(self.backend, self.held)


class Sparse24MoEMethod(FusedMoEMethodBase):
    """Loads, checks and runs the compressed experts of one layer."""

    def __init__(
        self, moe: FusedMoEConfig, labels: Mapping[str, Label], prefix: str, leaves: Mapping[str, str]
    ) -> None:
        """labels: of w13 and w2; prefix: of the experts; leaves: what files call w1, w2 and w3."""
        super().__init__(moe)
        self.labels = labels
        self.prefix = prefix
        self.leaves = leaves
        self.local: Callable[[int], int]  # number of an expert -> its number on this rank, or -1
        self.stacks: tuple[Stack, Stack]
        self.bias: torch.dtype | None  # of biases; None where there are none
        self.forms: tuple[str, str]  # of the stacks, as torch.compile can pass them on
        self.dummy = False
        config = get_current_vllm_config_or_none()
        self.eager = config is None or config.model_config is None or bool(config.model_config.enforce_eager)

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self.local = layer.expert_map_manager.map_global_to_local
        config = get_current_vllm_config_or_none()
        self.dummy = config is not None and config.load_config.load_format == "dummy"
        LOADING.begin(config and config.parallel_config)
        width, part = self.moe.intermediate_size, intermediate_size_per_partition
        self.bias = params_dtype if self.moe.has_bias else None
        gate_up = {"w1": self.leaves["w1"], "w3": self.leaves["w3"]}
        self.stacks = (
            self._stack("w13", gate_up, (width, hidden_size), (part, hidden_size)),
            self._stack("w2", {"w2": self.leaves["w2"]}, (hidden_size, width), (hidden_size, part)),
        )
        for stack in self.stacks:
            for suffix, (shape, dtype) in stack.layout(stack.scheme).items():
                parameter = nn.Parameter(torch.empty(num_experts, *shape, dtype=dtype), requires_grad=False)
                parameter.weight_loader = self._loader(stack, suffix)  # type: ignore[attr-defined]
                layer.register_parameter(f"{stack.name}_{suffix}", parameter)

    def _stack(self, name: str, parts: Mapping[str, str], whole: tuple[int, int], shard: tuple[int, int]) -> Stack:
        scheme = self.labels[name].scheme(whole)
        linear = f"{self.prefix}.*.{next(iter(parts.values()))}"
        if problem := scheme_problem(scheme):
            raise CheckpointError(f"{linear}: {problem}; config.json and the model do not belong together")
        return Stack(name, parts, scheme, shard_scheme(linear, scheme, *shard), self.bias)

    def _loader(self, stack: Stack, suffix: str) -> Callable[..., bool | None]:
        """What vLLM's models call for each tensor of an expert."""

        # vLLM passes these by name, and finds the parameter by its name when it loads again
        def load(
            param: nn.Parameter,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            number = self.local(expert_id)
            if number >= 0:
                self._load(stack, suffix, param, loaded_weight, shard_id, expert_id, number)
            return number >= 0 if return_success else None

        return load

    def _load(
        self, stack: Stack, suffix: str, param: nn.Parameter, loaded: Tensor, part: str, expert: int, number: int
    ) -> None:
        """Take this rank's share of one tensor of the checkpoint."""
        name = f"{self.prefix}.{expert}.{self.leaves[part]}.{suffix}"
        if suffix in ("weight_scale", "weight_values") and loaded.dtype in FLOATS:
            if not any(known == suffix for _, _, known in stack.loaded):
                param.data = param.data.to(loaded.dtype)  # which of the two floats is not known before
        shape, _ = stack.layout(stack.part)[suffix]
        dtypes = (*FLOATS, torch.float32) if suffix == "bias" else (param.dtype,)
        if loaded.dtype not in dtypes or tuple(loaded.shape) != shape:
            raise CheckpointError(
                f"{name}: expected {param.dtype} {list(shape)}, found {loaded.dtype} {list(loaded.shape)}; config.json and "
                "the files do not belong together"
            )
        target = stack.of_part(param.data[number], part)
        for axis, size in enumerate(target.shape):
            if loaded.shape[axis] != size:  # tensor parallel; scales per channel have no inputs to split
                loaded = loaded.narrow(axis, self.moe.tp_rank * size, size)
        target.copy_(loaded)
        if suffix == "bias" and part == "w2" and self.moe.tp_rank:
            target.zero_()  # ranks that split an expert add up what they give: one of them adds the bias
        stack.loaded.add((number, part, suffix))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        for stack in self.stacks:
            began = time.monotonic()
            self._prepare(layer, stack)
            form, nbytes = stack.form, sum(getattr(layer, name).nbytes for name in stack.buffers)
            leaf = "experts.down_proj" if stack.name == "w2" else "experts.gate_up_proj"
            served = Served(leaf, form.scheme.pattern, form.scheme.bits, form.backend, nbytes)
            LOADING.add(stack, served, time.monotonic() - began)
        self._refuse_graphs()
        self.forms = str(self.stacks[0].form), str(self.stacks[1].form)
        self.moe_quant_config = FusedMoEQuantConfig.make()  # nothing in it is needed; vLLM asks for one before it runs

    def _prepare(self, layer: Any, stack: Stack) -> None:
        """Check the weights that have arrived and let a back end put them, expert by expert, into its own layout."""
        suffixes = list(stack.layout(stack.shard))
        tensors = {suffix: getattr(layer, f"{stack.name}_{suffix}").data for suffix in suffixes}
        if self.dummy and not stack.loaded:
            fill_with_noise(tensors)
        else:
            self._refuse_missing(stack)
        device = next(iter(tensors.values())).device
        dtype: torch.dtype = layer.params_dtype
        bias = tensors.pop("bias", None)
        stacked: list[Tensor] = []
        for expert, number in self._experts():
            one = {suffix: tensor[number] for suffix, tensor in tensors.items()}
            for part, leaf in stack.parts.items():
                of_part = {suffix: stack.of_part(tensor, part) for suffix, tensor in one.items()}
                checked_tensors(f"{self.prefix}.{expert}.{leaf}", of_part, stack.shard)
                if bias is not None:
                    finite(f"{self.prefix}.{expert}.{leaf}.bias", stack.of_part(bias[number], part))
            one, stack.held = without_zero_points(one, stack.scheme, dtype)
            backend = get_backend(stack.backend) if stack.backend else experts_backend(stack.held, device, dtype)
            stack.backend = backend.name
            prepared = [_strided(tensor) for tensor in backend.prepare(one, stack.held, dtype)]
            stacked = stacked or [room(self.moe.num_local_experts, tensor) for tensor in prepared]
            for whole, tensor in zip(stacked, prepared, strict=True):
                whole[number].copy_(tensor)
        for suffix in suffixes:
            delattr(layer, f"{stack.name}_{suffix}")
        stack.loaded.clear()  # other weights may follow, which vLLM copies into the buffers that are there
        stack.buffers = tuple(f"sparse24_{stack.name}_{i}" for i in range(len(stacked)))
        for name, tensor in zip(stack.buffers, stacked, strict=True):
            layer.register_buffer(name, tensor)  # a persistent one: vLLM updates no others
        if bias is not None:
            layer.register_buffer(f"sparse24_{stack.name}_bias", bias)
        announce(logger, get_backend(stack.form.backend), stack.form.scheme, device)
        announce_zero_points(logger, stack.scheme, stack.form.scheme, dtype)
        if device.type != "cpu":
            logger.warning(
                "sparse24: compressed experts have not been tried in vLLM on a GPU; compare some answers first"
            )

    def _refuse_graphs(self) -> None:
        """CheckpointError where CUDA graphs are wanted of a back end that asks on the processor which experts to compute."""
        others = {stack.form.backend for stack in self.stacks} - {Triton.name}
        if others and torch.device(self.moe.device).type != "cpu" and not self.eager:
            raise CheckpointError(
                f"{self.prefix}: which of the compressed experts the back end {', '.join(sorted(others))} computes is "
                "decided on the processor, so no CUDA graph holds it; add --enforce-eager"
            )

    def _experts(self) -> list[tuple[int, int]]:
        """The experts of this rank: their numbers in the checkpoint and here."""
        numbers = ((expert, self.local(expert)) for expert in range(self.moe.num_experts))
        return [(expert, number) for expert, number in numbers if number >= 0]

    def _refuse_missing(self, stack: Stack) -> None:
        for expert, number in self._experts():
            for part, leaf in stack.parts.items():
                for suffix in stack.layout(stack.shard):
                    if (number, part, suffix) not in stack.loaded:
                        name = f"{self.prefix}.{expert}.{leaf}.{suffix}"
                        raise CheckpointError(f"{name}: the checkpoint does not hold it; {AGAIN}")

    def get_fused_moe_quant_config(self, layer: nn.Module) -> FusedMoEQuantConfig | None:
        return self.moe_quant_config

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """The routed experts; vLLM has computed the shared ones by itself."""
        gate_up, down = ([getattr(layer, name) for name in stack.buffers] for stack in self.stacks)
        biases = [getattr(layer, f"sparse24_{stack.name}_bias", None) for stack in self.stacks]
        kind, clamp = self.moe.activation.value, clamp_of(layer, self.moe)
        if layer.apply_router_weight_on_input:  # Llama 4
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        return sparse24_experts(
            x, topk_weights, topk_ids, layer.expert_map, gate_up, down, self.forms, kind, biases, clamp
        )


def _strided(tensor: Tensor) -> Tensor:
    """Experts lie in one tensor, which a layout of oneDNN does not allow."""
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def room(experts: int, tensor: Tensor) -> Tensor:
    """Room for what a back end prepared of so many experts, [E, *shape of tensor], each at the start of a cache line."""
    line = CACHE_LINE // tensor.itemsize
    step = -(-max(tensor.numel(), 1) // line) * line
    strides = (step, *tensor.contiguous().stride())
    return torch.empty_strided((experts, *tensor.shape), strides, dtype=tensor.dtype, device=tensor.device)
