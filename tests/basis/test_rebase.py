"""The basis pass on tiny models of many architectures: the rewritten model gives the logits of the one it was made from."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsify.compiler.apply import apply
from sparsify.compiler.planning import make_plan
from sparsify.compiler.rebase import rebase
from sparsify.errors import CheckpointError, RecipeError
from sparsify.recipe import parse_recipe
from tests.helpers.tiny import save_tiny, tiny_text

IDS = torch.randint(4, 96, (2, 24), generator=torch.Generator().manual_seed(2))  # longer than a sliding window
EQUAL = 1e-4  # of the largest logit, in float32
# LayerNorms with and without offsets, parallel blocks, one norm for both halves, biases, tied heads, q/k norms, scaled
# embeddings and residuals, fused projections
WHOLE = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "phi3",
    "opt",
    "gpt_neox",
    "cohere",
    "granite",
    "starcoder2",
    "stablelm",
    "phi",
]
PARTLY = {"gemma2": "post_attention_layernorm", "gemma3_text": "post_attention_layernorm", "olmo2": "q_norm"}
OWN_VALUES = {*WHOLE, *PARTLY} - {"phi3", "gpt_neox"}  # whose values are a linear of their own


@pytest.fixture
def recipe(tmp_path):
    text = tiny_text(tmp_path / "text.txt", 2000)

    def make(basis, *passes, format="dense", more=""):
        body = "".join(f"  - {step}\n" for step in (f"basis: {basis}", *passes))
        return parse_recipe(
            f'version: 1\ncalibration: {{source: "file:{text}", samples: 4, sequence_length: 32}}\n'
            f"export: {{format: {format}{more}}}\npasses:\n{body}"
        )

    return make


def source(directory, family, **changes):
    """A tiny model whose norms and biases do something; those of a fresh one are 1 and 0."""
    save_tiny(directory, family, **changes)
    model = AutoModelForCausalLM.from_pretrained(directory)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def logits(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(IDS, use_cache=False).logits


def rebased(directory, output, recipe):
    plan = make_plan(recipe, str(directory))
    rows = torch.randint(4, 96, (4, 32), generator=torch.Generator().manual_seed(1))
    return rebase(recipe.basis, plan, rows, output, quiet=True)


def assert_equal(directory, output):
    wanted, found = logits(directory), logits(output)
    assert float((wanted - found).abs().max()) < EQUAL * float(wanted.abs().max())


@pytest.mark.parametrize("family", WHOLE)
def test_all_three_changes_leave_the_logits(family, tmp_path, recipe):
    directory = source(tmp_path / "model", family)
    note = rebased(directory, tmp_path / "out", recipe("{steps: 5}"))
    assert note["residual"] and note["channels"] == 3
    assert note["heads"] == (3 if family in OWN_VALUES else 0)
    assert_equal(directory, tmp_path / "out")
    old, new = load_file(directory / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert {name for name in old if old[name].dim() == 2} <= set(changed) | {"position"}


@pytest.mark.parametrize("family", PARTLY)
def test_a_stream_that_cannot_be_turned_is_named_and_the_rest_still_works(family, tmp_path, recipe):
    directory = source(tmp_path / "model", family)
    with pytest.raises(CheckpointError, match=PARTLY[family] + r".*basis\.residual: false"):
        rebased(directory, tmp_path / "out", recipe("{steps: 5}"))
    assert not (tmp_path / "out").exists()
    note = rebased(directory, tmp_path / "out", recipe("{residual: false, steps: 5}"))
    assert not note["residual"] and note["heads"] == note["channels"] == 3
    assert_equal(directory, tmp_path / "out")


def test_a_tied_head_gets_weights_of_its_own(tmp_path, recipe):
    directory = source(tmp_path / "model", "llama", tie_word_embeddings=True)
    rebased(directory, tmp_path / "out", recipe("{steps: 5}"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")
    assert_equal(directory, tmp_path / "out")


def test_a_recipe_goes_on_from_the_new_basis(tmp_path, recipe):
    directory = source(tmp_path / "model", "llama", tie_word_embeddings=True)
    passes = ["prune: {method: sparsegpt}", "quantize: {bits: 4, group_size: 32}"]
    done = apply(recipe("{steps: 5}", *passes, format="sparse24"), str(directory), tmp_path / "out", quiet=True)
    found = done.metrics["basis"]
    assert found["model"] == str(directory) and found["channels"] == 3
    assert all(after < before for before, after in found["dropped"].values())
    assert done.metrics["base_model"] == str(directory)
    assert {layer["pattern"] for layer in done.metrics["layers"]} == {"2:4"}
    sizes, dense = done.metrics["sizes"], load_file(directory / "model.safetensors")
    assert sizes["dense_bytes"] == sum(
        tensor.nbytes for tensor in dense.values()
    )  # of the model, not of what was made of it
    linears = sum(dense[f"{layer['module']}.weight"].nbytes for layer in done.metrics["layers"])
    assert sizes["outside_bytes"] + sizes["dense_head_bytes"] + linears == sizes["dense_bytes"]
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_an_interrupted_run_finds_the_same_basis(tmp_path, recipe, monkeypatch):
    directory = source(tmp_path / "model", "llama")
    made = recipe("{steps: 5}", "prune: {method: sparsegpt}", format="sparse24")
    apply(made, str(directory), tmp_path / "whole", quiet=True)
    import sparsify.compiler.apply as run

    real = run.compress_on_data
    monkeypatch.setattr(run, "compress_on_data", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        apply(made, str(directory), tmp_path / "out", quiet=True)
    monkeypatch.setattr(run, "compress_on_data", real)
    monkeypatch.setattr(run, "rebase", lambda *args: pytest.fail("the basis was there"))
    apply(made, str(directory), tmp_path / "out", resume=True, quiet=True)
    for file in ("model.safetensors", "config.json", "metrics.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_basis_alone_is_written_dense_only(tmp_path, recipe):
    directory = source(tmp_path / "model", "llama")
    with pytest.raises(RecipeError, match="basis alone leaves the linears .* dense: set export.format: dense"):
        make_plan(recipe("{steps: 5}", format="sparse24"), str(directory))


@pytest.mark.parametrize(
    "passes, problem",
    [
        (["prune: {method: sparsegpt}", "basis: {}"], "basis comes after prune"),
        (["basis: {}", "depth: {method: deepest, drop: 1}"], "depth comes after basis"),
        (["basis: {}", "distill: {tokens: 8k}"], "only distill follows"),
        (["basis: {residual: false, heads: false, channels: false}"], "changes nothing"),
    ],
)
def test_a_basis_in_the_wrong_place_is_refused(passes, problem):
    body = "".join(f"  - {step}\n" for step in passes)
    with pytest.raises(RecipeError, match=problem):
        parse_recipe(f"version: 1\ncalibration: {{source: self}}\nexport: {{format: dense}}\npasses:\n{body}")
