"""Distillation and fine-tuning through `apply`, on tiny models: what is trained is what is written, and what a kill leaves."""

import importlib.util
import json
import shutil
import sys
import types

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsify.compiler.calibrate as calibrate
import sparsify.compiler.run_training as training
import sparsify.training.checkpoints as checkpoints
import sparsify.training.loss_monitor as watch
import sparsify.training.trainer as trainer
from sparsify.compiler.apply import apply
from sparsify.compiler.planning import make_plan
from sparsify.errors import (
    CalibrationError,
    CheckpointError,
    MissingDependency,
    NumericalError,
    RecipeError,
    SparsifyError,
)
from sparsify.formats.reader import open_compressed
from sparsify.formats.writer import CheckpointWriter
from sparsify.model.linear import is_two_four
from sparsify.recipe import load_recipe, parse_recipe, ready_recipes
from sparsify.training.qat_linear import kept_positions
from tests.helpers.students import Killed, bytes_of, noted_students
from tests.helpers.tiny import save_tiny, tiny_text

COMMON = "sequence_length: 16, batch_size: 4, precision: float32, learning_rate: 0.02, scale_learning_rate: 0.005"
DISTILL = f"distill: {{{{tokens: {{tokens}}, samples: 40, {COMMON}{{more}}}}}}"
COMPRESS = """
  - prune: {method: sparsegpt}
  - quantize: {method: gptq, bits: 4, group_size: 32}"""
CHAT = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def text(tmp_path):
    return tiny_text(tmp_path / "text.txt", 2000)


@pytest.fixture
def source(tmp_path):
    return save_tiny(tmp_path / "source", dtype=torch.bfloat16)


@pytest.fixture
def recipe(text):
    def make(tokens=640, more="", passes=COMPRESS, format="sparse24", *overrides):
        head = f'version: 1\ncalibration: {{source: "file:{text}", samples: 8, sequence_length: 32}}\nexport: {{format: {format}}}\n'
        return parse_recipe(
            f"{head}passes:{passes}\n  - {DISTILL.format(tokens=tokens, more=more)}\n", "r.yaml", overrides
        )

    return make


@pytest.fixture(scope="module")
def compressed_once(tmp_path_factory):
    """A tiny model, compressed and not trained."""
    place = tmp_path_factory.mktemp("compressed")
    source, text = save_tiny(place / "source", dtype=torch.bfloat16), tiny_text(place / "text.txt", 2000)
    head = f'version: 1\ncalibration: {{source: "file:{text}", samples: 8, sequence_length: 32}}\npasses:{COMPRESS}\n'
    apply(parse_recipe(head), str(source), place / "compressed", quiet=True)
    return place / "compressed"


@pytest.fixture
def compressed(compressed_once, source, tmp_path):
    """A copy of it, of a model equal to `source`."""
    shutil.copytree(compressed_once, tmp_path / "compressed")
    return tmp_path / "compressed"


@pytest.fixture
def students(monkeypatch):
    """The students of all training passes, to look at afterwards."""
    return noted_students(monkeypatch)


def as_written(directory, tmp_path):
    """The model of a compressed directory in float32, every weight as its codes and scales multiply out."""
    opened = open_compressed(directory)
    state = {name: opened.tensor(name) for name in opened.other_names()}
    for module in opened.modules:
        linear = opened.linear(module)
        state[f"{module}.weight"] = linear.dense(torch.float32)
        state |= {f"{module}.bias": linear.bias} if linear.bias is not None else {}
    plain = tmp_path / "as-written"
    shutil.copytree(directory, plain)
    config = json.loads((plain / "config.json").read_text())
    config.pop("quantization_config")
    (plain / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.float().contiguous() for name, tensor in state.items()},
        plain / "model.safetensors",
        {"format": "pt"},
    )
    return AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox"])
def test_what_was_trained_is_what_is_written(tmp_path, recipe, text, students, family):
    source = save_tiny(tmp_path / "source", family, dtype=torch.bfloat16)
    plain = recipe(1280, "", COMPRESS, "sparse24", "passes.distill.learning_rate=0.01")
    apply(plain.model_copy(update={"passes": plain.passes[:2]}), str(source), tmp_path / "before", quiet=True)
    result = apply(plain, str(source), tmp_path / "out", quiet=True)
    (note,) = result.metrics["training"]
    assert note["steps"] == 20 and note["tokens"] == 1280 and note["last"]["loss"] < note["first"]["loss"]
    before, after = open_compressed(tmp_path / "before"), open_compressed(tmp_path / "out")
    moved = 0
    for module in before.modules:
        old, new = before.linear(module), after.linear(module)
        assert is_two_four(new.codes) and (new.codes[~kept_positions(old)] == 0).all()
        moved += int(not torch.equal(old.codes, new.codes))
    assert moved > len(before.modules) / 4
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trained = students[-1].model(ids, use_cache=False).logits
        assert torch.equal(as_written(tmp_path / "out", tmp_path)(ids, use_cache=False).logits, trained)
        assert not torch.equal(as_written(tmp_path / "before", tmp_path / "out")(ids, use_cache=False).logits, trained)


def test_the_dense_format_holds_the_trained_weights_rounded_once(tmp_path, recipe, source, students):
    apply(recipe(format="dense"), str(source), tmp_path / "out", quiet=True)
    state = load_file(tmp_path / "out" / "model.safetensors")
    for name, linear in students[-1].model.named_modules():
        if name.endswith("_proj"):
            assert torch.equal(state[f"{name}.weight"], linear.effective().to(torch.bfloat16))


def test_notes_and_model_card_tell_of_the_training(tmp_path, recipe, source):
    result = apply(recipe(), str(source), tmp_path / "out", quiet=True)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    (note,) = metrics["training"]
    assert note["kind"] == "distill" and note["teacher"] == str(source) and note["rows"] == 40
    assert set(note["last"]) == {"loss", "squarehead", "kl", "cross_entropy"} and len(note["curve"]) == 10
    assert "10 steps, 640 tokens of 40 rows" in (tmp_path / "out" / "README.md").read_text()
    layers = {layer["module"]: layer for layer in metrics["layers"]}
    opened = open_compressed(tmp_path / "out")
    for module, layer in layers.items():
        assert layer["relative_error"] > 0  # of the walk, before training
        assert layer["sparsity"] == pytest.approx(float((opened.linear(module).codes == 0).float().mean()), abs=1e-6)
    assert "seconds" not in note and result.record["training_seconds"] > 0


@pytest.mark.parametrize("more", ["", ", micro_batch_size: 2", ", micro_batch_size: 1, gradient_checkpointing: true"])
def test_micro_batches_train_the_same_model(tmp_path, recipe, source, more):
    """Up to rounding: SquareHead is a ratio within a micro-batch, so it is left out here."""
    weights = ", loss: {squarehead: 0, kl: 1, cross_entropy: 0.5}"
    apply(recipe(192, weights), str(source), tmp_path / "one", quiet=True)
    apply(recipe(192, weights + more), str(source), tmp_path / "two", quiet=True)
    one, two = open_compressed(tmp_path / "one"), open_compressed(tmp_path / "two")
    for module in one.modules:
        a, b = one.linear(module).dense(torch.float32), two.linear(module).dense(torch.float32)
        assert ((a - b).abs() > 1e-3).float().mean() < 0.01


@pytest.mark.parametrize(
    "where",
    ["step 4", "step 5", "8 bits, step 5", "while saving", "after training", "while rewriting", "before the end"],
)
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, recipe, text, source, monkeypatch, where):
    optimizer = ", optimizer: adamw_8bit" if "8 bits" in where else ""
    asked = recipe(640, ", micro_batch_size: 2, save_every: 3" + optimizer)
    apply(asked, str(source), tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        if "step" in where:
            end = trainer.DistillTrainer._end_of_step

            def stop(self):
                end(self)
                if len(self.watch.losses) == int(where[-1]) + 1:
                    raise Killed

            patch.setattr(trainer.DistillTrainer, "_end_of_step", stop)
        elif where == "while saving":

            def die(aside, final):
                if final.name == "checkpoint-6":
                    raise Killed
                publish(aside, final)

            publish = trainer.publish
            patch.setattr(trainer, "publish", die)
        elif where == "after training":
            patch.setattr(training, "rewrite", lambda *args: (_ for _ in ()).throw(Killed))
        elif where == "while rewriting":
            write = CheckpointWriter._write

            def die(self, directory, part, linears, tensors):
                if directory.name.startswith(".parts-1") and part == "block-0001":
                    raise Killed
                write(self, directory, part, linears, tensors)

            patch.setattr(CheckpointWriter, "_write", die)
        else:
            patch.setattr(CheckpointWriter, "finish", lambda *args, **kwargs: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            apply(asked, str(source), tmp_path / "again", quiet=True)
    assert not (tmp_path / "again").exists()
    found = [d.name for d in checkpoints.checkpoints(tmp_path / "again.partial" / "training-1")]
    expected = {"step 4": ["checkpoint-3"], "step 5": ["checkpoint-3"], "while saving": ["checkpoint-3"]}
    assert found == expected.get(where.removeprefix("8 bits, "), ["checkpoint-9", "checkpoint-10"])
    text.unlink()  # a resumed run has its text already
    with monkeypatch.context() as patch:
        if where in ("after training", "while rewriting", "before the end"):
            patch.setattr(trainer.DistillTrainer, "compute_loss", None)  # nothing is left to train
        apply(asked, str(source), tmp_path / "again", resume=True, quiet=True)
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "again")
    assert not (tmp_path / "again.partial").exists()


def test_a_diverging_training_stops_and_goes_on_from_its_last_good_state(tmp_path, recipe, source, monkeypatch):
    asked = recipe(640, ", save_every: 2")
    compute = trainer.DistillTrainer.compute_loss

    def nan(self, model, inputs, *args, **kwargs):
        loss = compute(self, model, inputs, *args, **kwargs)
        if self.state.global_step == 5:
            self._sums["loss"] = self._sums["loss"] * float("nan")
        return loss

    monkeypatch.setattr(trainer.DistillTrainer, "compute_loss", nan)
    with pytest.raises(NumericalError) as caught:
        apply(asked, str(source), tmp_path / "out", quiet=True)
    monkeypatch.setattr(trainer.DistillTrainer, "compute_loss", compute)
    kept = tmp_path / "out.partial" / "training-1" / "checkpoint-4"
    message = str(caught.value)
    assert "diverged at step 6 of 10: the loss is nan" in message and str(kept) in message and kept.is_dir()
    assert "--set passes.distill.learning_rate=0.007" in message and not (tmp_path / "out").exists()
    assert all(torch.isfinite(tensor).all() for tensor in load_file(kept / checkpoints.PARAMETERS).values())
    with pytest.raises(CheckpointError, match="another recipe"):  # anything else would be another training
        apply(recipe(640, ", save_every: 2, seed: 1"), str(source), tmp_path / "out", resume=True, quiet=True)
    lower = recipe(640, ", save_every: 2", COMPRESS, "sparse24", "passes.distill.learning_rate=0.007")
    rates = []
    create = trainer.DistillTrainer._load_optimizer_and_scheduler

    def note(self, checkpoint):
        create(self, checkpoint)
        rates.append(
            [group["initial_lr"] / group["size"] for group in self.optimizer.param_groups if group["kind"] == "weights"]
        )

    monkeypatch.setattr(trainer.DistillTrainer, "_load_optimizer_and_scheduler", note)
    result = apply(lower, str(source), tmp_path / "out", resume=True, quiet=True)
    assert result.metrics["training"][0]["steps"] == 10
    assert rates[0] == pytest.approx([0.007] * 21)


def test_a_rising_loss_is_divergence(tmp_path, recipe, source, monkeypatch):
    monkeypatch.setattr(watch, "RISE", 1.02)
    monkeypatch.setattr(watch, "GOOD", 1.01)
    text = ", warmup: 0, schedule: constant, save_every: 1"
    asked = recipe(6400, text, COMPRESS, "sparse24", "passes.distill.learning_rate=1.0")
    with pytest.raises(
        NumericalError, match=r"the smoothed loss rose from .* to .*; the state after step \d+ is kept in"
    ):
        apply(asked, str(source), tmp_path / "out", quiet=True)
    kept = checkpoints.last_checkpoint(tmp_path / "out.partial" / "training-1")
    saved = watch.LossWatch.from_json(json.loads((kept / checkpoints.WATCH).read_text()))
    assert saved.good and len(saved.losses) == checkpoints.step_of(kept)


def test_the_progress_bar_says_what_fits():
    settings = parse_recipe("version: 1\npasses:\n  - prune: {method: magnitude}\n  - distill: {tokens: 1M}\n")
    seen = watch.LossWatch()
    assert trainer.describe(settings.training[0], seen) == "distill"
    seen.add({"loss": 1.5, "squarehead": 0.25, "cross_entropy": 3.0, "kl": 1.25})
    assert trainer.describe(settings.training[0], seen, 80) == "distill: loss 1.5"
    assert trainer.describe(settings.training[0], seen, 160) == "distill: loss 1.5 (squarehead 0.25, kl 1.25)"


def test_the_rule_of_divergence():
    def run(losses):
        seen = watch.LossWatch()
        return next((i for i, loss in enumerate(losses) if seen.add({"loss": loss}) is not None), None), seen

    assert run([1.0] * 100)[0] is None and run([1.0, 1.6] * 50)[0] is None  # batches differ
    assert run([1.0] * 30 + [1.4] * 100)[0] is None
    step, seen = run([1.0] * 30 + [2.0] * 100)
    assert 30 < step < 45 and not seen.good and seen.start == 1.0
    assert run([3.0] * 15 + [9.0] * 2 + [2.0] * 50)[0] is None  # a short spike, back below
    assert run([1.0, float("inf")])[0] == 1 and run([float("nan")])[0] == 0
    again = watch.LossWatch.from_json(json.loads(json.dumps(seen.to_json())))
    assert again == seen and len(seen.summary()["curve"]) <= watch.POINTS
    summary = run([4.0] * 10 + [3.0] * 10 + [2.0] * 10 + [1.0] * 370)[1].summary()
    assert summary["first"] == {"loss": 4.0} and summary["last"] == {"loss": 1.0} and len(summary["curve"]) == 100


def test_a_mask_that_changed_is_noticed_before_anything_is_saved(tmp_path, recipe, source, monkeypatch):
    end = trainer.DistillTrainer._end_of_step

    def flip(self):
        end(self)
        bits = self.linears["model.layers.1.mlp.up_proj"].mask_bits
        bits[0, 0] ^= 0b1111

    monkeypatch.setattr(trainer.DistillTrainer, "_end_of_step", flip)
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj: its mask changed"):
        apply(recipe(), str(source), tmp_path / "out", quiet=True)
    assert not checkpoints.checkpoints(tmp_path / "out.partial" / "training-1")


def test_teachers_that_cannot_teach_are_refused_before_the_walk(tmp_path, recipe, source, compressed, monkeypatch):
    monkeypatch.setattr(calibrate, "Walk", None)
    save_tiny(tmp_path / "larger", vocab_size=112)
    save_tiny(tmp_path / "deeper", num_hidden_layers=4)
    save_tiny(tmp_path / "foreign")
    foreign = json.loads((tmp_path / "foreign" / "tokenizer.json").read_text())
    words = foreign["model"]["vocab"]
    words["!"], words['"'] = words['"'], words["!"]
    (tmp_path / "foreign" / "tokenizer.json").write_text(json.dumps(foreign))
    for teacher, words in (
        ("larger", "vocabulary of 112 tokens and the student one of 96"),
        ("deeper", "blocks: 4 and the student 3.*loss.squarehead: 0"),
        ("foreign", "another vocabulary"),
    ):
        with pytest.raises(CheckpointError, match=words):
            apply(recipe(640, f", teacher: {tmp_path / teacher}"), str(source), tmp_path / "out", quiet=True)
    more = f", teacher: {tmp_path / 'deeper'}, loss: {{squarehead: 0}}"
    assert make_plan(recipe(640, more), str(source)).training[0].teacher.spec == str(tmp_path / "deeper")
    said = make_plan(recipe(640, f", teacher: {tmp_path / 'compressed'}"), str(source)).training[0].describe()
    assert said.endswith(f"teacher {tmp_path / 'compressed'} (dequantized: sparse24, 4-bit 2:4)")


def test_too_little_text_is_told_in_the_words_of_the_pass(tmp_path, recipe, source):
    asked = recipe(640, "", COMPRESS, "sparse24", "passes.distill.samples=9999")
    with pytest.raises(CalibrationError, match=r"lower passes\.distill\.samples to 125"):
        apply(asked, str(source), tmp_path / "out", quiet=True)


def test_cached_logits_teach_like_the_teacher(tmp_path, recipe, source, monkeypatch):
    weights = ", loss: {squarehead: 0, kl: 1}"
    online = apply(recipe(320, weights), str(source), tmp_path / "online", quiet=True)
    asked = recipe(320, f"{weights}, teacher_logits: cached, top_k: 96")  # all of them: nothing is lost but bfloat16
    cached = apply(asked, str(source), tmp_path / "cached", quiet=True)
    one, two = (result.metrics["training"][0]["last"]["kl"] for result in (online, cached))
    assert two == pytest.approx(one, rel=0.05)
    few = apply(recipe(320, f"{weights}, teacher_logits: cached, top_k: 8"), str(source), tmp_path / "few", quiet=True)
    assert few.metrics["training"][0]["last"]["kl"] < two

    teachers = []
    make = training.open_teacher
    monkeypatch.setattr(training, "open_teacher", lambda *args: teachers.append(make(*args)) or teachers[-1])
    with monkeypatch.context() as patch:
        patch.setattr(trainer.DistillTrainer, "compute_loss", lambda *args, **kwargs: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            apply(asked, str(source), tmp_path / "again", quiet=True)
    file = tmp_path / "again.partial" / "training-1" / "teacher" / "00000000.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert opened.get_slice("values").get_shape() == [40, 16, 96]
    stamp = file.stat().st_mtime_ns
    monkeypatch.setattr(training.Teacher, "forward", None)  # a resumed run does not ask the teacher again
    apply(asked, str(source), tmp_path / "again", resume=True, quiet=True)
    assert stamp and bytes_of(tmp_path / "again") == bytes_of(tmp_path / "cached")


def test_a_sixteen_bit_model_and_its_embedding_are_trained(tmp_path, recipe, students):
    source = save_tiny(tmp_path / "tied", dtype=torch.bfloat16, tie_word_embeddings=True)
    asked = recipe(320, ", train: [linears, embedding]", "\n  - prune: {method: magnitude}")
    apply(asked, str(source), tmp_path / "out", quiet=True)
    opened = open_compressed(tmp_path / "out")
    assert {scheme.bits for scheme in opened.modules.values()} == {16}
    before = load_file(source / "model.safetensors")
    assert all(is_two_four(opened.linear(module).values) for module in opened.modules)
    assert not torch.equal(opened.tensor("model.embed_tokens.weight"), before["model.embed_tokens.weight"])
    assert torch.equal(opened.tensor("model.norm.weight"), before["model.norm.weight"])
    import sparsify  # noqa: F401

    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        torch.testing.assert_close(written(ids).logits, students[-1].model(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_quantized_head_is_the_one_that_is_trained_through(tmp_path, recipe, students):
    source = save_tiny(tmp_path / "tied", dtype=torch.bfloat16, tie_word_embeddings=True)
    asked = recipe(320, "", COMPRESS, "sparse24", "export.head={bits: 8, group_size: 32}")
    apply(asked, str(source), tmp_path / "out", quiet=True)
    opened = open_compressed(tmp_path / "out")
    assert opened.modules["lm_head"].bits == 8
    assert torch.equal(students[-1].model.lm_head.weight, opened.linear("lm_head").dense(torch.float32))
    assert opened.config["tie_word_embeddings"] is False


# ---------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture
def talks(tmp_path, compressed):
    """Conversations in which the answer repeats the question's last letter three times; and a model that has a template."""
    for directory in (compressed, tmp_path / "source"):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(directory)
    file = tmp_path / "talks.jsonl"
    letters = "abcdefgh"
    lines = [
        {"messages": [{"role": "user", "content": a + b}, {"role": "assistant", "content": b * 3}]}
        for a in letters
        for b in letters
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def finetune(talks, more="", epochs=3):
    text = f'version: 1\npasses:\n  - finetune: {{data: "file:{talks}", epochs: {epochs}, {COMMON}{more}}}\n'
    return parse_recipe(text, "r.yaml")


def test_a_compressed_checkpoint_is_fine_tuned_on_conversations(tmp_path, compressed, talks):
    plan = make_plan(finetune(talks, epochs=8), str(compressed))
    assert not plan.schemes and plan.to_json()["training"][0]["kind"] == "finetune"
    result = apply(finetune(talks, epochs=8), str(compressed), tmp_path / "out", quiet=True)
    (note,) = result.metrics["training"]
    assert (
        note["steps"] == 128
        and note["rows"] == 64
        and note["last"]["cross_entropy"] < 0.5 * note["first"]["cross_entropy"]
    )
    before, after = open_compressed(compressed), open_compressed(tmp_path / "out")
    assert after.modules == before.modules
    for module in before.modules:
        assert (after.linear(module).codes[~kept_positions(before.linear(module))] == 0).all()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(before.tensor(name), after.tensor(name))
    assert len(result.metrics["layers"]) == 21 and result.metrics["layers"][0]["relative_error"] is None
    dense, walked = result.metrics["sizes"], json.loads((compressed / "metrics.json").read_text())["sizes"]
    assert dense == walked

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    import sparsify  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "ce"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert tokenizer.decode(model.generate(prompt, max_new_tokens=3, do_sample=False)[0, prompt.shape[1] :]) == "eee"


def test_a_killed_fine_tuning_resumes_to_the_same_bytes(tmp_path, compressed, talks, monkeypatch):
    asked = finetune(talks, ", micro_batch_size: 2", epochs=1)
    apply(asked, str(compressed), tmp_path / "whole", quiet=True)
    end = trainer.DistillTrainer._end_of_step

    def stop(self):
        end(self)
        if len(self.watch.losses) == 10:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(trainer.DistillTrainer, "_end_of_step", stop)
        with pytest.raises(Killed):
            apply(asked, str(compressed), tmp_path / "again", quiet=True)
    talks.unlink()
    apply(asked, str(compressed), tmp_path / "again", resume=True, quiet=True)
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "again")


def test_a_fine_tuned_sixteen_bit_model_can_be_quantized_inside_its_mask(tmp_path, recipe, source, talks, text):
    sparse = recipe(320, "", "\n  - prune: {method: sparsegpt}")
    apply(sparse.model_copy(update={"passes": sparse.passes[:1]}), str(source), tmp_path / "sparse", quiet=True)
    apply(finetune(talks), str(tmp_path / "sparse"), tmp_path / "tuned", quiet=True)
    from sparsify.compiler.convert import export

    export(tmp_path / "tuned", "dense", tmp_path / "tuned-dense", quiet=True)
    quantize = f"""
version: 1
calibration: {{source: "file:{text}", samples: 8, sequence_length: 32}}
passes:
  - prune: {{method: magnitude}}
  - quantize: {{method: gptq, bits: 4, group_size: 32}}
"""
    apply(parse_recipe(quantize), str(tmp_path / "tuned-dense"), tmp_path / "final", quiet=True)
    tuned, final = open_compressed(tmp_path / "tuned"), open_compressed(tmp_path / "final")
    for module in tuned.modules:
        assert (final.linear(module).codes[tuned.linear(module).values == 0] == 0).all()


def test_a_teacher_may_help_in_fine_tuning(tmp_path, source, compressed, talks):
    more = f", teacher: {source}, loss: {{squarehead: 1, kl: 1, cross_entropy: 1}}"
    result = apply(finetune(talks, more, epochs=1), str(compressed), tmp_path / "out", quiet=True)
    assert set(result.metrics["training"][0]["first"]) == {"loss", "squarehead", "kl", "cross_entropy"}


def test_fewer_conversations_than_a_step_are_refused(tmp_path, compressed, talks):
    with pytest.raises(CalibrationError, match="2 rows are less than one step of batch_size 4"):
        apply(finetune(talks, ", samples: 2", epochs=1), str(compressed), tmp_path / "out", quiet=True)


def test_a_recipe_that_only_trains_needs_a_compressed_model(tmp_path, source, talks):
    with pytest.raises(CheckpointError, match="holds no compressed linear, and this recipe only trains"):
        make_plan(finetune(talks), str(source))


# -------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", ["2of4-distill", "2of4-w4a16-distill", "sparse-finetune-gsm8k"])
def test_ready_recipes_load_and_plan(name, tmp_path, source, compressed):
    assert name in ready_recipes()
    recipe = load_recipe(name)
    model = source if recipe.compresses else compressed
    if recipe.compresses and recipe.quantize is not None:
        recipe = load_recipe(name, ["passes.quantize.group_size=32", "export.head=null"])
    plan = make_plan(recipe, str(model))
    assert plan.training and plan.training[0].describe() and recipe.training[0].kind in plan.training[0].describe()


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_computed(tmp_path, recipe, source, monkeypatch):
    monkeypatch.setattr(calibrate, "Walk", None)
    for name, module in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingDependency, match=rf"{name} in the recipe needs a package .*: pip install '.*'"):
            apply(recipe(128, f", {name}: x"), str(source), tmp_path / "out", quiet=True)


def test_trackers_get_every_value_that_is_logged(tmp_path, recipe, source, monkeypatch):
    """TensorBoard's file where the package is there, and what Weights & Biases is called with."""
    board = importlib.util.find_spec("tensorboard") is not None
    logged: list[tuple[int, dict]] = []
    ended: list[bool] = []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: ended.append(True)
    )
    begun: list[dict] = []
    wandb = types.ModuleType("wandb")
    wandb.Settings = lambda **settings: settings  # type: ignore[attr-defined]
    wandb.init = lambda **settings: begun.append(settings) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    more = ", wandb: sparse" + (f", tensorboard: {tmp_path / 'board'}" if board else "")
    apply(recipe(128, more), str(source), tmp_path / "out", quiet=True)
    assert begun[0]["project"] == "sparse" and begun[0]["mode"] == "offline"
    assert begun[0]["config"]["batch_size"] == 4 and ended == [True]
    lines = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and {"loss", "kl", "squarehead", "learning_rate", "gradient_norm"} <= lines[0].keys()
    wanted = [
        (line["step"], {f"train/{n}": v for n, v in line.items() if n not in ("step", "training")}) for line in lines
    ]
    assert logged == wanted
    if board:
        content = b"".join(file.read_bytes() for file in (tmp_path / "board").iterdir())
        assert all(name.encode() in content for name in wanted[0][1])


def test_a_tracker_that_cannot_start_is_one_sentence(tmp_path, recipe, source):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    with pytest.raises(SparsifyError, match="tensorboard in the recipe cannot be started: .*file"):
        apply(recipe(128, f", tensorboard: {tmp_path / 'file'}"), str(source), tmp_path / "out", quiet=True)


def test_a_recipe_says_no_to_a_training_that_cannot_be(recipe):
    with pytest.raises(RecipeError, match="32 tokens are less than one step of 4 x 16 = 64"):
        recipe(32)


def test_nothing_is_left_of_an_old_stage(tmp_path, source):
    writer = CheckpointWriter(tmp_path / "out", "sparse24", open_compressed(source).checkpoint)
    writer.write_part("a", {}, {"x": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="bug"), writer.next_stage():
        pass  # a stage that forgets a part
    with writer.next_stage() as write:
        write("a", {}, {"x": torch.ones(2)})
    assert writer.read_part("a")[1]["x"].tolist() == [1, 1] and writer.stage == 1
    again = CheckpointWriter(tmp_path / "out", "sparse24", open_compressed(source).checkpoint, resume=True)
    assert again.stage == 1 and again.read_part("a")[1]["x"].tolist() == [1, 1]
    shutil.rmtree(again.work)
