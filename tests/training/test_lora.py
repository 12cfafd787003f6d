"""Adapters on compressed linears: what is frozen, what is merged, and what lies beside the checkpoint."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from sparsify.compiler.apply import apply
from sparsify.compiler.convert import export
from sparsify.errors import RecipeError
from sparsify.formats.reader import open_compressed
from sparsify.model.linear import LinearWeights, is_two_four
from sparsify.recipe import parse_recipe
from sparsify.training.lora import (
    FrozenLinear,
    add_adapters,
    freeze,
    merge_inside_mask,
    pack_codes,
    targeted,
    unpack_codes,
)
from sparsify.training.qat_linear import kept_positions
from tests.helpers.students import noted_students
from tests.helpers.tiny import save_tiny, tiny_text

GROUP = 32


def compressed(bits: int = 4, n: int = 24, k: int = 64, seed: int = 0, pattern: str = "2:4") -> LinearWeights:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(n * k // 4, 4).scatter_(1, torch.rand(n * k // 4, 4, generator=generator).argsort(1)[:, :2], 1)
    mask = mask.reshape(n, k) if pattern == "2:4" else torch.ones(n, k)
    bias = torch.randn(n, generator=generator).bfloat16()
    if bits == 16:
        values = (torch.randn(n, k, generator=generator) * mask).bfloat16()
        return LinearWeights(bits=16, pattern=pattern, group_size=k, codes=None, scale=None, values=values, bias=bias)
    limit = 2 ** (bits - 1)
    codes = torch.randint(-limit, limit, (n, k), generator=generator) * mask
    scale = (0.01 + 0.1 * torch.rand(n, k // GROUP, generator=generator)).bfloat16()
    return LinearWeights(bits, pattern, GROUP, codes.to(torch.int8), scale, None, bias)


def model_of_one() -> nn.Module:
    """peft asks some parameter of a model where the model is, so there is one beside the linear."""
    model = nn.Sequential(nn.Linear(64, 24))
    model.register_parameter("other", nn.Parameter(torch.zeros(1)))
    return model


def adapted(linear: LinearWeights, merge: bool = True, **settings):
    """One linear with an adapter whose B is not zero."""
    model = model_of_one()
    given = dict(rank=4, alpha=8, merge=merge, quantize_in_loop=True, seed=1) | settings
    freeze(model, {"0": linear}, given.pop("quantized_base", True), given.pop("dtype", torch.float32))
    placed, _ = add_adapters(model, ["0"], **given)
    with torch.no_grad():
        placed["0"].lora_B["default"].weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(2))
    return model, placed["0"]


def delta_of(layer) -> torch.Tensor:
    """s B A with s = alpha / rank = 2, from the factors themselves."""
    return 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_codes_is_exact_and_four_bits_take_four(bits):
    codes = compressed(bits).codes
    packed = pack_codes(codes, bits)
    assert torch.equal(unpack_codes(packed, bits), codes)
    assert packed.numel() * packed.element_size() * 8 == codes.numel() * bits


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("quantized", [True, False])
def test_a_frozen_linear_is_the_compressed_one_and_gives_it_back(bits, quantized):
    linear = compressed(bits)
    frozen = FrozenLinear(linear, quantized, torch.float32)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(frozen(x), x @ linear.dense(torch.float32).T + linear.bias.float(), atol=1e-5)
    back = frozen.linear()
    for field in ("codes", "scale", "values"):
        one, other = getattr(back, field), getattr(linear, field)
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    assert not list(frozen.parameters())
    floats = [name for name, buffer in frozen.named_buffers() if buffer.shape == linear.shape]
    assert floats == ([] if quantized and bits == 4 else ["qweight"] if quantized and bits == 8 else ["weight"])


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("pattern", ["2:4", "dense"])
def test_merging_is_the_formula_inside_the_mask(bits, refit, pattern):
    linear = compressed(bits, pattern=pattern)
    delta = 0.05 * torch.randn(linear.shape, generator=torch.Generator().manual_seed(5))
    merged = merge_inside_mask(linear, delta, refit).validate("x")
    mask = kept_positions(linear).float() if pattern == "2:4" else torch.ones(linear.shape)
    goal = linear.dense(torch.float32) + mask * delta
    if bits == 16:
        assert torch.equal(merged.values, goal.bfloat16()) and (pattern == "dense" or is_two_four(merged.values))
        return
    assert torch.equal(merged.bias, linear.bias) and (merged.codes[mask == 0] == 0).all()
    assert pattern == "dense" or is_two_four(merged.codes)
    limit = 2 ** (bits - 1)
    steps = merged.scale.float().repeat_interleave(GROUP, 1)
    assert torch.equal(merged.codes.float(), (goal / steps).round().clamp(-limit, limit - 1) * mask)
    assert torch.equal(merged.scale, linear.scale) != refit
    if refit:
        error = (merged.dense(torch.float32) - goal).square().sum()
        assert error < (merge_inside_mask(linear, delta, False).dense(torch.float32) - goal).square().sum()


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("quantized", [True, False])
def test_what_is_trained_inside_the_mask_is_what_is_merged(bits, quantized):
    linear = compressed(bits)
    model, layer = adapted(linear, quantized_base=quantized, dtype=torch.bfloat16)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    merged = merge_inside_mask(linear, delta_of(layer).detach(), refit=False)
    assert torch.equal(layer.effective(), merged.dense(torch.float32))
    assert torch.allclose(model(x), x @ merged.dense(torch.float32).T + linear.bias.float(), atol=1e-5)
    exported = layer.export()
    assert torch.equal(exported.dense(torch.float32), merged.dense(torch.float32))
    assert not torch.equal(merged.dense(torch.float32), linear.dense(torch.float32))


def test_gradients_pass_through_the_mask_only():
    """dL/dB of L = sum(x W') is s (1' x o M) A', by hand; rounding passes straight through, clipped codes do not."""
    linear = compressed(4)
    model, layer = adapted(linear, quantize_in_loop=False)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    model(x).sum().backward()
    upstream = x.sum(0).expand(24, 64) * kept_positions(linear)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.allclose(b.grad, 2.0 * upstream @ a.detach().T, atol=1e-3)
    assert torch.allclose(a.grad, 2.0 * b.detach().T @ upstream, atol=1e-3)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"0.lora_A.default.weight", "0.lora_B.default.weight"}
    _, rounding = adapted(linear)
    rounding(x).sum().backward()
    assert 0 < rounding.lora_B["default"].weight.grad.abs().sum() < torch.inf


def test_an_exported_adapter_is_trained_as_the_runtime_multiplies():
    linear = compressed(4)
    model, layer = adapted(linear, merge=False)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    expected = x @ (linear.dense(torch.float32) + delta_of(layer)).T + linear.bias.float()
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_a_new_adapter_changes_nothing_and_depends_on_the_seed():
    linear = compressed(16)
    settings = dict(rank=4, alpha=8, merge=False, quantize_in_loop=True)
    x = torch.randn(5, 64)
    factors = []
    for seed in (0, 0, 1):
        model = model_of_one()
        freeze(model, {"0": linear}, True, torch.float32)
        placed, _ = add_adapters(model, ["0"], seed=seed, **settings)
        assert torch.allclose(model(x), x @ linear.dense(torch.float32).T + linear.bias.float(), atol=1e-5)
        factors.append(placed["0"].lora_A["default"].weight)
    assert torch.equal(factors[0], factors[1]) and not torch.equal(factors[0], factors[2])


def test_targets_are_named_as_in_ignore():
    names = ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    assert targeted(names, None) == names
    assert targeted(names, ["q_proj", "re:model.layers.1"]) == names[1:]
    with pytest.raises(RecipeError, match="'k_proj' names no compressed linear; they are called like model.layers.0"):
        targeted(names, ["up_proj", "k_proj"])


# ---------------------------------------------------------------------------------------------------- through `apply`

QUANTIZED = "\n  - prune: {method: sparsegpt}\n  - quantize: {method: gptq, bits: 4, group_size: 32}"
PRUNED = "\n  - prune: {method: sparsegpt}"


@pytest.fixture
def source(tmp_path):
    return save_tiny(tmp_path / "source", dtype=torch.bfloat16)


@pytest.fixture
def run(tmp_path, source, monkeypatch):
    text = tiny_text(tmp_path / "text.txt", 2000)
    students = noted_students(monkeypatch)

    def go(name, passes, more="", format="sparse24"):
        common = "tokens: 2560, samples: 40, sequence_length: 16, batch_size: 8, precision: float32, rank: 4"
        common += ", alpha: 16, learning_rate: 0.01"
        head = f'version: 1\ncalibration: {{source: "file:{text}", samples: 8, sequence_length: 32}}\nexport: {{format: {format}}}\n'
        lora = "" if more is None else f"\n  - lora: {{{common}{more}}}"
        result = apply(parse_recipe(f"{head}passes:{passes}{lora}\n"), str(source), tmp_path / name, quiet=True)
        return result, students[-1].model if students else None

    return go


def logits(model):
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("more", ["", ", quantized_base: false", ", quantize_in_loop: false"])
def test_merged_adapters_heal_within_the_masks(tmp_path, run, more):
    run("before", QUANTIZED, None)
    result, student = run("out", QUANTIZED, more)
    (note,) = result.metrics["training"]
    assert note["kind"] == "lora" and note["steps"] == 20 and note["last"]["loss"] < note["first"]["loss"]
    before, after = open_compressed(tmp_path / "before"), open_compressed(tmp_path / "out")
    moved = 0
    for module in before.modules:
        old, new = before.linear(module), after.linear(module)
        assert is_two_four(new.codes) and (new.codes[~kept_positions(old)] == 0).all()
        moved += int(not torch.equal(old.codes, new.codes))
        if not more.startswith(", quantize_in"):
            assert torch.equal(new.scale, old.scale)
            assert torch.equal(new.dense(torch.float32), student.get_submodule(module).effective())
    assert moved > len(before.modules) / 2
    assert not (tmp_path / "out" / "adapter").exists()


def test_only_the_targets_change(tmp_path, run):
    run("before", QUANTIZED, None)
    run("out", QUANTIZED, ", targets: [down_proj]")
    before, after = open_compressed(tmp_path / "before"), open_compressed(tmp_path / "out")
    changed = {m for m in before.modules if not torch.equal(before.linear(m).codes, after.linear(m).codes)}
    assert changed and all(module.endswith("down_proj") for module in changed)


def test_an_exported_adapter_gives_peft_the_students_logits(tmp_path, run):
    """16-bit weights, so that the dense checkpoint holds the base exactly."""
    _, student = run("out", PRUNED, ", export: adapter", "dense")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    without = logits(base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    assert torch.allclose(logits(loaded), logits(student), atol=1e-5)
    assert not torch.allclose(without, logits(student), atol=1e-3)
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    assert len(tensors) == 2 * 7 * 3 and all(4 in tensor.shape for tensor in tensors.values())
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 4 and config["lora_alpha"] == 16


def test_an_exported_adapter_loads_on_the_sparse24_model_and_on_its_export(tmp_path, run):
    _, student = run("out", QUANTIZED, ", export: adapter")
    export(tmp_path / "out", "dense", tmp_path / "dense", quiet=True)
    files = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    assert all((tmp_path / "dense" / file).read_bytes() == (tmp_path / "out" / file).read_bytes() for file in files)
    for directory, bound in (("out", 1e-4), ("dense", 0.1)):  # weights of the dense export are rounded to 16 bits
        base = AutoModelForCausalLM.from_pretrained(tmp_path / directory, dtype=torch.float32)
        without = logits(base)
        loaded = PeftModel.from_pretrained(base, tmp_path / directory / "adapter")
        assert torch.allclose(logits(loaded), logits(student), atol=bound)
        assert (logits(loaded) - without).abs().max() > 3 * bound


def test_the_base_beside_an_adapter_stays_as_it_was_compressed(tmp_path, run):
    """QLoRA: what is on disk are the codes of the walk, byte by byte, never a multiplied-out weight."""
    run("before", QUANTIZED, None)
    _, student = run("out", QUANTIZED, ", export: adapter")
    weights = "model.safetensors"
    assert (tmp_path / "before" / weights).read_bytes() == (tmp_path / "out" / weights).read_bytes()
    frozen = [module for module in student.modules() if isinstance(module, FrozenLinear)]
    assert len(frozen) == 21 and all(set(dict(m.named_buffers())) == {"scale", "qweight"} for m in frozen)
    assert all(module.qweight.dtype == torch.uint8 for module in frozen)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_text_alone_needs_no_teacher(run):
    result, _ = run("out", QUANTIZED, ", loss: {squarehead: 0, kl: 0, cross_entropy: 1}")
    (note,) = result.metrics["training"]
    assert note["teacher"] is None and set(note["last"]) == {"loss", "cross_entropy"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("train: [norms]", "train has no effect with method lora: the model's own weights stand still"),
        ("export: adapter, quantize_in_loop: false", "quantize_in_loop has no effect"),
        ("loss: {squarehead: 0, kl: 0}", "nothing to learn"),
        ("loss: {squarehead: 0, kl: 0, cross_entropy: 1}, teacher: m", "teacher has no effect"),
        ("rank: 0", "at least 1"),
        ("tokens: 10", "less than one step"),
    ],
)
def test_what_lora_cannot_mean_is_refused(more, words):
    tokens = "" if "tokens" in more else "tokens: 1M, "
    with pytest.raises(RecipeError, match=words):
        parse_recipe(f"version: 1\npasses:{QUANTIZED}\n  - lora: {{{tokens}{more}}}\n")


def test_nothing_may_follow_an_adapter_that_is_not_merged():
    text = f"version: 1\npasses:{QUANTIZED}\n  - lora: {{tokens: 1M, export: EXPORT}}\n  - finetune: {{data: 'file:a.jsonl'}}\n"
    with pytest.raises(RecipeError, match="finetune comes after lora"):
        parse_recipe(text.replace("EXPORT", "adapter"))
    assert len(parse_recipe(text.replace("EXPORT", "merge")).passes) == 4
