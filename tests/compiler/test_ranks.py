"""Runs that are begun and continued by different numbers of processes, processes that are killed, and processes that differ."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsify.training.checkpoints as checkpoints
import sparsify.training.trainer as trainer
from sparsify.compiler.apply import apply
from sparsify.compiler.calibrate import Walk
from sparsify.formats.reader import open_compressed
from sparsify.model.linear import is_two_four
from sparsify.recipe import parse_recipe
from tests.helpers.ranks import command, differing, in_ranks, noting_what_is_whole
from tests.helpers.students import Killed, bytes_of
from tests.helpers.tiny import save_tiny, tiny_text

STEPS = 20
WALK = """
version: 1
calibration: {{source: "file:{text}", samples: 8, sequence_length: 32}}
passes:
  - prune: {{method: sparsegpt}}
  - quantize: {{method: gptq, bits: 4, group_size: 32}}
"""
TUNE = WALK + "  - tune: {{epochs: 2, batch_size: 2, holdout: 0.25}}\n"
COMMON = (  # SquareHead is a ratio within a micro-batch, so that these must be the same ones
    'source: "file:{text}", tokens: 1280, samples: 40, sequence_length: 16, batch_size: 4, micro_batch_size: 2, precision: float32, '
    "teacher: {teacher}, save_every: 4, learning_rate: 0.004"
)
TRAIN = {
    "distill": "version: 1\npasses:\n  - distill: {{" + COMMON + "}}\n",
    "lora": "version: 1\npasses:\n  - lora: {{" + COMMON + ", rank: 4, offload: optimizer}}\n",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """source and compressed: models; a recipe file for the walk with tuning and one for each training"""
    folder = tmp_path_factory.mktemp("ranks")
    source, text = save_tiny(folder / "source", dtype=torch.bfloat16), tiny_text(folder / "text.txt", 2000)
    apply(parse_recipe(WALK.format(text=text)), str(source), folder / "compressed", quiet=True)
    for name, recipe in {"walk": TUNE, **TRAIN}.items():
        (folder / f"{name}.yaml").write_text(recipe.format(text=text, teacher=source))
    return folder


def model_of(place, name):
    return str(place / ("source" if name == "walk" else "compressed"))


def arguments(place, name, output, *more):
    return [
        "apply",
        str(place / f"{name}.yaml"),
        "--model",
        model_of(place, name),
        "--output",
        str(output),
        "-q",
        *more,
    ]


@pytest.fixture(scope="module")
def uninterrupted(place):
    """The outputs of one process, made once for each recipe."""
    made = {}

    def run(name):
        if name not in made:
            recipe = parse_recipe((place / f"{name}.yaml").read_text())
            made[name] = apply(recipe, model_of(place, name), place / f"{name}-whole", quiet=True).output
        return made[name]

    return run


def losses(output):
    (note,) = json.loads((output / "metrics.json").read_text())["training"]
    assert [step for step, _ in note["curve"]] == list(range(1, STEPS + 1))
    return torch.tensor([loss for _, loss in note["curve"]])


def same_training(one, two):
    """Sums over tokens in another order move a loss by no more than a thousandth, and few codes."""
    torch.testing.assert_close(losses(two), losses(one), rtol=0, atol=1e-3)
    logged = [json.loads(line) for line in (two / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(1, STEPS + 1))
    torch.testing.assert_close(torch.tensor([line["loss"] for line in logged]), losses(two), rtol=0, atol=1e-6)
    assert all(line["gradient_norm"] > 0 and line["learning_rate"] <= 0.004 for line in logged)
    one, two = open_compressed(one), open_compressed(two)
    assert one.modules == two.modules and one.modules
    for module in one.modules:
        a, b = one.linear(module).codes, two.linear(module).codes
        assert is_two_four(b) and (a == b).float().mean() > 0.98, module


def same_walk(one, two):
    """A weight that falls the other way moves what comes after it, so that it is the errors that are equal."""
    one, two = (json.loads((output / "metrics.json").read_text()) for output in (one, two))
    for a, b in zip(one["layers"], two["layers"], strict=True):
        assert b["relative_error"] == pytest.approx(a["relative_error"], rel=0.05), a["module"]
    for a, b in zip(one["tuning"], two["tuning"], strict=True):
        assert b["after"] == pytest.approx(a["after"], rel=0.05) and b["after"] < b["before"]


def interrupt(place, name, output, monkeypatch):
    """A run of one process that is killed where `command` kills one of two."""
    with monkeypatch.context() as patch:
        if name == "walk":
            visit = Walk.visit

            def visited(self, index, *args):
                if index == 1:
                    raise Killed
                return visit(self, index, *args)

            patch.setattr(Walk, "visit", visited)
        else:
            end = trainer.DistillTrainer._end_of_step

            def end_of_step(self):
                end(self)
                if len(self.watch.losses) == 10:
                    raise Killed

            patch.setattr(trainer.DistillTrainer, "_end_of_step", end_of_step)
        with pytest.raises(Killed):
            apply(parse_recipe((place / f"{name}.yaml").read_text()), model_of(place, name), output, quiet=True)


@pytest.mark.parametrize("name", ["walk", "distill", "lora"])
def test_a_run_goes_on_with_another_number_of_processes(place, uninterrupted, monkeypatch, name, tmp_path):
    """Begun by two, one of which is killed, and finished by one; begun by one and finished by two."""
    same = same_walk if name == "walk" else same_training
    fewer, more = tmp_path / "fewer", tmp_path / "more"
    ended = in_ranks(tmp_path, command, arguments(place, name, fewer), "block 1" if name == "walk" else "step 10")
    assert ended.codes == [1, -9], ended.said
    assert ended.said[0].startswith("error: another process of this run has ended"), ended.said[0]
    assert ended.said[0].count("\n") == 1 and "--resume" in ended.said[0] and not fewer.exists()
    work = tmp_path / "fewer.partial"
    if name != "walk":
        assert [d.name for d in checkpoints.checkpoints(work / "training-1")] == ["checkpoint-4", "checkpoint-8"]
    recipe = parse_recipe((place / f"{name}.yaml").read_text())
    apply(recipe, model_of(place, name), fewer, resume=True, quiet=True)
    same(uninterrupted(name), fewer)

    interrupt(place, name, more, monkeypatch)
    ended = in_ranks(tmp_path, command, arguments(place, name, more, "--resume"))
    assert ended.codes == [0, 0], ended.said
    same(uninterrupted(name), more)
    assert json.loads((more / "run.json").read_text())["processes"] == 2


def test_two_processes_train_as_one_does_and_never_hold_the_model(place, uninterrupted, tmp_path):
    """FSDP2 over gloo, 20 steps."""
    output, noted = tmp_path / "two", tmp_path / "whole-weights-"
    ended = in_ranks(tmp_path, noting_what_is_whole, arguments(place, "distill", output), str(noted))
    assert ended.codes == [0, 0], ended.said
    same_training(uninterrupted("distill"), output)
    opened = open_compressed(output)
    shapes = {module: scheme.shape[0] * scheme.shape[1] for module, scheme in opened.modules.items()}
    block = sum(size for module, size in shapes.items() if ".layers.0." in module)
    outside = 2 * opened.tensor("lm_head.weight").numel()
    for rank in (0, 1):
        most = int((tmp_path / f"whole-weights-{rank}").read_text())
        assert max(block, outside) <= most < 1.1 * max(block, outside) < sum(shapes.values())


def test_a_checkpoint_of_one_process_holds_the_state_by_name(place, monkeypatch, tmp_path):
    interrupt(place, "distill", tmp_path / "out", monkeypatch)
    kept = tmp_path / "out.partial" / "training-1" / "checkpoint-8"
    parameters, states = load_file(kept / checkpoints.PARAMETERS), load_file(kept / checkpoints.OPTIMIZER)
    assert states.keys() == {f"{name}.{kind}" for name in parameters for kind in ("exp_avg", "exp_avg_sq")}
    assert all(states[f"{name}.exp_avg_sq"].shape == tensor.shape for name, tensor in parameters.items())


def test_processes_that_differ_are_told_apart_before_anything_is_done(place, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(place / "source", other)
    state = load_file(other / "model.safetensors")
    state["model.norm.weight"][0] += 1
    save_file(state, other / "model.safetensors", {"format": "pt"})
    recipe = WALK.format(text=place / "text.txt")
    ended = in_ranks(tmp_path, differing, recipe, [str(place / "source"), str(other)], str(tmp_path / "out"))
    assert ended.codes == [0, 0], ended.said
    for said in ended.said:
        version, asked, file = [
            line for line in said.splitlines() if line.partition(":")[0] in ("version", "recipe", "file")
        ]
        assert (
            "process 1 on " in version and "has torch 1.0 and process 0 on" in version and torch.__version__ in version
        )
        assert "reads another recipe than process 0 on" in asked
        assert "reads another file model.safetensors of the model than process 0" in file
    assert not (tmp_path / "out").exists() and bytes_of(place / "source").keys()
