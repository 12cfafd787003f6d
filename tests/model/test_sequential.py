"""The walk against running the whole transformers model: what arrives at each linear, and that rewriting takes effect."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsify.errors import CheckpointError, NumericalError
from sparsify.model.checkpoint import open_checkpoint
from sparsify.model.decoder import open_blocks
from sparsify.model.linear import LinearWeights
from sparsify.model.linear_groups import find_groups
from sparsify.model.sequential import Walk
from tests.helpers.tiny import FAMILIES, save_tiny

SAMPLES, LENGTH = 5, 24


@pytest.fixture(autouse=True)
def two_micro_batches(monkeypatch):
    monkeypatch.setattr(
        "sparsify.model.sequential.TOKENS_PER_MICRO_BATCH", 3 * LENGTH
    )  # 3 rows, then 2: ragged on purpose


def tokens() -> torch.Tensor:
    return torch.randint(4, 96, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


def halve(visit):
    """A rewrite whose effect is easy to repeat on a whole model: every weight is halved."""
    return {
        name: LinearWeights(16, "dense", linear.in_features, values=(linear.weight / 2).bfloat16())
        for name, linear in zip(visit.names, visit.linears, strict=True)
    }


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_sees_what_the_whole_model_computes(tmp_path, family):
    directory = save_tiny(tmp_path / family, family)
    walk = Walk(open_blocks(open_checkpoint(directory)), tokens(), dense_reference=True)
    seen, dense_seen = {}, {}

    def rewrite(visit):
        for name in visit.names:
            seen[name] = torch.cat(visit.inputs)
            dense_seen[name] = torch.cat(visit.dense_inputs)
        return halve(visit)

    results = [walk.visit(i, lambda name: True, rewrite) for i in range(len(walk.model.blocks))]
    assert seen, "no linear was visited"

    dense = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected_dense = inputs_of(dense, seen)
    halved = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for result in results:
        for name, weights in result.linears.items():
            halved.get_submodule(name).weight.data.copy_(weights.dense(torch.float32))
    expected = inputs_of(halved, seen)
    for name in seen:
        torch.testing.assert_close(dense_seen[name], expected_dense[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen[name], expected[name], rtol=1e-4, atol=1e-5)
    head = next(name for name, module in halved.named_modules() if module is halved.get_output_embeddings())
    read = inputs_of(halved, [head])[head]
    torch.testing.assert_close(torch.cat(walk.head_inputs()), read, rtol=1e-4, atol=1e-5)


def inputs_of(model, names):
    """What each named linear reads when the whole model runs."""
    found = {}

    def note(name):
        def hook(module, args):
            found[name] = args[0].reshape(-1, args[0].shape[-1])

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    with torch.no_grad():
        model(tokens(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def test_groups_are_linears_that_read_one_tensor(tmp_path):
    walk = Walk(open_blocks(open_checkpoint(save_tiny(tmp_path / "m"))), tokens())
    walk.model.load(0)
    groups, skipped = find_groups(walk.model.block(0), walk.probe[0], walk.probe[1][0])
    assert [g.names for g in groups] == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",),
    ]  # fmt: skip
    assert skipped == {}


def test_experts_and_router_are_not_visited(tmp_path):
    model = open_blocks(open_checkpoint(save_tiny(tmp_path / "moe", "mixtral")))
    walk = Walk(model, tokens())
    result = walk.visit(0, lambda name: True, halve)
    assert all("self_attn" in name for name in result.linears)
    assert any("experts" in name for name in model.other_parameters(0))


def test_replay_gives_the_same_hidden_states(tmp_path):
    directory = save_tiny(tmp_path / "m", dtype=torch.bfloat16)
    first = Walk(open_blocks(open_checkpoint(directory)), tokens(), dense_reference=True)
    result = first.visit(0, lambda name: True, halve)
    second = Walk(open_blocks(open_checkpoint(directory)), tokens(), dense_reference=True)
    second.replay(0, result.linears)
    for i in range(len(first.hidden)):
        assert torch.equal(first.hidden[i], second.hidden[i])
        assert torch.equal(first.dense[i], second.dense[i])


def test_spilled_activations_equal_those_in_memory(tmp_path):
    directory = save_tiny(tmp_path / "m")
    walks = [Walk(open_blocks(open_checkpoint(directory)), tokens(), spill=spill) for spill in (None, tmp_path)]
    for walk in walks:
        walk.visit(0, lambda name: True, halve)
    assert (tmp_path / "hidden").exists()
    assert all(torch.equal(walks[0].hidden[i], walks[1].hidden[i]) for i in range(len(walks[0].hidden)))


def test_one_block_is_resident_at_a_time(tmp_path):
    model = open_blocks(open_checkpoint(save_tiny(tmp_path / "m")))
    walk = Walk(model, tokens())

    def rewrite(visit):
        resident = [i for i in range(3) if not next(model.block(i).parameters()).is_meta]
        assert resident == [visit.block]
        return halve(visit)

    for index in range(3):
        walk.visit(index, lambda name: True, rewrite)
    assert all(parameter.is_meta for i in range(3) for parameter in model.block(i).parameters())


def test_nan_in_a_block_is_named(tmp_path):
    directory = save_tiny(tmp_path / "m")
    walk = Walk(open_blocks(open_checkpoint(directory)), tokens())

    def poison(visit):
        return {
            name: LinearWeights(16, "dense", linear.in_features, values=torch.full_like(linear.weight, 3e38).bfloat16())
            for name, linear in zip(visit.names, visit.linears, strict=True)
        }

    with pytest.raises(NumericalError, match=r"model\.layers\.0.*NaN or Inf"):
        walk.visit(0, lambda name: True, poison)


def test_missing_tensor_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    directory = save_tiny(tmp_path / "m")
    state = load_file(directory / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        open_blocks(open_checkpoint(directory))


def test_wrong_shape_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    directory = save_tiny(tmp_path / "m")
    state = load_file(directory / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has shape \[3, 3\]"):
        open_blocks(open_checkpoint(directory))


def test_moves_what_is_loaded_to_a_device_and_leaves_the_rest(tmp_path):
    model = open_blocks(open_checkpoint(save_tiny(tmp_path / "m")))
    model.load(None)
    model.load(1)
    before = {name: p.clone() for name, p in model.model.named_parameters() if not p.is_meta}
    model.to("cpu")  # `nn.Module.to` raises here: it cannot move a block that is not loaded
    after = dict(model.model.named_parameters())
    assert all(p.is_meta for p in model.block(0).parameters())
    assert not any(p.is_meta for p in model.block(1).parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())
