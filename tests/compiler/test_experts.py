"""Mixtures of experts from a recipe to a checkpoint that transformers runs: 2:4, counted, resumed, refused."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sparsify.compiler.apply as run
from sparsify.compiler.apply import apply
from sparsify.compiler.balance import chosen_rows, routed
from sparsify.compiler.convert import convert
from sparsify.compiler.plan_experts import not_in_vllm
from sparsify.compiler.planning import make_plan
from sparsify.compiler.summary import summary
from sparsify.errors import CheckpointError, RecipeError
from sparsify.evaluation.load import load_model
from sparsify.formats.inspect import inspect
from sparsify.formats.reader import open_compressed
from sparsify.model.experts import SeparateExperts, is_expert
from sparsify.model.linear import is_two_four
from sparsify.recipe import parse_recipe
from sparsify.runtime.module import Sparse24Linear
from sparsify.training.qat_linear import kept_positions
from tests.helpers.tiny import MIXTURES, tiny_mixture, tiny_text

RECIPE = """
version: 1
calibration: {{source: "file:{text}", samples: 8, sequence_length: 24}}
solver: {{error_propagation: 0.5, coordinate_descent: 1}}
passes:
  - prune: {{method: sparsegpt}}
  - quantize: {{method: gptq, bits: 4, group_size: 32}}
export: {{format: {format}}}
"""
IDS = torch.randint(4, 96, (2, 20), generator=torch.Generator().manual_seed(3))
LEAVES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # of Mixtral's files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    tiny_text(folder / "text.txt")
    return folder


@pytest.fixture(scope="module")
def recipe(folder):
    return lambda format="sparse24", more="": parse_recipe(
        RECIPE.format(text=folder / "text.txt", format=format) + more
    )


@pytest.fixture(scope="module")
def made(folder, recipe):
    """The source, the compressed checkpoint and the metrics of a family, made once."""
    found = {}

    def make(family):
        if family not in found:
            source = tiny_mixture(folder / family, family)
            found[family] = (
                source,
                folder / f"{family}-out",
                apply(recipe(), str(source), folder / f"{family}-out", quiet=True),
            )
        return found[family][0], found[family][1], found[family][2].metrics

    return make


def put(model, name, weight):
    """Give a dense transformers model the weight of a linear, of one expert in a fused parameter too."""
    index, number, leaf = re.fullmatch(r"model\.layers\.(\d+)\..*?(?:experts\.(\d+)\.)?(\w+)", name).groups()
    if number is None:
        model.get_submodule(name).weight.data = weight
        return
    layer = model.model.layers[int(index)]
    experts = next(module for path, module in layer.named_modules() if path.endswith("experts"))
    leaf = LEAVES.get(leaf, leaf)
    fused = (experts.down_proj if leaf == "down_proj" else experts.gate_up_proj).data[int(number)]
    fused = fused.t() if experts.is_transposed else fused
    half = fused.shape[0] // 2
    if leaf == "down_proj":
        fused.copy_(weight)
    elif experts.is_concatenated:
        fused[:half].copy_(weight) if leaf == "gate_proj" else fused[half:].copy_(weight)
    else:
        fused[leaf == "up_proj" :: 2].copy_(weight)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_is_two_four_and_transformers_runs_it_as_the_dense_export(family, made, tmp_path):
    source, out, metrics = made(family)
    opened = open_compressed(out)
    experts = [module for module in opened.modules if is_expert(module)]
    layers = 1 if family == "deepseek_v3" else 2
    assert len(experts) == layers * 4 * 3 == len([layer for layer in metrics["layers"] if "tokens" in layer])
    for module in opened.modules:
        linear = opened.linear(module)
        assert linear.bits == 4 and is_two_four(linear.codes) and bool(linear.codes.any())
    shared = [module for module in opened.modules if "shared_expert" in module]
    assert len(shared) == {"qwen2_moe": 6, "deepseek_v3": 3}.get(family, 0)
    assert not any(re.search(r"(gate|router)$", module) for module in opened.modules)

    convert(out, "dense", tmp_path / "dense", quiet=True)
    names = set(load_file(source / "model.safetensors"))
    assert set(load_file(tmp_path / "dense/model.safetensors")) == names  # fused where the source's files are
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    dense, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {m.name for m in ours.modules() if isinstance(m, Sparse24Linear)} == set(opened.modules)
    written = {name: parameter.clone() for name, parameter in dense.named_parameters()}
    for module in opened.modules:
        put(dense, module, opened.linear(module).dense(torch.float32))
    for name, parameter in dense.named_parameters():  # the dense export has them, rounded to 16 bits
        torch.testing.assert_close(written[name], parameter, rtol=2**-8, atol=0)
    torch.testing.assert_close(logits(ours), logits(dense), rtol=1e-4, atol=1e-4)
    ours.save_pretrained(tmp_path / "again")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)), logits(ours)
    )


def test_tokens_per_expert_are_counted_and_said(made):
    metrics = made("mixtral")[2]
    for block in range(2):
        up = [layer for layer in metrics["layers"] if layer["block"] == block and layer["module"].endswith("up_proj")]
        assert sum(layer["tokens"] for layer in up) == 8 * 24 * 2
        for layer in up:
            few = layer["tokens"] < 2 * 64
            assert layer["shrinkage"] == pytest.approx(64 / (layer["tokens"] + 64) if few else 0, abs=1e-4)
    said = rendered(summary(metrics, "mixtral"))
    counts = sorted(layer["tokens"] for layer in metrics["layers"] if layer["module"].endswith("up_proj"))
    assert f"{counts[0]} to {counts[-1]}, median {counts[4]}, 8 experts" in said
    assert "Hessian shrunk toward the layer's" in said and "routes tokens to experts" in said


def rendered(table):
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(table)
    return console.export_text()


def test_an_expert_without_a_token_is_solved_on_the_layer_and_named(tmp_path, recipe):
    source = tiny_mixture(tmp_path / "model", "gpt_oss", num_hidden_layers=1)
    change(source, lambda tensors: tensors["model.layers.0.mlp.router.bias"].copy_(torch.tensor([0.0, 0, 0, -1e4])))
    result = apply(recipe(), str(source), tmp_path / "out", quiet=True)
    last = [layer for layer in result.metrics["layers"] if ".experts.3." in layer["module"]]
    assert [(layer["tokens"], layer["shrinkage"]) for layer in last] == [(0, 1.0)] * 3
    assert all(0 < layer["relative_error"] < 0.5 for layer in last)
    assert "model.layers.0.mlp.experts.3" in rendered(summary(result.metrics, "gpt_oss"))


def change(directory, edit):
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def killed_and_resumed(recipe, source, output, monkeypatch):
    """Apply a recipe in a run that is killed before its second block is written, and in one that goes on."""
    written = run.CheckpointWriter.write_part

    def killed(self, part, *rest):
        if part == "block-0001":
            raise KeyboardInterrupt
        written(self, part, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(run.CheckpointWriter, "write_part", killed)
        with pytest.raises(KeyboardInterrupt):
            apply(recipe, str(source), output, quiet=True)
    apply(recipe, str(source), output, resume=True, quiet=True)


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path, made, recipe, monkeypatch):
    source, out, _ = made("granitemoe")
    killed_and_resumed(recipe(), source, tmp_path / "again", monkeypatch)
    for name in ("model.safetensors", "config.json", "metrics.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_without_data_experts_are_rounded_too(tmp_path, made, recipe):
    source = made("gpt_oss")[0]
    rounded = recipe().model_copy(
        update={"passes": parse_recipe("version: 1\npasses: [prune: {method: magnitude}]\n").passes}
    )
    rounded = rounded.model_copy(
        update={"solver": parse_recipe("version: 1\npasses: [prune: {method: magnitude}]\n").solver}
    )
    apply(rounded, str(source), tmp_path / "out", quiet=True)
    opened, stored = open_compressed(tmp_path / "out"), load_file(source / "model.safetensors")
    module = "model.layers.0.mlp.experts.1.up_proj"
    kept = opened.linear(module).dense(torch.float32)
    assert opened.modules[module].bits == 16 and is_two_four(kept)
    whole = stored["model.layers.0.mlp.experts.gate_up_proj"][1, :, 1::2].t()
    torch.testing.assert_close(kept, torch.where(kept != 0, whole, 0.0).bfloat16().float(), rtol=0, atol=0)


def test_stock_transformers_reads_the_experts_of_pack_quantized(tmp_path, made, recipe):
    pytest.importorskip("compressed_tensors")
    source = made("mixtral")[0]
    apply(recipe("pack-quantized"), str(source), tmp_path / "packed", quiet=True)
    opened = open_compressed(tmp_path / "packed")
    assert len([module for module in opened.modules if is_expert(module)]) == 2 * 4 * 3
    convert(tmp_path / "packed", "dense", tmp_path / "dense", quiet=True)
    packed, dense = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16) for name in ("packed", "dense")
    )
    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-3, atol=1e-3)
    assert torch.isfinite(logits(load_model(tmp_path / "packed", "cpu").model)).all()  # in float32, as it is scored


def test_the_run_and_its_card_say_whether_vllm_serves_it(tmp_path, made, recipe, capfd, monkeypatch):
    source, out, metrics = made("gpt_oss")
    assert metrics["not_in_vllm"] is None
    card = (out / "README.md").read_text()
    assert "vLLM serves it" in card and "not tried in vLLM on a GPU" in card and "- vllm" in card
    card = (made("granitemoe")[1] / "README.md").read_text()
    assert "vLLM serves it" in card and "not tried in vLLM on a GPU" in card and "- vllm" in card
    monkeypatch.setattr(SeparateExperts, "unusual", "they have no gate")
    assert apply(recipe(), str(source), tmp_path / "out").metrics["not_in_vllm"] == "they have no gate"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vLLM does not serve its experts: they have no gate." in card and "- vllm" not in card
    said = " ".join(capfd.readouterr().err.split())
    assert "vLLM does not serve these experts: they have no gate" in said and "ignore: ['*.experts.*']" in said
    apply(recipe(more="ignore: ['*.experts.*']"), str(source), tmp_path / "dense")
    assert "vLLM serves it" in (tmp_path / "dense" / "README.md").read_text()
    assert "vLLM does not" not in capfd.readouterr().err


def test_the_plan_says_what_becomes_of_experts_and_what_does_not(made, recipe):
    source, granite = str(made("mixtral")[0]), str(made("granitemoe")[0])
    said = rendered(make_plan(recipe(), source).table())
    assert re.search(r"mlp\.experts\.\*\.down_proj.*64 x 128.*2 x 4 experts.*2:4 sparsegpt", said)
    assert "about 96 of 192" in said and "vLLM serves these experts on CPUs" in said

    def reasons(plan):
        return {why for name, why in plan.dense_modules().items() if "experts" in name}

    ignoring = make_plan(recipe(more="ignore: ['*.experts.*']"), source)
    assert reasons(ignoring) == {"the recipe ignores it"} and not any(map(is_expert, ignoring.linears))
    turned = recipe().model_copy(update={"passes": parse_recipe(TURNED).passes})
    assert reasons(make_plan(turned, source)) == {"experts are not compressed in a recipe with basis"}
    assert reasons(make_plan(recipe("gptq"), source)) == {"gptq is not written with compressed experts; sparse24 is"}
    assert "in one tensor" in next(iter(reasons(make_plan(recipe("pack-quantized"), granite))))
    unlike = "overrides: [{match: '*experts.1.down_proj', quantize: {bits: 8}}]"
    with pytest.raises(RecipeError, match=r"one scheme for all experts.*experts\.1\.down_proj: .*8-bit"):
        make_plan(recipe("pack-quantized", unlike), source)
    plan = make_plan(recipe(more=unlike), source)
    name, first = (f"model.layers.{place}.down_proj" for place in ("0.mlp.experts.1", "0.mlp.experts.0"))
    assert plan.schemes[name].bits == 8
    assert not_in_vllm(plan) == f"it wants all of a layer to be alike, and {name} is not as {first}"
    without = make_plan(recipe(more="ignore: ['*.experts.*.down_proj']"), source)
    assert not_in_vllm(without) == "some linears of model.layers.0.mlp.experts are dense"
    assert not_in_vllm(ignoring) is None


TURNED = """
version: 1
passes: [basis: {}, prune: {method: sparsegpt}, quantize: {method: gptq, bits: 4, group_size: 32}]
"""
TRAINED = """
version: 1
passes:
  - prune: {method: sparsegpt}
  - quantize: {method: gptq, bits: 4, group_size: 32}
  - tune: {epochs: 3}
  - distill: {tokens: 1920, samples: 8, sequence_length: 24, batch_size: 4, learning_rate: 0.05, warmup: 0, precision: float32}
"""


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_tuning_and_distillation_train_experts_inside_their_masks(family, made, recipe, tmp_path, monkeypatch):
    """Killed in the second block, and gone on with to the same bytes."""
    source, untrained, _ = made(family)
    training = recipe().model_copy(update={"passes": parse_recipe(TRAINED).passes})
    out = tmp_path / "out"
    metrics = apply(training, str(source), out, quiet=True).metrics
    assert len(metrics["tuning"]) == 2 and all(note["after"] < note["before"] for note in metrics["tuning"])
    (distilled,) = metrics["training"]
    assert distilled["last"]["loss"] < distilled["first"]["loss"]
    before, after = open_compressed(untrained), open_compressed(out)
    experts = [module for module in after.modules if is_expert(module)]
    assert len(experts) == 2 * 4 * 3 and after.modules.keys() == before.modules.keys()
    for module in experts:
        linear, solved = after.linear(module), before.linear(module)
        assert is_two_four(linear.codes) and (linear.codes != solved.codes).float().mean() > 0.01
        if ".layers.0." in module:  # the walk of later blocks reads what tuning made
            assert not (linear.codes.bool() & ~kept_positions(solved)).any()
    killed_and_resumed(training, source, tmp_path / "again", monkeypatch)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_rows_that_complete_each_other_are_chosen():
    rare, common, both = [0, 0, 6], [3, 3, 0], [2, 2, 2]
    assert chosen_rows(torch.tensor([common, common, common, rare, both]), 2) == [0, 4]
    assert chosen_rows(torch.tensor([common, common, rare, rare]), 3) == [0, 1, 2]
    assert chosen_rows(torch.tensor([rare, common]), 2) == [0, 1]


def test_balanced_rows_even_the_experts_out_and_are_those_of_a_resumed_run(made, recipe, folder, tmp_path, monkeypatch):
    source, _, plain = made("mixtral")
    text = tmp_path / "text.txt"
    text.write_text((folder / "text.txt").read_text())
    document = RECIPE.format(text=text, format="sparse24").replace("samples: 8,", "samples: 8, experts: balanced,")
    balanced = parse_recipe(document)
    assert "rows chosen among 32 to even that out" in rendered(make_plan(balanced, str(source)).table())
    result = apply(balanced, str(source), tmp_path / "out", quiet=True)

    def squares(metrics):
        counts = [layer["tokens"] for layer in metrics["layers"] if layer["module"].endswith("up_proj")]
        assert sum(counts) == 2 * 8 * 24 * 2
        return sum(count**2 for count in counts)

    assert squares(result.metrics) < squares(plain)

    def killed(self, *rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run.CheckpointWriter, "write_part", killed)
        with pytest.raises(KeyboardInterrupt):
            apply(balanced, str(source), tmp_path / "again", quiet=True)
    text.unlink()  # the chosen rows are kept with the run
    apply(balanced, str(source), tmp_path / "again", resume=True, quiet=True)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    with pytest.raises(RecipeError, match=r"calibration\.experts chooses rows for the experts of a mixture"):
        make_plan(parse_recipe(document + "ignore: ['*.experts.*']"), str(source))


def test_the_dense_models_routers_are_counted(made, recipe):
    """Against transformers' own hooks on the whole model."""
    source = made("gpt_oss")[0]
    tokens = torch.randint(4, 90, (5, 12), generator=torch.Generator().manual_seed(5))
    counts = routed(make_plan(recipe(), str(source)).model, tokens, None, None, None)
    dense, chosen = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), []
    for layer in dense.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1].view(5, -1)))
    with torch.no_grad():
        dense(tokens)
    expected = [torch.stack([row.bincount(minlength=4) for row in of_layer]) for of_layer in chosen]
    assert torch.equal(counts, torch.cat(expected, 1))


def test_ignored_experts_stay_as_the_files_have_them(tmp_path, made, recipe):
    source = made("granitemoe")[0]
    apply(recipe(more="ignore: ['*.experts.*']"), str(source), tmp_path / "out", quiet=True)
    stored, new = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    assert torch.equal(new[name], stored[name].bfloat16())
    assert "experts" not in json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(model.model.layers[0].block_sparse_moe.experts.gate_up_proj.data, new[name].float())


def test_experts_that_are_dense_in_part_are_read(tmp_path, made, recipe):
    """The down projections, with their biases, are dense linears of files that hold them fused otherwise."""
    more = "overrides: [{match: '*experts.*.down_proj', prune: null, quantize: null}]"
    apply(recipe(more=more), str(made("gpt_oss")[0]), tmp_path / "out", quiet=True)
    convert(tmp_path / "out", "dense", tmp_path / "dense", quiet=True)
    stored, back = (load_file(folder / "model.safetensors") for folder in (made("gpt_oss")[0], tmp_path / "dense"))
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(back[name], stored[name].bfloat16())
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    experts = ours.model.layers[1].mlp.experts
    assert torch.equal(experts.expert(2).down_proj.weight, stored[name][2].t().bfloat16().float())
    assert torch.equal(experts.expert(2).down_proj.bias, stored[f"{name}_bias"][2].bfloat16().float())
    assert isinstance(experts.expert(2).up_proj, Sparse24Linear) and torch.isfinite(logits(ours)).all()


def test_inspect_lists_experts(made):
    totals = inspect(made("gpt_oss")[1], quiet=True).totals()
    assert totals["compressed_linears"] == totals["two_four_linears"] == 2 * (4 + 4 * 3)
    kinds = {report.kind for report in inspect(made("mixtral")[1], quiet=True).tensors}
    assert "block_sparse_moe.experts.*.w1" in kinds


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_missing_or_other_expert_is_refused_by_name(family, made, tmp_path):
    shutil.copytree(made(family)[1], tmp_path / "out")
    name = next(
        n for n in load_file(tmp_path / "out/model.safetensors") if re.search(r"experts\.2\.\w+\.weight_meta", n)
    )
    change(tmp_path / "out", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=re.escape(name)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    shutil.copytree(made(family)[1], tmp_path / "more")
    config = json.loads((tmp_path / "more/config.json").read_text())
    (tmp_path / "more/config.json").write_text(json.dumps({**config, "num_local_experts": 5}))
    with pytest.raises(CheckpointError, match="experts"):
        load_model(tmp_path / "more")


def test_training_what_holds_compressed_experts_is_refused(made, recipe):
    teacher = made("gpt_oss")[0]
    distill = f"distill: {{tokens: 512, sequence_length: 32, batch_size: 2, teacher: {teacher}}}"
    passes = parse_recipe(f"version: 1\npasses: [{distill}]\n").passes
    with pytest.raises(CheckpointError, match=r"experts\.\d+\.\w+ compressed.*cannot be trained"):
        make_plan(recipe().model_copy(update={"passes": passes}), str(made("gpt_oss")[1]))


def test_formats_that_hold_no_experts_are_refused_on_export(made, tmp_path):
    for family, format in (("mixtral", "gptq"), ("gpt_oss", "pack-quantized")):
        with pytest.raises(CheckpointError, match=f"{format} does not hold the compressed experts"):
            convert(made(family)[1], format, tmp_path / format, quiet=True)
