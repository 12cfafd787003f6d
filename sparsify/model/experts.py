"""Mixtures of experts: the experts of a layer as linears of their own, whatever the model class and the files hold.

transformers keeps the experts of a layer in parameters of three axes, [experts, outputs, inputs], with the gate and the up
projection side by side in one of them; files hold one tensor per expert and linear, or those same parameters. Here every
expert has linears `EXPERTS.N.gate_proj`, `EXPERTS.N.up_proj` and `EXPERTS.N.down_proj`, EXPERTS being the module's path in
the model. Where a tensor of the files goes is derived from transformers' own rules of renaming and assembling: a class is
known by what `use_experts_implementation` says of it, not by its name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sparsify.errors import CheckpointError

LEAVES = ("gate_proj", "up_proj", "down_proj")
NAME = re.compile(r"(?:.*\.)?experts\.\d+\.\w+")  # of one expert's linear, in the model and in the files
FUSED = re.compile(r"experts\.(gate_up_proj|up_proj|down_proj)$")
ONE_BY_ONE = re.compile(r"experts\.\*\.(\w+)\.weight$")  # of a file's tensor, as transformers' rules write it
LAYOUT = (
    "has_gate",
    "has_bias",
    "is_transposed",
    "is_concatenated",
)  # set by transformers' `use_experts_implementation`


SCALES_INPUTS = (
    "Llama4TextMoe"  # its router's weights are multiplied into what experts read, and its experts say nothing of LAYOUT
)
LAYOUT_OF_SCALED = {"has_gate": True, "has_bias": False, "is_transposed": True, "is_concatenated": True}
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # what configs call them
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "top_k_experts")


def refuse_unlike_counts(levels: Iterable[Mapping[str, Any]], spec: str) -> None:
    """CheckpointError for a config that says two numbers of experts, or that more are chosen for a token than there are.

    levels: the config and those inside of it
    """
    for level in levels:
        counts = {key: level[key] for key in EXPERT_COUNTS if isinstance(level.get(key), int)}
        chosen = {key: level[key] for key in CHOSEN if isinstance(level.get(key), int)}
        if len(set(counts.values())) > 1:
            said = " and ".join(f"{key} {str(count)[:20]}" for key, count in counts.items())
            raise CheckpointError(f"{spec}: config.json has {said}, and a layer has one number of experts; correct it")
        for (key, count), (name, number) in itertools.product(counts.items(), chosen.items()):
            if number > count > 0:
                raise CheckpointError(
                    f"{spec}: config.json chooses {str(number)[:20]} experts for a token ({name}) of {str(count)[:20]} "
                    f"({key}); correct it"
                )


def is_expert(module: str) -> bool:
    """Whether a module, by its name in a model or in a checkpoint, is a linear of one of several experts."""
    return NAME.fullmatch(module) is not None


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a transformers model that hold the experts of a layer in fused parameters, by path."""
    for module in model.modules():
        if (
            type(module).__name__ == SCALES_INPUTS and module.top_k == 1
        ):  # published models choose one expert for a token
            for key, value in LAYOUT_OF_SCALED.items():
                setattr(module.experts, key, value)
    return {path: m for path, m in model.named_modules() if all(hasattr(m, key) for key in LAYOUT)}


def _forward_scaling_inputs(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """What Llama 4's layer computes, with experts that read only the tokens that they were given."""
    hidden_states = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(hidden_states)
    scale, chosen = scores.max(dim=1, keepdim=True)
    routed = self.experts(hidden_states * scale, chosen, torch.ones_like(scale))
    return self.shared_expert(hidden_states) + routed, logits


class Expert(nn.Module):
    """The linears of one expert: gate_proj [I, K] (where there is a gate), up_proj [I, K] and down_proj [K, I]."""

    def __init__(self, inputs: int, width: int, gated: bool, bias: bool, dtype: torch.dtype, device: torch.device):
        super().__init__()
        for leaf in LEAVES if gated else LEAVES[1:]:
            n, k = (inputs, width) if leaf == "down_proj" else (width, inputs)
            self.add_module(leaf, _linear(k, n, bias, dtype, device))


def _default_apply_gate(fused: Any, gate_up: Tensor) -> Tensor:
    """As transformers has it for a class without a gate of its own, which is called so there, too."""
    gate, up = gate_up.chunk(2, dim=-1)
    gated: Tensor = fused.act_fn(gate) * up
    return gated


def _linear(inputs: int, outputs: int, bias: bool, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """As `nn.Linear` makes it, frozen as a model that is opened, without drawing its first weights: of tens of thousands of
    experts that takes long, on the meta device too."""

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    own = {"weight": parameter(outputs, inputs), "bias": parameter(outputs) if bias else None}
    linear.__dict__ |= {"in_features": inputs, "out_features": outputs}  # past the checks of `nn.Module.__setattr__`
    linear._parameters |= own
    return linear


class SeparateExperts(nn.Module):
    """Stands where a transformers model has the fused experts of a layer, and computes the same from linears.

    Only experts that some token was given to are computed.
    """

    def __init__(self, fused: Any) -> None:
        """fused: the module of transformers, which lends its activation function; its parameters are dropped."""
        super().__init__()
        down = fused.down_proj
        self.count, *shape = down.shape
        inputs, width = reversed(shape) if fused.is_transposed else shape
        self.is_concatenated: bool = fused.is_concatenated
        for number in range(self.count):
            made = Expert(inputs, width, fused.has_gate, fused.has_bias, down.dtype, down.device)
            self.add_module(str(number), made)
        self.skipped = False  # they are not computed, and give zeros
        self.every = False  # in training those without tokens get gradients too, or processes would add up unlike ones
        self.known: Callable[[], Tensor] | None = None  # what they give, where that was computed before
        fused._parameters.clear()
        self.__dict__["fused"] = fused  # no child: it has no tensors, and none of its names

    @property
    def unusual(self) -> str | None:
        """What they compute beside w2(act(w1 x) * w3 x), perhaps clamped; None where that is all."""
        if not self.__dict__["fused"].has_gate:
            return "they have no gate"
        # transformers gives a class without a gate of its own this one
        common = self._apply_gate.__name__ == _default_apply_gate.__name__ or self._is_clamped()
        return None if common else "their gate is one of its own"

    def _is_clamped(self) -> bool:
        """Whether the gate is silu(g) u, or g sigmoid(alpha g) (u + 1) as gpt-oss has it, of g up to a limit and u within it."""
        fused: Any = self.__dict__["fused"]
        limit = getattr(fused, "limit", getattr(fused, "swiglu_limit", None))
        alpha = getattr(fused, "alpha", getattr(fused, "swiglu_alpha", 1.0))
        if limit is None:
            return False
        gate = torch.linspace(-3 * limit, 3 * limit, 96, device="cpu")
        up = gate.roll(31)
        found, g, u = self._gated(gate, up), gate.clamp(max=limit), up.clamp(-limit, limit)
        return any(
            torch.allclose(found, wanted)
            for wanted in (nn.functional.silu(g) * u, g * torch.sigmoid(alpha * g) * (u + 1))
        )

    @property
    def _apply_gate(self) -> Callable[[Any, Tensor], Tensor]:
        return getattr(type(self.__dict__["fused"]), "_apply_gate", _default_apply_gate)

    def expert(self, number: int) -> Any:
        return self.get_submodule(str(number))

    def between(self, expert: Any, x: Tensor) -> Tensor:
        """What the down projection of an expert reads. x: [tokens, K]. Returns [tokens, I]."""
        fused: Any = self.__dict__["fused"]
        up = expert.up_proj(x)
        if not fused.has_gate:
            activated: Tensor = fused.act_fn(up)
            return activated
        return self._gated(expert.gate_proj(x), up)

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        side_by_side = torch.cat((gate, up), -1) if self.is_concatenated else torch.stack((gate, up), -1).flatten(-2)
        gated: Tensor = self._apply_gate(self.__dict__["fused"], side_by_side)
        return gated

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [tokens, K]; top_k_index, top_k_weights: [tokens, chosen experts]. Returns [tokens, K]."""
        if self.known is not None:
            return self.known().view(hidden_states.shape)
        output = torch.zeros_like(hidden_states)
        if self.skipped:
            return output
        if isinstance(hidden_states, FakeTensor):  # has no numbers to choose by: as if all went to one expert
            return output + self._computed(0, hidden_states) * top_k_weights[:, :1].to(output.dtype)
        for number, tokens, places in given(top_k_index, self.count, self.every and torch.is_grad_enabled()):
            y = self._computed(number, hidden_states[tokens]) * top_k_weights[tokens, places, None]
            output.index_add_(0, tokens, y.to(output.dtype))
        return output

    def _computed(self, number: int, x: Tensor) -> Tensor:
        expert = self.expert(number)
        computed: Tensor = expert.down_proj(self.between(expert, x))
        return computed


def given(chosen: Tensor, experts: int, every: bool = False) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The tokens of each expert that has any, in their order: its number, rows of `chosen` and columns of it.

    chosen: integers [tokens, chosen experts]; a number beyond the experts stands for none
    every: give those without tokens too
    """
    sorted_, order = chosen.reshape(-1).sort(stable=True)
    counts = torch.bincount(sorted_, minlength=experts).tolist()
    start = 0
    for number, count in enumerate(counts[:experts]):
        if count or every:
            entries = order[start : start + count]
            yield number, entries // chosen.shape[1], entries % chosen.shape[1]
        start += count


def take_apart(model: nn.Module) -> nn.Module:
    """Put `SeparateExperts` where a transformers model holds fused experts. Returns the model."""
    for path, fused in fused_experts(model).items():
        model.set_submodule(path, SeparateExperts(fused))
        layer: Any = model.get_submodule(path.rpartition(".")[0])
        if type(layer).__name__ == SCALES_INPUTS:
            layer.forward = MethodType(_forward_scaling_inputs, layer)
    return model


def experts_of(module: nn.Module) -> dict[str, SeparateExperts]:
    """The experts in a module that are taken apart, by path."""
    if isinstance(module, SeparateExperts):
        return {"": module}
    return {
        f"{name}.{path}" if path else name: experts
        for name, child in module.named_children()
        for path, experts in experts_of(child).items()
    }


def conversion_rules(model: Any) -> list[Any]:
    """transformers' rules of renaming and assembling for a model; where its experts are taken apart, without assembling them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    rules: list[Any] = get_model_conversion_mapping(model)
    return without_assembling(rules) if experts_of(model) else rules


def without_assembling(rules: list[Any]) -> list[Any]:
    """Rules that give each linear of an expert its name here, where they put experts together."""
    from transformers.core_model_loading import WeightRenaming

    names = {stored: leaf for rule in rules for stored, leaf in one_by_one(rule).items() if stored != leaf}
    renamings = [WeightRenaming(rf"experts\.(\d+)\.{old}\.", rf"experts.\1.{new}.") for old, new in names.items()]
    return [*(rule for rule in rules if not one_by_one(rule)), *renamings]


def one_by_one(rule: Any) -> dict[str, str]:
    """What files call the linears of one expert that a rule of transformers puts together, each with its name here; {} for
    any other rule."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    if not isinstance(rule, WeightConverter):
        return {}
    targets = [FUSED.search(name.replace("\\", "")) for name in rule._original_target_patterns]
    sources = [ONE_BY_ONE.search(name.replace("\\", "").rstrip("$")) for name in rule._original_source_patterns]
    if len(targets) != 1 or targets[0] is None or not all(sources):
        return {}
    kinds = [type(operation) for operation in rule.operations]
    stored = [source[1] for source in sources if source is not None]
    wanted = LEAVES[:2] if targets[0][1] == "gate_up_proj" else (targets[0][1],)
    operations = [MergeModulelist, Concatenate] if len(wanted) > 1 else [MergeModulelist]
    return dict(zip(stored, wanted, strict=True)) if kinds == operations and len(stored) == len(wanted) else {}


@dataclass(frozen=True)
class FusedTensor:
    """A parameter of fused experts, as files may hold it too.

    shape:      [E, N, K], [E, K, N] where it is transposed, and [E, N] for biases
    path:       of the experts in the model; suffix: weight or bias
    outputs:    which of the N outputs are those of each linear, by its name
    """

    shape: tuple[int, ...]
    path: str
    suffix: str
    outputs: Mapping[str, slice]
    transposed: bool

    def turned(self) -> FusedTensor:
        """As files hold it whose outputs and inputs stand the other way round."""
        return replace(self, shape=(self.shape[0], *self.shape[:0:-1]), transposed=not self.transposed)

    def names(self) -> dict[str, tuple[int, slice]]:
        """The tensors that it consists of: the expert and the outputs of each."""
        return {
            f"{self.path}.{number}.{leaf}.{self.suffix}": (number, outputs)
            for number in range(self.shape[0])
            for leaf, outputs in self.outputs.items()
        }

    def of_expert(self, tensor: Tensor, outputs: slice) -> Tensor:
        """One linear's own, contiguous. tensor: the entry of one expert along the first axis."""
        return (tensor.t() if self.transposed else tensor)[outputs].contiguous()

    def assembled(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse: of the tensors of all experts, by name."""
        first = next(iter(tensors.values()))
        whole = torch.empty(self.shape, dtype=first.dtype, device=first.device)
        for name, (number, outputs) in self.names().items():
            one = whole[number].t() if self.transposed else whole[number]
            one[outputs] = tensors[name]
        return whole


def fused_tensors(model: nn.Module) -> dict[str, FusedTensor]:
    """The parameters of fused experts by their names in the model."""
    return {
        f"{path}.{name}": _described(path, module, name, tuple(parameter.shape))
        for path, module in fused_experts(model).items()
        for name, parameter in module.named_parameters(recurse=False)
    }


def _described(path: str, module: Any, name: str, shape: tuple[int, ...]) -> FusedTensor:
    is_bias = name.endswith("_bias")
    transposed = bool(module.is_transposed) and not is_bias
    leaf = name.removesuffix("_bias")
    outputs: dict[str, slice] = {leaf: slice(None)}
    if leaf == "gate_up_proj":
        half = shape[2 if transposed else 1] // 2
        outputs = {"gate_proj": slice(None, half), "up_proj": slice(half, None)}
        if not module.is_concatenated:
            outputs = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
    return FusedTensor(shape, path, "bias" if is_bias else "weight", outputs, transposed)


def turned_on_loading(rules: list[Any], parameter: str) -> bool:
    """Whether transformers exchanges the last two axes of a file's tensor of fused experts (Qwen3-VL-MoE), where its shape is not
    that of the parameter."""
    from transformers.core_model_loading import Transpose, WeightConverter

    leaf = FUSED.search(parameter)
    return leaf is not None and any(
        isinstance(rule, WeightConverter)
        and [type(operation) for operation in rule.operations] == [Transpose]
        and any(target.replace("\\", "").endswith(leaf[0].rstrip("$")) for target in rule._original_target_patterns)
        for rule in rules
    )


def stored_fused(model: Any) -> dict[str, FusedTensor]:
    """The parameters of fused experts that published files hold as they are, by their names in those files.

    model: with fused experts. Empty for a family whose files hold one tensor per expert.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    rules = get_model_conversion_mapping(model, add_legacy=False)
    if any(one_by_one(rule) for rule in rules):
        return {}
    found = {}
    for path, tensor in fused_tensors(model).items():
        name = path
        for rule in reversed(rules):
            if isinstance(rule, WeightRenaming):
                name = rule.reverse_transform().rename_source_key(name)[0]
        turned = tensor.turned()
        found[name] = turned if turned.shape != tensor.shape and turned_on_loading(rules, path) else tensor
    return found


def assembled_shapes(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors by name, those of single experts put together where the files of the model hold fused ones."""
    found = dict(shapes)
    if not any(is_expert(name.rpartition(".")[0]) for name in shapes):
        return found
    for name, fused in stored_fused(model).items():
        members = fused.names()
        if name not in found and all(
            found.get(one) == shape_of(fused, outputs) for one, (_, outputs) in members.items()
        ):
            for one in members:
                del found[one]
            found[name] = fused.shape
    return found


def shape_of(fused: FusedTensor, outputs: slice) -> tuple[int, ...]:
    """Of one linear's tensor."""
    sizes = fused.shape[:0:-1] if fused.transposed else fused.shape[1:]
    return (len(range(sizes[0])[outputs]), *sizes[1:])
