"""Experts of a mixture as linears: the same numbers as transformers' fused ones, and a walk that gives each its own tokens."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsify.model.checkpoint import open_checkpoint
from sparsify.model.decoder import open_blocks
from sparsify.model.experts import SeparateExperts, experts_of
from sparsify.model.linear import LinearWeights
from sparsify.model.sequential import Walk
from tests.helpers.tiny import MIXTURES, tiny_mixture

SAMPLES, LENGTH = 5, 24
TOKENS = torch.randint(4, 96, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A checkpoint of a family, written once."""
    folder = tmp_path_factory.mktemp("mixtures")
    return lambda family: folder / family if (folder / family).exists() else tiny_mixture(folder / family, family)


@pytest.fixture(autouse=True)
def two_micro_batches(monkeypatch):
    monkeypatch.setattr("sparsify.model.sequential.TOKENS_PER_MICRO_BATCH", 3 * LENGTH)  # 3 rows, then 2


def opened(directory):
    return open_blocks(open_checkpoint(directory), torch.float32, separate=True)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_taken_apart_compute_what_transformers_computes(family, mixture):
    model = opened(mixture(family))
    model.load(None)
    for index in range(len(model.blocks)):
        model.load(index)
    model.model.tie_weights()
    fused = AutoModelForCausalLM.from_pretrained(mixture(family), dtype=torch.float32)
    assert model.fused is None and experts_of(model.model)
    with torch.no_grad():
        ours, theirs = (one(TOKENS, use_cache=False).logits for one in (model.model, fused))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_interleaved_and_transposed_parameters_are_taken_apart(mixture):
    stored = load_file(mixture("gpt_oss") / "model.safetensors")
    model = opened(mixture("gpt_oss"))
    path = "model.layers.1.mlp.experts"
    whole, bias = stored[f"{path}.gate_up_proj"], stored[f"{path}.gate_up_proj_bias"]
    for start, leaf in enumerate(("gate_proj", "up_proj")):
        assert torch.equal(model.checkpoint.tensor(f"{path}.2.{leaf}.weight"), whole[2, :, start::2].t())
        assert torch.equal(model.checkpoint.tensor(f"{path}.2.{leaf}.bias"), bias[2, start::2])
    assert torch.equal(model.checkpoint.tensor(f"{path}.3.down_proj.weight"), stored[f"{path}.down_proj"][3].t())
    assert model.checkpoint.nbytes() == open_checkpoint(mixture("gpt_oss")).nbytes()
    assert f"{path}.gate_up_proj" not in model.checkpoint


def silu_of_clamped(experts, both):
    gate, up = both.chunk(2, -1)
    return torch.nn.functional.silu(gate.clamp(max=experts.limit)) * up.clamp(-experts.limit, experts.limit)


def clamped_silu(experts, both):
    gate, up = both.chunk(2, -1)
    return torch.nn.functional.silu(gate).clamp(max=experts.limit) * up.clamp(-experts.limit, experts.limit)


@pytest.mark.parametrize(
    ("gate", "layout", "unusual"),
    [
        (silu_of_clamped, {}, None),
        (clamped_silu, {}, "their gate is one of its own"),
        (clamped_silu, {"limit": None}, "their gate is one of its own"),
        (silu_of_clamped, {"has_gate": False}, "they have no gate"),
    ],
)
def test_what_experts_compute_that_others_do_not(gate, layout, unusual):
    fused = type("Fused", (torch.nn.Module,), {"_apply_gate": gate})()
    for key, value in {
        "has_gate": True,
        "has_bias": True,
        "is_transposed": False,
        "is_concatenated": True,
        "limit": 7.0,
        **layout,
    }.items():
        setattr(fused, key, value)
    fused.down_proj = torch.nn.Parameter(torch.empty(2, 64, 32))
    assert SeparateExperts(fused).unusual == unusual


@pytest.mark.parametrize("family", MIXTURES)
def test_vllm_knows_what_the_experts_of_these_families_compute(family, mixture):
    assert [experts.unusual for experts in experts_of(opened(mixture(family)).model).values()] == [None] * (
        1 if family == "deepseek_v3" else 2
    )


def halve(visit):
    return {
        name: LinearWeights(16, "dense", linear.in_features, values=(linear.weight / 2).bfloat16())
        for name, linear in zip(visit.names, visit.linears, strict=True)
    }


def routed(model, index):
    """What a transformers model brings to the experts of a layer, [tokens, K], and which of them are chosen."""
    found = []
    experts = next(m for name, m in model.model.layers[index].named_modules() if name.endswith("experts"))
    hook = experts.register_forward_pre_hook(lambda module, args: found.append(args))
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    hook.remove()
    return experts, *found[0][:2]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_each_expert_is_rewritten_on_the_tokens_it_is_given(family, mixture):
    """Against the whole transformers model with the same halved weights, and the dense model beside it."""
    walk = Walk(opened(mixture(family)), TOKENS, dense_reference=True)
    seen = {}

    def rewrite(visit):
        if visit.layer is not None:
            seen[visit.names[-1]] = [torch.cat(batches) for batches in zip(*visit.batches, strict=True)]
        return halve(visit)

    results = [walk.visit(index, lambda name: True, rewrite) for index in range(2)]
    dense, halved = (AutoModelForCausalLM.from_pretrained(mixture(family), dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        for result in results:
            for name in result.linears:
                if ".experts." not in name:
                    halved.get_submodule(name).weight.copy_((halved.get_submodule(name).weight / 2).bfloat16())
        for layer in halved.model.layers:
            for name, parameter in layer.mlp.experts.named_parameters():
                parameter.copy_(parameter if "bias" in name else (parameter / 2).bfloat16())
    counts = 0
    for index in range(2):
        experts, inputs, chosen = routed(halved, index)
        originals, dense_inputs, _ = routed(dense, index)
        for number in range(4):
            rows = (chosen == number).any(1).nonzero()[:, 0]
            counts += len(rows)
            path = f"model.layers.{index}.mlp.experts.{number}"
            for leaf, reads in (
                ("up_proj", lambda module, x: x),
                ("down_proj", lambda m, x, e=number: between(m, e, x)),
            ):
                x, own = seen[f"{path}.{leaf}"]
                torch.testing.assert_close(x, reads(experts, inputs[rows]), rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(own, reads(originals, dense_inputs[rows]), rtol=1e-4, atol=1e-4)
    assert counts == 2 * 2 * TOKENS.numel()
    assert {name for result in results for name in result.linears if name.endswith("experts.3.down_proj")}


def between(experts, number, x):
    """What the down projection of a fused expert reads, as its class says."""
    with torch.no_grad():
        if experts.is_transposed:
            return experts._apply_gate(x @ experts.gate_up_proj[number] + experts.gate_up_proj_bias[number])
        gate, up = (x @ experts.gate_up_proj[number].t()).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up


def test_without_room_in_files_and_again_the_walk_has_the_same_bits(mixture, tmp_path):
    walks = [
        Walk(opened(mixture("qwen2_moe")), TOKENS, dense_reference=True, room=room, spill=spill)
        for room, spill in ((None, None), (0, tmp_path))
    ]
    again = Walk(opened(mixture("qwen2_moe")), TOKENS, dense_reference=True)
    for index in range(2):
        results = [walk.visit(index, lambda name: True, lambda visit: drained(visit)) for walk in walks]
        again.replay(index, results[0].linears)
        assert results[0].skipped == {f"model.layers.{index}.mlp.shared_expert_gate": "routes tokens to experts"}
        assert len([name for name in results[0].linears if ".experts." in name]) == 4 * 3
        assert any("shared_expert." in name for name in results[0].linears)
    for walk in (walks[1], again):
        for i in range(len(walk.hidden)):
            assert torch.equal(walk.hidden[i], walks[0].hidden[i]) and torch.equal(walk.dense[i], walks[0].dense[i])


def drained(visit):
    for _ in visit.batches:
        pass
    return halve(visit)


def test_only_experts_that_a_batch_touches_are_computed(mixture):
    model = opened(mixture("mixtral"))
    model.load(0)
    experts = next(m for m in model.block(0).modules() if isinstance(m, SeparateExperts))
    called = []
    for number in range(4):
        experts.expert(number).down_proj.register_forward_hook(lambda *_, number=number: called.append(number))
    chosen, weights = torch.tensor([[1, 4], [3, 1], [1, 3]]), torch.full((3, 2), 0.5)
    x = torch.randn(3, 64)
    y = experts(x, chosen, weights)
    assert called == [1, 3]  # and 4, which is beyond them, stands for none
    torch.testing.assert_close(y[:1], experts._computed(1, x[:1]) * 0.5)
