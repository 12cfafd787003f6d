"""LoRA and QLoRA on a compressed model: low-rank adapters heal it while its own weights stand still.

Hu et al. 2021 (LoRA, arXiv:2106.09685): y = x (W + s B A)', with A: [r, K], B: [N, r] and s = alpha / r. Dettmers et al. 2023
(QLoRA, arXiv:2305.14314): W stays in its codes and is dequantized for each product.

A dense B A would fill the zeros of a 2:4 weight. An adapter that is to be merged is therefore trained as what it will be,
inside the mask and, where the weight is quantized, on its grid; one that is exported beside the checkpoint is trained as
the runtime multiplies with it, unmasked.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sparsify.errors import MissingDependency, RecipeError
from sparsify.model.linear import CODE_RANGE, LinearWeights
from sparsify.recipe import ignored_by
from sparsify.solver.grid import Grid, search_scale
from sparsify.training.qat_linear import Stored, codes_of, kept_positions, mask_bits, masked, on_grid
from sparsify.training.sharding import whole

try:
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
    from peft.tuners.lora import Linear as PeftLinear
except ImportError as error:
    raise MissingDependency("the lora pass needs peft: pip install 'sparsify-24[train]'") from error

ADAPTER = "default"  # peft's own name of the only one
SAVED_PREFIX = "base_model.model."  # what PeftModel, and so vLLM, puts before the names of the model


class FrozenLinear(nn.Module):
    """A compressed linear that is not trained.

    quantized: the codes stay codes, two to a byte where they have 4 bits, and are dequantized in each forward pass;
    otherwise, and for weights of 16 bits, `weight` holds [N, K] in `dtype`. Codes of 8 bits less a zero point, which need 9, stay
    codes too: they could not be read back from a weight of 16 bits.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    bias: Tensor | None
    weight: Tensor
    qweight: Tensor

    def __init__(self, linear: LinearWeights, quantized: bool, dtype: torch.dtype):
        super().__init__()
        self.out_features, self.in_features = linear.shape
        self.bits, self.pattern, self.group_size, self.store = (
            linear.bits, linear.pattern, linear.group_size, linear.dtype
        )  # fmt: skip
        wide = linear.bits == 8 and not linear.symmetric
        self.quantized = (quantized or wide) and linear.codes is not None
        self.register_buffer("scale", linear.scale, persistent=False)
        self.register_buffer("zero_point", linear.zero_point, persistent=False)
        self.register_buffer("bias", linear.bias, persistent=False)
        if self.quantized:
            assert linear.codes is not None
            self.register_buffer("qweight", pack_codes(linear.codes, linear.bits), persistent=False)
        else:
            self.register_buffer("weight", linear.dense(dtype), persistent=False)

    def linear(self) -> LinearWeights:
        """The compressed linear, to the bit."""
        common: dict[str, Any] = {
            "bits": self.bits, "pattern": self.pattern, "group_size": self.group_size, "bias": self.bias
        }  # fmt: skip
        if self.bits == 16:
            return LinearWeights(**common, values=self.weight.to(self.store))
        if self.quantized:
            codes = unpack_codes(self.qweight, self.bits)
        else:
            assert self.scale is not None
            steps = self.scale.float().repeat_interleave(self.group_size, 1)
            codes = (self.weight.float() / steps).round()
            if self.zero_point is not None:
                codes += self.zero_point.repeat_interleave(self.group_size, 1)
            codes = codes.to(torch.int8)
        return LinearWeights(**common, codes=codes, scale=self.scale, zero_point=self.zero_point)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[N, K]"""
        return self.linear().dense(dtype) if self.quantized else self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.dense(x.dtype), bias)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """int8 [N, K] to uint8 [N, K/2], the first of two in the low nibble; codes of 8 bits stay as they are."""
    if bits == 8:
        return codes
    nibbles = (codes & 15).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_codes`: int8 [N, K]."""
    if bits == 8:
        return packed
    nibbles = torch.stack([packed & 15, packed >> 4], 2).flatten(1).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


class InsideMask(PeftLinear):
    """An adapter that is trained as the merged weight it will become. Placed by peft, on a FrozenLinear."""

    quantize_in_loop = True
    mask_bits: Tensor | None

    def __init__(self, base_layer: FrozenLinear, *args: Any, **settings: Any):
        super().__init__(base_layer, *args, **settings)
        self.register_buffer("mask_bits", mask_bits(base_layer.linear()), persistent=False)

    def effective(self) -> Tensor:
        """The weight of the forward pass, [N, K] float32: what `merged` gives, where rounding is part of training."""
        base: Any = self.get_base_layer()
        factor: Tensor = self.lora_A[ADAPTER].weight  # type: ignore[assignment]
        with torch.autocast(factor.device.type, enabled=False):
            weight = base.linear().dense(torch.float32) + self.get_delta_weight(ADAPTER).float()
            if base.bits == 16:
                return Stored(base.store)(masked(weight, self.mask_bits))
            if self.quantize_in_loop:
                return on_grid(weight, base.scale.float(), self.mask_bits, *CODE_RANGE[base.bits], base.zero_point)
            return masked(weight, self.mask_bits)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.get_base_layer()
        bias = None if base.bias is None else base.bias.to(x.dtype)
        return nn.functional.linear(x, self.effective().to(x.dtype), bias)

    @torch.no_grad()
    def export(self) -> LinearWeights:
        base: Any = self.get_base_layer()
        return merge_inside_mask(base.linear(), self.get_delta_weight(ADAPTER), refit=not self.quantize_in_loop)


def merge_inside_mask(linear: LinearWeights, delta: Tensor, refit: bool) -> LinearWeights:
    """What + M * delta, compressed again: the same mask M, codes on the grid. delta: [N, K] float32.

    refit: choose each scale (and zero point) anew for the sum; otherwise codes are counted on those that are there.
    """
    mask = None if linear.pattern == "dense" else kept_positions(linear)
    weight = linear.dense(torch.float32) + (delta.float() if mask is None else delta.float() * mask)
    common: dict[str, Any] = {
        "bits": linear.bits, "pattern": linear.pattern, "group_size": linear.group_size, "bias": linear.bias
    }  # fmt: skip
    if linear.scale is None:
        return LinearWeights(**common, values=weight.to(linear.dtype))
    scale, zero_point = linear.scale, linear.zero_point
    if refit:
        grid = Grid(linear.bits, linear.group_size, linear.dtype, symmetric=linear.symmetric)
        kept = [None] * scale.shape[1] if mask is None else mask.T.split(linear.group_size)
        groups = zip(weight.T.split(linear.group_size), kept, strict=True)
        found = [search_scale(rows, grid, inside, None) for rows, inside in groups]
        scale = torch.stack([found_scale for found_scale, _ in found], 1).to(linear.dtype)
        zeros = [zero for _, zero in found if zero is not None]
        zero_point = torch.stack(zeros, 1).to(torch.int8) if zeros else None
    codes = codes_of(weight, scale, mask, linear.bits, zero_point)
    return LinearWeights(**common, codes=codes, scale=scale, zero_point=zero_point)


def freeze(
    model: nn.Module, linears: Mapping[str, LinearWeights], quantized_base: bool, dtype: torch.dtype
) -> dict[str, FrozenLinear]:
    """Put a FrozenLinear in place of each named submodule. Returns them by name."""
    placed = {}
    for name, linear in linears.items():
        old = model.get_submodule(name)
        device = next((t.device for t in [*old.parameters(), *old.buffers()]), torch.device("cpu"))
        placed[name] = FrozenLinear(linear, quantized_base, dtype).to(device)
        model.set_submodule(name, placed[name])
    return placed


def add_adapters(
    model: nn.Module,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    merge: bool,
    quantize_in_loop: bool,
    seed: int,
) -> tuple[dict[str, PeftLinear], LoraConfig]:
    """Freeze all of `model`, and let peft put an adapter beside each of `targets`, which `freeze` has placed. Returns these by name.

    B starts at zero, so the model says what it said before. seed: of A.
    """
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=sorted(targets))  # type: ignore[arg-type]
    config._register_custom_module({FrozenLinear: InsideMask if merge else PeftLinear})
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Unsupported layer type"
        )  # peft finds in_features and out_features all the same
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    placed: dict[str, PeftLinear] = {}
    for name in targets:
        layer: Any = model.get_submodule(name)
        for adapter in (layer.lora_A, layer.lora_B):
            adapter.float().requires_grad_(True)
        if merge:
            layer.quantize_in_loop = quantize_in_loop
        placed[name] = layer
    return placed, config


def targeted(linears: Iterable[str], patterns: Sequence[str] | None) -> list[str]:
    """The names that `patterns` mean, all without any. RecipeError for a pattern that names none."""
    names = list(linears)
    if patterns is None:
        return names
    for pattern in patterns:
        if not any(ignored_by(name, [pattern]) for name in names):
            raise RecipeError(f"lora.targets: '{pattern}' names no compressed linear; they are called like {names[0]}")
    return [name for name in names if ignored_by(name, patterns)]


def adapter_files(model: nn.Module, config: LoraConfig, base: str) -> dict[str, bytes]:
    """`adapter_config.json` and `adapter_model.safetensors`, as PeftModel.save_pretrained writes them and vLLM reads them. All
    processes must ask for them.

    base: the name of the checkpoint that the adapter belongs to."""
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    tensors = {SAVED_PREFIX + name: whole(tensor.detach()).cpu().contiguous() for name, tensor in state.items()}
    settings = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    settings |= {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True}
    return {
        "adapter_config.json": (json.dumps(settings, indent=2, default=str) + "\n").encode(),
        "adapter_model.safetensors": save(tensors, {"format": "pt"}),
    }
