"""A whole search on tiny random models: what is measured, chosen, written, resumed and refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sparsify  # noqa: F401  registers sparse24 with transformers
from sparsify.compiler.apply import apply
from sparsify.compiler.convert import export
from sparsify.compiler.planning import keep_zeros, make_plan
from sparsify.errors import CalibrationError, CheckpointError, RecipeError, SparsifyError
from sparsify.evaluation import score_logits
from sparsify.formats.inspect import inspect
from sparsify.formats.reader import open_compressed
from sparsify.model.decoder import open_blocks
from sparsify.recipe import Calibration, Head, ignored_by, load_recipe, parse_recipe
from sparsify.runtime.backends import ENVIRONMENT_VARIABLE
from sparsify.search import measure as measuring
from sparsify.search.budget import parse_budget
from sparsify.search.choices import CHOICES, DENSE, Choice, choice_named, units_of
from sparsify.search.held_out import HeldOut
from sparsify.search.overrides import recipe_with
from sparsify.search.run import Settings, search
from sparsify.search.speed import seconds_of
from sparsify.search.text import held_out_source
from sparsify.search.verify import linear_bytes
from sparsify.solver.hessian import Statistics
from sparsify.solver.solve import Scheme, solve_layer
from tests.helpers.tiny import save_tiny, tiny_text

RECIPE = """
version: 1
calibration: {{source: "file:{text}", samples: 8, sequence_length: 32}}
solver: {{error_propagation: 0.5}}
passes:
  - prune: {{method: sparsegpt}}
  - quantize: {{method: gptq, bits: 4, group_size: 32}}
export: {{format: {format}}}
overrides: {overrides}
"""
BLOCK = "model.layers"
SMALL = Settings(samples=4)
BASE, DENSE4 = Choice(True, 4), Choice(False, 4)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "source", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_text(tmp_path_factory.mktemp("text") / "text.txt", 2000)


@pytest.fixture(scope="module")
def recipe(text):
    def make(overrides="[]", format="sparse24"):
        return parse_recipe(RECIPE.format(text=text, overrides=overrides, format=format))

    return make


@pytest.fixture(scope="module")
def searched(tmp_path_factory, recipe, source):
    output = tmp_path_factory.mktemp("searched") / "out"
    budgets = [parse_budget("bits=4.3"), parse_budget("kl=0.02")]
    return search(recipe(), str(source), output, budgets, SMALL, quiet=True)


def units(searched):
    return json.loads((searched.output / "search.json").read_text())["units"]


def test_every_choice_of_every_unit_is_measured(searched):
    found = units(searched)
    assert len(found) == 3 * 4
    assert [unit["name"].removeprefix(f"{BLOCK}.0.") for unit in found[:4]] == [
        "self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj",
    ]  # fmt: skip
    for unit in found:
        assert list(unit["choices"]) == [choice.name for choice in CHOICES]
        kl = {name: entry["kl"] for name, entry in unit["choices"].items()}
        assert kl["dense-16"] == 0 < kl["dense-8"] < min(kl["dense-4"], kl["2:4-8"], kl["2:4-4"])
        nbytes = {name: 8 * entry["bytes"] / unit["weights"] for name, entry in unit["choices"].items()}
        assert nbytes == {"dense-16": 16, "dense-8": 8.5, "dense-4": 4.5, "2:4-16": 9, "2:4-8": 5.5, "2:4-4": 3.5}


def test_single_changes_are_what_a_whole_forward_gives(tmp_path, recipe, source, searched):
    """An independent forward of transformers, with the weights that `apply` gives the first group that it solves."""
    asked = recipe("[{match: '*', prune: null, quantize: null}, {match: 're:layers[.]0[.]self_attn[.][qkv]_proj', prune: {}}]"
                   .replace("prune: {}", "prune: {method: sparsegpt}, quantize: {bits: 4}"))  # fmt: skip
    apply(asked, str(source), tmp_path / "one", quiet=True)
    export(str(tmp_path / "one"), "dense", tmp_path / "dense", quiet=True)
    tokens = load_file(searched.output / "held-out.safetensors")["tokens"]
    one, dense = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (tmp_path / "dense", source)
    )
    with torch.no_grad():
        logits = [model(tokens).logits[:, :-1].flatten(0, 1) for model in (one, dense)]
    expected = score_logits(logits[0], tokens[:, 1:].flatten(), logits[1]).mean_kl
    assert units(searched)[0]["choices"]["2:4-4"]["kl"] == pytest.approx(expected, rel=0.02)  # stored in bfloat16


@pytest.mark.parametrize("resident", [True, False])
def test_the_divergence_of_a_changed_block(source, text, resident):
    """Of a block in the middle, of several rows at once, in any number of variants; and the model is left as it was."""
    from sparsify.formats.foreign import open_dense

    torch.manual_seed(0)
    tokens = torch.randint(4, 90, (5, 24))
    dense = HeldOut(open_blocks(open_dense(str(source)), torch.float32), tokens, resident=resident)
    dense.advance()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        reference = model(tokens).logits[:, :-1].flatten(0, 1)
    block = model.model.layers[1]
    variants, expected = [], []
    for scale, names in (
        (0.9, ["mlp.down_proj"]),
        (1.0, ["mlp.up_proj"]),
        (0.5, ["self_attn.q_proj", "self_attn.v_proj"]),
    ):
        own = {name: block.get_submodule(name).weight.data.clone() for name in names}
        variants.append({name: weight * scale for name, weight in own.items()})
        with torch.no_grad():
            for name in names:
                block.get_submodule(name).weight.copy_(variants[-1][name])
            logits = model(tokens).logits[:, :-1].flatten(0, 1)
            for name in names:
                block.get_submodule(name).weight.copy_(own[name])
        expected.append(score_logits(logits, tokens[:, 1:].flatten(), reference).mean_kl)
    assert dense.divergences(variants) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert dense.divergences(variants) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert expected[1] == pytest.approx(0, abs=1e-6) and expected[0] > 1e-4


def test_a_budget_is_met_by_the_least_sum(searched):
    bits, kl = searched.found
    assert bits.point.bits <= 4.3 < bits.point.bits + 0.2
    assert bits.point.kl == pytest.approx(sum(
        searched.selection.measured[unit.name][choice.name].kl
        for unit, choice in zip(searched.selection.units, bits.point.choices, strict=True)
    ))  # fmt: skip
    assert kl.point.kl <= 0.02
    front = searched.front
    assert all(a.kl > b.kl and a.nbytes < b.nbytes for a, b in zip(front, front[1:], strict=False))
    assert searched.own.bits == 3.5 and searched.own.kl > bits.point.kl


def test_linears_that_vllm_merges_choose_together(searched):
    for found in searched.found:
        for unit in searched.selection.units:
            assert len(unit.modules) == {"self_attn.q_proj": 3, "mlp.gate_proj": 2}.get(
                unit.modules[0].split(".", 3)[3], 1
            )
        make_plan(found.recipe, found.recipe.model)  # refuses merged linears that are not stored alike


def test_the_written_recipe_gives_the_budgeted_bits(tmp_path, searched, source):
    (found, _) = searched.found
    written = load_recipe(searched.output / "bits-4.3.yaml")
    assert written == found.recipe and written.model == str(source)
    result = apply(written, str(source), tmp_path / "out", quiet=True)
    opened = open_compressed(tmp_path / "out")
    for unit, choice in zip(searched.selection.units, found.point.choices, strict=True):
        for module in unit.modules:
            scheme = opened.modules.get(module)
            assert (scheme is None) == (choice == DENSE)
            assert scheme is None or (scheme.bits, scheme.pattern == "2:4") == (choice.bits, choice.pruned)
    assert result.metrics["sizes"]["compressed_bytes"] == found.point.nbytes
    linears = searched.selection.linears()
    assert 8 * linear_bytes(tmp_path / "out", linears) / searched.selection.weights == found.point.bits


def every_choice(plan, choices=CHOICES):
    """A selection in which each of the choices stands twice."""
    found = units_of(plan, list(choices))
    return found, [found[i].choices[i % len(choices)] for i in range(len(found))]


def test_all_six_choices_in_one_checkpoint(tmp_path, recipe, source, monkeypatch):
    plan = keep_zeros(make_plan(recipe(), str(source)))
    found, choices = every_choice(plan)
    mixed = recipe_with(recipe(), found, choices, plan.model.blocks)
    apply(mixed, str(source), tmp_path / "out", quiet=True)
    schemes = {
        scheme and (scheme.bits, scheme.pattern) for scheme in open_compressed(tmp_path / "out").modules.values()
    }
    assert schemes == {(8, "dense"), (4, "dense"), (16, "2:4"), (8, "2:4"), (4, "2:4")}
    totals = inspect(tmp_path / "out", quiet=True).totals()
    assert totals["compressed_linears"] == sum(
        len(u.modules) for u, c in zip(found, choices, strict=True) if c != DENSE
    )
    export(str(tmp_path / "out"), "dense", tmp_path / "dense", quiet=True)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        ours, dense = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16)(ids).logits
            for name in ("out", "dense")
        )
    assert torch.equal(ours, dense)


def test_what_overrides_name_and_ignore_leaves_out_is_not_chosen(recipe, source):
    plan = keep_zeros(make_plan(recipe("[{match: '*down_proj', prune: null}]"), str(source)))
    found = units_of(plan, list(CHOICES))
    assert len(found) == 9 and not any("down_proj" in module for unit in found for module in unit.modules)
    everything = recipe("[{match: '*', quantize: {bits: 8}}]")
    with pytest.raises(RecipeError, match="leaves no linear to choose for"):
        units_of(keep_zeros(make_plan(everything, str(source))), list(CHOICES))


def test_fixed_linears_count_in_the_mean(tmp_path, recipe, source):
    asked = recipe("[{match: '*down_proj', prune: null}]")
    settings = Settings(samples=4, choices=[DENSE4, BASE])
    result = search(asked, str(source), tmp_path / "out", [parse_budget("bits=3.8")], settings, quiet=True)
    (found,) = result.found
    assert found.point.bits <= 3.8 and result.selection.fixed == [f"{BLOCK}.{i}.mlp.down_proj" for i in range(3)]
    done = apply(found.recipe, str(source), tmp_path / "model", quiet=True)
    assert done.metrics["sizes"]["bits_per_weight"] == pytest.approx(found.point.bits, abs=1e-4)
    assert done.metrics["sizes"]["compressed_bytes"] == found.point.nbytes


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("bits=3.4", "nearest selection has 3.5 bits per weight"),
        ("bytes=1kB", "nearest selection has 3.5 bits per weight"),
        ("speed=9x", "linears 4.57x as fast as dense"),
    ],
)
def test_a_budget_that_cannot_be_met_names_the_nearest_selection_before_measuring(
    tmp_path, recipe, source, budget, words
):
    settings = Settings(samples=4, speed="modelled")
    with pytest.raises(RecipeError) as caught:
        search(recipe(), str(source), tmp_path / "out", [parse_budget(budget)], settings, quiet=True)
    assert f"--budget {budget} cannot be met with these choices; the " in str(caught.value) and words in str(
        caught.value
    )
    assert not any(tmp_path.glob("out*"))  # and can be asked again


def test_a_divergence_that_cannot_be_met(tmp_path, recipe, source):
    settings = Settings(samples=4, choices=[DENSE4, BASE])
    with pytest.raises(RecipeError, match="nearest selection has 4.5 bits per weight.*predicted KL"):
        search(recipe(), str(source), tmp_path / "out", [parse_budget("kl=1e-9")], settings, quiet=True)


def test_a_modelled_speed(tmp_path, recipe, source):
    settings = Settings(samples=4, speed="modelled", choices=[DENSE, DENSE4, BASE])
    result = search(recipe(), str(source), tmp_path / "out", [parse_budget("speed=4x")], settings, quiet=True)
    (found,) = result.found
    assert found.point.speed >= 4
    assert found.point.speed == pytest.approx(16 / found.point.bits)
    assert json.loads((tmp_path / "out" / "search.json").read_text())["speed"] == "modelled"


def test_an_interrupted_search_goes_on(tmp_path, recipe, source, monkeypatch, searched):
    whole, calls = measuring._measured, []

    def twice(index, *rest):
        calls.append(index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(index, *rest)

    monkeypatch.setattr(measuring, "_measured", twice)
    arguments = (recipe(), str(source), tmp_path / "out", [parse_budget("bits=4.3")], SMALL)
    with pytest.raises(KeyboardInterrupt):
        search(*arguments, quiet=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="interrupted search; go on with --resume"):
        search(*arguments, quiet=True)
    with pytest.raises(CheckpointError, match="was measured with another number of samples"):
        search(*arguments[:4], Settings(samples=5), resume=True, quiet=True)
    search(*arguments, resume=True, quiet=True)
    assert calls == [0, 1, 1, 2]
    found = json.loads((tmp_path / "out" / "search.json").read_text())["units"]
    assert found == units(searched)
    assert not (tmp_path / "out.partial").exists()


def test_a_finished_search_serves_other_budgets(tmp_path, recipe, source, monkeypatch):
    settings = Settings(samples=4, choices=[DENSE4, BASE])
    arguments = (recipe(), str(source), tmp_path / "out")
    search(*arguments, [parse_budget("bits=4")], settings, quiet=True)
    with pytest.raises(CheckpointError, match="exists already; choose another output, or add --resume"):
        search(*arguments, [parse_budget("bits=3.7")], settings, quiet=True)
    monkeypatch.setattr(measuring, "_measured", None)
    search(*arguments, [parse_budget("bits=3.7")], settings, resume=True, quiet=True)
    assert {file.name for file in (tmp_path / "out").glob("*.yaml")} == {"bits-4.yaml", "bits-3.7.yaml"}
    found = json.loads((tmp_path / "out" / "search.json").read_text())["found"]
    assert [entry["for"] for entry in found] == ["bits=4", "bits=3.7"]


def test_a_verified_selection(tmp_path, recipe, source, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    settings = Settings(samples=4, choices=[DENSE4, BASE], verify=2)
    result = search(recipe(), str(source), tmp_path / "out", [parse_budget("bits=4")], settings, quiet=True)
    first, second = result.found
    assert first.verified is not None and second.verified is not None and second.file is None
    assert (first.verified.bits, first.verified.nbytes) == (first.point.bits, first.point.nbytes)
    assert 0.3 * first.point.kl < first.verified.kl < 3 * first.point.kl
    assert (tmp_path / "out" / "verified" / "bits-4" / "config.json").exists()
    said = json.loads((tmp_path / "out" / "search.json").read_text())["found"][0]
    assert said["verified"]["kl"] == first.verified.kl and said["for"] == "bits=4"
    assert result.own_verified is not None and result.own.kl == pytest.approx(result.own_verified.kl)
    plain = replace(result.selection, scale=1.0)
    assert plain.point(result.own.choices).kl == pytest.approx(result.own.kl / result.selection.scale)
    again = [recipe(), str(source), tmp_path / "out", [parse_budget("bits=4.2")], replace(settings, verify=0)]
    assert search(*again, resume=True, quiet=True).selection.scale == result.selection.scale != 1
    other = recipe().model_copy(
        update={"export": recipe().export.model_copy(update={"head": Head(bits=8, group_size=32)})}
    )
    with pytest.raises(CheckpointError, match="verified/as-given was made by another recipe; remove it"):
        search(other, str(source), tmp_path / "out", [parse_budget("bits=4")], settings, resume=True, quiet=True)


def test_a_data_free_recipe_needs_no_walk(tmp_path, text, source):
    asked = parse_recipe(
        f"version: 1\ncalibration: {{source: 'file:{text}', samples: 4, sequence_length: 32}}\n"
        "passes:\n  - prune: {method: magnitude}\n  - quantize: {method: rtn, bits: 4, group_size: 32}\n"
    )
    result = search(asked, str(source), tmp_path / "out", [parse_budget("bits=4.3")], SMALL, quiet=True)
    assert result.found[0].point.bits <= 4.3 and len(units(result)) == 12


def test_a_recipe_of_one_pass_chooses_among_what_it_can_say(tmp_path, text, source):
    only = "version: 1\ncalibration: {{source: 'file:{}', samples: 4, sequence_length: 32}}\npasses:\n  - {}\n"
    quantized = parse_recipe(only.format(text, "quantize: {method: gptq, bits: 4, group_size: 32}"))
    result = search(quantized, str(source), tmp_path / "out", [parse_budget("bits=6")], SMALL, quiet=True)
    assert {choice.name for choice in result.selection.units[0].choices} == {"dense-16", "dense-8", "dense-4"}
    pruned = parse_recipe(only.format(text, "prune: {method: sparsegpt}"))
    with pytest.raises(RecipeError, match=r"choice 2:4-4 needs a quantize pass"):
        search(
            pruned, str(source), tmp_path / "no", [parse_budget("bits=10")], Settings(choices=[BASE, DENSE]), quiet=True
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budgets": []}, "name a budget"),
        ({"format": "dense"}, "export.format dense stores every choice with the same bytes"),
        ({"settings": Settings(choices=[BASE])}, "nothing to choose from with one choice"),
        ({"settings": Settings(samples=0)}, "--samples takes a positive number"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path, recipe, source, change, words):
    asked = recipe(format=change.get("format", "sparse24"))
    budgets = change.get("budgets", [parse_budget("bits=4")])
    with pytest.raises(SparsifyError, match=words):
        search(asked, str(source), tmp_path / "out", budgets, change.get("settings", SMALL), quiet=True)
    assert not (tmp_path / "out.partial").exists()


def test_a_basis_pass_has_to_run_before(tmp_path, recipe, source, text):
    written = RECIPE.format(text=text, overrides="[]", format="sparse24")
    asked = parse_recipe(written.replace("passes:\n", "passes:\n  - basis: {}\n"))
    assert asked.basis is not None
    with pytest.raises(RecipeError, match="this recipe's basis pass changes the model before linears can choose"):
        search(asked, str(source), tmp_path / "out", [parse_budget("bits=4")], SMALL, quiet=True)


def test_a_budget_that_leaves_everything_dense_is_refused(tmp_path, recipe, source):
    with pytest.raises(RecipeError, match="--budget bits=17 leaves every linear dense"):
        search(recipe(), str(source), tmp_path / "out", [parse_budget("bits=17")], SMALL, quiet=True)


def test_too_little_text_to_measure_on_is_said(tmp_path, recipe, source):
    with pytest.raises(CalibrationError, match="the text that choices are measured on: .*; --text names another"):
        search(recipe(), str(source), tmp_path / "out", [parse_budget("bits=4")], Settings(samples=500), quiet=True)


def test_the_held_out_text_lies_behind_the_calibration_rows(recipe, text, searched, source):
    asked, skip = held_out_source(recipe().calibration, None, 4)
    assert (asked.source, asked.samples, skip) == (f"file:{text}", 12, 8)
    own, skip = held_out_source(Calibration(samples=16), None, 4)
    assert own.source == "self" and own.seed != 0 and (own.samples, skip) == (4, 0)
    mixed = Calibration(
        sources=[{"source": "self", "weight": 1.0}, {"source": f"file:{text}", "weight": 3.0}], samples=8
    )
    assert held_out_source(mixed, None, 2)[0].source == f"file:{text}" and held_out_source(mixed, None, 2)[1] == 6
    other, skip = held_out_source(recipe().calibration, "file:elsewhere.txt", 4)
    assert (other.source, other.samples, skip) == ("file:elsewhere.txt", 4, 0)
    used = load_file(searched.output / "calibration.safetensors")["tokens"]
    held = load_file(searched.output / "held-out.safetensors")["tokens"]
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(source)(text.read_text())["input_ids"]
    assert used.flatten().tolist() + held.flatten().tolist() == ids[: 12 * 32]


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("bits=3.5", "bits", 3.5), ("bytes=90MB", "bytes", 90e6), ("bytes = 1.5 GiB", "bytes", 1.5 * 2**30), ("speed=1.8x", "speed", 1.8),
     ("speed=2", "speed", 2), ("kl=.25", "kl", 0.25), ("bytes=1000", "bytes", 1000)],
)  # fmt: skip
def test_budgets(text, kind, value):
    budget = parse_budget(text)
    assert (budget.kind, budget.value) == (kind, value)
    assert budget.file.replace("-", "").replace(".", "").isalnum()


@pytest.mark.parametrize(
    "text", ["3.5", "bits", "bits=", "bits=x", "bits=-1", "bits=3.5MB", "speed=fast", "kl=nan", "size=3", "bytes=3XB"]
)
def test_what_is_no_budget(text):
    with pytest.raises(RecipeError, match="--budget"):
        parse_budget(text)


def test_names_of_choices():
    assert [choice.name for choice in CHOICES] == ["dense-16", "dense-8", "dense-4", "2:4-16", "2:4-8", "2:4-4"]
    assert choice_named("2:4-8") == Choice(True, 8)
    assert choice_named("2:4-4-channel") == Choice(True, 4, "channel")
    assert choice_named("dense-8-128").describe() == "dense, 8 bits, groups of 128"
    for name in ("2:4", "2:4-4-48", "dense-16-64", "2:4-4-channel-64"):
        with pytest.raises(RecipeError, match=f"choice '{name}' is unknown; choose from dense-16"):
            choice_named(name)


def test_choices_of_several_group_sizes(tmp_path, recipe, source):
    names = ["dense-4", "2:4-4", "2:4-4-64", "2:4-4-channel"]
    settings = Settings(samples=4, choices=[choice_named(name) for name in names], verify=1)
    result = search(recipe(), str(source), tmp_path / "out", [parse_budget("bits=3.4")], settings, quiet=True)
    linears = make_plan(recipe(), str(source)).linears
    for unit in result.selection.units:  # 4 or 3 bits per weight, and 16 per scale
        groups = {"dense-4": 32, "2:4-4": 32, "2:4-4-64": 64, "2:4-4-channel": linears[unit.modules[0]].shape[1]}
        expected = {name: (4 if name == "dense-4" else 3) + 16 / size for name, size in groups.items()}
        assert {c.name: 8 * unit.nbytes[c] / unit.weights for c in unit.choices} == pytest.approx(expected)
    (found,) = result.found
    assert found.point.bits <= 3.4 and found.verified.bits == found.point.bits
    written = load_recipe(tmp_path / "out" / found.file)
    assert {o.quantize.group_size for o in written.overrides if o.quantize} <= {None, 64, "channel"}
    assert any(o.quantize and o.quantize.group_size for o in written.overrides)


def test_measured_times_are_of_every_shape_and_choice(recipe, source, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    monkeypatch.setattr("sparsify.search.speed.ROUNDS", 1)
    plan = keep_zeros(make_plan(recipe(), str(source)))
    found = units_of(plan, [DENSE, DENSE4, BASE])
    times = seconds_of(plan, found, "measured", quiet=True)
    assert all(set(own) == {DENSE, DENSE4, BASE} and min(own.values()) > 0 for own in times)
    assert times[0] == times[4] != times[1]  # one measurement for each shape
    with pytest.raises(RecipeError, match="leave dense-16 among the --choices"):
        seconds_of(plan, units_of(plan, [DENSE4, BASE]), "modelled", quiet=True)


@pytest.mark.parametrize(
    ("family", "last"),
    [("llama", "mlp.down_proj"), ("opt", "fc2"), ("gpt_neox", "mlp.dense_4h_to_h"), ("phi3", "mlp.down_proj")],
)
def test_the_balanced_recipe_fits_models_of_other_names(tmp_path, family, last):
    plan = make_plan(load_recipe("balanced"), str(save_tiny(tmp_path / "model", family)))
    dense = {name for name, scheme in plan.schemes.items() if scheme.prune is None}
    assert dense == {f"{block}.{last}" for block in plan.model.blocks} < set(plan.schemes)
    assert all(scheme.bits == 4 for scheme in plan.schemes.values())


def test_the_balanced_recipe_names_the_linear_that_leaves_the_mlp():
    (override,) = load_recipe("balanced").overrides
    named = {
        "transformer.h.0.mlp.c_proj": True, "transformer.h.0.attn.c_proj": False, "transformer.h.1.mlp.fc_out": True,
        "model.layers.3.feed_forward.w2": True, "model.layers.3.feed_forward.w1": False, "transformer.h.2.mlp.dense_4h_to_h": True,
        "model.layers.0.mlp.experts.11.down_proj": True, "model.layers.0.self_attn.o_proj": False,
    }  # fmt: skip
    assert {name: ignored_by(name, [override.match]) is not None for name in named} == named


def test_choices_of_several_bits_share_their_mask():
    torch.manual_seed(0)
    weights, x = {"a": torch.randn(16, 64), "b": torch.randn(8, 64)}, torch.randn(200, 64)
    statistics, known = Statistics(x.t() @ x / 200), {}
    for bits in (4, 8):
        scheme = Scheme("alps", "gptq", bits, 32, coordinate_descent=2)
        shared, _ = solve_layer(weights, scheme, statistics, masks_found=known)
        alone, _ = solve_layer(weights, scheme, statistics)
        assert all(torch.equal(shared[name].codes, alone[name].codes) for name in weights)
    assert list(known) == ["alps"] and known["alps"].shape == (24, 64)
    known["alps"] = torch.arange(4).repeat(24, 16) < 2
    inside = replace(scheme, coordinate_descent=0)  # which may exchange what is kept
    forced, _ = solve_layer(weights, inside, statistics, masks_found=known)
    assert not forced["a"].codes[:, 2::4].any() and not forced["a"].codes[:, 3::4].any()
