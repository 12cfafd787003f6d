"""Checkpoint directories: what is in them, resuming, and what is never left behind."""

import hashlib
import json
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sparsify.errors import CheckpointError
from sparsify.files import read_json
from sparsify.formats import ModuleScheme, tensor_file
from sparsify.formats import writer as writer_module
from sparsify.formats.reader import natural, open_compressed
from sparsify.formats.writer import CheckpointWriter
from sparsify.manifest import MANIFEST
from sparsify.model.checkpoint import open_checkpoint


def digest(path):
    """Name and content of every file in a directory."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


def same_tensor(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


RECIPE = {
    "model.layers.0.self_attn.v_proj": dict(bits=8, pattern="dense"),
    "model.layers.1.mlp.down_proj": dict(bits=4, group_size=192),
    "model.layers.2.mlp.up_proj": dict(bits=16),
    "model.layers.2.self_attn.o_proj": None,
    "lm_head": dict(bits=8, pattern="dense"),
}


def test_what_is_written_is_read(llama, compress, same, tmp_path):
    source = llama(tied=False)
    out, linears = compress(source, tmp_path / "out", "sparse24", RECIPE, {"recipe.yaml": "version: 1\n"})
    opened = open_compressed(out)
    assert opened.format == "sparse24"
    assert opened.modules == {module: ModuleScheme.of(linear) for module, linear in linears.items()}
    assert all(same(opened.linear(module), linear) for module, linear in linears.items())
    dense = open_checkpoint(source)
    others = [name for name in dense.names() if name.removesuffix(".weight") not in linears]
    assert opened.other_names() == others
    assert all(same_tensor(opened.tensor(name), dense.tensor(name)) for name in others)
    assert (out / "recipe.yaml").read_text() == "version: 1\n"
    assert (out / "tokenizer.json").read_text() == "this is tokenizer.json"
    assert (out / "chat_template.jinja").exists() and (out / "generation_config.json").exists()
    assert not (tmp_path / "out.partial").exists() and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_config_says_what_is_dense_and_drops_what_is_stale(llama, compress, tmp_path):
    source = open_checkpoint(llama())
    source.config.update(quantization_config={"quant_method": "awq"}, torch_dtype="float32", _name_or_path="/somewhere")
    writer = CheckpointWriter(tmp_path / "out", "dense", source)
    writer.write_part("all", {}, {name: source.tensor(name) for name in source.names()})
    config = read_json(writer.finish({"added": 1}) / "config.json")
    assert config["added"] == 1 and config["dtype"] == "bfloat16"
    assert not {"quantization_config", "torch_dtype", "_name_or_path"} & set(config)

    out, _ = compress(llama(), tmp_path / "packed", "sparse24", {"model.layers.2.self_attn.o_proj": None})
    config = read_json(out / "config.json")
    described = config["quantization_config"]
    # tied: the head is in no file but is a linear of the model
    assert described["ignore"] == ["lm_head", "model.embed_tokens", "model.layers.2.self_attn.o_proj"]
    assert config["tie_word_embeddings"] is True
    assert (described["bits"], described["group_size"], described["modules"]) == (4, 32, {})


def test_a_head_of_its_own_is_not_tied_any_more(llama, make_linear, tmp_path):
    source = open_checkpoint(llama())
    assert source.config["tie_word_embeddings"] is True and "lm_head.weight" not in source
    for format in ("sparse24", "dense"):
        writer = CheckpointWriter(tmp_path / format, format, source)
        head = make_linear(64, 64, bits=8, pattern="dense")
        embedding = "model.embed_tokens.weight"
        writer.write_part("all", {"lm_head": head}, {embedding: source.tensor(embedding)})
        assert read_json(writer.finish() / "config.json")["tie_word_embeddings"] is False


def test_files_are_what_the_safetensors_library_expects(llama, compress, tmp_path):
    out, _ = compress(llama(), tmp_path / "out", "sparse24")
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
    loaded = load_file(out / "model.safetensors")
    opened = open_checkpoint(out)
    assert set(loaded) == names == set(opened.names())
    assert all(same_tensor(loaded[name], opened.tensor(name)) for name in names)
    header = int.from_bytes((out / "model.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0  # tensors are aligned, so readers can map the file


@pytest.mark.parametrize("format", ["sparse24", "pack-quantized", "dense"])
def test_parts_survive_and_give_back_what_was_written(llama, make_linear, same, tmp_path, format):
    linears = {
        "model.layers.0.a": make_linear(bits=4, bias=True, seed=1),
        "model.layers.0.b": make_linear(bits=8, group_size=128, pattern="dense", seed=2),
        "model.layers.0.c": make_linear(bits=16, seed=3),
        "model.layers.0.d": make_linear(bits=4, k=72, group_size=72, bias=True, seed=4),
    }
    tensors = {"model.layers.0.norm.weight": torch.ones(8), "model.layers.0.e.weight": torch.ones(4, 4)}
    writer = CheckpointWriter(tmp_path / "out", format, open_checkpoint(llama()))
    writer.write_part("block.0", linears, tensors)
    again = CheckpointWriter(tmp_path / "out", format, open_checkpoint(llama()), resume=True)
    assert again.parts() == {"block.0"}
    read, others = again.read_part("block.0")
    assert set(read) == set(linears) and all(same(read[module], linear) for module, linear in linears.items())
    assert set(others) == set(tensors) and all(same_tensor(others[name], tensors[name]) for name in tensors)


def test_linears_that_do_not_fit_stay_dense_and_are_listed(llama, make_linear, tmp_path):
    narrow = make_linear(k=72, group_size=72, bias=True)
    writer = CheckpointWriter(tmp_path / "out", "sparse24", open_checkpoint(llama()))
    writer.write_part("0", {"model.layers.0.narrow": narrow, "model.layers.0.wide": make_linear()}, {})
    assert writer.dense_modules() == {"model.layers.0.narrow": "its 72 inputs are no multiple of 16"}
    out = writer.finish()
    opened = open_compressed(out)
    assert set(opened.modules) == {"model.layers.0.wide"}
    assert opened.other_names() == ["model.layers.0.narrow.bias", "model.layers.0.narrow.weight"]
    assert torch.equal(opened.tensor("model.layers.0.narrow.weight"), narrow.dense())
    assert opened.config["quantization_config"]["ignore"] == ["lm_head", "model.layers.0.narrow"]


def test_dense_checkpoints_hold_no_codes(llama, compress, tmp_path):
    out, linears = compress(llama(), tmp_path / "out", "dense")
    opened = open_compressed(out)
    assert opened.format == "dense" and opened.modules == {} and "quantization_config" not in opened.config
    assert set(opened.other_names()) == set(open_checkpoint(llama()).names())
    for module, linear in linears.items():
        assert torch.equal(opened.tensor(f"{module}.weight"), linear.dense(torch.bfloat16))


def test_large_checkpoints_are_sharded(llama, compress, same, tmp_path, monkeypatch):
    whole, linears = compress(llama(), tmp_path / "whole", "sparse24")
    monkeypatch.setattr(tensor_file, "SHARD_BYTES", 20_000)
    out, _ = compress(llama(), tmp_path / "out", "sparse24")
    index = read_json(out / "model.safetensors.index.json")
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert not (out / "model.safetensors").exists()
    opened, reference = open_compressed(out), open_compressed(whole)
    assert index["metadata"]["total_size"] == opened.checkpoint.nbytes() == reference.checkpoint.nbytes()
    assert all(same(opened.linear(module), linear) for module, linear in linears.items())
    for file in files:
        tensors = load_file(out / file)
        assert sum(t.nbytes for t in tensors.values()) <= 20_000 or len(tensors) == 1


def write(writer, source, make_linear, numbers):
    for i in numbers:
        linears, tensors = {f"model.layers.{i}.up": make_linear(seed=i)}, {f"model.layers.{i}.n": torch.ones(i + 1)}
        writer.write_part(f"block.{i}", linears, tensors)


def test_a_resumed_run_ends_with_the_same_bytes(llama, make_linear, tmp_path):
    source = open_checkpoint(llama())
    straight = CheckpointWriter(tmp_path / "straight", "sparse24", source, identity="recipe")
    write(straight, source, make_linear, range(12))
    straight.finish({}, {"recipe.yaml": "a"})
    killed = CheckpointWriter(tmp_path / "killed", "sparse24", source, identity="recipe")
    write(killed, source, make_linear, [11, 2, 0, 5])
    (killed.work / "parts" / ".block.7.safetensors.99.partial").write_bytes(b"half")
    resumed = CheckpointWriter(tmp_path / "killed", "sparse24", source, resume=True, identity="recipe")
    assert resumed.parts() == {"block.0", "block.2", "block.5", "block.11"}
    write(resumed, source, make_linear, [i for i in range(12) if f"block.{i}" not in resumed.parts()])
    resumed.finish({}, {"recipe.yaml": "a"})
    assert digest(tmp_path / "straight") == digest(tmp_path / "killed")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "straight"]


def test_another_run_is_not_resumed(llama, make_linear, tmp_path, monkeypatch):
    source = open_checkpoint(llama())
    write(CheckpointWriter(tmp_path / "out", "sparse24", source, identity="a"), source, make_linear, [0])
    with pytest.raises(CheckpointError, match="out.partial holds 1 finished parts.*--resume, or remove"):
        CheckpointWriter(tmp_path / "out", "sparse24", source, identity="a")
    with pytest.raises(CheckpointError, match="begun with another recipe"):
        CheckpointWriter(tmp_path / "out", "sparse24", source, resume=True, identity="b")
    with pytest.raises(CheckpointError, match="begun with another format"):
        CheckpointWriter(tmp_path / "out", "dense", source, resume=True, identity="a")
    monkeypatch.setattr(writer_module, "__version__", "99.0")
    with pytest.raises(CheckpointError, match="begun with another version of sparsify"):
        CheckpointWriter(tmp_path / "out", "sparse24", source, resume=True, identity="a")
    monkeypatch.undo()
    (tmp_path / "out.partial" / "parts" / "block.1.safetensors").write_bytes(b"\0" * 100)
    resumed = CheckpointWriter(tmp_path / "out", "sparse24", source, resume=True, identity="a")
    assert resumed.parts() == {"block.0"} and not (tmp_path / "out").exists()  # what no run has written is none


@pytest.mark.parametrize("resume", [False, True])
def test_a_work_directory_of_somebody_else_is_left_alone(llama, make_linear, tmp_path, resume):
    """`finish` would remove it. What a run leaves that was killed before its record was written is taken over."""
    source = open_checkpoint(llama())
    (tmp_path / "out.partial" / "parts").mkdir(parents=True)
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"out.partial is no work directory of sparsify \(it holds thesis.txt\)"):
        CheckpointWriter(tmp_path / "out", "sparse24", source, resume=resume, identity="a")
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"
    (tmp_path / "out.partial" / "thesis.txt").unlink()
    writer = CheckpointWriter(tmp_path / "out", "sparse24", source, resume=resume, identity="a")
    write(writer, source, make_linear, [0])
    writer.finish({}, {"recipe.yaml": "a"})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_process_leaves_whole_parts_only(llama, tmp_path):
    """SIGKILL while parts are written as fast as the disk takes them: every part under a final name is readable."""
    script = textwrap.dedent(
        f"""
        import torch
        from sparsify.formats.writer import CheckpointWriter
        from sparsify.model.checkpoint import open_checkpoint
        writer = CheckpointWriter({str(tmp_path / "out")!r}, "sparse24", open_checkpoint({str(llama())!r}))
        print("ready", flush=True)
        for i in range(100000):
            writer.write_part(f"block.{{i}}", {{}}, {{f"model.layers.{{i}}.n": torch.full((200_000,), float(i))}})
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    parts = tmp_path / "out.partial" / "parts"
    try:
        assert process.stdout.readline() == "ready\n"
        while process.poll() is None and len(list(parts.glob("*.safetensors"))) < 4:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    writer = CheckpointWriter(tmp_path / "out", "sparse24", open_checkpoint(llama()), resume=True)
    assert len(writer.parts()) >= 4 and not list(parts.glob(".*"))
    for part in writer.parts():
        number = int(part.removeprefix("block."))
        assert torch.equal(writer.read_part(part)[1][f"model.layers.{number}.n"], torch.full((200_000,), float(number)))


@pytest.mark.parametrize("moment", ["part", "finish"])
def test_a_full_disk_gives_one_sentence_and_no_directory(llama, tmp_path, moment):
    """RLIMIT_FSIZE makes the operating system itself refuse to let a file grow."""
    script = textwrap.dedent(
        f"""
        import resource, signal, sys, torch
        from sparsify.errors import CheckpointError
        from sparsify.formats.writer import CheckpointWriter
        from sparsify.model.checkpoint import open_checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        writer = CheckpointWriter({str(tmp_path / "out")!r}, "dense", open_checkpoint({str(llama())!r}))
        limit = 100_000 if {moment!r} == "part" else 600_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            for i in range(4):
                writer.write_part(f"p{{i}}", {{}}, {{f"model.layers.{{i}}.n": torch.zeros(100_000)}})
            writer.finish()
        except CheckpointError as error:
            sys.exit(f"error: {{error}}")
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert "cannot write" in done.stderr and "free some disk space" in done.stderr
    assert not (tmp_path / "out").exists()
    parts = sorted(file.name for file in (tmp_path / "out.partial" / "parts").iterdir() if file.name != MANIFEST)
    assert parts == ([] if moment == "part" else [f"p{i}.safetensors" for i in range(4)])
    if moment == "finish":  # with room again, the same parts become the checkpoint
        out = CheckpointWriter(tmp_path / "out", "dense", open_checkpoint(llama()), resume=True).finish()
        assert set(open_checkpoint(out).names()) == {f"model.layers.{i}.n" for i in range(4)}


def test_writer_refuses_what_would_be_wrong(llama, make_linear, tmp_path):
    source = open_checkpoint(llama())
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="there exists already"):
        CheckpointWriter(tmp_path / "there", "sparse24", source)
    with pytest.raises(CheckpointError, match="format 'gguf' is unknown; known formats: sparse24"):
        CheckpointWriter(tmp_path / "out", "gguf", source)
    writer = CheckpointWriter(tmp_path / "out", "sparse24", source)
    with pytest.raises(CheckpointError, match="part name '../x'"):
        writer.write_part("../x", {}, {})
    with pytest.raises(CheckpointError, match="holds no finished part"):
        writer.finish()
    full = make_linear(pattern="dense")
    broken = type(full)(4, "2:4", 64, codes=full.codes, scale=full.scale)
    with pytest.raises(CheckpointError, match="model.layers.0.up: some group of 4"):
        writer.write_part("0", {"model.layers.0.up": broken}, {})
    with pytest.raises(CheckpointError, match="holds model.layers.0.up.weight_meta twice"):
        writer.write_part("0", {"model.layers.0.up": make_linear()}, {"model.layers.0.up.weight_meta": torch.ones(1)})
    writer.write_part("0", {}, {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match="must lie inside the directory"):
        writer.finish({}, {"../README.md": "x"})
    writer.write_part("1", {}, {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match="a is in two parts"):
        writer.finish()
    assert not (tmp_path / "out").exists()


def test_natural_order():
    names = ["layers.10.a", "layers.9.b", "layers.9.a", "head", "2", "x"]
    assert sorted(names, key=natural) == ["2", "head", "layers.9.a", "layers.9.b", "layers.10.a", "x"]
    hostile = ["9" * 5000 + "a", "1²2", "1", "²", "1" + "0" * 5000 + "a"]
    assert sorted(hostile, key=natural) == ["1", "1²2", hostile[0], hostile[-1], "²"]


# --- hostile and damaged directories ---------------------------------------------------------------------------------


@pytest.fixture
def good(llama, compress, tmp_path):
    return compress(llama(), tmp_path / "good", "sparse24")[0]


def read_everything(path):
    opened = open_compressed(path)
    for module in opened.modules:
        opened.linear(module)
    for name in opened.other_names():
        opened.tensor(name)


def edit_config(path, change):
    config = read_json(path / "config.json")
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def rewrite(path, change):
    """Change the tensors of a finished checkpoint."""
    from safetensors.torch import save_file

    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 0.5, -1])
def test_a_truncated_file_is_refused(good, keep):
    content = (good / "model.safetensors").read_bytes()
    keep = int(len(content) * keep) if isinstance(keep, float) else keep
    (good / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        read_everything(good)


@pytest.mark.parametrize("length", [2**63, 2**40, 2**27, 0])
def test_a_header_length_bomb_is_refused(good, length):
    content = (good / "model.safetensors").read_bytes()
    (good / "model.safetensors").write_bytes(length.to_bytes(8, "little") + content[8:])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        read_everything(good)


def header_edit(path, change):
    file = path / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [0, 2**62]},
        {"data_offsets": [-8, 8]},
        {"data_offsets": "all"},
        {"shape": [2**31, 2**31]},
        {"shape": [-1, 4]},
        {"shape": "wide"},
        {"dtype": "I3"},
    ],
    ids=str,
)
def test_a_lying_header_is_refused(good, entry):
    header_edit(good, lambda header: header[f"{UP}.weight_packed"].update(entry))
    with pytest.raises(CheckpointError):
        read_everything(good)


def first(value):
    def change(tensor):
        tensor.view(-1)[0] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("weight_scale", first(float("nan")), "NaN"),
        ("weight_meta", first(0x11), "first >= second"),
    ],
)
def test_damaged_values_are_refused_by_name(good, name, change, says):
    rewrite(good, lambda tensors: change(tensors[f"{UP}.{name}"]))
    with pytest.raises(CheckpointError, match=f"{UP}.{name}.*{says}"):
        read_everything(good)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{UP}.weight_scale"), f"{UP}.weight_scale is missing"),
        (lambda t: t.pop(f"{UP}.weight_packed"), f"{UP}.weight_packed is missing"),
        (lambda t: t.pop(f"{UP}.weight_meta"), f"{UP}.weight_meta: expected a matrix, found nothing"),
        (lambda t: t.update({f"{UP}.weight_meta": torch.zeros(4, dtype=torch.uint8)}), "expected a matrix"),
        (lambda t: t.update({f"{UP}.weight_meta": torch.zeros(192, 7, dtype=torch.uint8)}), "no multiple of 16"),
        (lambda t: t.update({f"{UP}.weight": torch.zeros(192, 64)}), f"{UP}.weight is dense"),
        (lambda t: t.update({"model.layers.1.mlp.new.weight": torch.zeros(8, 8)}), "new.weight is dense, but config"),
        (lambda t: t.update({"lm_head.weight_packed": torch.zeros(8, 8)}), "lm_head is packed, but config"),
    ],
)
def test_missing_and_foreign_tensors_are_refused_by_name(good, change, says):
    rewrite(good, change)
    with pytest.raises(CheckpointError, match=says):
        read_everything(good)


def override(name, **entry):
    return lambda config: config["quantization_config"]["modules"].update({name: entry})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (override("model.layers.7.mlp.up_proj", bits=8), "lists model.layers.7.mlp.up_proj as compressed"),
        (override(UP, bits=8), f"{UP}.weight_packed: expected int32"),
        (override(UP, group_size=64), f"{UP}.weight_scale: expected"),
        (override(UP, group_size=48), "no multiple of the group size 48"),
        (lambda c: c["quantization_config"]["ignore"].append(UP), f"{UP} is packed, but config.json says"),
        (
            lambda c: c["quantization_config"].update(quant_method="hqq"),
            "quantized with hqq.*transformers with hqq reads it",
        ),
        (lambda c: c["quantization_config"].clear(), "unnamed method"),
        (lambda c: c.update(quantization_config="4 bits"), "must be an object"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(good, change, says):
    edit_config(good, change)
    with pytest.raises(CheckpointError, match=says):
        read_everything(good)


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff", "null"])
def test_a_damaged_config_file_is_refused(good, content):
    (good / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match="config.json"):
        read_everything(good)


@pytest.fixture
def sharded(llama, compress, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "SHARD_BYTES", 20_000)
    return compress(llama(), tmp_path / "sharded", "sparse24")[0]


def test_a_missing_shard_is_refused(sharded):
    (sharded / sorted(p.name for p in sharded.glob("*.safetensors"))[1]).unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-.* is missing"):
        read_everything(sharded)


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, None])
def test_an_index_that_leaves_the_directory_is_refused(sharded, target):
    index = read_json(sharded / "model.safetensors.index.json")
    index["weight_map"][next(iter(index["weight_map"]))] = target
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        read_everything(sharded)


def test_an_index_that_lists_absent_tensors_is_refused(sharded):
    index = read_json(sharded / "model.safetensors.index.json")
    index["weight_map"]["model.layers.9.mlp.up_proj.weight_packed"] = next(iter(index["weight_map"].values()))
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lists model.layers.9.mlp.up_proj.weight_packed"):
        read_everything(sharded)
