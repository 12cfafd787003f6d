"""Which files a run is made of: a resumed one finds the same, byte for byte, wherever they lie, or is refused by name."""

import json
import os
import shutil

import pytest
import torch

import sparsify.compiler.apply as run
import sparsify.compiler.calibrate as calibrate
from sparsify.compiler.apply import apply
from sparsify.errors import CheckpointError
from sparsify.formats.writer import CheckpointWriter
from sparsify.recipe import parse_recipe
from tests.helpers.tiny import save_tiny, tiny_text

SETTINGS = """
version: 1
calibration: {{source: {source}, samples: 8, sequence_length: 32}}
passes:
  - {before}prune: {{method: sparsegpt}}
  - quantize: {{method: gptq, bits: 4, group_size: 32}}{after}
export: {{format: sparse24}}
"""


class Killed(Exception):
    """Stands for a kill."""


@pytest.fixture
def source(tmp_path):
    return save_tiny(tmp_path / "source", dtype=torch.bfloat16)


@pytest.fixture
def recipe(tmp_path):
    text = tiny_text(tmp_path / "text.txt")

    def make(before="", after="", source=f"file:{text}"):
        return parse_recipe(SETTINGS.format(source=source, before=before, after=after))

    return make


def interrupted(recipe, source, output, monkeypatch, patched=CheckpointWriter, name="write_part", calls=2):
    """Kill a run at the call of this number of a method."""
    real, count = getattr(patched, name), iter(range(calls))

    def killed(*arguments, **settings):
        if next(count, None) is None:
            raise Killed
        return real(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(patched, name, killed)
        with pytest.raises(Killed):
            apply(recipe, str(source), output, quiet=True)


def change_last_byte(file):
    """Another weight; size, time of modification and inode stay, as with `touch -r`."""
    stamp = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-2, 2)
        byte = stream.read(1)
        stream.seek(-2, 2)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model.safetensors", change_last_byte, "model.safetensors has changed"),
        ("config.json", lambda file: file.write_text(file.read_text() + " "), "config.json has changed"),
        ("tokenizer_config.json", lambda file: file.unlink(), "tokenizer_config.json is gone"),
        ("modeling_own.py", lambda file: file.write_text("pass"), "modeling_own.py is new"),
    ],
)
def test_a_changed_source_is_refused_by_name(tmp_path, source, recipe, monkeypatch, file, change, message):
    interrupted(recipe(), source, tmp_path / "out", monkeypatch)
    before = (source / file).read_bytes() if (source / file).exists() else None
    change(source / file)
    with pytest.raises(
        CheckpointError, match=f"begun with another source: {message}; put it back as it was, or remove"
    ):
        apply(recipe(), str(source), tmp_path / "out", resume=True, quiet=True)
    assert not (tmp_path / "out").exists()
    (source / file).unlink(missing_ok=True) if before is None else (source / file).write_bytes(before)
    apply(recipe(), str(source), tmp_path / "out", resume=True, quiet=True)  # put back as it was


def test_a_model_that_was_moved_is_the_same_model(tmp_path, source, recipe, monkeypatch):
    apply(recipe(), str(source), tmp_path / "straight", quiet=True)
    interrupted(recipe(), source, tmp_path / "out", monkeypatch)
    shutil.copytree(source, tmp_path / "copied")
    shutil.rmtree(source)
    apply(recipe(), str(tmp_path / "copied"), tmp_path / "out", resume=True, quiet=True)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "out"))
    assert one == two


def test_tokens_of_another_source_are_not_used(tmp_path, source, recipe, monkeypatch):
    """Killed before the first part: nothing is finished, but the text of the old model lies there."""
    own = recipe(source="self")
    interrupted(own, source, tmp_path / "out", monkeypatch, calibrate, "Walk", calls=0)
    assert (tmp_path / "out.partial" / "calibration.safetensors").exists()
    change_last_byte(source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed"):
        apply(own, str(source), tmp_path / "out", resume=True, quiet=True)
    with pytest.raises(CheckpointError, match="begun with another recipe"):
        apply(recipe(), str(source), tmp_path / "out", resume=True, quiet=True)
    apply(own, str(source), tmp_path / "out", quiet=True)  # from the start
    apply(own, str(source), tmp_path / "straight", quiet=True)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "out"))
    assert one == two


def test_a_depth_pass_of_another_source_is_not_used(tmp_path, source, recipe, monkeypatch):
    asked = recipe(before="depth: {method: deepest, drop: 1}\n  - ")
    interrupted(asked, source, tmp_path / "out", monkeypatch, run, "compress_on_data", calls=0)
    change_last_byte(source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed"):
        apply(asked, str(source), tmp_path / "out", resume=True, quiet=True)
    with pytest.raises(CheckpointError, match="beginning of an interrupted run"):
        apply(recipe(), str(source), tmp_path / "out", quiet=True)


def test_a_changed_teacher_is_refused(tmp_path, source, recipe, monkeypatch):
    teacher = save_tiny(tmp_path / "teacher", dtype=torch.bfloat16, seed=1)
    distill = f"distill: {{tokens: 320, teacher: {teacher}, batch_size: 2, sequence_length: 32, loss: {{squarehead: 0, kl: 1}}}}"
    asked = recipe(after=f"\n  - {distill}")
    interrupted(asked, source, tmp_path / "out", monkeypatch)
    change_last_byte(teacher / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"teacher 1: model\.safetensors has changed"):
        apply(asked, str(source), tmp_path / "out", resume=True, quiet=True)


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, source, recipe, monkeypatch):
    real = CheckpointWriter.write_part

    def overwritten(self, part, *arguments):
        if part.endswith("1"):
            change_last_byte(source / "model.safetensors")
        return real(self, part, *arguments)

    monkeypatch.setattr(CheckpointWriter, "write_part", overwritten)
    with pytest.raises(
        CheckpointError, match=r"changed while it was read: model\.safetensors has changed; remove .*out\.partial"
    ):
        apply(recipe(), str(source), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_run_json_names_what_the_model_was_made_of(tmp_path, source, recipe):
    apply(recipe(), str(source), tmp_path / "out", quiet=True)
    apply(recipe(), str(source), tmp_path / "again", quiet=True)
    change_last_byte(source / "model.safetensors")
    apply(recipe(), str(source), tmp_path / "other", quiet=True)
    out, again, other = (
        json.loads((tmp_path / name / "run.json").read_text())["source"] for name in ("out", "again", "other")
    )
    assert len(out) == 64 and out == again != other
