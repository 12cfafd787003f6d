"""Models whose classes are not plain decoders: wrappers of a text tower, linears of a class of their own, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sparsify.compiler.apply import apply
from sparsify.compiler.convert import convert
from sparsify.compiler.plan import make_plan
from sparsify.errors import CheckpointError
from sparsify.formats.reader import open_compressed
from sparsify.model.linear import is_plain_linear
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
WRAPPERS: dict[str, dict[str, Any]] = {
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
