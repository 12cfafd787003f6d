"""The walk against running the whole transformers model: what arrives at each linear, and that rewriting takes effect."""

import errno
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from sparsify.errors import CheckpointError, NumericalError, SparsifyError
from sparsify.model import sequential
from sparsify.model.capture import BlockCall
from sparsify.model.checkpoint import open_checkpoint
from sparsify.model.decoder import open_blocks
from sparsify.model.footprint import Release, footprint
from sparsify.model.hidden_states import Activations
from sparsify.model.linear import LinearWeights
from sparsify.model.linear_groups import find_groups
from sparsify.model.sequential import Walk
from sparsify.model.suspended import InStep, Room
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
    walk = Walk(open_blocks(open_checkpoint(directory)), tokens(), dense_reference=True, dense_outputs=True)
    seen, dense_seen, outputs = {}, {}, set()

    def rewrite(visit):
        read, read_dense = (torch.cat(batches) for batches in zip(*visit.batches, strict=True))
        for name in visit.names:
            seen[name], dense_seen[name] = read, read_dense
        outputs.update(visit.names if visit.outputs else ())
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
        made = dense.get_submodule(name)(expected_dense[name]) if name in outputs else expected_dense[name]
        torch.testing.assert_close(dense_seen[name], made, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen[name], expected[name], rtol=1e-4, atol=1e-5)
    head = next(name for name, module in halved.named_modules() if module is halved.get_output_embeddings())
    read = inputs_of(halved, [head])[head]
    torch.testing.assert_close(torch.cat(list(walk.head_inputs())), read, rtol=1e-4, atol=1e-5)


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


def test_fused_experts_and_router_are_not_visited(tmp_path):
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


def walked(directory, room, change=lambda block: None):
    """What all linears read, in both models, and the hidden states that leave the last block. Also the walk."""
    walk = Walk(open_blocks(open_checkpoint(directory)), tokens(), dense_reference=True, room=room, dense_outputs=True)
    read = []

    def rewrite(visit):
        read.extend(x for pair in visit.batches for x in pair)
        assert room is None or walk.room.used <= room
        return halve(visit)

    for index in range(len(walk.model.blocks)):
        change(walk.model.block(index))
        walk.visit(index, lambda name: True, rewrite)
    assert walk.room.used == 0
    return [*read, *walk.hidden.parts, *walk.dense.parts], walk


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "mixtral"])  # gpt_neox: parallel blocks
def test_forwards_that_are_computed_anew_give_the_same_bits(tmp_path, family):
    directory = save_tiny(tmp_path / family, family)
    kept, _ = walked(directory, None)
    most = max(max(one.waiting) for one in walked(directory, 0)[1].footprints.values())
    for room in (0, most, 3 * most):
        found, _ = walked(directory, room)
        assert len(found) == len(kept)
        assert all(torch.equal(one, other) for one, other in zip(found, kept, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "mixtral"])
def test_forwards_let_go_of_what_they_never_read_again(tmp_path, family, monkeypatch):
    """To the same bits, with less in memory while all wait behind attention."""
    directory, alive = save_tiny(tmp_path / family, family), []
    visit_group = Walk._visit_group

    def counted(walk, index, block, group, batches, rewrite, outputs):
        def last(visit):
            new = rewrite(visit)
            if any("o_proj" in name or "attention.dense" in name for name in group.names):
                tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.device.type == "cpu"]
                alive[-1] += sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
            return new

        return visit_group(walk, index, block, group, batches, last, outputs)

    monkeypatch.setattr(Walk, "_visit_group", counted)
    found = []
    for lets_go in (True, False):
        if not lets_go:
            monkeypatch.setattr(Release, "at", lambda release, stop: None)
        alive.append(0)
        read, _ = walked(directory, None)
        found.append([x.clone() for x in read])
        del read
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert 0 < alive[0] < alive[1]


class Late(nn.Module):
    """A block whose last operation reads what its first one made, but not for every micro-batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        early = x * 2
        late = self.second(self.first(early).relu())
        return late + early if x.sum() > 0 else late


def test_a_forward_that_reads_again_what_it_let_go_of_is_computed_anew():
    torch.manual_seed(0)
    block, states = Late(), [torch.randn(1, 4, 8).abs() * sign for sign in (-1, 1, -1)]
    hidden = Activations([x.shape for x in states], torch.float32)
    for i, x in enumerate(states):
        hidden[i] = x
    call = BlockCall((), {})
    stops = [block.first, block.second]
    with torch.no_grad():
        watched = footprint(block, stops, states[0], call)
        assert watched.unread[1]  # the input of `first`
        steps = InStep(block, stops, hidden, [[call]] * 3, 0, Room(), watched, False, "forward")
        for stop in stops:
            for i in range(3):
                assert steps.advance(i)[0] is stop
            steps.passed += 1
        for i in range(3):
            steps.finish(i)
        steps.close()
        for i, x in enumerate(states):
            assert torch.equal(hidden[i], block(x))


@pytest.mark.parametrize(("room", "forwards"), [(None, 1 + 1), (0, 4 + 3)])
def test_without_room_every_group_begins_at_the_hidden_states(tmp_path, room, forwards):
    """A block of four groups: the first linears run once for each later group and for the output, to which the dense model goes
    on from the last group."""
    ran = []

    def count(block):
        block.self_attn.q_proj.register_forward_hook(lambda *_: ran.append("q"))
        block.mlp.down_proj.register_forward_hook(lambda *_: ran.append("down"))

    directory = save_tiny(tmp_path / "m", num_hidden_layers=1)
    walked(directory, room, count)
    beside = 2  # the probe, and the forward that measures
    assert ran.count("q") == forwards * 2 + beside  # micro-batches
    assert ran.count("down") == 2 * 2 + beside


@pytest.mark.parametrize("room", [None, 0])
def test_a_block_that_writes_into_its_input_walks_alike(tmp_path, room):
    def overwrite(block):
        forward = block.forward

        def run(hidden_states, *args, **kwargs):
            return forward(hidden_states.mul_(1.5), *args, **kwargs)

        block.forward = run

    directory = save_tiny(tmp_path / "m")
    with_room, _ = walked(directory, None, overwrite)
    found, _ = walked(directory, room, overwrite)
    assert all(torch.equal(one, other) for one, other in zip(found, with_room, strict=True))


def test_what_lies_outside_the_blocks_can_be_left_until_the_head(tmp_path):
    directory = save_tiny(tmp_path / "m", tie_word_embeddings=False)
    walks = [Walk(open_blocks(open_checkpoint(directory)), tokens(), keeps_outside=keeps) for keeps in (True, False)]
    assert walks[1].model.model.get_input_embeddings().weight.is_meta
    for walk in walks:
        walk.visit(0, lambda name: True, halve)
    kept, left = (torch.cat(list(walk.head_inputs())) for walk in walks)
    assert torch.equal(kept, left)


def test_two_walks_cannot_share_a_spill_directory(tmp_path):
    directory = save_tiny(tmp_path / "m")
    first = Walk(open_blocks(open_checkpoint(directory)), tokens(), spill=tmp_path)
    with pytest.raises(SparsifyError, match="another run"):
        Walk(open_blocks(open_checkpoint(directory)), tokens(), spill=tmp_path)
    del first
    Walk(open_blocks(open_checkpoint(directory)), tokens(), spill=tmp_path)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(SparsifyError, match=r"hidden: no room for [\d.]+ kB of .*the disk is full"):
        Walk(open_blocks(open_checkpoint(save_tiny(tmp_path / "m"))), tokens(), spill=tmp_path)


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


def test_the_dense_copy_of_a_block_ends_with_its_visit(tmp_path, monkeypatch):
    """Without the help of the garbage collector, or several would be in memory."""
    copies = []

    def beside(block):
        copied = make_copy(block)
        copies.append(weakref.ref(copied))
        return copied

    make_copy = sequential._beside
    monkeypatch.setattr(sequential, "_beside", beside)
    walk = Walk(
        open_blocks(open_checkpoint(save_tiny(tmp_path / "m"))), tokens(), dense_reference=True, dense_outputs=True
    )
    gc.collect()
    gc.disable()
    try:
        for index in range(2):
            walk.visit(index, lambda name: True, halve)
            assert copies[index]() is None
    finally:
        gc.enable()


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
