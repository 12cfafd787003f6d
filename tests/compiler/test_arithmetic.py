"""The type of products and the order of sums belong to a run: whoever goes on with it computes as it was begun."""

import json

import pytest
import torch
from safetensors.torch import load_file

import sparsify.compiler.apply as run
import sparsify.compiler.run as running
from sparsify.compiler.apply import apply
from sparsify.compiler.arithmetic import RECORD
from sparsify.compiler.planning import make_plan
from sparsify.errors import CheckpointError
from sparsify.formats.writer import partial_directory
from sparsify.processor import available_levels
from sparsify.recipe import parse_recipe
from tests.helpers.tiny import save_tiny, tiny_text

SOLVED = """
version: 1
calibration: {{source: "{text}", samples: 8, sequence_length: 32}}
solver: {{error_propagation: 0.5}}
passes:
  - prune: {{method: sparsegpt}}
  - quantize: {{method: gptq, bits: 4, group_size: 32, activation_order: true}}
export: {{head: {{bits: 4, group_size: 32}}}}
"""
TUNED = SOLVED.replace("export", "  - tune: {{epochs: 2, learning_rate: 0.02, batch_size: 2, holdout: 0.25}}\nexport")
DISTILLED = SOLVED.replace(
    "export",
    "  - distill: {{tokens: 256, samples: 8, sequence_length: 32, batch_size: 4, loss: {{kl: 0}}}}\nexport",
)
SHORTENED = """
version: 1
calibration: {{source: "{text}", samples: 8, sequence_length: 32}}
passes:
  - prune: {{method: sparsegpt}}
  - depth: {{method: angular, drop: 1}}
"""
OLDER = "avx2" if "avx2" in available_levels() else "portable"  # a level that every processor of its kind has


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "source", "llama", torch.bfloat16)


@pytest.fixture
def recipe(tmp_path):
    text = tiny_text(tmp_path / "text.txt")
    return lambda asked, own=False: parse_recipe(asked.format(text="self" if own else f"file:{text}"))


@pytest.fixture
def environment(monkeypatch):
    """Set the two variables, or unset them."""

    def put(computed=None, level=None):
        for name, value in (("SPARSIFY_COMPUTE", computed), ("SPARSIFY_CPU_LEVEL", level)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)

    put()
    return put


@pytest.fixture
def interrupted(monkeypatch):
    """Run `apply` until it is about to write a part."""

    def begin(recipe, source, output, part="block-0001"):
        class Killed(BaseException):
            pass

        write = run.CheckpointWriter.write_part

        def killed(self, name, linears, tensors):
            if name == part and self.output == output:
                raise Killed
            write(self, name, linears, tensors)

        with monkeypatch.context() as patch:
            patch.setattr(run.CheckpointWriter, "write_part", killed)
            with pytest.raises(Killed):
                apply(recipe, str(source), output, quiet=True)

    return begin


def tensor_files(directory):
    return {file.name: file.read_bytes() for file in sorted(directory.glob("*.safetensors"))}


def same_run(one, other):
    assert tensor_files(one) == tensor_files(other)
    assert (one / "metrics.json").read_bytes() == (other / "metrics.json").read_bytes()


@pytest.mark.parametrize("asked", [SOLVED, TUNED], ids=["solved", "tuned"])
@pytest.mark.parametrize("computed", ["bfloat16", "float32"])
@pytest.mark.parametrize("begun, resumed", [(None, OLDER), (OLDER, None)], ids=["natively first", "natively then"])
def test_another_level_goes_on_to_the_same_bytes(
    tmp_path, source, recipe, environment, interrupted, asked, computed, begun, resumed
):
    environment(computed, begun)
    apply(recipe(asked), str(source), tmp_path / "whole", quiet=True)
    interrupted(recipe(asked), source, tmp_path / "out")
    record = json.loads((partial_directory(tmp_path / "out") / RECORD).read_text())
    assert record["dtype"] == computed and record["order"]
    environment(None, resumed)
    result = apply(recipe(asked), str(source), tmp_path / "out", resume=True, quiet=True)
    assert result.record["compute"] == record and result.record["resumed_after_blocks"] == 1
    same_run(tmp_path / "whole", tmp_path / "out")


def test_the_type_decides_bits(tmp_path, source, recipe, environment):
    """Or the tests above would show nothing."""
    for computed in ("bfloat16", "float32"):
        environment(computed)
        apply(recipe(SOLVED), str(source), tmp_path / computed, quiet=True)
    assert tensor_files(tmp_path / "bfloat16") != tensor_files(tmp_path / "float32")


@pytest.mark.parametrize("part", ["block-0000", "outside"])
def test_text_that_the_model_wrote_is_that_of_the_first_process(
    tmp_path, source, recipe, environment, interrupted, part, monkeypatch
):
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    environment("float32")
    apply(recipe(SOLVED, own=True), str(source), tmp_path / "whole", quiet=True)
    interrupted(recipe(SOLVED, own=True), source, tmp_path / "out", part)
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "another"))
    environment("bfloat16")
    apply(recipe(SOLVED, own=True), str(source), tmp_path / "out", resume=True, quiet=True)
    same_run(tmp_path / "whole", tmp_path / "out")


def test_what_a_model_writes_in_another_type_is_another_text(tmp_path, source, recipe, environment, monkeypatch):
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    for count, computed in enumerate(("bfloat16", "float32"), 1):
        environment(computed)
        apply(recipe(SOLVED, own=True), str(source), tmp_path / computed, quiet=True)
        assert len(list((tmp_path / "cache" / "calibration").iterdir())) == count


@pytest.mark.parametrize("computed", ["bfloat16", "float32"])
def test_training_passes_and_runs_inside_compute_alike(tmp_path, source, recipe, environment, monkeypatch, computed):
    """`precision: auto` is the type of the run, and the part before a depth pass has the record of the whole."""
    other = {"bfloat16": "float32", "float32": "bfloat16"}[computed]
    environment(computed)

    class Killed(BaseException):
        pass

    def killed(*arguments, **settings):
        raise Killed

    for module, name, asked in ((running, "train_stage", DISTILLED), (run, "shorten", SHORTENED)):
        output = tmp_path / name
        environment(computed)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, name, killed)
            apply(recipe(asked), str(source), output, quiet=True)
        environment(other)
        result = apply(recipe(asked), str(source), output, resume=True, quiet=True)
        assert result.record["compute"]["dtype"] == computed
        assert result.metrics["calibration"]["computed_in"] == computed
        assert [training["precision"] for training in result.metrics["training"]] in ([], [computed])
        if name == "shorten":
            continue
        environment(computed)
        apply(recipe(asked), str(source), tmp_path / f"{name}-whole", quiet=True)
        same_run(tmp_path / f"{name}-whole", output)


def test_a_resumed_run_says_what_it_goes_on_in(tmp_path, source, recipe, environment, interrupted, capsys):
    environment("float32")
    interrupted(recipe(SOLVED), source, tmp_path / "out")
    lines = []
    for computed in ("float32", "bfloat16"):
        environment(computed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "_carry_out", lambda *arguments, **named: None)
            apply(recipe(SOLVED), str(source), tmp_path / "out", resume=True)
        lines += capsys.readouterr().err.splitlines()
    assert lines == [
        "goes on in float32, in which this run was begun",
        "goes on in float32, in which this run was begun; SPARSIFY_COMPUTE=bfloat16 counts for new runs only",
    ]
    environment("bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_carry_out", lambda *arguments, **named: None)
        apply(recipe(SOLVED), str(source), tmp_path / "new")
    assert capsys.readouterr().err.splitlines() == ["computes in bfloat16: SPARSIFY_COMPUTE asks for it"]


def test_a_run_without_a_record_is_not_guessed_at(tmp_path, source, recipe, interrupted, environment):
    interrupted(recipe(SOLVED), source, tmp_path / "out")
    record = partial_directory(tmp_path / "out") / RECORD
    record.write_text('{"dtype": "float8", "why": "", "order": null}')
    with pytest.raises(CheckpointError, match="does not say what the run computes in"):
        apply(recipe(SOLVED), str(source), tmp_path / "out", resume=True, quiet=True)
    record.unlink()
    with pytest.raises(CheckpointError, match="did not record what it computed in"):
        apply(recipe(SOLVED), str(source), tmp_path / "out", resume=True, quiet=True)


@pytest.mark.parametrize("asked", [SOLVED, TUNED], ids=["solved", "tuned"])
def test_what_is_stored_does_not_depend_on_the_type(tmp_path, source, recipe, environment, asked):
    """Norms and embeddings come out as they went in, scales in the type of the checkpoint, whatever computed them."""
    environment("float32")
    apply(recipe(asked), str(source), tmp_path / "out", quiet=True)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    kept = set(before) & set(after)
    assert {name for name in kept if "norm" in name}
    for name in kept:
        assert after[name].dtype == before[name].dtype == torch.bfloat16
        if asked == SOLVED or not name.startswith("model.layers"):
            assert torch.equal(after[name].view(torch.int16), before[name].view(torch.int16)), name
    assert {t.dtype for name, t in after.items() if name.endswith("weight_scale")} == {torch.bfloat16}


def test_the_plan_says_what_it_will_compute_in(source, recipe, environment):
    environment("float32")
    plan = make_plan(recipe(SOLVED), str(source))
    assert plan.model.dtype == torch.float32 and plan.to_json()["compute"]["dtype"] == "float32"
    assert "computes in float32: SPARSIFY_COMPUTE asks for it" in str(plan.table().caption)
    narrow = plan.estimate().memory_bytes
    environment("bfloat16")
    wide = make_plan(recipe(SOLVED), str(source)).estimate().memory_bytes
    assert wide < narrow < 2 * wide
