"""The depth pass through `apply`: what is written loads in stock transformers and says what the model says without the blocks."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import sparsify.compiler.apply as run
from sparsify.compiler.apply import apply
from sparsify.compiler.planning import make_plan
from sparsify.compiler.shorten import teacher_blocks
from sparsify.compiler.shorten.choose import Choice
from sparsify.compiler.shorten.source import open_source, structures_of
from sparsify.compiler.shorten.write import renumbered, shortened_config, verify, write_shortened
from sparsify.depth.layers import Layer, as_layers
from sparsify.errors import CheckpointError, RecipeError
from sparsify.formats.reader import open_compressed
from sparsify.model.checkpoint import open_checkpoint
from sparsify.model.linear import is_two_four
from sparsify.model.sublayers import Sublayer
from sparsify.recipe import parse_recipe
from sparsify.runtime.module import Sparse24Linear
from tests.helpers.tiny import FAMILIES, save_tiny, tiny_text, tiny_tokenizer

IDS = torch.randint(4, 96, (2, 24), generator=torch.Generator().manual_seed(2))  # longer than a sliding window
LORA = "lora: {tokens: 2k, samples: 40, batch_size: 4, sequence_length: 32, precision: float32, learning_rate: 0.02}"
FOUR_BITS = ["prune: {method: sparsegpt}", "quantize: {method: gptq, bits: 4, group_size: 32}"]


@pytest.fixture
def text(tmp_path):
    return tiny_text(tmp_path / "text.txt", 2000)


@pytest.fixture
def recipe(text):
    def make(*passes, format="dense", more=""):
        body = "".join(f"  - {step}\n" for step in passes)
        return parse_recipe(
            f'version: 1\ncalibration: {{source: "file:{text}", samples: 8, sequence_length: 32}}\n'
            f"export: {{format: {format}{more}}}\npasses:\n{body}"
        )

    return make


@torch.no_grad()
def logits(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(IDS, use_cache=False).logits


@torch.no_grad()
def logits_without(directory, gone):
    """Logits of the whole model in stock transformers whose removed sublayers add zeros."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))

    def zero(module, args, output):
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    for block, kind in gone:
        names = ("self_attn", "attention") if kind == "attention" else ("fc2", "mlp")
        module = next(getattr(layers[block], name) for name in names if hasattr(layers[block], name))
        module.register_forward_hook(zero)
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_layers_go_and_the_rest_says_the_same(tmp_path, family):
    source = open_source(save_tiny(tmp_path / "source", family, num_hidden_layers=4))
    kept = [Sublayer(block, position) for block in (0, 3) for position in (0, 1)]
    write_shortened(source, Choice(kept, as_layers(kept), {}), {}, tmp_path / "short")
    written = json.loads((tmp_path / "short" / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "short").config.num_hidden_layers == 2
    gone = [(block, kind) for block in (1, 2) for kind in ("attention", "feed_forward")]
    torch.testing.assert_close(logits(tmp_path / "short"), logits_without(tmp_path / "source", gone))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "source").config.to_dict()
    if "layer_types" in whole:
        assert written["layer_types"] == [whole["layer_types"][0], whole["layer_types"][3]]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_neox"])
def test_halves_of_layers_pair_up_and_the_rest_says_the_same(tmp_path, family):
    source = open_source(save_tiny(tmp_path / "source", family, num_hidden_layers=5))
    gone = [(0, "feed_forward"), (1, "attention"), (3, "attention"), (4, "feed_forward")]
    everything = [Sublayer(block, position) for block in range(5) for position in (0, 1)]
    kept = [sublayer for sublayer in everything if (sublayer.block, sublayer.kind) not in gone]
    layers = as_layers(kept)
    assert layers == [Layer(0, 1), Layer(2, 2), Layer(None, 3), Layer(4, None)]
    choice = Choice(kept, layers, {})
    structures = structures_of(source, layers)
    write_shortened(source, choice, structures, tmp_path / "short")
    verify(source, choice, structures, tmp_path / "short")
    torch.testing.assert_close(logits(tmp_path / "short"), logits_without(tmp_path / "source", gone))


def test_a_block_whose_halves_run_side_by_side_is_not_taken_apart(tmp_path, recipe):
    source = save_tiny(tmp_path / "source", "gpt_neox")
    with pytest.raises(
        CheckpointError, match="gpt_neox.layers.0 cannot be taken apart .* do not run one after another"
    ):
        apply(recipe("depth: {method: finercut, drop: 1, protect_first: 0}"), str(source), tmp_path / "out", quiet=True)


def test_a_model_that_the_new_config_does_not_describe_is_refused(tmp_path, monkeypatch):
    source = open_source(save_tiny(tmp_path / "source", "gemma2", num_hidden_layers=4))
    kept = [Sublayer(block, position) for block in (1, 3) for position in (0, 1)]

    def wrong(checkpoint, layers, blocks):
        config = shortened_config(checkpoint, layers, blocks)
        return config | {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4}

    monkeypatch.setattr("sparsify.compiler.shorten.write.shortened_config", wrong)
    choice = Choice(kept, as_layers(kept), {})
    write_shortened(source, choice, {}, tmp_path / "short")
    with pytest.raises(CheckpointError, match="decides something by the number of a layer"):
        verify(source, choice, {}, tmp_path / "short")


SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
PERIODIC = {
    "qwen2_moe": {
        "decoder_sparse_step": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False,
    },
}  # fmt: skip


def save_family(directory, family, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SIZES | settings), dtype=torch.bfloat16)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", PERIODIC)
def test_layers_whose_making_depends_on_their_number(tmp_path, recipe, family):
    """Every second one holds experts, or mixes tokens in another way: one alone cannot go, two can. The plan says so."""
    source = save_family(tmp_path / "source", family, **PERIODIC[family])
    with pytest.raises(
        CheckpointError, match="decides by the number of a layer what it is made of: layer . would become"
    ):
        make_plan(recipe("depth: {method: angular, drop: 1}"), str(source))
    make_plan(
        recipe("depth: {method: angular, drop: 1, protect_last: 0, protect_first: 0}"), str(source)
    )  # the last may go
    apply(recipe("depth: {method: angular, drop: 2}"), str(source), tmp_path / "out", quiet=True)
    note = json.loads((tmp_path / "out" / "metrics.json").read_text())["depth"]
    kept = [block for block in range(6) if not note["first"] <= block < note["first"] + 2]
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    short = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for layer, block in zip(short.model.layers, kept, strict=True):
        old = whole.model.layers[block].state_dict()
        assert layer.state_dict().keys() == old.keys()
        assert all(torch.equal(tensor, old[name]) for name, tensor in layer.state_dict().items())


def test_a_choice_that_the_class_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    source = open_source(save_family(tmp_path / "source", "qwen2_moe", **PERIODIC["qwen2_moe"]))
    kept = [Sublayer(block, position) for block in (0, 1, 2, 3, 5) for position in (0, 1)]
    with pytest.raises(CheckpointError, match="layer 5 would become layer 4, which differs in mlp"):
        write_shortened(source, Choice(kept, as_layers(kept), {}), {}, tmp_path / "short")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_several_streams_of_hidden_states_are_refused_in_the_plan(tmp_path, recipe):
    more = dict(
        num_kv_shared_layers=2, sliding_window=32, vocab_size_per_layer_input=96, hidden_size_per_layer_input=16
    )
    more |= dict(
        layer_types=["sliding_attention", "full_attention"] * 3,
        intermediate_size=[128] * 6,
        activation_sparsity_pattern=[0.0] * 6,
        laurel_rank=8,
    )
    source = save_family(tmp_path / "source", "gemma3n_text", **more)
    for settings in ("method: angular, drop: 1", "method: finercut, drop: 2"):
        with pytest.raises(CheckpointError, match="Gemma3nForCausalLM passes 4 streams of hidden states"):
            make_plan(recipe(f"depth: {{{settings}}}"), str(source))


@pytest.mark.parametrize(
    "settings", ["method: angular, drop: 2", "method: deepest, drop: 40%", "method: finercut, drop: 4"]
)
def test_apply_writes_the_model_without_what_it_names(tmp_path, recipe, settings):
    source = save_tiny(tmp_path / "source", num_hidden_layers=5, dtype=torch.bfloat16)
    made = apply(recipe(f"depth: {{{settings}}}"), str(source), tmp_path / "out", quiet=True)
    depth = made.metrics["depth"]
    assert (
        made.metrics["base_model"] == str(source) and made.metrics["recipe"]["passes"][0]["depth"]["method"] in settings
    )
    assert depth["layers_before"] == 5 and len(depth["removed"]) == 4
    gone = [tuple(entry) for entry in depth["removed"]]
    torch.testing.assert_close(logits(tmp_path / "out"), logits_without(source, gone), rtol=1e-4, atol=1e-4)
    assert made.metrics["sizes"]["dense_bytes"] == open_checkpoint(source).nbytes()
    assert (tmp_path / "out" / "tokenizer.json").is_file() and not list(tmp_path.glob("out.partial*"))


@pytest.mark.parametrize(
    "settings", ["replacement: layer", "replacement: feed-forward", "replacement: layer, llm_epochs: 2"]
)
def test_a_replacement_stands_for_the_removed_layers(tmp_path, recipe, settings):
    source = save_tiny(tmp_path / "source", num_hidden_layers=6, dtype=torch.bfloat16)
    passes = f"depth: {{method: streamline, drop: 2, {settings}, epochs: 6, batch_size: 2, learning_rate: 0.02}}"
    made = apply(recipe(passes), str(source), tmp_path / "out", quiet=True)
    note = made.metrics["depth"]
    assert note["layers_after"] == 4 and note["count"] == 3
    assert note["replacement"]["after"] < note["replacement"]["before"]
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    old = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    layer = new.model.layers[note["first"]]
    if "feed-forward" in settings:
        assert not any(p.any() for p in layer.self_attn.parameters())
        x = torch.randn(1, 7, 64)
        rotary = new.model.rotary_emb(x, torch.arange(7)[None])
        torch.testing.assert_close(
            layer(x, position_embeddings=rotary), x + layer.mlp(layer.post_attention_layernorm(x)), rtol=0, atol=0
        )
    else:
        assert layer.self_attn.o_proj.weight.any()
    begun = old.model.layers[note["first"]].mlp.up_proj.weight
    assert not torch.equal(layer.mlp.up_proj.weight, begun) and (layer.mlp.up_proj.weight - begun).norm() < begun.norm()
    after = old.model.layers[note["first"] + 3].mlp.up_proj.weight
    assert torch.equal(new.model.layers[note["first"] + 1].mlp.up_proj.weight, after)
    if "llm" in settings:
        assert note["replacement"]["next_token"]["after"] <= note["replacement"]["next_token"]["before"]


@pytest.mark.parametrize("order", ["depth first", "depth last"])
def test_fewer_layers_each_sparse_and_four_bit(tmp_path, recipe, order):
    source = save_tiny(tmp_path / "source", num_hidden_layers=6, dtype=torch.bfloat16)
    depth = "depth: {method: finercut, drop: 5}"
    compress = [*FOUR_BITS, "tune: {epochs: 1}"]
    passes = [depth, *compress] if order == "depth first" else [*compress, depth]
    made = apply(
        recipe(*passes, LORA, format="sparse24", more=", head: {bits: 8, group_size: 64}"),
        str(source), tmp_path / "out", quiet=True,
    )  # fmt: skip
    note, layers = made.metrics["depth"], made.metrics["depth"]["layers"]
    assert any(None in layer for layer in layers), "the test wants a layer of one half"
    compressed = open_compressed(tmp_path / "out")
    assert len(compressed.modules) == 7 * note["layers_after"] + 1 and made.metrics["head"]["bits"] == 8
    for module, scheme in compressed.modules.items():
        linear = compressed.linear(module)
        if module != "lm_head":
            assert (scheme.bits, scheme.pattern) == (4, "2:4") and is_two_four(linear.dense())
            attention, feed_forward = layers[int(module.split(".")[2])]
            absent = (attention is None and "self_attn" in module) or (feed_forward is None and "mlp" in module)
            assert linear.is_zero() == absent, f"{module}: training must not bring a removed sublayer back"
    assert torch.isfinite(logits(tmp_path / "out")).all()
    assert {layer["block"] for layer in made.metrics["layers"]} == set(range(note["layers_after"]))
    assert made.metrics["training"][0]["teacher"] == str(source)
    assert any(layer["relative_error"] for layer in made.metrics["layers"])


def test_a_dense_model_heals_toward_the_whole_one(tmp_path, recipe):
    source = save_tiny(tmp_path / "source", num_hidden_layers=5, dtype=torch.bfloat16)
    lora = LORA.replace("2k", "8k").replace("0.02", "0.005")
    healed = apply(recipe("depth: {method: angular, drop: 2}", lora), str(source), tmp_path / "healed", quiet=True)
    apply(recipe("depth: {method: angular, drop: 2}"), str(source), tmp_path / "cut", quiet=True)
    training = healed.metrics["training"][0]
    assert training["last"]["loss"] < training["first"]["loss"] and training["teacher"] == str(source)
    assert healed.metrics["layers"] == [] and healed.metrics["sizes"]["bits_per_weight"] == 16
    cut, after = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "healed"))
    assert set(cut) == set(after) and all(after[name].dtype == torch.bfloat16 for name in after)
    assert not torch.equal(cut["model.layers.1.mlp.up_proj.weight"], after["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(cut["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_a_compressed_model_is_shortened_as_it_is(tmp_path, recipe):
    source = save_tiny(tmp_path / "source", num_hidden_layers=5, dtype=torch.bfloat16)
    apply(recipe(*FOUR_BITS, format="sparse24"), str(source), tmp_path / "compressed", quiet=True)
    made = apply(
        recipe("depth: {method: deepest, drop: 2}", format="sparse24"),
        str(tmp_path / "compressed"),
        tmp_path / "out",
        quiet=True,
    )
    before, after = (
        load_file(tmp_path / "compressed" / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    moved = {0: 0, 1: 1, 4: 2}
    for old, new in moved.items():
        for name in before:
            if f".layers.{old}." in name:
                assert torch.equal(before[name], after[name.replace(f".{old}.", f".{new}.")])
    assert made.metrics["depth"]["layers"] == [[0, 0], [1, 1], [4, 4]]
    gone = [(block, kind) for block in (2, 3) for kind in ("attention", "feed_forward")]
    torch.testing.assert_close(logits(tmp_path / "out"), logits_without(tmp_path / "compressed", gone))


def test_an_interrupted_run_does_not_choose_again(tmp_path, recipe, monkeypatch):
    source = save_tiny(tmp_path / "source", num_hidden_layers=5, dtype=torch.bfloat16)
    asked = recipe("depth: {method: angular, drop: 2}", *FOUR_BITS, format="sparse24")
    apply(asked, str(source), tmp_path / "whole", quiet=True)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "compress_on_data", killed)
        with pytest.raises(KeyboardInterrupt):
            apply(asked, str(source), tmp_path / "out", quiet=True)
    with pytest.raises(CheckpointError, match="beginning of an interrupted run; continue it with --resume"):
        apply(asked, str(source), tmp_path / "out", quiet=True)
    with pytest.raises(CheckpointError, match="begun with another recipe"):
        other = recipe("depth: {method: angular, drop: 1}", *FOUR_BITS, format="sparse24")
        apply(other, str(source), tmp_path / "out", resume=True, quiet=True)
    monkeypatch.setattr(run, "shorten", killed)
    apply(asked, str(source), tmp_path / "out", resume=True, quiet=True)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == other


def test_a_result_that_was_not_compared_is_made_again(tmp_path, recipe, monkeypatch):
    source = save_tiny(tmp_path / "source", num_hidden_layers=4, dtype=torch.bfloat16)
    asked = recipe("depth: {method: deepest, drop: 1}")

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sparsify.compiler.shorten.verify", killed)
        with pytest.raises(KeyboardInterrupt):
            apply(asked, str(source), tmp_path / "out", quiet=True)
    assert (tmp_path / "out.partial" / "depth").exists()
    compared = []
    monkeypatch.setattr("sparsify.compiler.shorten.verify", lambda *arguments: compared.append(verify(*arguments)))
    apply(asked, str(source), tmp_path / "out", resume=True, quiet=True)
    assert len(compared) == 1


def test_a_smaller_replacement_counts_as_what_it_is(tmp_path, recipe):
    source = save_tiny(tmp_path / "source", num_hidden_layers=6, dtype=torch.bfloat16)
    passes = "depth: {method: streamline, target: {parameters: 0.65}, replacement: feed-forward, epochs: 1}"
    made = apply(recipe(passes), str(source), tmp_path / "out", quiet=True)
    parameters = made.metrics["depth"]["parameters"]
    assert parameters["after"] <= 0.65 * parameters["before"] and made.metrics["depth"]["count"] == 3
    layer = AutoModelForCausalLM.from_pretrained(source).model.layers[0]
    attention = sum(p.numel() for m in (layer.self_attn, layer.input_layernorm) for p in m.parameters())
    whole = sum(p.numel() for p in layer.parameters())
    assert parameters["before"] - parameters["after"] == 2 * whole + attention


def test_the_plan_says_how_large_the_result_will_be(tmp_path, recipe):
    source = save_tiny(tmp_path / "source", num_hidden_layers=5, dtype=torch.bfloat16)
    plan = make_plan(recipe("depth: {method: angular, drop: 2}"), str(source))
    made = apply(plan.recipe, str(source), tmp_path / "out", quiet=True)
    assert plan.estimate().output_bytes == made.metrics["sizes"]["compressed_bytes"]
    assert "angular drops 2 of 5 layers" in plan.table().caption and plan.to_json()["depth"]["weights_left"] == 0.6
    four = make_plan(recipe("depth: {method: angular, drop: 2}", *FOUR_BITS, format="sparse24"), str(source))
    made = apply(four.recipe, str(source), tmp_path / "four", quiet=True)
    assert four.estimate().output_bytes == pytest.approx(made.metrics["sizes"]["compressed_bytes"], rel=0.01)
    target = make_plan(recipe("depth: {method: finercut, target: {parameters: 0.7}}"), str(source))
    assert target.to_json()["depth"]["exact"] and "at most 70% of all parameters" in target.table().caption
    bound = make_plan(recipe("depth: {method: angular, target: {divergence: 0.1}}"), str(source))
    assert not bound.to_json()["depth"]["exact"] and "only the text can say" in bound.table().caption


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ("method: angular, drop: 3", RecipeError, "depth drops 3 layers but the model has 3; drop fewer"),
        ("method: deepest, drop: 2", RecipeError, "protect_first 1 and protect_last 1 only 1 may go"),
        ("method: streamline, drop: 1", RecipeError, "drops 1, and one more that is replaced, of 3 layers"),
        ("method: finercut, drop: 3", RecipeError, "depth drops 3 of 6 sublayers, but .* only 2 may go"),
        ("method: finercut, drop: 6", RecipeError, "depth drops 6 sublayers but the model has 6 in 3 layers"),
        ("method: angular, drop: 1, protect_first: 2", RecipeError, "protect all 3 layers of the model; lower one"),
        ("method: angular, target: {parameters: 0.1}", RecipeError, "depth.target.parameters 0.1 cannot be met: with all 1 lay"),
        ("method: finercut, target: {speedup: 50}", RecipeError, "depth.target.speedup 50 cannot be met: .* 2 sublayers .* times"),
        ("method: deepest, target: {divergence: 1.0e-9}", RecipeError, "divergence 1e-09 cannot be met: dropping a single lay"),
        ("method: finercut, target: {divergence: 1.0e-9}", RecipeError, "cannot be met: removing a single sublayer diverges"),
        ("method: streamline, target: {divergence: 5}", RecipeError, "a replacement takes the place of at least two"),
        ("method: angular, target: {parameters: 0.8, divergence: 1.0e-9}", RecipeError, "dropping the 1 layers that the goal"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_sentence(tmp_path, recipe, settings, error, words):
    source = save_tiny(tmp_path / "source")
    with pytest.raises(error, match=words) as caught:
        apply(recipe(f"depth: {{{settings}}}"), str(source), tmp_path / "out", quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_result_of_which_nothing_is_compressed_is_dense(tmp_path, recipe):
    source = save_tiny(tmp_path / "source")
    with pytest.raises(RecipeError, match="so the result is dense: set export.format: dense, or add prune or quantize"):
        make_plan(recipe("depth: {method: angular, drop: 1}", format="sparse24"), str(source))
    make_plan(recipe("depth: {method: finercut, drop: 2}", format="sparse24"), str(source))  # may leave halves to skip


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        (
            [FOUR_BITS[0], "depth: {method: deepest, drop: 1}", FOUR_BITS[1]],
            "depth stands between passes that share one walk",
        ),
        ([*FOUR_BITS, LORA, "depth: {method: deepest, drop: 1}"], "depth comes after lora"),
        (["depth: {method: deepest, drop: 1}", "tune: {epochs: 1}"], "tune trains what compression left over"),
        (["depth: {method: angular}"], "depth needs either drop"),
        (["depth: {method: angular, drop: 1, target: {speedup: 2}}"], "depth needs either drop"),
        (["depth: {method: finercut, units: pairs, drop: 3}"], "must be even, not 3"),
        (["depth: {method: angular, drop: 1, metric: euclidean}"], "metric has no effect with method angular"),
        (
            ["depth: {method: streamline, drop: 1, replacement: none, epochs: 3}"],
            "epochs has no effect with method streamline",
        ),
        (["depth: {method: angular, target: {parameters: 0.5, speedup: 2}}"], "target has both parameters and speedup"),
    ],
)
def test_recipes_that_make_no_sense(recipe, passes, words):
    with pytest.raises(RecipeError, match=words):
        recipe(*passes)


def test_halves_of_a_dense_model_are_skipped_by_the_runtime(tmp_path, recipe):
    source = save_tiny(tmp_path / "source", num_hidden_layers=5, dtype=torch.bfloat16)
    depth = "depth: {method: finercut, drop: 5}"
    made = apply(recipe(depth, format="sparse24"), str(source), tmp_path / "skips", quiet=True)
    apply(recipe(depth), str(source), tmp_path / "multiplies", quiet=True)
    absent = [(n, k) for n, layer in enumerate(made.metrics["depth"]["layers"]) for k in (0, 1) if layer[k] is None]
    assert absent, "the test wants a layer of one half"
    modules = open_compressed(tmp_path / "skips").modules
    assert len(modules) == sum(3 if kind else 4 for _, kind in absent)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "skips", dtype=torch.float32)
    model(IDS)
    skipped = [m for m in model.modules() if isinstance(m, Sparse24Linear)]
    assert len(skipped) == len(modules) and all(m._zero for m in skipped)
    torch.testing.assert_close(logits(tmp_path / "skips"), logits(tmp_path / "multiplies"), rtol=0, atol=0)


def test_names_of_tensors_get_the_new_number():
    assert renumbered("model.layers.7.mlp.up_proj.weight", 7, 5) == "model.layers.5.mlp.up_proj.weight"
    assert (
        renumbered("transformer.h.1.mlp.experts.1.w1.weight_packed", 1, 0)
        == "transformer.h.0.mlp.experts.1.w1.weight_packed"
    )
    with pytest.raises(CheckpointError, match="does not hold the number 3"):
        renumbered("model.norm.weight", 3, 1)


def test_each_layer_learns_from_the_one_before_what_follows_it():
    whole = [Layer(b, b) for b in (0, 1, 5, 6)]
    assert teacher_blocks(whole, 7) == [0, 4, 5, 6]
    assert teacher_blocks([Layer(0, 1), Layer(None, 3), Layer(4, 4)], 5) == [1, 3, 4]
