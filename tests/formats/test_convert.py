"""Conversions between formats, and what stock software makes of the results."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from sparsify.cli import main
from sparsify.compiler.convert import export
from sparsify.errors import CheckpointError
from sparsify.files import read_json
from sparsify.formats.reader import open_compressed
from sparsify.model.checkpoint import open_checkpoint
from sparsify.model.linear import is_two_four

MIXED = {
    "model.layers.0.self_attn.v_proj": dict(bits=8, pattern="dense"),
    "model.layers.1.mlp.down_proj": dict(bits=4, group_size=192),
    "model.layers.2.self_attn.o_proj": None,
    "lm_head": dict(bits=8, pattern="dense", group_size=64),
}


# one scale per output: what marlin-24 holds where there are 64 outputs
CHANNEL = {
    f"model.layers.{i}.{name}": dict(group_size=size, dtype=torch.float16)
    for i in range(3)
    for name, size in (
        *((f"self_attn.{letter}_proj", 64) for letter in "qkvo"),
        ("mlp.gate_proj", 64), ("mlp.up_proj", 64), ("mlp.down_proj", 192),
    )
}  # fmt: skip


def digest(path):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("recipe", [{}, MIXED], ids=["uniform", "mixed"])
def test_packed_formats_convert_into_each_other_without_loss(llama, compress, same, tmp_path, recipe):
    source = llama(tied=not recipe)
    files = {"README.md": "card", "recipe.yaml": "version: 1", "metrics.json": "{}"}
    original, linears = compress(source, tmp_path / "original", "sparse24", recipe, files)
    there = export(original, "pack-quantized", tmp_path / "there")
    opened = open_compressed(there)
    assert opened.format == "pack-quantized" and set(opened.modules) == set(linears)
    assert all(same(opened.linear(module), linear) for module, linear in linears.items())
    back = export(there, "sparse24", tmp_path / "back")
    assert {name: (there / name).read_text() for name in files} == files
    assert digest(back) == digest(original)


def test_the_checkpoints_of_2024_become_sparse24(llama, compress, same, tmp_path):
    """marlin-24 as llm-compressor wrote it: scales per channel or per 128 inputs, outputs in 64s; the rest stays dense."""
    small = {f"model.layers.{i}.self_attn.{name}_proj": None for i in range(3) for name in "kv"}  # 32 outputs
    every = {f"model.layers.{i}.{name}": dict(group_size=size, dtype=torch.float16) for i in range(3) for name, size in (
        ("self_attn.q_proj", 64), ("self_attn.o_proj", 64), ("mlp.gate_proj", 64), ("mlp.up_proj", 64),
        ("mlp.down_proj", 192))}  # fmt: skip
    old, linears = compress(llama(), tmp_path / "old", "marlin-24", small | every)
    config = read_json(old / "config.json")["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "marlin-24")
    opened = open_compressed(old)
    assert opened.format == "marlin-24" and set(opened.modules) == set(every) == set(linears)
    new = open_compressed(export(old, "sparse24", tmp_path / "new"))
    assert new.format == "sparse24"
    assert all(same(new.linear(module), linear) for module, linear in linears.items())
    again = export(tmp_path / "new", "marlin-24", tmp_path / "again")
    assert digest(again)["model.safetensors"] == digest(old)["model.safetensors"]


def test_dense_has_the_same_weights(llama, compress, tmp_path):
    original, linears = compress(llama(), tmp_path / "original", "sparse24")
    via = export(original, "pack-quantized", tmp_path / "via")
    first, second = export(original, "dense", tmp_path / "first"), export(via, "dense", tmp_path / "second")
    assert digest(first) == digest(second)
    opened = open_compressed(first)
    assert set(opened.other_names()) == set(open_checkpoint(llama()).names())
    for module, linear in linears.items():
        assert torch.equal(opened.tensor(f"{module}.weight"), linear.dense(torch.bfloat16))


def test_a_dense_model_is_copied(llama, tmp_path):
    out = export(llama(), "dense", tmp_path / "out")
    before, after = open_checkpoint(llama()), open_checkpoint(out)
    assert before.names() == after.names()
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.names())
    assert (out / "README.md").read_text() == "this is README.md" and (out / "chat_template.jinja").exists()


def test_a_sparse_dense_model_becomes_sixteen_bit_sparse24_and_back(llama, compress, same, tmp_path):
    every = {f"model.layers.{i}.{n}": dict(bits=16) for i in range(3) for n in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}  # fmt: skip
    sparse, linears = compress(llama(), tmp_path / "sparse", "sparse24", every)
    dense = export(sparse, "dense", tmp_path / "dense")
    again = export(dense, "sparse24", tmp_path / "again")
    opened = open_compressed(again)
    assert set(opened.modules) == set(every) and all(same(opened.linear(m), linear) for m, linear in linears.items())
    assert digest(again)["model.safetensors"] == digest(sparse)["model.safetensors"]
    assert opened.config["quantization_config"]["bits"] == 16
    with pytest.raises(CheckpointError, match="no codes for 21 linears.*apply a recipe that quantizes"):
        export(sparse, "pack-quantized", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_biases_travel_with_their_linears(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.dim() == 2:
                parameter.view(-1, 4)[:, ::2] = 0
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "dense")
    out = export(tmp_path / "dense", "sparse24", tmp_path / "out")
    opened = open_compressed(out)
    assert opened.linear("model.layers.1.self_attn.k_proj").bias is not None
    assert opened.linear("model.layers.1.self_attn.o_proj").bias is None
    back = open_checkpoint(export(out, "dense", tmp_path / "back"))
    before = open_checkpoint(tmp_path / "dense")
    assert before.names() == back.names()
    assert all(torch.equal(before.tensor(name), back.tensor(name)) for name in before.names())


@pytest.mark.parametrize(
    ("format", "says"),
    [
        ("sparse24", "21 of its 21 linears are not 2:4.*layers.0.mlp.down_proj.*sparsify apply 2of4-w4a16 --model"),
        ("pack-quantized", "no codes, which pack-quantized needs.*sparsify apply w4a16 --model"),
        ("sparse-42", "format 'sparse-42' is unknown; known formats: sparse24, dense, pack-quantized"),
        ("sparse-24-bitmask", "sparsify reads sparse-24-bitmask and does not write it; it writes sparse24, dense"),
    ],
)
def test_what_cannot_be_made_says_what_to_do(llama, tmp_path, format, says):
    with pytest.raises(CheckpointError, match=says):
        export(llama(), format, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_in_which_nothing_could_be_written_is_refused(llama, compress, tmp_path):
    """Groups of 32 inputs: marlin-24 holds 128 or channel. Nothing appears, and the setting that would do is named."""
    source, _ = compress(llama(), tmp_path / "source", "sparse24")
    with pytest.raises(CheckpointError) as caught:
        export(source, "marlin-24", tmp_path / "out")
    said = str(caught.value)
    assert "none of the 21 linears" in said and "not of 32 (15)" in said and "multiples of 64 outputs" in said
    assert "group_size 128 or channel" in said
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    # a head that the format cannot hold is refused as well, not written dense
    fits, _ = compress(llama(), tmp_path / "fits", "sparse24", CHANNEL)
    with pytest.raises(CheckpointError, match="2:4 sparse linears only"):
        export(fits, "marlin-24", tmp_path / "out", 8)
    assert not (tmp_path / "out").exists()


def test_linears_that_could_not_be_written_are_named_before_and_after(llama, compress, tmp_path, capsys):
    """k and v have 32 outputs, marlin-24 wants 64; the scales of one more linear fit no float16."""
    recipe = CHANNEL | {"model.layers.0.self_attn.q_proj": dict(group_size=64, dtype=torch.bfloat16)}
    source, linears = compress(llama(), tmp_path / "source", "sparse24", recipe)
    opened = open_compressed(source)
    tensors = {name: opened.tensor(name).clone() for name in opened.checkpoint.names()}
    tensors["model.layers.0.self_attn.q_proj.weight_scale"].fill_(2.0**-30)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    wish = ["export", str(source), "--format", "marlin-24", "--output", str(tmp_path / "out"), "--json"]
    assert main(wish) == 0
    shown = capsys.readouterr()
    kept = {f"model.layers.{i}.self_attn.{name}_proj" for i in range(3) for name in "kv"}
    kept |= {"model.layers.0.self_attn.q_proj"}
    assert {entry["module"] for entry in json.loads(shown.out)["dense_modules"]} == kept
    assert "6 linears cannot be written as marlin-24 and stay dense: " in shown.err
    assert "float16, which cannot hold these (model.layers.0.self_attn.q_proj)" in shown.err
    assert set(open_compressed(tmp_path / "out").modules) == set(linears) - kept


def test_a_dense_two_four_model_whose_inputs_fit_no_kernel_is_refused(tmp_path):
    (tmp_path / "m").mkdir()
    weight = torch.zeros(4, 24, dtype=torch.bfloat16)
    weight[:, 0] = 1
    save_file({"model.layers.0.up.weight": weight}, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of the 1 linears.*its 24 inputs are no multiple of 16"):
        export(tmp_path / "m", "sparse24", tmp_path / "out")


def test_float32_does_not_lose_bits_silently(tmp_path):
    (tmp_path / "m").mkdir()
    weight = torch.zeros(4, 16)
    weight[:, 0] = 1 / 3
    save_file({"model.layers.0.up.weight": weight}, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="model.layers.0.up is float32"):
        export(tmp_path / "m", "sparse24", tmp_path / "out")


def test_a_damaged_source_leaves_nothing_behind(llama, compress, tmp_path):
    source, _ = compress(llama(), tmp_path / "source", "sparse24")
    content = bytearray((source / "model.safetensors").read_bytes())
    opened = open_compressed(source).checkpoint
    name = "model.layers.2.mlp.up_proj.weight_meta"
    meta = bytes(opened.tensor(name).view(-1).tolist())
    content[content.index(meta)] = 0
    (source / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        export(source, "dense", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_an_export_that_was_killed_is_begun_again(llama, compress, tmp_path, monkeypatch):
    from sparsify.formats.writer import CheckpointWriter

    source, _ = compress(llama(), tmp_path / "source", "sparse24")
    writer = CheckpointWriter(tmp_path / "out", "dense", open_checkpoint(source), identity=f"export of {source}")
    writer.write_part("0", {}, {"stale": torch.ones(1)})
    for other in ({"format": "sparse24"}, {"source": llama()}):
        with pytest.raises(CheckpointError, match="of an interrupted export of another model or to another format"):
            export(**{"source": source, "format": "dense", "output": tmp_path / "out", **other})
    assert writer.parts() == {"0"}
    assert "stale" not in open_checkpoint(export(source, "dense", tmp_path / "out"))
    # an interrupted compression is no export: its parts are worth hours
    writer = CheckpointWriter(tmp_path / "other", "dense", open_checkpoint(source), identity="a recipe")
    writer.write_part("0", {}, {"precious": torch.ones(1)})
    with pytest.raises(CheckpointError, match="--resume"):
        export(source, "dense", tmp_path / "other")
    assert writer.parts() == {"0"}


def test_what_a_run_left_that_was_killed_after_publishing_is_removed(llama, compress, tmp_path, monkeypatch, capfd):
    from sparsify.formats.writer import CheckpointWriter

    source, _ = compress(llama(), tmp_path / "source", "sparse24")
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "discard", lambda self: None)  # killed before it
        out = export(source, "dense", tmp_path / "out")
    written = (out / "model.safetensors").read_bytes()
    assert (tmp_path / "out.partial").exists()
    with pytest.raises(CheckpointError, match="exists already"):
        export(source, "dense", out)
    assert not (tmp_path / "out.partial").exists() and (out / "model.safetensors").read_bytes() == written
    assert "was left behind by the run that wrote" in capfd.readouterr().err


def test_the_parts_of_a_run_stay_when_a_stranger_makes_its_output(llama, tmp_path):
    from sparsify.formats.writer import CheckpointWriter

    source = open_checkpoint(llama())
    writer = CheckpointWriter(tmp_path / "out", "dense", source, identity="a recipe")
    writer.write_part("0", {}, {"precious": torch.ones(1)})
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        CheckpointWriter(tmp_path / "out", "dense", source, resume=True, identity="a recipe")
    assert writer.parts() == {"0"}


def test_a_foreign_directory_under_the_name_of_the_work_is_left_alone(llama, compress, tmp_path):
    source, _ = compress(llama(), tmp_path / "source", "sparse24")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="no work directory of sparsify"):
        export(source, "dense", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out.partial").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("recipe", [{}, MIXED], ids=["uniform", "mixed"])
def test_stock_transformers_runs_pack_quantized(llama, compress, tmp_path, recipe):
    """compressed-tensors decodes the weights, transformers computes with them: the logits are those of `dense`."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    sparse, linears = compress(llama(tied=not recipe), tmp_path / "sparse", "sparse24", recipe)
    tokens = torch.arange(48)[None] % 64
    logits = {}
    for format in ("dense", "pack-quantized"):
        model = AutoModelForCausalLM.from_pretrained(export(sparse, format, tmp_path / format)).eval()
        assert model.dtype == torch.bfloat16
        with torch.no_grad():
            logits[format] = model(tokens).logits
    assert torch.isfinite(logits["dense"]).all()
    assert torch.equal(logits["dense"], logits["pack-quantized"])


def test_embedded_model_to_dense(tmp_path, embedded):
    out = export(embedded, "dense", tmp_path / "out")
    checkpoint = open_checkpoint(out)
    assert checkpoint.config["dtype"] == "bfloat16" and checkpoint.config["tie_word_embeddings"] is True
    assert len([name for name in checkpoint.names() if ".layers." in name]) == 30 * 9
    assert not is_two_four(checkpoint.tensor("model.layers.0.mlp.up_proj.weight"))
    assert (out / "tokenizer.json").exists() and "quantization_config" not in read_json(out / "config.json")
