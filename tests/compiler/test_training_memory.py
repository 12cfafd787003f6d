"""What training takes, as a plan predicts it, against what a real student holds, and what a plan says where it does not fit."""

import re
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from sparsify import api
from sparsify import memory as machine
from sparsify.compiler import training_memory as predicted
from sparsify.compiler.activations import block_activations
from sparsify.compiler.apply import apply
from sparsify.compiler.memory import Limits, walk_memory
from sparsify.compiler.planning import make_plan
from sparsify.compiler.training_memory import counts_of, training_memory
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.model.capture import BlockCall, capture_calls, run_block
from sparsify.model.decoder import open_blocks
from sparsify.recipe import parse_recipe
from tests.helpers.students import noted_students
from tests.helpers.tiny import save_tiny, tiny_text

ROWS, LENGTH, VOCABULARY = 4, 32, 100
RECIPE = """
version: 1
calibration: {{source: "file:{text}", samples: 8, sequence_length: 32}}
passes:
  - prune: {{method: magnitude}}
  - quantize: {{method: rtn, bits: 4, group_size: 32}}
  - {training}
export: {{format: sparse24, head: null}}
"""
DISTILL = "distill: {tokens: 256, batch_size: 4, sequence_length: 32, precision: PRECISION, loss: {squarehead: 0, cross_entropy: 0}}"


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """A process that takes nothing but what training does."""
    monkeypatch.setattr(machine, "anonymous", lambda: 0)
    monkeypatch.setattr(predicted, "LATER", 0)


@pytest.fixture
def recipe(tmp_path):
    text = tiny_text(tmp_path / "text.txt")

    def make(training=DISTILL, precision="float32", *overrides):
        return parse_recipe(
            RECIPE.format(text=text, training=training.replace("PRECISION", precision)), "recipe.yaml", overrides
        )

    return make


def saved_by(block, x: torch.Tensor, call: BlockCall, dtype: torch.dtype, own: set[int]) -> int:
    """Bytes of the distinct tensors that autograd keeps of the forward pass of a real block. own: storages that are there anyway"""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    entering = x.detach().requires_grad_(True)
    with saved_tensors_hooks(note, lambda tensor: tensor), torch.enable_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = run_block(block, entering, call)
    del output  # as large as `entering`, which is among those that are kept
    return sum(kept.values())


def storages(values) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in values if isinstance(tensor, torch.Tensor)}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_activations_are_what_autograd_keeps(tmp_path, recipe, monkeypatch, family, precision):
    """Counted by autograd's own hooks on the student that was trained."""
    source = save_tiny(tmp_path / "source", family)
    students = noted_students(monkeypatch)
    plan = make_plan(recipe(precision=precision), str(source))
    apply(plan.recipe, str(source), tmp_path / "out", quiet=True)
    student, dtype = students[0], getattr(torch, precision)
    opened = replace(open_blocks(plan.checkpoint), model=student.model)
    hidden, calls = capture_calls(opened, torch.zeros((ROWS, LENGTH), dtype=torch.long))
    block = opened.block(0)
    linears = [module for module in block.modules() if hasattr(module, "hold")]
    assert linears
    for linear in linears:
        linear.hold(dtype)
    own = storages([*block.parameters(), *block.buffers(), *(linear._held for linear in linears)])
    own |= storages(torch.utils._pytree.tree_leaves((calls[0].args, calls[0].kwargs)))
    real = saved_by(block, hidden, calls[0], dtype, own)
    (first, *others), state = block_activations(plan, set(plan.schemes), True, dtype, (ROWS, LENGTH))
    assert state == hidden.nbytes
    assert first == pytest.approx(real, rel=0.03) and all(other == first for other in others)


def test_numbers_of_parameters_are_those_of_the_student(tmp_path, recipe, monkeypatch):
    source = save_tiny(tmp_path / "source", tie_word_embeddings=True)
    students = noted_students(monkeypatch)
    asked = recipe(DISTILL, "float32", "export.head={bits: 8, group_size: 32}")
    plan = make_plan(asked, str(source))
    apply(asked, str(source), tmp_path / "out", quiet=True)
    found, student = counts_of(plan), students[0]
    trained = [module for module in student.modules() if hasattr(module, "hold")]
    assert found.compressed == sum(linear.weight.numel() for linear in trained)
    assert found.masked == sum(linear.mask.numel() for linear in trained)
    assert found.scales == sum(linear.scale.numel() for linear in trained)
    assert found.model + found.scales == sum(parameter.numel() for parameter in student.parameters())
    moved = sum(p.numel() for p in student.parameters() if p.requires_grad)
    items = training_memory(plan, plan.training[0]).host
    assert items["optimizer states"] == pytest.approx(8 * moved, rel=0.01)  # norms are not counted
    assert items["masks"] == 2 * sum(linear.mask_bits.nbytes for linear in trained)  # and those to compare with
    assert items["student in float32"] == 4 * sum(parameter.numel() for parameter in student.parameters())


@pytest.mark.parametrize(
    ("changes", "less", "same"),
    [
        (["micro_batch_size=1"], "activations", "optimizer states"),
        (["gradient_checkpointing=true"], "activations", "teacher"),
        (["teacher_logits=cached"], "teacher", "activations"),
        (["optimizer=adamw_8bit"], "optimizer states", "activations"),
    ],
)
def test_settings_that_save_memory_are_seen(tmp_path, recipe, changes, less, same):
    source = str(save_tiny(tmp_path / "source", num_hidden_layers=4, intermediate_size=512))
    changes = [f"passes.distill.{change}" for change in changes]
    plain, other = (make_plan(recipe(DISTILL, "float32", *more), source) for more in ([], changes))
    plain, other = (training_memory(plan, plan.training[0]).host for plan in (plain, other))
    assert other.get(less, 0) < plain[less]
    assert other[same] == plain[same]


def test_several_processes_share_parameters_and_states(tmp_path, recipe):
    plan = make_plan(recipe(), str(save_tiny(tmp_path / "source")))
    one, four = (replace(plan, limits=Limits(processes=count)) for count in (1, 4))
    one, four = (training_memory(plan, plan.training[0]).host for plan in (one, four))
    for item in ("student in float32", "optimizer states"):
        assert four[item] == one[item] // 4
    assert four["masks"] == one["masks"] and four["gathered parameters"] > 0


def test_what_does_not_fit_is_told_with_what_takes_less(tmp_path, recipe):
    plan = make_plan(recipe(), str(save_tiny(tmp_path / "source", num_hidden_layers=4)))
    peak = training_memory(plan, plan.training[0]).peak
    tight = replace(plan, limits=Limits(memory=str(peak - 1)))
    found = training_memory(tight, tight.training[0])
    assert found.too_much and found.instead and max(found.instead.values()) < peak
    name, promised = next(iter(found.instead.items()))
    kept = make_plan(recipe(DISTILL, "float32", f"passes.distill.{name}"), plan.checkpoint.spec)
    assert training_memory(kept, kept.training[0]).peak == promised
    assert "does not fit" in found.describe()[-1] and f"--set passes.distill.{name}" in found.describe()[-1]
    assert not training_memory(plan, plan.training[0]).too_much


def test_the_training_of_blocks_counts_in_the_memory_of_a_walk(tmp_path, recipe):
    source = str(save_tiny(tmp_path / "source"))
    plan = make_plan(recipe("tune: {batch_size: 4}"), source)
    weights = sum(p.numel() for p in plan.model.block(0).parameters())
    least = 4 * 4 * weights  # parameters, two moments and the best state
    assert walk_memory(plan, Limits("1TB")).host["training of the block"] > least


def test_a_number_of_processes_that_cannot_be_is_refused(tmp_path, recipe):
    with pytest.raises(SparsifyError, match="--processes 0"):
        api.plan(recipe(), save_tiny(tmp_path / "source"), processes=0)
    made = api.plan(recipe(), save_tiny(tmp_path / "other"), processes=2)
    assert made.limits.among == 2


@pytest.mark.parametrize(
    "more, processes, said",
    [
        (["average=0.5"], 2, "distill: average works in one process; start it without torchrun, or leave it out"),
        (["masks=learned"], 2, "distill: masks: learned works in one process"),
        ([], 3, "distill: batch_size 4 does not divide into 3 processes of 1 rows; choose a multiple of 3"),
    ],
)
def test_a_plan_refuses_what_so_many_processes_would(tmp_path, recipe, more, processes, said):
    asked = recipe(DISTILL, "float32", *(f"passes.distill.{change}" for change in more))
    source = save_tiny(tmp_path / "source")
    with pytest.raises(CheckpointError, match=re.escape(said)):
        api.plan(asked, source, processes=processes)
    assert api.plan(asked, source, processes=1).training


@pytest.mark.parametrize(
    "budget, gpu_budget, free",
    [
        (100, None, "100 B"),
        (100, 10**6, "100 B"),
        (10**6, 200, "200 B of the GPU"),
        (100, 200, "100 B and 200 B of the GPU"),
    ],
)
def test_what_does_not_fit_is_named(budget, gpu_budget, free):
    gpu = {} if gpu_budget is None else {"student": 2000}
    found = predicted.TrainingMemory("lora", {"teacher": 1000}, gpu, budget, gpu_budget)
    assert found.too_much and found.describe()[-1] == f"does not fit: lora may take {free} here; no setting takes less"


def test_alternatives_are_not_counted_anew(tmp_path, recipe, monkeypatch):
    counted = []
    count = predicted.block_activations
    monkeypatch.setattr(predicted, "block_activations", lambda *args: counted.append(args[1:]) or count(*args))
    plan = make_plan(recipe(), str(save_tiny(tmp_path / "source")))
    found = training_memory(replace(plan, limits=Limits(memory="1MB")), plan.training[0])
    assert len(found.instead) >= 3 and [shape for *_, shape in counted] == [(ROWS, LENGTH), (1, LENGTH)]
