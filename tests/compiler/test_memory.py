"""Budgets: two of them give the same bytes, what is predicted is what the shapes say, and what is too small is refused."""

import errno
import json

import pytest
import torch

import sparsify.compiler.calibrate as calibrate
from sparsify import memory as machine
from sparsify.compiler import memory
from sparsify.compiler.apply import apply
from sparsify.compiler.memory import Limits, walk_memory
from sparsify.compiler.planning import make_plan
from sparsify.errors import SparsifyError
from sparsify.recipe import parse_recipe
from tests.helpers.tiny import save_tiny, tiny_text

RECIPE = """
version: 1
calibration: {{source: "file:{text}", samples: 8, sequence_length: 32}}
solver: {{error_propagation: 0.5, coordinate_descent: {descent}}}
passes:
  - prune: {{method: sparsegpt}}
  - quantize: {{method: gptq, bits: 4, group_size: 32}}
"""
SAMPLES, LENGTH, HIDDEN, WIDE = 8, 32, 64, 128
STATES = 2 * SAMPLES * LENGTH * HIDDEN * 4  # of both models, float32


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Micro-batches of three rows, and a process that takes nothing but what the walk does."""
    monkeypatch.setattr("sparsify.model.sequential.TOKENS_PER_MICRO_BATCH", 3 * LENGTH)
    monkeypatch.setattr(machine, "anonymous", lambda: 0)
    monkeypatch.setattr(memory, "LATER", 0)
    monkeypatch.setattr(calibrate, "in_memory", lambda path: False)


@pytest.fixture
def recipe(tmp_path):
    return parse_recipe(RECIPE.format(text=tiny_text(tmp_path / "text.txt"), descent=1))


def files(directory):
    """The bytes of every file of a result but the record of the run, and the manifest, which has its digest."""
    own = ("run.json", "SHA256SUMS")
    return {f.name: f.read_bytes() for f in directory.rglob("*") if f.is_file() and f.name not in own}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "mixtral"])
def test_budgets_and_spilling_change_no_byte(tmp_path, recipe, family):
    source = save_tiny(tmp_path / "source", family)
    apply(recipe, str(source), tmp_path / "all", quiet=True)
    least = walk_memory(make_plan(recipe, str(source)), Limits()).least
    for name, limits in {
        "least": Limits(str(least)),
        "some": Limits(str(least + STATES + 40_000)),
        "spilled": Limits(spill=True),
    }.items():
        apply(recipe, str(source), tmp_path / name, quiet=True, limits=limits)
        assert files(tmp_path / name) == files(tmp_path / "all"), name


def test_budgets_lead_to_files_and_forwards_computed_anew(tmp_path, recipe):
    plan = make_plan(recipe, str(save_tiny(tmp_path / "source")))
    free = walk_memory(plan, Limits("1TB"))
    assert not free.spills and free.room is None and free.host["hidden states"] == STATES
    least = walk_memory(plan, Limits(str(free.least)))
    assert least.spills and least.room == 0 and least.disk["hidden states"] == STATES and least.peak == free.least
    some = walk_memory(plan, Limits(str(free.least + STATES + 1000)))
    assert not some.spills and some.room == 1000 and some.peak == some.budget
    assert walk_memory(plan, Limits("1TB", spill=True)).spills


def test_items_are_what_the_shapes_say(tmp_path, recipe):
    plan = make_plan(recipe, str(save_tiny(tmp_path / "source", vocab_size=96)))
    found = walk_memory(plan, Limits("1TB"))
    attention = HIDDEN * HIDDEN * 2 + 2 * HIDDEN * HIDDEN // 2
    weights = attention + 3 * HIDDEN * WIDE
    assert found.host["block"] == 2 * 4 * (weights + 2 * HIDDEN)  # the block and its dense reference, with two norms
    assert found.host["codes of the block"] == weights
    assert found.host["suspended forwards"] % (2 * 3) == 0  # both models, three micro-batches
    statistics = found.host["statistics and factors"]
    down, others = 4 * (WIDE + HIDDEN) * WIDE, 4 * 2 * HIDDEN**2  # H with W C, or with C; a factor besides
    assert statistics in (down, down + 4 * WIDE**2, others, others + 4 * HIDDEN**2)
    assert found.peak == sum(found.host.values())
    cost = plan.estimate()
    assert cost.memory is not None and cost.memory.disk["output"] == cost.output_bytes and found.disk == {}
    assert json.dumps(found.to_json())


def test_a_budget_too_small_for_one_block_names_the_least_that_works(tmp_path, recipe, monkeypatch):
    source = save_tiny(tmp_path / "source")
    monkeypatch.setattr(calibrate, "Walk", None)
    with pytest.raises(
        SparsifyError, match=r"one block does not fit into 1 kB of memory: --memory 0\.1GB is the least"
    ):
        apply(recipe, str(source), tmp_path / "out", quiet=True, limits=Limits("1kB"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_plan_says_what_does_not_fit(tmp_path, recipe):
    from dataclasses import replace

    plan = replace(make_plan(recipe, str(save_tiny(tmp_path / "source"))), limits=Limits("1kB"))
    caption = str(plan.table().caption)
    assert "does not fit: one block" in caption and "--memory 0.1GB is the least" in caption
    fits = str(replace(plan, limits=Limits("1TB")).table().caption)
    assert "does not fit" not in fits and "memory of the walk" in fits


def test_a_run_goes_on_under_another_budget(tmp_path, recipe, monkeypatch):
    source = save_tiny(tmp_path / "source")
    apply(recipe, str(source), tmp_path / "whole", quiet=True)
    least = walk_memory(make_plan(recipe, str(source)), Limits()).least
    solve, calls = calibrate.solve_layer, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 7:  # in the second block
            raise KeyboardInterrupt
        return solve(*args, **kwargs)

    monkeypatch.setattr(calibrate, "solve_layer", dies)
    with pytest.raises(KeyboardInterrupt):
        apply(recipe, str(source), tmp_path / "out", quiet=True, limits=Limits(str(least)))
    monkeypatch.setattr(calibrate, "solve_layer", solve)
    result = apply(recipe, str(source), tmp_path / "out", quiet=True, resume=True, limits=Limits("1TB"))
    assert result.record["resumed_after_blocks"] == 1
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_goes_on_that_could_not_spill(tmp_path, recipe, monkeypatch):
    """A spill directory in memory, then a full disk: one sentence each, and the same bytes in the end."""
    source, out = save_tiny(tmp_path / "source"), tmp_path / "out"
    apply(recipe, str(source), tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "in_memory", lambda path: True)
        with pytest.raises(SparsifyError, match=r"activations-0 lies in memory \(tmpfs\).*put --output on a disk"):
            apply(recipe, str(source), out, quiet=True, limits=Limits(spill=True))
    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(SparsifyError, match=r"hidden: no room for .*the disk is full.*go on with --resume"):
            apply(recipe, str(source), out, quiet=True, resume=True, limits=Limits(spill=True))
    assert not out.exists()
    apply(recipe, str(source), out, quiet=True, resume=True, limits=Limits(spill=True))
    assert files(out) == files(tmp_path / "whole")


def test_the_record_has_the_peak_of_anonymous_memory(tmp_path, recipe, monkeypatch):
    monkeypatch.undo()
    if machine.anonymous() is None:
        pytest.skip("the system does not say what a process has")
    result = apply(recipe, str(save_tiny(tmp_path / "source")), tmp_path / "out", quiet=True)
    assert 10**7 < result.record["peak_anonymous_bytes"] <= 1.1 * result.record["peak_memory_bytes"]


def test_a_model_that_cannot_run_without_numbers_is_predicted_from_its_widths(tmp_path, recipe, monkeypatch):
    plan = make_plan(recipe, str(save_tiny(tmp_path / "source")))
    seen = walk_memory(plan, Limits("1TB"))

    def fails(*args):
        raise RuntimeError("data dependent")

    monkeypatch.setattr(memory, "capture_calls", fails)
    guessed = walk_memory(plan, Limits("1TB"))
    assert 0.3 < guessed.host["suspended forwards"] / seen.host["suspended forwards"] < 3
    assert torch.isfinite(torch.tensor(float(guessed.peak)))


def test_tuning_under_a_budget_changes_no_byte(tmp_path):
    recipe = parse_recipe(
        RECIPE.format(text=tiny_text(tmp_path / "text.txt"), descent=0)
        + "  - tune: {epochs: 2, learning_rate: 0.02, batch_size: 2, holdout: 0.25}\n"
    )
    source = save_tiny(tmp_path / "source")
    apply(recipe, str(source), tmp_path / "all", quiet=True)
    least = walk_memory(make_plan(recipe, str(source)), Limits()).least
    apply(recipe, str(source), tmp_path / "least", quiet=True, limits=Limits(str(least)))
    assert files(tmp_path / "least") == files(tmp_path / "all")


def test_on_a_gpu_hidden_states_lie_there_or_on_the_host(tmp_path, recipe, monkeypatch):
    """What is decided and counted; no GPU runs here."""
    plan = make_plan(recipe, str(save_tiny(tmp_path / "source")))
    monkeypatch.setattr(memory, "device", lambda: "cuda:0")
    monkeypatch.setattr(machine, "gpu_budget", lambda asked: int(asked))
    roomy = walk_memory(plan, Limits("1TB", "1000000000"))
    assert roomy.place == "cuda:0" and roomy.gpu["hidden states"] == STATES and roomy.room is None and not roomy.spills
    assert "hidden states" not in roomy.host
    tight = walk_memory(plan, Limits("1TB", str(roomy.least_gpu)))
    assert tight.place == "cpu" and tight.host["hidden states"] == STATES and tight.room == 0
    assert "hidden states" not in tight.gpu and not tight.spills and tight.problem() is None
    small = walk_memory(plan, Limits(str(tight.least), str(roomy.least_gpu)))
    assert small.spills and small.disk["hidden states"] == STATES
    problem = walk_memory(plan, Limits("1TB", "1000")).problem()
    assert problem is not None and "--gpu-memory 0.1GB is the least" in problem


def test_what_is_no_size_is_refused_before_anything_is_read(tmp_path, recipe):
    with pytest.raises(SparsifyError, match="--memory 12 apples"):
        apply(recipe, str(save_tiny(tmp_path / "source")), tmp_path / "out", quiet=True, limits=Limits("12 apples"))
    assert not (tmp_path / "out.partial").exists()
