"""What training reads and what it keeps, through `apply` on tiny models: mixtures, held-out text, means of the last weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

import sparsify.training.trainer as trainer
from sparsify.compiler.apply import apply
from sparsify.compiler.planning import make_plan
from sparsify.errors import CalibrationError, CheckpointError, NumericalError, RecipeError
from sparsify.formats.reader import open_compressed
from sparsify.formats.writer import partial_directory
from sparsify.model.linear import is_two_four
from sparsify.recipe import parse_recipe
from sparsify.report import write_report
from sparsify.training.qat_linear import kept_positions
from tests.helpers.students import Killed, bytes_of, noted_students
from tests.helpers.tiny import save_tiny, tiny_text

COMMON = "sequence_length: 16, batch_size: 4, precision: float32, learning_rate: 0.02, scale_learning_rate: 0.005"


@pytest.fixture
def texts(tmp_path):
    """Three texts: of 125, 10 and 62 rows of 16 tokens."""
    return [
        tiny_text(tmp_path / f"{n}.txt", length, seed)
        for seed, (n, length) in enumerate(zip("abc", (2000, 160, 1000), strict=True))
    ]


@pytest.fixture
def source(tmp_path):
    return save_tiny(tmp_path / "source", dtype=torch.bfloat16)


@pytest.fixture
def recipe(texts):
    def make(more, tokens=640, kind="distill", head=""):
        return parse_recipe(
            f'version: 1\ncalibration: {{source: "file:{texts[0]}", samples: 8, sequence_length: 32}}\n{head}passes:\n'
            f"  - prune: {{method: magnitude}}\n  - quantize: {{method: rtn, bits: 4, group_size: 32}}\n"
            f"  - {kind}: {{tokens: {tokens}, {COMMON}{more}}}\n",
            "r.yaml",
        )

    return make


def mixture(texts, *weights):
    entries = (f'{{source: "file:{text}", weight: {weight}}}' for text, weight in zip(texts, weights, strict=False))
    return f", sources: [{', '.join(entries)}]"


# -------------------------------------------------------------------------------------------------------------- mixtures


def test_rows_are_drawn_by_weight_and_a_short_text_repeats(tmp_path, recipe, texts, source, monkeypatch, capsys):
    asked = recipe(
        mixture(texts, 3, 1), tokens=2560
    )  # 40 steps of 4 rows: 120 of the first, 40 of the second, which has 10
    said = f"distill: file:{texts[1]} holds 10 rows of 16 tokens and 40 are drawn of it, so each is seen 4 times"
    plan = make_plan(asked, str(source))
    assert f"of 75% file:{texts[0]} + 25% file:{texts[1]}" in plan.training[0].describe()
    assert said in plan.table().caption and plan.to_json()["repeated_text"] == [said]
    students = noted_students(monkeypatch)
    seen = []
    forward = trainer.DistillTrainer.compute_loss

    def note(self, model, inputs, *args, **kwargs):
        seen.extend(tuple(row.tolist()) for row in inputs["input_ids"])
        return forward(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.DistillTrainer, "compute_loss", note)
    result = apply(asked, str(source), tmp_path / "out")
    assert said in capsys.readouterr().err and students
    times = {row: seen.count(row) for row in seen}
    assert len(seen) == 160 and sorted(times.values()) == [1] * 120 + [4] * 10
    (note,) = result.metrics["training"]
    assert note["rows"] == 130 and note["tokens"] == 2560


def test_a_number_of_rows_is_what_it_says(tmp_path, recipe, texts, source):
    asked = recipe(mixture(texts, 1, 1) + ", samples: 20", tokens=2560)
    plan = make_plan(asked, str(source))
    assert "20 rows, each seen 8 times" in plan.training[0].describe() and plan.to_json()["repeated_text"] == []
    result = apply(asked, str(source), tmp_path / "out", quiet=True)
    assert result.metrics["training"][0]["rows"] == 20
    with pytest.raises(CalibrationError, match=r"b.txt holds 160 tokens.* 10 samples of 16, but 20 were asked for"):
        apply(recipe(mixture(texts, 1, 1) + ", samples: 40"), str(source), tmp_path / "more", quiet=True)


def test_a_short_file_is_refused_before_the_model_writes_its_share(tmp_path, recipe, texts, source, monkeypatch):
    def writer(*_):
        raise AssertionError("the model was loaded to write")

    monkeypatch.setattr("sparsify.compiler.training_text.open_writer", writer)
    monkeypatch.setattr("sparsify.compiler.calibrate.open_writer", writer)
    both = f'sources: [{{source: self, weight: 1}}, {{source: "file:{texts[1]}", weight: 1}}]'
    short = r"b.txt holds 160 tokens.* 10 samples of 16, but 20 were asked for"
    with pytest.raises(CalibrationError, match=short):
        apply(recipe(f", {both}, samples: 40"), str(source), tmp_path / "trained", quiet=True)
    assert not list(partial_directory(tmp_path / "trained").glob("**/*.safetensors"))  # nothing was compressed
    asked = parse_recipe(
        f"version: 1\ncalibration: {{{both}, samples: 40, sequence_length: 16}}\npasses: [prune: {{method: wanda}}]\n",
        "r",
    )
    with pytest.raises(CalibrationError, match=short):
        apply(asked, str(source), tmp_path / "solved", quiet=True)


def test_a_killed_training_on_a_mixture_resumes_to_the_same_bytes(tmp_path, recipe, texts, source, monkeypatch):
    asked = recipe(mixture(texts, 2, 1) + ", save_every: 3")
    apply(asked, str(source), tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            apply(asked, str(source), tmp_path / "again", quiet=True)
    for text in texts:
        text.unlink()
    apply(asked, str(source), tmp_path / "again", resume=True, quiet=True)
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "again")


def kill_at(patch, step):
    end = trainer.DistillTrainer._end_of_step

    def stop(self):
        end(self)
        if len(self.watch.losses) == step + 1:
            raise Killed

    patch.setattr(trainer.DistillTrainer, "_end_of_step", stop)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (', source: "file:x.txt", sources: [{source: self, weight: 1}]', "both source and sources"),
        (", sources: [{source: self, weight: 1}, {source: self, weight: 2}]", "here a second time"),
        (', sources: [{source: self, weight: 1000}, {source: "file:x.txt", weight: 1}]', "gets none of the 40 samples"),
        (", sources: []", "sources is empty"),
        (', source: "file:x.txt", held_out: {source: "file:x.txt"}', "held_out reads a text that distill trains on"),
        (", held_out: {samples: 4}", "held_out needs the key 'source'"),
        (", average: 1", "average must be less than 1"),
        (", loss: {kl: 0, squarehead: 0, reverse_kl: 0}", "none of kl, reverse_kl and squarehead counts"),
        (", mask_learning: {every: 3}", "mask_learning has no effect with masks: fixed"),
        (", masks: learned, train: [norms]", "masks of linears that are not trained"),
        (", masks: learned, average: 0.5", "a mean of weights of different masks is none"),
        (", masks: learned, mask_learning: {frozen: 0.99}", "masks stand still in all of the 10 steps"),
        (", masks: learnt", "masks must be fixed or learned"),
    ],
)
def test_what_cannot_be_read_or_kept_is_refused(recipe, more, words):
    with pytest.raises(RecipeError, match=words):
        recipe(more)


def test_held_out_text_is_neither_calibrated_into_training_nor_evaluated(recipe, texts):
    with pytest.raises(RecipeError, match="held_out reads a text that distill trains on"):  # what calibration reads
        recipe(f', held_out: {{source: "file:{texts[0]}"}}')
    with pytest.raises(RecipeError, match="evaluation reads the text that distill chooses its state by"):
        recipe(f', held_out: {{source: "file:{texts[1]}"}}', head=f'evaluation: {{text: "file:{texts[1]}"}}\n')
    assert recipe(f', held_out: {{source: "file:{texts[1]}"}}').learns_from(f"file:{texts[1]}")
    recipe(", source: self, held_out: {source: self}")  # other rows are written
    lora = ", loss: {kl: 0, squarehead: 0, cross_entropy: 1}, held_out: {source: self}"
    with pytest.raises(RecipeError, match="held_out measures the distance to a teacher"):
        parse_recipe(f"version: 1\npasses:\n  - lora: {{tokens: 640, sequence_length: 16, batch_size: 4{lora}}}\n")


# ------------------------------------------------------------------------------------------- the state that is written


def divergence(directory, source, text):
    """KL(dense || written) per token on rows of 16, by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import sparsify  # noqa: F401

    ids = torch.tensor(AutoTokenizer.from_pretrained(source)(text.read_text())["input_ids"])[: 16 * 4].view(4, 16)
    written, dense = (AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in (directory, source))
    with torch.no_grad():
        s, t = (m(ids, use_cache=False).logits[:, :-1].log_softmax(-1) for m in (written, dense))
    return float((t.exp() * (t - s)).sum(-1).mean())


@pytest.mark.parametrize(
    "more", ["", ", teacher_logits: cached, top_k: 96", ", quantize_in_loop: false", ", average: 0.5"]
)
def test_the_state_that_is_written_is_the_best_on_held_out_text(tmp_path, recipe, texts, source, more):
    held_out = f', loss: {{squarehead: 0}}, samples: 8, held_out: {{source: "file:{texts[2]}", samples: 4, every: 4, patience: 100}}'
    result = apply(recipe(held_out + more, tokens=1280), str(source), tmp_path / "out", quiet=True)
    note = result.metrics["training"][0]["held_out"]
    steps, found = zip(*note["curve"], strict=True)
    assert steps == (0, 4, 8, 12, 16, 20) and note["best"] == min(found) < found[0]
    assert note["best_step"] == steps[found.index(min(found))] and note["rows"] == 4 and not note["stopped"]
    assert divergence(tmp_path / "out", source, texts[2]) == pytest.approx(
        note["best"], rel=2e-2 if "cached" in more else 1e-3
    )
    assert f"the best on file:{texts[2]}" in (tmp_path / "out" / "README.md").read_text()


def test_training_stops_early_and_keeps_what_was_before_it(tmp_path, recipe, texts, source, monkeypatch):
    """At a rate that only harms, the model of before any training is the one that is written."""
    held_out = f', held_out: {{source: "file:{texts[2]}", samples: 4, every: 2, patience: 2}}, warmup: 0, save_every: 3'
    asked = recipe(held_out, tokens=1280)
    bad = asked.model_copy(
        update={"passes": [*asked.passes[:2], asked.training[0].model_copy(update={"learning_rate": 1.0})]}
    )
    monkeypatch.setattr("sparsify.training.loss_monitor.RISE", 1e9)
    monkeypatch.setattr("sparsify.training.loss_monitor.GOOD", 1e9)
    result = apply(bad, str(source), tmp_path / "out", quiet=True)
    (note,) = result.metrics["training"]
    assert note["steps"] == 4 and note["planned_steps"] == 20 and note["tokens"] == 256
    assert note["held_out"]["stopped"] and note["held_out"]["best_step"] == 0
    apply(asked.model_copy(update={"passes": asked.passes[:2]}), str(source), tmp_path / "plain", quiet=True)
    one, two = open_compressed(tmp_path / "out"), open_compressed(tmp_path / "plain")
    for module in two.modules:
        assert torch.equal(one.linear(module).codes, two.linear(module).codes)
    with monkeypatch.context() as patch:
        patch.setattr("sparsify.compiler.run_training.rewrite", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            apply(bad, str(source), tmp_path / "again", quiet=True)
    monkeypatch.setattr(
        trainer.DistillTrainer, "compute_loss", None
    )  # a resumed run does not go on where it had stopped
    apply(bad, str(source), tmp_path / "again", resume=True, quiet=True)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "again")
    write_report(tmp_path / "report.html", result.metrics)
    page = (tmp_path / "report.html").read_text()
    assert "the state of step 0; training stopped early" in page and "text that is not trained on" in page


@pytest.mark.parametrize("where", [3, 6, 9, 11, "rewrite"])
@pytest.mark.parametrize("kept", ["average: 0.4", "held_out", "average: 0.4, held_out"])
def test_means_and_best_states_resume_to_the_same_bytes(tmp_path, recipe, texts, source, monkeypatch, where, kept):
    """Killed before, at and after the first state of the mean and of a measurement, and when training has stopped early."""
    held_out = f'held_out: {{source: "file:{texts[2]}", samples: 4, every: 2, patience: 3}}, schedule: constant'
    asked = recipe(f", save_every: 3, {kept.replace('held_out', held_out)}", tokens=1280)
    whole = apply(asked, str(source), tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        if where == "rewrite":
            patch.setattr("sparsify.compiler.run_training.rewrite", lambda *args: (_ for _ in ()).throw(Killed))
        else:
            kill_at(patch, where)
        with pytest.raises(Killed):
            apply(asked, str(source), tmp_path / "again", quiet=True)
    apply(asked, str(source), tmp_path / "again", resume=True, quiet=True)
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "again")
    (note,) = whole.metrics["training"]
    assert note["averaged_steps"] == (max(0, note["steps"] - 12) if "average" in kept else 0)


def test_the_mean_of_the_last_weights_is_rounded_once(tmp_path, recipe, source, monkeypatch):
    students, states = noted_students(monkeypatch), []
    step = trainer._EndOfStep.on_step_end

    def note(self, args, state, control, **kwargs):
        states.append({n: p.detach().clone() for n, p in students[-1].named_parameters() if p.requires_grad})
        return step(self, args, state, control, **kwargs)

    monkeypatch.setattr(trainer._EndOfStep, "on_step_end", note)
    result = apply(recipe(", average: 0.3"), str(source), tmp_path / "out", quiet=True)
    assert result.metrics["training"][0]["averaged_steps"] == 3 and len(states) == 10
    for name, parameter in students[-1].named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter, torch.stack([s[name] for s in states[-3:]]).mean(0), rtol=1e-5, atol=1e-7
            )
    opened, model = open_compressed(tmp_path / "out"), students[-1].model
    for module in opened.modules:
        assert torch.equal(opened.linear(module).dense(torch.float32), model.get_submodule(module).effective())
    assert "mean of the weights of 3 steps" in (tmp_path / "out" / "README.md").read_text()
    assert (
        "mean of the weights of the last 30% of the steps"
        in make_plan(recipe(", average: 0.3"), str(source)).training[0].describe()
    )


def test_a_held_out_divergence_that_is_no_number_ends_the_run(tmp_path, recipe, texts, source, monkeypatch):
    monkeypatch.setattr(trainer, "measure", lambda *args: float("nan"))
    with pytest.raises(NumericalError, match=r"on held-out text is nan at step 0; is held_out\.source text"):
        apply(
            recipe(f', held_out: {{source: "file:{texts[2]}", samples: 4}}'), str(source), tmp_path / "out", quiet=True
        )


def test_too_little_held_out_text_is_told_before_compressing(tmp_path, recipe, texts, source):
    asked = recipe(f', held_out: {{source: "file:{texts[1]}", samples: 11}}')
    with pytest.raises(CalibrationError, match=r"lower passes\.distill\.held_out\.samples to 10"):
        apply(asked, str(source), tmp_path / "out", quiet=True)


def test_the_reverse_divergence_is_trained_and_written_down(tmp_path, recipe, source):
    weights = ", samples: 8, loss: {kl: 0.5, reverse_kl: 0.5, squarehead: 0}"
    result = apply(recipe(weights, tokens=1280), str(source), tmp_path / "out", quiet=True)
    first, last = (result.metrics["training"][0][key] for key in ("first", "last"))
    assert last["reverse_kl"] < first["reverse_kl"] and last["kl"] < first["kl"]
    assert last["loss"] == pytest.approx(0.5 * last["kl"] + 0.5 * last["reverse_kl"], rel=1e-4)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["training"][0]["held_out"] is None


def test_own_text_held_out_is_not_the_text_that_is_trained_on(tmp_path, recipe, source, monkeypatch):
    more = ", source: self, held_out: {source: self, samples: 4}"
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            apply(recipe(more), str(source), tmp_path / "out", quiet=True)
    folder = tmp_path / "out.partial" / "training-1"
    trained, measured = (
        load_file(folder / name)["tokens"].tolist() for name in ("rows.safetensors", "held-out.safetensors")
    )
    assert len(measured) == 4 and not any(row in trained for row in measured)


# ------------------------------------------------------------------------------------------------------- learned masks

LEARNED = ", masks: learned, mask_learning: {method: METHOD, every: 2, frozen: 0.4}"


@pytest.mark.parametrize("method", ["ast", "cast"])
@pytest.mark.parametrize("passes", ["4 bits", "16 bits"])
def test_learned_masks_move_and_what_is_written_is_two_of_four(tmp_path, recipe, source, monkeypatch, method, passes):
    asked = recipe(LEARNED.replace("METHOD", method), tokens=1280)
    kept = [step for step in asked.passes if passes == "4 bits" or step.kind != "quantize"]
    asked = asked.model_copy(update={"passes": kept})
    assert (
        f"masks learned ({method}, every 2 steps up to step 12)" in make_plan(asked, str(source)).training[0].describe()
    )
    students = noted_students(monkeypatch)
    result = apply(asked, str(source), tmp_path / "out", quiet=True)
    plain = asked.model_copy(update={"passes": kept[:-1]})
    apply(plain, str(source), tmp_path / "before", quiet=True)
    (note,) = result.metrics["training"]
    assert note["last"]["loss"] < note["first"]["loss"]
    before, after = open_compressed(tmp_path / "before"), open_compressed(tmp_path / "out")
    new = total = 0
    for module in before.modules:
        linear = after.linear(module)
        assert is_two_four(linear.unscaled())
        assert torch.equal(linear.dense(torch.float32), students[0].model.get_submodule(module).effective())
        one, two = kept_positions(before.linear(module)), students[0].model.get_submodule(module).mask
        new, total = new + int((two & ~one).sum()), total + int(two.sum())
    assert note["masks"] == {"method": method, "last_change": 12, "moved": pytest.approx(new / total, abs=1e-6)} and new
    assert "masks learned" in (tmp_path / "out" / "README.md").read_text()


def test_training_with_learned_masks_starts_from_the_compressed_model(tmp_path, recipe, texts, source):
    held_out = f', held_out: {{source: "file:{texts[2]}", samples: 4, every: 4, patience: 1}}'
    found = {}
    for more in ("", LEARNED.replace("METHOD", "ast"), LEARNED.replace("METHOD", "cast")):
        result = apply(recipe(held_out + more, tokens=1280), str(source), tmp_path / f"out{len(found)}", quiet=True)
        found[more] = result.metrics["training"][0]["held_out"]
    first = {note["curve"][0][1] for note in found.values()}
    assert len(first) == 1
    for note in list(found.values())[
        1:
    ]:  # whatever is measured while masks move, training goes on until they stand still
        assert [step for step, _ in note["curve"]][:4] == [0, 4, 8, 12]


@pytest.mark.parametrize("method", ["ast", "cast"])
@pytest.mark.parametrize("where", [1, 4, 8, 14, "rewrite"])
def test_learned_masks_resume_to_the_same_bytes(tmp_path, recipe, texts, source, monkeypatch, method, where):
    """Killed before the first choice, between choices, before and after masks stand still, and after training."""
    more = f', save_every: 3, average: 0.2, held_out: {{source: "file:{texts[2]}", samples: 4, every: 4}}'
    settings = LEARNED.replace("METHOD", method).replace("frozen: 0.4", "frozen: 0.4, input_norms: true")
    asked = recipe(settings + more, tokens=1280)
    whole = apply(asked, str(source), tmp_path / "whole", quiet=True)
    assert whole.metrics["training"][0]["masks"]["moved"] > 0 and whole.metrics["training"][0]["steps"] == 20
    with monkeypatch.context() as patch:
        if where == "rewrite":
            patch.setattr("sparsify.compiler.run_training.rewrite", lambda *args: (_ for _ in ()).throw(Killed))
        else:
            kill_at(patch, where)
        with pytest.raises(Killed):
            apply(asked, str(source), tmp_path / "again", quiet=True)
    apply(asked, str(source), tmp_path / "again", resume=True, quiet=True)
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "again")


def test_a_mask_that_moves_by_no_rule_is_noticed(tmp_path, recipe, source, monkeypatch):
    end = trainer.DistillTrainer._end_of_step

    def flip(self):
        end(self)
        if len(self.watch.losses) == 3:  # masks were chosen after step 2, and are after step 4
            bits = self.linears["model.layers.1.mlp.up_proj"].mask_bits
            bits[0, 0] ^= 0b1111

    monkeypatch.setattr(trainer.DistillTrainer, "_end_of_step", flip)
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj: its mask changed in training"):
        apply(recipe(LEARNED.replace("METHOD", "ast") + ", save_every: 3"), str(source), tmp_path / "out", quiet=True)


def test_masks_need_a_pass_or_a_model_that_has_some(tmp_path, recipe, texts, source):
    quantized = f"distill: {{tokens: 640, {COMMON}, masks: learned}}"
    head = f'version: 1\ncalibration: {{source: "file:{texts[0]}"}}\npasses:\n'
    with pytest.raises(RecipeError, match="masks: learned needs masks, and no pass prunes"):
        parse_recipe(f"{head}  - quantize: {{method: rtn, bits: 4, group_size: 32}}\n  - {quantized}\n")
    plain = parse_recipe(f"{head}  - quantize: {{method: rtn, bits: 4, group_size: 32}}\n")
    apply(plain, str(source), tmp_path / "dense4", quiet=True)
    alone = parse_recipe(f"{head}  - {quantized.replace('tokens', f'teacher: {source}, tokens')}\n")
    with pytest.raises(CheckpointError, match="no linear of the model is 2:4"):
        apply(alone, str(tmp_path / "dense4"), tmp_path / "out", quiet=True)
    with pytest.raises(RecipeError, match="masks has no effect with method lora"):
        parse_recipe(
            f"{head}  - lora: {{tokens: 640, sequence_length: 16, batch_size: 4, teacher: x, masks: learned}}\n"
        )


@pytest.mark.parametrize(
    ("more", "words"),
    [(", average: 0.5", "average"), (", held_out: {source: self}", "held_out"), (", masks: learned", "masks: learned")],
)
def test_what_needs_one_process_is_refused_in_several(recipe, source, monkeypatch, more, words):
    monkeypatch.setattr("sparsify.compiler.plan_training.processes", lambda: 2)
    with pytest.raises(CheckpointError, match=f"distill: {words} works in one process"):
        make_plan(recipe(more), str(source))
