"""Which files go with a model beside its weights, and which links are refused."""

import json
import os

import pytest

from sparsify.compiler.apply import apply
from sparsify.compiler.convert import export
from sparsify.errors import CheckpointError
from sparsify.model.checkpoint import open_checkpoint
from sparsify.model.sidecars import sidecars
from sparsify.recipe import parse_recipe
from tests.helpers.tiny import save_tiny

DATA_FREE = """
version: 1
passes:
  - prune: {method: magnitude}
  - quantize: {method: rtn, bits: 4, group_size: 32}
"""
COMES = [
    "modeling_mine.py", "modeling_token.py", "src/deep/helper.py", "additional_chat_templates/tool_use.jinja", "qwen.tiktoken",
    "tokenizer.model", "vocab.bpe", "merges.txt", "LICENSE", "NOTICE.txt", "USE_POLICY.md", "special_tokens_map.json",
    "added_tokens.json", "generation_config.json", "assets/figure.png", ".gitattributes", "hf_tokenizer_notes.md",
    "custom_generate/generate.py", "preprocessor_config.json",
]  # fmt: skip
STAYS = [
    "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json", "tf_model.h5", "model.onnx",
    "model.onnx_data", "flax_model.msgpack", "model-q4.gguf", "training.pt", "optimizer.pth", "consolidated.00.pth",
    "original/params.json", "checkpoint-500/trainer_state.json", "adapter_config.json", "quantize_config.json",
    "earlier/config.json", "earlier/model.safetensors", "earlier/tokenizer.json",
    ".env", ".env.local", "prod.env", ".git/config", ".cache/huggingface/x.lock", ".netrc", ".ssh/id_rsa", "id_rsa",
    "id_ed25519.pub", "token", "hf_token.txt", "HF_TOKEN", "access_tokens.json", "credentials.json", "secrets.yaml",
    "secrets.py", "server.pem", "private.key", "__pycache__/modeling_mine.cpython-311.pyc", "out.partial/parts/x.json",
    "config.json", "README.md", "recipe.yaml", "metrics.json", "run.json", "SHA256SUMS",
]  # fmt: skip


def fill(directory, names):
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(f"this is {name}".encode())
    return directory


def test_everything_but_weights_and_credentials_comes_along(tmp_path):
    directory = fill(tmp_path / "model", COMES + STAYS)
    found = sidecars(directory)
    assert list(found) == sorted(COMES)
    assert all(file.read_text() == f"this is {name}" for name, file in found.items())


def test_what_looks_like_a_credential_is_said_to_stay(tmp_path, capsys):
    model = fill(save_tiny(tmp_path / "model"), ["hf_token.txt", ".env"])
    apply(parse_recipe(DATA_FREE), str(model), tmp_path / "out")
    assert "left out, as it looks like a credential: hf_token.txt" in capsys.readouterr().err


def test_apply_and_export_carry_them(tmp_path):
    model = fill(
        save_tiny(tmp_path / "model"), ["modeling_mine.py", "additional_chat_templates/a.jinja", "a/b/LICENSE", ".env"]
    )
    out = apply(parse_recipe(DATA_FREE), str(model), tmp_path / "out", quiet=True).output
    again = export(out, "pack-quantized", tmp_path / "again", quiet=True)
    for directory in (out, again):
        for name in ("modeling_mine.py", "additional_chat_templates/a.jinja", "a/b/LICENSE", "tokenizer.json"):
            assert (directory / name).read_bytes() == (model / name).read_bytes()
        assert not (directory / ".env").exists()
        assert (directory / "README.md").read_text() != "this is README.md"


def test_an_output_inside_of_the_model_is_not_copied_into_itself(tmp_path):
    model = save_tiny(tmp_path / "model")
    out = apply(parse_recipe(DATA_FREE), str(model), model / "results" / "out", quiet=True).output
    assert (out / "tokenizer.json").exists() and not (out / "results").exists()


def snapshot(tmp_path, names):
    """A repository in the cache of the Hub: links into its blobs."""
    repository = tmp_path / "hub" / "models--org--name"
    directory = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    for number, name in enumerate(names):
        (repository / "blobs" / f"{number}").write_text(f"this is {name}")
        link = directory / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(repository / "blobs" / f"{number}", link.parent))
    return directory


def test_links_of_a_hub_snapshot_are_followed(tmp_path):
    directory = snapshot(tmp_path, ["modeling_mine.py", "additional_chat_templates/a.jinja", "model.safetensors"])
    found = sidecars(directory)
    assert list(found) == ["additional_chat_templates/a.jinja", "modeling_mine.py"]
    assert all(file.read_text() == f"this is {name}" and not file.is_symlink() for name, file in found.items())


@pytest.mark.parametrize("kind", ["plain", "snapshot", "folder", "nowhere"])
def test_links_that_lead_out_are_refused_by_name(tmp_path, kind):
    outside = fill(tmp_path / "elsewhere", ["private.txt"])
    directory = snapshot(tmp_path, ["a.py"]) if kind == "snapshot" else fill(tmp_path / "model", ["a.py"])
    target = {"folder": outside, "nowhere": directory / "absent"}.get(kind, outside / "private.txt")
    (directory / "notes").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"notes is a link to .*(outside of|does not exist)"):
        sidecars(directory)


def test_links_inside_of_the_directory_are_followed_once(tmp_path):
    directory = fill(tmp_path / "model", ["templates/a.jinja"])
    (directory / "b.jinja").symlink_to("templates/a.jinja")
    (directory / "templates" / "around").symlink_to("..")
    (tmp_path / "link").symlink_to(directory)
    assert list(sidecars(tmp_path / "link")) == ["b.jinja", "templates/a.jinja"]


def test_a_link_that_leads_out_is_refused_before_anything_is_computed(tmp_path):
    model = save_tiny(tmp_path / "model")
    fill(tmp_path, ["private.txt"])
    (model / "NOTES").symlink_to(tmp_path / "private.txt")
    with pytest.raises(CheckpointError, match="NOTES is a link to"):
        apply(parse_recipe(DATA_FREE), str(model), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out.partial").exists()


def test_a_card_behind_a_link_that_leads_out_is_refused(tmp_path):
    model = save_tiny(tmp_path / "model")
    out = apply(parse_recipe(DATA_FREE), str(model), tmp_path / "out", quiet=True).output
    fill(tmp_path, ["private.txt"])
    (out / "README.md").unlink()
    (out / "README.md").symlink_to(tmp_path / "private.txt")
    with pytest.raises(CheckpointError, match=r"README.md is a link to"):
        export(out, "dense", tmp_path / "again", quiet=True)


def test_infinities_of_a_config_are_written_back(tmp_path):
    model = save_tiny(tmp_path / "model")
    file = model / "config.json"
    odd = {"low": float("-inf"), "high": [float("inf"), 1], "none": float("nan")}
    file.write_text(json.dumps({**json.loads(file.read_text()), "limits": odd}))
    out = apply(parse_recipe(DATA_FREE), str(model), tmp_path / "out", quiet=True).output
    again = export(out, "pack-quantized", tmp_path / "again", quiet=True)
    for directory in (out, again):
        assert repr(open_checkpoint(directory).config["limits"]) == repr(odd)
