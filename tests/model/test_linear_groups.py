"""What the walk will skip is known from shapes, before a weight is read."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3nTextConfig

from sparsify.compiler.planning import make_plan
from sparsify.errors import CheckpointError
from sparsify.model.capture import capture_calls
from sparsify.model.checkpoint import Checkpoint, open_checkpoint
from sparsify.model.decoder import open_blocks
from sparsify.model.linear_groups import NOT_CALLED, find_groups, skipped_by_shape
from sparsify.recipe import parse_recipe
from tests.helpers.tiny import save_tiny, tiny_text

GPTQ = """
version: 1
calibration: {{source: "file:{text}", samples: 4, sequence_length: 32}}
passes: [{{quantize: {{method: gptq, bits: 4, group_size: 32}}}}]
export: {{format: sparse24}}
"""


def save_gemma3n(directory):
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        vocab_size=96, hidden_size=64, intermediate_size=[128] * 3, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_kv_shared_layers=1, sliding_window=16, vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=16, activation_sparsity_pattern=[0.0] * 3, laurel_rank=16,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "mixtral", "gemma3n"])
def test_it_is_what_a_forward_pass_on_numbers_skips(tmp_path, family):
    make = save_gemma3n if family == "gemma3n" else lambda directory: save_tiny(directory, family)
    opened = open_blocks(open_checkpoint(make(tmp_path / "model")), torch.float32)
    found = skipped_by_shape(opened)
    assert all(parameter.is_meta for parameter in opened.model.parameters()), "the model stays as it was"
    opened.load_outside("cpu")
    hidden, calls = capture_calls(opened, torch.arange(3, 19)[None])
    expected = {}
    for index, block in enumerate(opened.blocks):
        opened.load(index)
        skipped = find_groups(opened.block(index), hidden, calls[index])[1]
        expected |= {f"{block}.{name}": why for name, why in skipped.items() if why != NOT_CALLED}
    assert found == expected
    assert bool(found) is (family == "gemma3n")


def test_a_plan_refuses_a_model_of_which_nothing_can_be_compressed(tmp_path, monkeypatch):
    source, text = save_gemma3n(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    monkeypatch.setattr(Checkpoint, "tensor", None)  # no weight is read
    with pytest.raises(
        CheckpointError, match=r"none of the \d+ linears of .*model that .*: does not read every token \(\d+\)"
    ):
        make_plan(parse_recipe(GPTQ.format(text=text)), str(source))


def test_a_plan_refuses_a_link_out_of_the_directory(tmp_path):
    source, text = save_tiny(tmp_path / "model"), tiny_text(tmp_path / "text.txt")
    (source / "LICENSE").symlink_to(text)
    with pytest.raises(CheckpointError, match=r"LICENSE is a link to .*text\.txt, which is outside of"):
        make_plan(parse_recipe(GPTQ.format(text=text)), str(source))
