"""What becomes of tensors that no pass compresses, and of zeros that are there already: nothing changes without a word."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config

import sparsify.model.sequential as sequential
from sparsify.compiler.apply import apply
from sparsify.compiler.checkpoint_names import refuse_unstorable
from sparsify.compiler.planning import make_plan
from sparsify.compiler.summary import summary
from sparsify.errors import CheckpointError, NumericalError, RecipeError
from sparsify.formats.inspect import inspect
from sparsify.formats.reader import open_compressed
from sparsify.model.checkpoint import Checkpoint
from sparsify.model.permissions import allowing_unknown
from sparsify.model.pretrained import load_causal_lm
from sparsify.recipe import parse_recipe
from sparsify.solver.masks.magnitude import magnitude_mask
from tests.helpers.tiny import save_tiny, tiny_text

RTN = "version: 1\npasses: [{quantize: {method: rtn, bits: 4, group_size: 32}}]\nexport: {format: sparse24}\n"
PRUNED = "version: 1\npasses: [{prune: {method: magnitude}}]\n"
ON_TEXT = """
version: 1
calibration: {{source: "file:{text}", samples: 8, sequence_length: 32}}
solver: {{error_propagation: {propagation}}}
passes: [{passes}]
export: {{format: sparse24}}
"""
GPTQ = "quantize: {method: gptq, bits: 4, group_size: 32}"
NORM = "model.layers.1.input_layernorm.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def on_text(tmp_path, *passes, propagation=0.0):
    text = tiny_text(tmp_path / "text.txt")
    steps = ", ".join(f"{{{step}}}" for step in passes)
    return parse_recipe(ON_TEXT.format(text=text, propagation=propagation, passes=steps))


def changed(source, change):
    """Change the tensors of a checkpoint of one file. Returns them."""
    state = load_file(source / "model.safetensors")
    state = change(state) or state
    save_file(state, source / "model.safetensors", {"format": "pt"})
    return state


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def deepseek(directory, dtype):
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=96, hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=16,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).save_pretrained(directory)

    def bias(state):
        for name in state:
            if "e_score" in name:
                state[name] = 14 + torch.rand(4) / 64

    return changed(directory, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_router_bias_stays_float32_to_the_bit(tmp_path, dtype):
    state = deepseek(tmp_path / "source", dtype)
    apply(parse_recipe(PRUNED), str(tmp_path / "source"), tmp_path / "out", quiet=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    (name,) = [name for name in state if "e_score" in name]
    assert written[name].dtype == torch.float32 and same_bits(written[name], state[name])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["kept_wide"] == [name]
    shown = [str(cell) for column in summary(metrics, "t").columns for cell in column.cells]
    assert "1 tensor: model.layers.*.mlp.gate.e_score_correction_bias" in shown
    assert {t.dtype for n, t in written.items() if t.is_floating_point() and n != name} == {torch.bfloat16}


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_wide_tensors_among_sixteen_bits_stay(tmp_path, wide):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    state = changed(source, lambda s: {**s, NORM: s[NORM].to(wide) + 1e-5})
    apply(on_text(tmp_path, "prune: {method: sparsegpt}", GPTQ), str(source), tmp_path / "out", quiet=True)
    opened = open_compressed(tmp_path / "out")
    for name in opened.other_names():
        assert same_bits(opened.tensor(name), state[name]), name
    assert opened.config["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.arange(4, 20)[None]).logits).all()


def test_a_float32_model_is_cast_as_the_recipe_says(tmp_path):
    source = save_tiny(tmp_path / "source")
    state = changed(source, lambda s: {**s, NORM: s[NORM].bfloat16()})
    apply(parse_recipe(PRUNED), str(source), tmp_path / "out", quiet=True)
    opened = open_compressed(tmp_path / "out")
    for name in opened.other_names():
        assert same_bits(opened.tensor(name), state[name].bfloat16())


def test_what_does_not_come_along_is_said(tmp_path):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    (source / "hf_token.txt").write_text("secret")
    plan = make_plan(parse_recipe(PRUNED), str(source))
    assert plan.to_json()["left_behind"] == ["hf_token.txt"] and "hf_token.txt" in plan.table().caption
    metrics = apply(parse_recipe(PRUNED), str(source), tmp_path / "out", quiet=True).metrics
    assert metrics["left_behind"] == ["hf_token.txt"] and not (tmp_path / "out" / "hf_token.txt").exists()
    shown = [str(cell) for column in summary(metrics, "t").columns for cell in column.cells]
    assert any("hf_token.txt" in cell for cell in shown) and metrics["kept_wide"] == []


def test_one_float16_tensor_makes_no_float16_model(tmp_path):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    state = changed(source, lambda s: {**s, NORM: s[NORM].half() + 2**-10})
    apply(parse_recipe(RTN), str(source), tmp_path / "out", quiet=True)
    opened = open_compressed(tmp_path / "out")
    assert opened.config["dtype"] == "bfloat16"
    assert {opened.linear(module).scale.dtype for module in opened.modules} == {torch.bfloat16}
    for name in opened.other_names():
        assert same_bits(opened.tensor(name), state[name]), name
    apply(parse_recipe(RTN, overrides=["export.dtype=bfloat16"]), str(source), tmp_path / "cast", quiet=True)
    assert same_bits(open_compressed(tmp_path / "cast").tensor(NORM), state[NORM].bfloat16())


def test_nan_in_a_float32_tensor_is_named_before_anything_is_written(tmp_path):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)

    def damage(state):
        state[NORM] = state[NORM].float()
        state[NORM][3] = float("inf")

    changed(source, damage)
    with pytest.raises(NumericalError, match=rf"{NORM}.*NaN or Inf"):
        apply(parse_recipe(PRUNED), str(source), tmp_path / "out", quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("name", [NORM, "model.embed_tokens.weight", UP])
def test_a_cast_that_overflows_is_refused_by_name_before_anything_is_written(tmp_path, name):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)

    def enlarge(state):
        state[name].view(-1)[5] = 70144.0

    changed(source, enlarge)
    recipe = parse_recipe(PRUNED, overrides=["export.dtype=float16"])
    with pytest.raises(NumericalError, match=rf"{name}.*70144.*float16"):
        apply(recipe, str(source), tmp_path / "out", quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
    apply(parse_recipe(PRUNED), str(source), tmp_path / "out", quiet=True)


def test_a_float32_model_is_not_read_for_what_bfloat16_holds(tmp_path, monkeypatch):
    source = save_tiny(tmp_path / "source")
    read = []
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: read.append(name))
    refuse_unstorable(make_plan(parse_recipe(PRUNED), str(source)))
    assert not read
    monkeypatch.undo()
    changed(source, lambda s: s[NORM].view(-1)[5:6].fill_(3.4e38) and None)  # rounds to infinity
    with pytest.raises(NumericalError, match=rf"{NORM}.*3\.4e\+38 leaves the range of bfloat16"):
        apply(parse_recipe(PRUNED), str(source), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def extra(state):
    layer = {n.replace(".2.", ".3."): t.clone() for n, t in state.items() if ".layers.2." in n}
    more = {"model.layers.3.eh_proj.weight": torch.randn(64, 128), "counter": torch.tensor([3, 4])}
    return {**state, **layer, **more}


@pytest.mark.parametrize("passes", [["prune: {method: magnitude}"], ["prune: {method: sparsegpt}", GPTQ]], ids=len)
def test_tensors_that_the_model_does_not_know_are_carried_over_and_named(tmp_path, passes):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    before = set(load_file(source / "model.safetensors"))
    state = changed(source, extra)
    unknown = {name: tensor for name, tensor in state.items() if name not in before}
    recipe = on_text(tmp_path, *passes) if len(passes) > 1 else parse_recipe(PRUNED)
    with pytest.raises(
        CheckpointError, match=r"holds counter, model\.layers\.3.*\(and 8 more\), which LlamaForCausalLM"
    ):
        make_plan(recipe, str(source))
    with allowing_unknown(True):
        plan = make_plan(recipe, str(source))
        assert set(plan.to_json()["carried"]["tensors"]) == set(unknown)
        assert "model.layers.3.*" in plan.table().caption
        result = apply(recipe, str(source), tmp_path / "out", quiet=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in unknown.items():
        assert same_bits(written[name], tensor), name
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics["carried"]["tensors"]) == set(unknown)
    assert metrics["carried"]["bytes"] == sum(tensor.nbytes for tensor in unknown.values())
    assert metrics["sizes"]["compressed_bytes"] == sum(tensor.nbytes for tensor in written.values())
    assert metrics["sizes"]["dense_bytes"] == sum(tensor.nbytes for tensor in state.values())
    shown = [str(cell) for column in summary(result.metrics, "t").columns for cell in column.cells]
    assert any("model.layers.3.*" in cell and "counter" in cell for cell in shown)
    load_causal_lm(tmp_path / "out", dtype=torch.float32)  # the run was told, so nobody has to be told again
    assert inspect(tmp_path / "out", quiet=True).not_compared is None


def test_a_layer_for_further_tokens_is_carried_over_unasked(tmp_path):
    """DeepSeek numbers it behind the last block; its class in transformers does not build it."""
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    state = changed(source, lambda s: {n: t for n, t in extra(s).items() if n != "counter"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    result = apply(parse_recipe(PRUNED), str(source), tmp_path / "out", quiet=True)
    behind = {name for name in state if ".layers.3." in name}
    assert set(result.metrics["carried"]["tensors"]) == behind
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(same_bits(written[name], state[name]) for name in behind)
    load_causal_lm(source, dtype=torch.float32)


def test_a_depth_pass_keeps_a_layer_behind_the_last_behind_the_last(tmp_path):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    state = changed(source, extra)
    recipe = parse_recipe("version: 1\npasses: [{depth: {method: deepest, drop: 1}}]\nexport: {format: dense}\n")
    with allowing_unknown(True):
        apply(recipe, str(source), tmp_path / "out", quiet=True)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("model.layers.3.eh_proj.weight", "model.layers.3.mlp.up_proj.weight", "counter"):
        assert same_bits(written[name.replace(".3.", ".2.")], state[name]), name
    assert not any(".layers.3." in name for name in written)


def make_two_four(source, wanted=lambda name: True):
    """Prune the linears of a checkpoint by magnitude, half of one linear's rows further. Returns the tensors."""

    def prune(state):
        for name, tensor in state.items():
            if ".layers." in name and tensor.dim() == 2 and wanted(name):
                state[name] = tensor * magnitude_mask(tensor)
        state[UP][::2, ::4] = 0

    return changed(source, prune)


@pytest.mark.parametrize("propagation", [0.0, 0.5])
@pytest.mark.parametrize(
    "passes",
    [
        ["rtn"],
        [GPTQ],
        ["prune: {method: sparsegpt}"],
        ["prune: {method: wanda}", GPTQ],
        ["prune: {method: keep}", GPTQ],
    ],
    ids=str,
)
def test_zeros_of_a_two_four_model_stay_zero(tmp_path, passes, propagation):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    state = make_two_four(source)
    recipe = parse_recipe(RTN) if passes == ["rtn"] else on_text(tmp_path, *passes, propagation=propagation)
    plan = make_plan(recipe, str(source))
    assert all(scheme.prune == "keep" for scheme in plan.schemes.values())
    assert any("2:4 already, zeros kept" in str(cell) for column in plan.table().columns for cell in column.cells)
    result = apply(recipe, str(source), tmp_path / "out", quiet=True)
    opened = open_compressed(tmp_path / "out")
    assert len(opened.modules) == 21
    for module in opened.modules:
        linear, given = opened.linear(module), state[f"{module}.weight"]
        assert linear.pattern == "2:4" and not linear.dense()[given == 0].any()
        if linear.bits == 16:
            assert torch.equal(linear.dense(), given)
        else:
            assert (linear.dense() != 0).float().mean() > 0.35
    assert set(result.metrics["kept_zeros"]) == set(plan.schemes)
    shown = [str(cell) for column in summary(result.metrics, "t").columns for cell in column.cells]
    assert "in 21 linears that were 2:4 already" in shown


def test_zeros_stay_where_a_merged_neighbour_has_none(tmp_path):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    state = make_two_four(source, lambda name: "q_proj" in name or "down_proj" in name)
    apply(parse_recipe(RTN), str(source), tmp_path / "out", quiet=True)
    opened = open_compressed(tmp_path / "out")
    for module, scheme in opened.modules.items():
        kept = "q_proj" in module or "down_proj" in module
        assert scheme.pattern == ("2:4" if "down_proj" in module else "dense")
        assert not kept or not opened.linear(module).dense()[state[f"{module}.weight"] == 0].any()


def test_one_group_of_three_is_no_mask(tmp_path):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    make_two_four(source)

    def spoil(state):
        state[UP][-1, -4:] = 0.25  # behind the rows that a plan looks at

    changed(source, spoil)
    result = apply(parse_recipe(PRUNED), str(source), tmp_path / "out", quiet=True)
    assert UP.removesuffix(".weight") not in result.metrics["kept_zeros"] and len(result.metrics["kept_zeros"]) == 20
    keep = parse_recipe(PRUNED.replace("magnitude", "keep"))
    with pytest.raises(RecipeError, match=rf"{UP}.* is not"):
        apply(keep, str(source), tmp_path / "again", quiet=True)
    dense = save_tiny(tmp_path / "dense", dtype=torch.bfloat16)
    with pytest.raises(RecipeError, match=r"model\.layers\.0.* is not"):
        make_plan(keep, str(dense))


def test_a_run_that_can_compress_nothing_is_refused_with_the_reason(tmp_path, monkeypatch):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    monkeypatch.setattr(sequential, "find_groups", lambda block, *_: ([], {"mlp.up_proj": "does not read every token"}))
    with pytest.raises(CheckpointError, match="none of the 21 linears.*does not read every token"):
        apply(on_text(tmp_path, GPTQ), str(source), tmp_path / "out", quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "text.txt"}
