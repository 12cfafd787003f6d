"""Several schemes in one model: planned, refused where vLLM could not load them, solved, exported, read back, trained."""

import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sparsify  # noqa: F401  registers sparse24 with transformers
from sparsify.compiler.apply import apply
from sparsify.compiler.convert import export
from sparsify.compiler.operations import groups_of, solving
from sparsify.compiler.planning import make_plan
from sparsify.errors import RecipeError
from sparsify.formats.inspect import inspect
from sparsify.formats.reader import open_compressed
from sparsify.model.linear import is_two_four
from sparsify.recipe import parse_recipe
from sparsify.runtime.backends import ENVIRONMENT_VARIABLE
from tests.helpers.tiny import save_tiny, tiny_text

RECIPE = """
version: 1
calibration: {{source: "file:{text}", samples: 8, sequence_length: 32}}
solver: {{error_propagation: 0.5}}
passes:
  - prune: {{method: sparsegpt}}
  - quantize: {{method: gptq, bits: 4, group_size: 32}}{more}
export: {{format: {format}}}
overrides:
"""
MIXED = (
    "{match: '*down_proj', prune: null}",
    "{match: 're:layers[.]1[.]mlp[.](gate|up)_proj', quantize: {bits: 8}}",
    "{match: 'layers.2.self_attn.*', quantize: null}",
    "{match: layers.0.self_attn.o_proj, prune: null, quantize: null}",
    "{match: layers.1.self_attn.o_proj, prune: {method: magnitude}, quantize: {group_size: channel, method: rtn}}",
)
BLOCK = "model.layers"
DENSE = f"{BLOCK}.0.self_attn.o_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "source", dtype=torch.bfloat16)


@pytest.fixture
def recipe(tmp_path):
    text = tiny_text(tmp_path / "text.txt", 2000)

    def make(*entries, format="sparse24", more=""):
        lines = "".join(f"  - {entry}\n" for entry in entries)
        return parse_recipe(RECIPE.format(text=text, format=format, more=more) + (lines or "  []\n"))

    return make


def found(directory):
    """How each linear is stored: (bits, pattern, group size), by its name inside of the model."""
    opened = open_compressed(directory)
    return {
        name.removeprefix(f"{BLOCK}."): (scheme.bits, scheme.pattern, scheme.group_size)
        for name, scheme in opened.modules.items()
    }


def test_a_plan_says_what_becomes_of_each_linear(recipe, source):
    plan = make_plan(recipe(*MIXED), str(source))
    words = {name.removeprefix(f"{BLOCK}."): planned.describe() for name, planned in plan.linears.items()}
    end = ", error propagation 0.5"
    assert words["0.self_attn.q_proj"] == f"2:4 sparsegpt + 4-bit gptq, groups of 32{end}"
    assert words["0.mlp.down_proj"] == f"4-bit gptq, groups of 32{end}"
    assert words["1.mlp.up_proj"] == f"2:4 sparsegpt + 8-bit gptq, groups of 32{end}"
    assert words["2.self_attn.v_proj"] == f"2:4 sparsegpt{end}"
    assert words["0.self_attn.o_proj"] == "stays dense: an override leaves it dense"
    assert words["1.self_attn.o_proj"] == "2:4 magnitude + 4-bit rtn, one scale per channel"
    assert plan.dense_modules()[DENSE] == "an override leaves it dense"
    free = plan.schemes[f"{BLOCK}.1.self_attn.o_proj"]
    assert not free.needs_data and (free.error_propagation, free.coordinate_descent) == (0, 0)


def test_operations_are_counted_scheme_by_scheme(recipe, source):
    plan, plain = make_plan(recipe(*MIXED), str(source)), make_plan(recipe(), str(source))
    counts = plan.estimate().operations
    expected = sum(
        solving(n, k, scheme)["coordinate descent"]
        for group in groups_of(plan)
        for scheme in {scheme for _, scheme in group.members if scheme.sweeps}
        for n, k in [(sum(n for (n, _), own in group.members if own == scheme), group.inputs)]
    )
    assert counts["coordinate descent"] == expected < plain.estimate().operations["coordinate descent"]


def test_several_schemes_become_one_checkpoint(tmp_path, recipe, source, monkeypatch):
    plan = make_plan(recipe(*MIXED), str(source))
    result = apply(recipe(*MIXED), str(source), tmp_path / "out", quiet=True)
    stored = found(tmp_path / "out")
    assert stored["0.self_attn.q_proj"] == (4, "2:4", 32)
    assert stored["0.mlp.down_proj"] == stored["2.mlp.down_proj"] == (4, "dense", 32)
    assert stored["1.mlp.gate_proj"] == stored["1.mlp.up_proj"] == (8, "2:4", 32)
    assert stored["2.self_attn.k_proj"] == stored["2.self_attn.o_proj"] == (16, "2:4", 64)
    assert stored["1.self_attn.o_proj"] == (4, "2:4", 64)
    assert "0.self_attn.o_proj" not in stored
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["pattern"], config["group_size"]) == (4, "2:4", 32)
    assert config["modules"][f"{BLOCK}.1.mlp.up_proj"] == {"bits": 8, "group_size": 32, "pattern": "2:4"}
    assert config["modules"][f"{BLOCK}.0.mlp.down_proj"] == {"bits": 4, "group_size": 32, "pattern": "dense"}
    assert len(config["modules"]) == 3 + 2 + 4 + 1 and DENSE in config["ignore"]
    opened = open_compressed(tmp_path / "out")
    dense = load_file(source / "model.safetensors")
    assert torch.equal(opened.tensor(f"{DENSE}.weight"), dense[f"{DENSE}.weight"])
    assert not is_two_four(opened.linear(f"{BLOCK}.0.mlp.down_proj").codes)
    assert opened.linear(f"{BLOCK}.1.mlp.up_proj").codes.abs().max() > 8  # eight bits are used
    assert result.metrics["sizes"]["compressed_bytes"] == plan.estimate().output_bytes
    totals = inspect(tmp_path / "out", quiet=True).totals()
    assert (totals["compressed_linears"], totals["two_four_linears"]) == (20, 17)
    export(str(tmp_path / "out"), "dense", tmp_path / "dense", quiet=True)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        ours, written = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16)(ids).logits
            for name in ("out", "dense")
        )
    assert torch.equal(ours, written)


def test_linears_of_one_group_are_solved_each_by_its_own_scheme(tmp_path, recipe, source):
    """Before the first block nothing was rewritten, so there each is what it would be with its scheme for all."""
    apply(recipe("{match: v_proj, prune: {method: wanda}}"), str(source), tmp_path / "mixed", quiet=True)
    apply(recipe("{match: '*', prune: {method: wanda}}"), str(source), tmp_path / "wanda", quiet=True)
    apply(recipe(), str(source), tmp_path / "plain", quiet=True)
    mixed, wanda, plain = (open_compressed(tmp_path / name) for name in ("mixed", "wanda", "plain"))
    for name, same, other in (("v_proj", wanda, plain), ("q_proj", plain, wanda), ("k_proj", plain, wanda)):
        module = f"{BLOCK}.0.self_attn.{name}"
        codes = mixed.linear(module).codes
        assert torch.equal(codes, same.linear(module).codes)
        assert not torch.equal(codes, other.linear(module).codes)


def test_stock_formats_say_each_scheme(tmp_path, recipe, source):
    entries = (
        "{match: '*down_proj', quantize: {bits: 8}}",
        "{match: o_proj, quantize: null}",
        "{match: v_proj, prune: null}",
    )
    result = apply(recipe(*entries, format="pack-quantized"), str(source), tmp_path / "out", quiet=True)
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [(group["targets"], group["weights"]["num_bits"]) for group in groups.values()] == [
        (["Linear"], 4),
        ([f"{BLOCK}.{block}.mlp.down_proj" for block in range(3)], 8),
    ]
    stored = found(tmp_path / "out")
    assert stored["0.mlp.down_proj"][0] == 8 and stored["0.mlp.up_proj"][0] == 4 and "0.self_attn.o_proj" not in stored
    reasons = {entry["module"]: entry["reason"] for entry in result.metrics["dense_modules"]}
    assert "this linear is not quantized" in reasons[DENSE]
    opened = open_compressed(tmp_path / "out")
    assert is_two_four(opened.linear(f"{BLOCK}.0.self_attn.q_proj").codes)
    assert not is_two_four(opened.linear(f"{BLOCK}.0.self_attn.v_proj").codes)


def test_stock_software_reads_several_schemes(tmp_path, recipe, source):
    """transformers with compressed-tensors, and how vLLM looks up the scheme of a linear that it merges."""
    pytest.importorskip("compressed_tensors")
    entries = (
        "{match: '*down_proj', quantize: {bits: 8}}",
        "{match: 're:layers[.]1[.]self_attn[.][qkv]_proj', quantize: {bits: 8}}",
        "{match: o_proj, quantize: null}",
    )
    apply(recipe(*entries, format="pack-quantized"), str(source), tmp_path / "out", quiet=True)
    export(str(tmp_path / "out"), "dense", tmp_path / "dense", quiet=True)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        stock, written = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16)(ids).logits
            for name in ("out", "dense")
        )
    assert torch.equal(stock, written)
    utils = pytest.importorskip("vllm.model_executor.layers.quantization.compressed_tensors.utils")
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"].values()
    bits = {target: group["weights"]["num_bits"] for group in groups for target in group["targets"]}
    merged, merges = type("QKVParallelLinear", (torch.nn.Module,), {})(), {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    for block, expected in ((0, 4), (1, 8)):
        target = utils.find_matched_target(f"{BLOCK}.{block}.self_attn.qkv_proj", merged, bits, merges)
        assert bits[target] == expected


def test_a_data_free_recipe_reads_text_for_the_linears_that_need_it(tmp_path, recipe, source):
    base = recipe()
    free = parse_recipe(
        "version: 1\npasses:\n  - prune: {method: magnitude}\n  - quantize: {method: rtn, bits: 4, group_size: 32}\n"
    )
    solved = free.model_copy(
        update={
            "calibration": base.calibration,
            "overrides": recipe("{match: o_proj, quantize: {method: gptq}}").overrides,
        }
    )
    assert not make_plan(free, str(source)).needs_data and make_plan(solved, str(source)).needs_data
    apply(free, str(source), tmp_path / "free", quiet=True)
    apply(solved, str(source), tmp_path / "solved", quiet=True)
    one, other = open_compressed(tmp_path / "free"), open_compressed(tmp_path / "solved")
    same = {name for name in one.modules if torch.equal(one.linear(name).codes, other.linear(name).codes)}
    assert set(one.modules) - same == {f"{BLOCK}.{block}.self_attn.o_proj" for block in range(3)}


@pytest.mark.parametrize(
    ("entry", "format", "pair"),
    [
        ("{match: v_proj, prune: null}", "sparse24", ("q_proj", "v_proj")),
        ("{match: k_proj, quantize: {bits: 8}}", "sparse24", ("q_proj", "k_proj")),
        ("{match: layers.1.mlp.up_proj, quantize: {group_size: 64}}", "sparse24", ("gate_proj", "up_proj")),
        ("{match: gate_proj, prune: null, quantize: null}", "sparse24", ("gate_proj", "up_proj")),
        ("{match: k_proj, quantize: {bits: 8}}", "pack-quantized", ("q_proj", "k_proj")),
        ("{match: q_proj, quantize: null}", "pack-quantized", ("q_proj", "k_proj")),
        ("{match: v_proj, prune: null}", "pack-quantized", None),  # zeros are no scheme there
        ("{match: v_proj, prune: null}", "dense", None),
        ("{match: k_proj, quantize: {bits: 8}}", "dense", None),
        ("{match: v_proj, prune: {method: wanda}}", "sparse24", None),  # stored alike
        ("{match: 're:.*[.][qkv]_proj', quantize: {bits: 8}}", "sparse24", None),
        ("{match: mlp.*, prune: null}", "sparse24", None),
    ],
)
def test_linears_that_vllm_merges_are_stored_alike(recipe, source, entry, format, pair):
    asked = recipe(entry, format=format)
    if pair is None:
        assert make_plan(asked, str(source)).schemes
        return
    with pytest.raises(RecipeError) as caught:
        make_plan(asked, str(source))
    one, other = pair
    message = str(caught.value)
    assert "vLLM merges " in message and f".{one} and " in message and f".{other} into one linear" in message, message
    assert f"of {one} the recipe says: " in message and f"of {other}: " in message


def test_ignore_cannot_part_what_vllm_merges(recipe, source):
    asked = recipe().model_copy(update={"ignore": ["v_proj"]})
    with pytest.raises(
        RecipeError, match=r"q_proj and .*v_proj into one.*; of v_proj: stays dense: the recipe ignores it"
    ):
        make_plan(asked, str(source))


def test_one_scale_per_row_and_a_group_of_all_inputs_are_stored_alike(recipe, source):
    """The tiny model is 64 wide, so both have one scale per row."""
    merged = "{match: gate_proj, quantize: {group_size: 64}}", "{match: up_proj, quantize: {group_size: channel}}"
    assert make_plan(recipe(*merged), str(source)).schemes


def test_an_override_that_matches_nothing_is_refused(recipe, source):
    with pytest.raises(RecipeError, match=r"overrides.1: '\*down_prj' matches no linear of .*did you mean 'down_proj'"):
        make_plan(recipe("{match: o_proj, prune: null}", "{match: '*down_prj', prune: null}"), str(source))
    with pytest.raises(RecipeError, match=r"overrides.0: 'lm_head' names the output head, which export.head sets"):
        make_plan(recipe("{match: lm_head, quantize: {bits: 8}}"), str(source))


def test_after_a_depth_pass_an_override_may_name_a_layer_that_is_gone(tmp_path, recipe, source):
    asked = recipe("{match: layers.2.mlp.down_proj, prune: null}", "{match: layers.0.mlp.down_proj, prune: null}")
    depth = parse_recipe("version: 1\npasses:\n  - depth: {method: deepest, drop: 1}\nexport: {format: dense}\n").passes
    apply(asked.model_copy(update={"passes": [*depth, *asked.passes]}), str(source), tmp_path / "out", quiet=True)
    stored = found(tmp_path / "out")
    assert (
        stored["0.mlp.down_proj"][1] == "dense"
        and stored["1.mlp.down_proj"][1] == "2:4"
        and "2.mlp.down_proj" not in stored
    )


def test_what_no_engine_loads_may_part_what_vllm_merges(tmp_path, recipe, source):
    """Before a depth pass that comes last, the model is compressed into a directory of the run's own, always in sparse24."""
    asked = recipe("{match: v_proj, prune: null}", format="dense", more="\n  - depth: {method: deepest, drop: 1}")
    apply(asked, str(source), tmp_path / "out", quiet=True)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert is_two_four(weights[f"{BLOCK}.1.self_attn.q_proj.weight"])
    assert not is_two_four(weights[f"{BLOCK}.1.self_attn.v_proj.weight"])


@pytest.mark.parametrize(
    "training",
    [
        "tune: {epochs: 4, batch_size: 2, learning_rate: 0.02, holdout: 0}",
        "distill: {tokens: 1280, samples: 8, sequence_length: 32, batch_size: 4, precision: float32, learning_rate: 0.1}",
        "lora: {tokens: 256, samples: 8, sequence_length: 32, batch_size: 4, precision: float32, learning_rate: 0.1}",
    ],
)
def test_training_keeps_every_scheme(tmp_path, recipe, source, training):
    more = f"\n  - {training}"
    apply(recipe(*MIXED), str(source), tmp_path / "plain", quiet=True)
    apply(recipe(*MIXED, more=more), str(source), tmp_path / "out", quiet=True)
    assert found(tmp_path / "out") == found(tmp_path / "plain")
    before, after = open_compressed(tmp_path / "plain"), open_compressed(tmp_path / "out")
    stayed = torch.equal(before.tensor(f"{DENSE}.weight"), after.tensor(f"{DENSE}.weight"))
    assert stayed != training.startswith("tune")  # which trains whatever else a block has, as it does norms
    for inside, (_, pattern, _) in found(tmp_path / "out").items():
        module = f"{BLOCK}.{inside}"
        one, other = (opened.linear(module).dense(torch.float32) for opened in (before, after))
        assert not torch.equal(one, other), module  # each kind learns
        if pattern == "2:4":
            assert is_two_four(other), module


def test_linears_that_the_export_format_cannot_hold_are_in_the_plan(recipe, source):
    """pack-quantized holds integers: pruned linears without them are written dense, and not all of them may be."""
    some = make_plan(recipe("{match: o_proj, quantize: null}", format="pack-quantized"), str(source))
    unheld = some.written_dense()
    assert {name.rpartition(".")[2] for name in unheld} == {"o_proj"} and unheld.items() <= some.to_json()[
        "dense_modules"
    ].items()
    console = Console(width=300)
    with console.capture() as shown:
        console.print(some.table())
    assert "written dense: pack-quantized holds 4- or 8-bit codes" in shown.get()
    assert not make_plan(recipe("{match: o_proj, quantize: null}"), str(source)).written_dense()
    with pytest.raises(RecipeError) as caught:
        make_plan(recipe("{match: '*', quantize: null}", format="pack-quantized"), str(source))
    said = str(caught.value)
    assert "export.format: none of the 21 linears" in said and "quantized to 4 or 8 bits" in said
