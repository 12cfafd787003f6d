"""Models that consist of a shape: what vLLM is started with, and what they would weigh."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sparsify.bench import BenchOptions, latency, throughput
from sparsify.bench.dummy_model import parse_dummy
from sparsify.bench.targets import open_targets
from sparsify.errors import SparsifyError
from sparsify.formats.sparse24 import Sparse24Config
from sparsify.model.checkpoint import open_checkpoint
from tests.helpers.compressed import compress

SMALL = "shape:smollm2-135m@"


def test_dense_weighs_what_the_real_model_weighs() -> None:
    """SmolLM2-135M: 134,515,008 parameters."""
    assert parse_dummy("shape:smollm2-135m").nbytes() == 2 * 134_515_008
    assert parse_dummy(SMALL + "dense+untied").nbytes() == 2 * (134_515_008 + 49152 * 576)
    eight = parse_dummy("shape:llama-3.1-8b@dense").nbytes()
    assert eight == 2 * 8_030_261_248


def test_config_is_that_of_the_model(tmp_path: Path) -> None:
    directory = parse_dummy(SMALL + "dense+layers2").write(tmp_path / "m")
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    modules = parse_dummy(SMALL + "dense+layers2").shape.modules()
    assert linears == {**modules, "lm_head": (49152, 576)}
    nbytes = sum(p.numel() * 2 for p in model.parameters())
    assert nbytes == parse_dummy(SMALL + "dense+layers2").nbytes()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("options", ["", "+bits8+group128", "+bits16", "+channel", "+head8"])
def test_sparse24_weighs_what_the_writer_writes(tmp_path: Path, options: str) -> None:
    """A checkpoint of the same shape, compressed by the code that writes checkpoints."""
    dummy = parse_dummy(f"shape:llama-3.2-1b@sparse24+layers1{options}")
    shape = replace(dummy.shape, hidden=128, intermediate=256, heads=2, kv_heads=1, vocabulary=96)  # small
    dummy = replace(dummy, shape=shape)
    config = AutoConfig.for_model("llama", **{
        k: v for k, v in dummy.config().items() if k not in ("architectures", "model_type", "quantization_config")
    })  # fmt: skip
    dense = tmp_path / "dense"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(dense)
    head = {"bits": 8, "group_size": dummy.group_size, "pattern": "dense"}
    written = compress(
        dense, tmp_path / "sparse", "sparse24",
        {"lm_head": head} if dummy.head_bits else {}, bits=dummy.bits, group_size=dummy.group_size,
    )  # fmt: skip
    opened = open_checkpoint(written)
    assert sum(info.nbytes for info in opened.infos.values()) == dummy.nbytes()
    ours = Sparse24Config.from_dict(dummy.config()["quantization_config"])
    theirs = Sparse24Config.from_dict(opened.config["quantization_config"])
    assert (ours.default, dict(ours.modules)) == (theirs.default, dict(theirs.modules))


def test_options_reach_the_config() -> None:
    config = parse_dummy("shape:llama-3.2-1b@sparse24+bits8+channel+head8").config()
    assert config["tie_word_embeddings"] is False
    quantization = config["quantization_config"]
    assert (quantization["bits"], quantization["group_size"], quantization["pattern"]) == (8, "channel", "2:4")
    assert quantization["modules"] == {"lm_head": {"bits": 8, "group_size": "channel", "pattern": "dense"}}
    assert Sparse24Config.from_dict(quantization).label("model.layers.3.mlp.up_proj").bits == 8
    packed = parse_dummy("shape:llama-3.2-1b@pack-quantized+group128").config()
    assert packed["tie_word_embeddings"] is True
    assert packed["quantization_config"]["quant_method"] == "compressed-tensors"
    assert packed["quantization_config"]["ignore"] == ["lm_head"]
    group = packed["quantization_config"]["config_groups"]["group_0"]
    assert group["weights"]["group_size"] == 128 and group["targets"] == ["Linear"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("shape:gpt-5", "shape 'gpt-5' is unknown; known shapes: smollm2-135m"),
        (SMALL + "gguf", "format 'gguf' is unknown; choose from dense, sparse24, pack-quantized"),
        (SMALL + "sparse24+fast", "option 'fast' is unknown; known are bits4"),
        (SMALL + "sparse24+group128", "576 inputs are no multiple of the group size 128"),
        (SMALL + "sparse24+bits5", "5 bits are not supported"),
        (SMALL + "dense+head8", "needs the format sparse24"),
        (SMALL + "sparse24+head8+tied", "no \\+tied"),
        (SMALL + "pack-quantized+bits16", "holds 4 or 8 bits"),
        (SMALL + "dense+layers0", "at least one layer"),
    ],
)
def test_what_cannot_be_is_refused(spec: str, message: str) -> None:
    with pytest.raises(SparsifyError, match=message):
        parse_dummy(spec)


def test_tokenizer_loses_nothing(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(parse_dummy(SMALL + "dense+layers1").write(tmp_path / "m"))
    ids = [0, 5, 49151, 17, 2, 1]
    assert len(tokenizer) == tokenizer.vocab_size == 49152
    assert tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids == ids


def test_shapes_and_directories_in_one_run(models, fake_vllm, tmp_path: Path) -> None:
    specs = [models[0], "shape:smollm2-135m@sparse24", "mine=shape:llama-3.2-1b@dense+untied"]
    result = latency(specs, options=BenchOptions(quiet=True))
    assert [(m.model, m.format) for m in result.models] == [
        ("dense", "dense"), ("smollm2-135m@sparse24", "sparse24, random"), ("mine", "dense, random"),
    ]  # fmt: skip
    real, made, other = [entry["engine"] for entry in fake_vllm() if "start" in entry]
    assert "--load-format" not in real
    assert made[2:4] == other[2:4] == ["--load-format", "dummy"] and made[4:] == real[2:]
    assert result.models[1].nbytes == parse_dummy(SMALL + "sparse24").nbytes()
    assert len(result.commands) == 4 and sum("--load-format dummy" in c for c in result.commands) == 2
    assert str(tmp_path) not in json.dumps(result.to_json())
    assert not list(tmp_path.glob("sparsify-shapes-*")), "scratch is removed"
    assert throughput(specs[1:2], options=BenchOptions(quiet=True)).models[0].throughput is not None


def test_a_shape_answers_no_prompts(models, fake_vllm) -> None:
    with pytest.raises(SparsifyError, match="cannot answer prompts"):
        latency(["shape:smollm2-135m"], options=BenchOptions(prompts=["hello"], quiet=True))


def test_written_config_is_a_checkpoint_for_the_checks(tmp_path: Path) -> None:
    [target] = open_targets(["shape:llama-3.2-1b@pack-quantized"], scratch=tmp_path)
    assert json.loads((target.directory / "config.json").read_text())["vocab_size"] == 49152
