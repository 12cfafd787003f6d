"""Models whose classes are not plain decoders: wrappers of a text tower, linears of a class of their own, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.families import tiny, tried
from sparsify.compiler.apply import apply
from sparsify.compiler.convert import convert
from sparsify.compiler.planning import make_plan
from sparsify.errors import CheckpointError, RecipeError
from sparsify.formats.reader import open_compressed
from sparsify.model.linear import is_plain_linear
from sparsify.model.pretrained import setting
from sparsify.recipe import parse_recipe
from tests.helpers.tiny import COMMON, save_tiny, tiny_text, tiny_tokenizer

ROUNDED = "version: 1\npasses: [prune: {method: magnitude}, quantize: {method: rtn, bits: 4, group_size: 32}]\n"
SOLVED = """
version: 1
calibration: {{source: "file:{text}", samples: 4, sequence_length: 24}}
passes: [prune: {{method: sparsegpt}}, quantize: {{method: gptq, bits: 4, group_size: 32}}]
"""
IDS = torch.randint(4, 90, (2, 12), generator=torch.Generator().manual_seed(3))
CLIP = {
    "model_type": "clip_vision_model", "projection_dim": 32, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
WRAPPERS: dict[str, dict[str, Any]] = {  # what the tables of transformers know as a text model, too, is loaded whole
    "llava": {"vision_config": CLIP, "text": "llama", "image_token_id": 95},
}  # fmt: skip


def save_wrapper(directory: Path, family: str) -> Path:
    """A tiny random wrapper of a text tower, with a file of its processor."""
    settings = dict(WRAPPERS[family])
    text = {**COMMON, "num_hidden_layers": 2, "model_type": settings.pop("text")}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[family](text_config=text, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
    model.to(torch.float32).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text("{}")
    return directory


@torch.no_grad()
def logits(directory: Path, loader: Any) -> torch.Tensor:
    model = loader.from_pretrained(directory, dtype=torch.float32)
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", WRAPPERS)
def test_the_text_tower_of_a_wrapper_is_compressed_and_the_rest_stays(family: str, tmp_path: Path) -> None:
    source, out = save_wrapper(tmp_path / "source", family), tmp_path / "out"
    recipe = parse_recipe(SOLVED.format(text=tiny_text(tmp_path / "text.txt")))
    apply(recipe, str(source), out, quiet=True)
    opened, stored, new = (
        open_compressed(out),
        load_file(source / "model.safetensors"),
        load_file(out / "model.safetensors"),
    )
    assert len(opened.modules) == 2 * 7 and not any("vis" in module for module in opened.modules)
    seeing = [name for name in stored if "vis" in name]
    assert len(seeing) > 10 and all(torch.equal(new[name], stored[name].bfloat16()) for name in seeing)
    assert (out / "preprocessor_config.json").exists()
    convert(out, "dense", tmp_path / "dense", quiet=True)
    ours = logits(out, AutoModelForImageTextToText)
    dense = logits(tmp_path / "dense", AutoModelForImageTextToText)
    torch.testing.assert_close(ours, dense, rtol=0.02, atol=0.02 * float(dense.abs().max()))
    whole = logits(source, AutoModelForImageTextToText)
    assert (ours - whole).abs().max() > 0.1 * whole.abs().max()  # it was compressed


def test_linears_of_a_class_of_their_own_are_compressed(tmp_path: Path) -> None:
    without = {"num_key_value_heads": None, "head_dim": None, "intermediate_size": None}
    source = save_tiny(tmp_path / "source", "falcon", num_hidden_layers=2, alibi=False, **without)
    text = tiny_text(tmp_path / "text.txt")
    apply(parse_recipe(SOLVED.format(text=text)), str(source), tmp_path / "out", quiet=True)
    assert len(open_compressed(tmp_path / "out").modules) == 2 * 4
    convert(tmp_path / "out", "dense", tmp_path / "dense", quiet=True)
    ours, dense = (logits(tmp_path / name, AutoModelForCausalLM) for name in ("out", "dense"))
    torch.testing.assert_close(ours, dense, rtol=0.02, atol=0.02 * float(dense.abs().max()))


# Of each kind one: a linear stored transposed, blocks that return lists and several values, experts that read what their router
# scaled or that files hold turned, several hidden states per token, wrappers of each sort, an encoder.
KINDS = [
    "gpt2",
    "openai-gpt",
    "gpt_neo",
    "llama4",
    "qwen3_vl_moe",
    "hy_v4",
    "gemma3",
    "qwen2_5_vl",
    "mistral3",
    "bert",
]


SEEING = ("llama4", "qwen3_vl_moe", "gemma3", "qwen2_5_vl", "mistral3")


@pytest.mark.parametrize("family", KINDS)
def test_a_family_computes_what_its_dense_export_does(family: str, tmp_path: Path) -> None:
    found = tried(family, tmp_path, with_vllm=False)
    assert found["compress"].startswith("yes") and "dense" not in found["compress"] and found["logits"] == "yes", found
    stored, new = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "sparse24"))
    seeing = [name for name in stored if "vis" in name]
    assert all(torch.equal(new[name], stored[name].bfloat16()) for name in seeing)
    assert (len(seeing) > 10) == (family in SEEING)
    assert ("of experts" in found["compress"]) == (family in ("llama4", "qwen3_vl_moe", "hy_v4"))


def tiny_gpt2(directory: Path) -> Path:
    without = {"num_key_value_heads": None, "head_dim": None, "intermediate_size": None}
    return save_tiny(directory, "gpt2", num_hidden_layers=2, n_positions=128, **without)


def test_weights_that_a_class_stores_transposed_are_turned_in_files_alone(tmp_path: Path) -> None:
    source, out, dense = tiny_gpt2(tmp_path / "source"), tmp_path / "out", tmp_path / "dense"
    plan = make_plan(parse_recipe(ROUNDED), str(source))
    left, packed = "transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"
    assert plan.linears[left].shape == (3 * 64, 64) and len(plan.schemes) == 2 * 4
    stored = load_file(source / "model.safetensors")
    assert stored[f"{left}.weight"].shape == (64, 3 * 64)
    assert torch.equal(plan.checkpoint.tensor(f"{left}.weight"), stored[f"{left}.weight"].T)
    assert torch.equal(plan.checkpoint.first_rows(f"{left}.weight", 5), stored[f"{left}.weight"].T[:5])
    apply(parse_recipe(f"{ROUNDED}ignore: ['{left}']"), str(source), out, quiet=True)
    opened, written = open_compressed(out), load_file(out / "model.safetensors")
    assert torch.equal(written[f"{left}.weight"], stored[f"{left}.weight"].bfloat16())
    assert opened.modules[packed].shape == (256, 64) and written[f"{packed}.weight_meta"].shape == (256, 64 // 8)
    convert(out, "dense", dense, quiet=True)
    turned = load_file(dense / "model.safetensors")
    assert torch.equal(turned[f"{packed}.weight"].T, opened.linear(packed).dense())
    ours, theirs = (logits(name, AutoModelForCausalLM) for name in (out, dense))
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


def test_what_transformers_does_not_read_of_such_weights_is_refused(tmp_path: Path) -> None:
    source = tiny_gpt2(tmp_path / "source")
    recipe = parse_recipe(f"{ROUNDED}export: {{format: pack-quantized}}")
    with pytest.raises(RecipeError, match=r"c_attn\.weight belongs to a Conv1D.*export to sparse24 or dense"):
        make_plan(recipe, str(source))
    apply(parse_recipe(ROUNDED), str(source), tmp_path / "out", quiet=True)
    with pytest.raises(CheckpointError, match="belongs to a Conv1D"):
        convert(tmp_path / "out", "pack-quantized", tmp_path / "packed", quiet=True)


def test_what_does_not_run_on_text_alone_is_refused_in_the_plan(tmp_path: Path) -> None:
    tiny("blip", tmp_path)
    recipe = parse_recipe(SOLVED.format(text=tiny_text(tmp_path / "text.txt")))
    with pytest.raises(CheckpointError, match="BlipForConditionalGeneration does not run on text alone"):
        make_plan(recipe, str(tmp_path))


def test_hidden_states_with_the_batch_on_another_axis_are_refused_in_the_plan(tmp_path: Path) -> None:
    tiny("xlnet", tmp_path)
    recipe = parse_recipe(SOLVED.format(text=tiny_text(tmp_path / "text.txt")))
    with pytest.raises(CheckpointError, match="XLNetLMHeadModel have no row of their own for each text"):
        make_plan(recipe, str(tmp_path))


def test_a_setting_that_differs_between_layers_is_the_largest() -> None:
    config = CONFIG_MAPPING["gemma4_unified_text"](num_hidden_layers=6, head_dim=32, global_head_dim=64)
    assert setting(config, "head_dim") == 64 and setting(config, "hidden_size") == config.hidden_size
    assert setting(config, "of_no_config") is None


class Doubled(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Plain(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


def test_a_linear_is_what_computes_one() -> None:
    linears = {torch.nn.Linear(4, 4): True, Plain(4, 4): True, Doubled(4, 4): False, torch.nn.Embedding(2, 2): False}
    linears[torch.nn.MultiheadAttention(8, 2).out_proj] = False  # never called: its weight is read
    before = torch.get_rng_state()
    assert {module: is_plain_linear(module) for module in linears} == linears
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", ["t5", "whisper", "bart"])
def test_encoders_with_decoders_are_refused_in_one_sentence(family: str, tmp_path: Path) -> None:
    CONFIG_MAPPING[family]().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"{family} has an encoder and a decoder, .*can be compressed"):
        make_plan(parse_recipe(ROUNDED), str(tmp_path), config_only=True)
