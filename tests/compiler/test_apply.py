"""From a recipe to a checkpoint directory, on tiny models of every family: what is written, resumed and refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, RwkvConfig, Zamba2Config
from transformers.models.llama.modeling_llama import LlamaModel

import sparsify.compiler.apply as run
import sparsify.compiler.calibrate as calibrate
from sparsify.compiler.apply import apply
from sparsify.compiler.planning import make_plan
from sparsify.errors import CalibrationError, CheckpointError, NumericalError, RecipeError, SparsifyError
from sparsify.evaluation import evaluate
from sparsify.formats.reader import open_compressed
from sparsify.model.linear import is_two_four
from sparsify.recipe import parse_recipe
from sparsify.training.qat_linear import kept_positions
from tests.helpers.students import bytes_of
from tests.helpers.tiny import FAMILIES, save_tiny, tiny_text, tiny_tokenizer

JOINT = """
version: 1
calibration: {{source: "file:{text}", samples: 8, sequence_length: 32}}
solver: {{error_propagation: 0.5}}
passes:
  - prune: {{method: sparsegpt}}
  - quantize: {{method: gptq, bits: 4, group_size: 32}}
export: {{format: {format}}}
"""
TUNED = """
version: 1
calibration: {{source: "file:{text}", samples: 64, sequence_length: 32}}
passes:
  - prune: {{method: sparsegpt}}
  - quantize: {{method: gptq, bits: 4, group_size: 32}}
  - tune: {{epochs: 4, learning_rate: 0.02, batch_size: 2, holdout: 0.25}}
"""
DATA_FREE = """
version: 1
passes:
  - prune: {method: magnitude}
  - quantize: {method: rtn, bits: 4, group_size: 32}
"""


@pytest.fixture
def recipe(tmp_path):
    text = tiny_text(tmp_path / "text.txt")

    def make(format="sparse24", *overrides):
        return parse_recipe(JOINT.format(text=text, format=format), overrides=overrides)

    return make


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_becomes_a_two_four_checkpoint(tmp_path, recipe, family):
    source = save_tiny(tmp_path / "source", family)
    result = apply(recipe(), str(source), tmp_path / "out", quiet=True)
    opened = open_compressed(tmp_path / "out")
    layers = {layer["module"] for layer in result.metrics["layers"]}
    assert len(opened.modules) == len(layers) > 0
    for module in opened.modules:
        linear = opened.linear(module)
        assert linear.bits == 4 and linear.group_size == 32 and is_two_four(linear.codes)
        assert torch.isfinite(linear.dense(torch.float32)).all()
    # whatever was not compressed is the source's tensor, in the type of the checkpoint
    source_state = load_file(source / "model.safetensors")
    for name in opened.other_names():
        torch.testing.assert_close(opened.tensor(name), source_state[name].to(torch.bfloat16), rtol=0, atol=0)
    missing = {
        n
        for n in source_state
        if n not in set(opened.other_names()) and n.removesuffix(".weight") not in opened.modules
    }
    assert not {n for n in missing if not n.endswith(".bias")}
    assert {"recipe.yaml", "metrics.json", "README.md", "run.json", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    if family == "mixtral":
        reasons = " ".join(f"{d['module']}: {d['reason']}" for d in result.metrics["dense_modules"])
        assert any("experts" in name for name in layers) and "mlp.gate.weight: routes tokens to experts" in reasons


def test_evaluated_weights_are_the_exported_ones(tmp_path, recipe):
    """The weights a checkpoint decodes to give the errors that were recorded while compressing, on an independent forward."""
    source = save_tiny(tmp_path / "source")
    result = apply(recipe("dense"), str(source), tmp_path / "out", quiet=True)
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    from sparsify.compiler.calibrate import calibration_rows  # the calibration tokens of this very recipe

    class Nowhere:
        work = tmp_path

    tokens = calibration_rows(make_plan(recipe("dense"), str(source)), Nowhere(), True)
    seen = {}
    for layer in result.metrics["layers"]:
        name = layer["module"]

        def note(module, args, name=name):
            seen[name] = args[0].reshape(-1, args[0].shape[-1])

        sparse.get_submodule(name).register_forward_pre_hook(note)
    with torch.no_grad():
        sparse(tokens, use_cache=False)
    for layer in result.metrics["layers"]:
        X = seen[layer["module"]].double()
        W = dense.get_submodule(layer["module"]).weight.double()
        What = sparse.get_submodule(layer["module"]).weight.double()
        error = (X @ (W - What).t()).square().sum() / (X @ W.t()).square().sum()
        assert layer["relative_error"] == pytest.approx(error.item(), rel=0.02)


def test_formats_decode_to_the_same_weights(tmp_path, recipe):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    states = {}
    for format in ("sparse24", "pack-quantized", "dense"):
        apply(recipe(format), str(source), tmp_path / format, quiet=True)
    sparse, packed = open_compressed(tmp_path / "sparse24"), open_compressed(tmp_path / "pack-quantized")
    states = load_file(tmp_path / "dense" / "model.safetensors")
    for module in sparse.modules:
        assert torch.equal(sparse.linear(module).codes, packed.linear(module).codes)
        assert torch.equal(sparse.linear(module).dense(torch.bfloat16), states[f"{module}.weight"])


def test_data_free_recipes_never_run_the_model(tmp_path, monkeypatch):
    source = save_tiny(tmp_path / "source")
    monkeypatch.setattr(calibrate, "Walk", None)
    monkeypatch.setattr(calibrate, "calibration_tokens", None)
    result = apply(parse_recipe(DATA_FREE), str(source), tmp_path / "out", quiet=True)
    assert len(result.metrics["layers"]) == 21
    opened = open_compressed(tmp_path / "out")
    assert all(is_two_four(opened.linear(m).codes) for m in opened.modules)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "mixtral"])
def test_tuned_blocks_come_nearer_to_the_dense_ones(tmp_path, family):
    """Across families; norms and biases are trained too, masks stay, and no block gets worse on what it was not trained on."""
    source = save_tiny(tmp_path / "source", family)
    text = tiny_text(tmp_path / "text.txt")
    tuned = apply(parse_recipe(TUNED.format(text=text)), str(source), tmp_path / "tuned", quiet=True)
    plain = "\n".join(line for line in TUNED.format(text=text).splitlines() if "tune:" not in line)
    apply(parse_recipe(plain), str(source), tmp_path / "plain", quiet=True)
    notes = tuned.metrics["tuning"]
    assert len(notes) == 3 and all(0 <= note["after"] <= note["before"] for note in notes)
    assert notes[0]["after"] < 0.97 * notes[0]["before"], notes
    one, other = open_compressed(tmp_path / "tuned"), open_compressed(tmp_path / "plain")
    first = next(module for module in one.modules if ".0." in module)  # later ones see other inputs
    mask = [kept_positions(opened.linear(first)) for opened in (one, other)]
    assert (mask[0] == mask[1]).float().mean() > 0.95  # a code that was or became zero hides where its mask was
    assert not torch.equal(one.linear(first).codes, other.linear(first).codes)
    assert all(is_two_four(one.linear(module).codes) for module in one.modules)
    moved = [n for n in one.other_names() if not torch.equal(one.tensor(n), other.tensor(n))]
    assert any("norm" in name for name in moved) and not any("embed" in name or "expert" in name for name in moved)


@pytest.mark.parametrize("recipe_text, killed_at", [(JOINT, 0), (JOINT, 1), (JOINT, 2), (TUNED, 1)])
def test_killed_and_resumed_is_byte_identical(tmp_path, monkeypatch, recipe_text, killed_at):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    text = tiny_text(tmp_path / "text.txt")

    def recipe():
        return parse_recipe(recipe_text.format(text=text, format="sparse24"))

    apply(recipe(), str(source), tmp_path / "whole", quiet=True)
    write = run.CheckpointWriter.write_part

    def killed(self, part, linears, tensors):
        if part == f"block-{killed_at:04d}":
            raise KeyboardInterrupt
        write(self, part, linears, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(run.CheckpointWriter, "write_part", killed)
        with pytest.raises(KeyboardInterrupt):
            apply(recipe(), str(source), tmp_path / "again", quiet=True)
    assert not (tmp_path / "again").exists()
    if killed_at:  # a finished part is never overwritten by accident
        with pytest.raises(CheckpointError, match="--resume"):
            apply(recipe(), str(source), tmp_path / "again", quiet=True)
    (tmp_path / "text.txt").unlink()  # a resumed run must not need the text again
    apply(recipe(), str(source), tmp_path / "again", resume=True, quiet=True)
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "again")
    assert not (tmp_path / "again.partial").exists()


def test_resume_with_another_recipe_is_refused(tmp_path, recipe, monkeypatch):
    source = save_tiny(tmp_path / "source")
    monkeypatch.setattr(run.CheckpointWriter, "finish", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        apply(recipe(), str(source), tmp_path / "out", quiet=True)
    with pytest.raises(CheckpointError, match="recipe"):
        apply(recipe("sparse24", "passes.1.quantize.bits=8"), str(source), tmp_path / "out", resume=True, quiet=True)


def test_float16_checkpoints_stay_float16(tmp_path, recipe):
    source = save_tiny(tmp_path / "source", dtype=torch.float16)
    apply(recipe(), str(source), tmp_path / "out", quiet=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    opened = open_compressed(tmp_path / "out")
    assert {opened.linear(m).scale.dtype for m in opened.modules} == {torch.float16}


def test_what_cannot_be_compressed_stays_dense_and_is_listed(tmp_path, recipe):
    source = save_tiny(tmp_path / "source", intermediate_size=120)  # 120 is no multiple of 16
    plan = make_plan(recipe(), str(source))
    assert all("down_proj" in name for name in plan.dense_modules() if "mlp" in name)
    result = apply(recipe(), str(source), tmp_path / "out", quiet=True)
    reasons = {d["module"]: d["reason"] for d in result.metrics["dense_modules"]}
    assert "120 inputs" in reasons["model.layers.0.mlp.down_proj"]
    assert not any("down_proj" in m for m in open_compressed(tmp_path / "out").modules)


def test_ignored_linears_stay_as_they_were(tmp_path, recipe):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    apply(recipe("sparse24", "ignore=[lm_head, o_proj]"), str(source), tmp_path / "out", quiet=True)
    opened = open_compressed(tmp_path / "out")
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(opened.tensor(name), load_file(source / "model.safetensors")[name])


def test_nothing_to_do_is_refused(tmp_path, recipe):
    source = save_tiny(tmp_path / "source")
    with pytest.raises(RecipeError, match="changes no linear"):
        make_plan(recipe("sparse24", 'ignore=["*"]'), str(source))


@pytest.fixture
def rwkv(tmp_path):
    """Blocks that return three values, and whose class divides weights by two every six blocks unless told otherwise."""

    def make(every):
        config = RwkvConfig(
            vocab_size=96, hidden_size=64, attention_hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            context_length=64, rescale_every=every, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
        tiny_tokenizer().save_pretrained(tmp_path / "source")
        return tmp_path / "source"

    return make


def test_blocks_that_return_several_values(tmp_path, recipe, rwkv):
    source = rwkv(0)
    assert len(apply(recipe(), str(source), tmp_path / "out", quiet=True).metrics["layers"]) == 2 * 7
    apply(recipe("dense"), str(source), tmp_path / "dense", quiet=True)
    ids = torch.arange(4, 20)[None]
    ours, dense = (AutoModelForCausalLM.from_pretrained(tmp_path / f, dtype=torch.float32) for f in ("out", "dense"))
    compressed = open_compressed(tmp_path / "out")
    for name in compressed.modules:
        dense.get_submodule(name).weight.data = compressed.linear(name).dense(torch.float32)
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, dense(ids).logits, atol=1e-4)


def test_a_class_that_changes_its_weights_is_refused_in_the_plan(recipe, rwkv):
    for asked in (recipe(), parse_recipe(DATA_FREE)):
        with pytest.raises(
            CheckpointError, match="divides weights by two every 6 blocks .* set it to 0, which changes nothing"
        ):
            make_plan(asked, str(rwkv(6)))


def test_a_class_that_runs_its_blocks_in_another_way_is_refused_in_the_plan(tmp_path, recipe, monkeypatch):
    source = save_tiny(tmp_path / "source")
    make_plan(recipe(), str(source))
    whole = LlamaModel.forward

    def twice(self, *args, **kwargs):
        self.layers[0](torch.zeros(1, 16, 64))
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", twice)
    with pytest.raises(CheckpointError, match="LlamaForCausalLM does not call its blocks one after another"):
        make_plan(recipe(), str(source))
    make_plan(parse_recipe(DATA_FREE), str(source))


def test_sequences_longer_than_the_table_of_positions_are_refused(tmp_path, recipe):
    """OPT has 128 of them; a rotary model goes on."""
    source = save_tiny(tmp_path / "source", "opt")
    longer = recipe("sparse24", "calibration.sequence_length=160")
    with pytest.raises(
        CalibrationError, match=r"positions for 128 tokens, and calibration.sequence_length is 160; set it to 128"
    ):
        apply(longer, str(source), tmp_path / "out", quiet=True)
    with pytest.raises(
        SparsifyError, match=r"positions for 128 tokens, and the text is read 160 at a time: give --sequence-length"
    ):
        evaluate(source, None, tmp_path / "text.txt", 160, 2, quiet=True)
    apply(longer, str(save_tiny(tmp_path / "rotary")), tmp_path / "out", quiet=True)
    assert evaluate(tmp_path / "out", None, tmp_path / "text.txt", 160, 2, quiet=True).first.tokens == 2 * 159


def test_blocks_that_share_their_weights_are_refused_in_the_plan(tmp_path):
    config = Zamba2Config(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_mem_blocks=1,
        layers_block_type=["mamba", "hybrid"] * 2, mamba_d_state=8, mamba_headdim=16, n_mamba_heads=8, mamba_ngroups=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    with pytest.raises(
        CheckpointError, match=r"Zamba2ForCausalLM uses the same weights in several blocks \(model.layers.3.shared"
    ):
        make_plan(parse_recipe(DATA_FREE), str(tmp_path / "source"))


def test_too_little_text_is_refused_and_leaves_no_output(tmp_path, recipe):
    source = save_tiny(tmp_path / "source")
    with pytest.raises(CalibrationError, match="samples"):
        apply(recipe("sparse24", "calibration.samples=500"), str(source), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_nan_weights_are_named(tmp_path, recipe):
    source = save_tiny(tmp_path / "source")
    state = load_file(source / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericalError, match=r"model\.layers\.1"):
        apply(recipe(), str(source), tmp_path / "out", quiet=True)
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj"):
        apply(parse_recipe(DATA_FREE), str(source), tmp_path / "out2", quiet=True)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out2").exists()


def test_truncated_checkpoint_is_refused(tmp_path, recipe):
    source = save_tiny(tmp_path / "source")
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        apply(recipe(), str(source), tmp_path / "out", quiet=True)


def test_a_compressed_input_is_dequantized_and_keeps_its_zeros(tmp_path, recipe):
    source = save_tiny(tmp_path / "source")
    apply(recipe(), str(source), tmp_path / "out", quiet=True)
    plan = make_plan(recipe(), str(tmp_path / "out"))
    assert plan.checkpoint.quantization == "sparse24, 4-bit 2:4"
    assert {scheme.prune for scheme in plan.schemes.values()} == {"keep"}


def test_existing_output_is_refused(tmp_path, recipe):
    source = save_tiny(tmp_path / "source")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        apply(recipe(), str(source), tmp_path / "out", quiet=True)


def test_sharded_checkpoints_give_the_same_result(tmp_path, recipe):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(sharded, max_shard_size="60KB")
    for file in source.glob("tokenizer*"):
        shutil.copy(file, sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for name in ("source", "sharded"):
        apply(recipe(), str(tmp_path / name), tmp_path / f"out-{name}", quiet=True)
    one, other = ((tmp_path / f"out-{name}" / "model.safetensors").read_bytes() for name in ("source", "sharded"))
    assert one == other


def test_estimated_size_is_the_size(tmp_path, recipe):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    for format in ("sparse24", "pack-quantized", "dense"):
        plan = make_plan(recipe(format), str(source))
        result = apply(recipe(format), str(source), tmp_path / format, quiet=True)
        estimated = plan.estimate().output_bytes
        assert estimated == pytest.approx(result.metrics["sizes"]["compressed_bytes"], rel=0.02)
