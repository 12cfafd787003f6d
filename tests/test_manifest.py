"""The manifest of an output: written last, compared by `verify`, on loading when asked, and by a run that goes on."""

import errno
import json
import random
import shutil
import subprocess
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sparsify
from sparsify.cli import main
from sparsify.compiler.apply import apply
from sparsify.compiler.convert import export
from sparsify.errors import CheckpointError
from sparsify.formats import tensor_file
from sparsify.formats.writer import CheckpointWriter
from sparsify.manifest import MANIFEST, VARIABLE, damage, keep, keep_json, read_manifest, seal, unsound, verify
from sparsify.recipe import parse_recipe
from tests.helpers.compressed import compress, make_dense
from tests.helpers.students import Killed, bytes_of
from tests.helpers.tiny import save_tiny, tiny_text

TRIALS = 100
FORMATS = ("sparse24", "pack-quantized", "gptq", "marlin-24", "dense", "sharded")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """`outputs(format)`: a finished output in it, which a test leaves as it was."""
    place = tmp_path_factory.mktemp("outputs")
    dense = make_dense("llama", place / "model", num_hidden_layers=1, tie_word_embeddings=True)
    made = {}

    def make(format):
        if format not in made:
            asked, output = "sparse24" if format == "sharded" else format, place / format
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tensor_file, "SHARD_BYTES", 30_000 if format == "sharded" else 2**40)
                settings = {"pattern": "dense"} if format in ("pack-quantized", "gptq") else {}
                made[format] = compress(
                    dense, output, asked, group_size=128 if format == "marlin-24" else 64, **settings
                )
        return made[format]

    return make


def flipped(file, bit):
    """Flip one bit of a file in place."""
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        byte = opened.read(1)[0]
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))


@pytest.mark.parametrize("format", FORMATS)
def test_every_flipped_bit_is_found(outputs, format):
    """Of random bits, the manifest's own among them, as many in small files as in large ones."""
    output = outputs(format)
    assert (len(list(output.glob("*.safetensors"))) > 2) == (format == "sharded")
    assert verify(output).good and verify(output).files == sum(p.is_file() for p in output.rglob("*")) - 1
    chance = random.Random(0)
    files = sorted(path for path in output.rglob("*") if path.is_file())
    for _ in range(TRIALS):
        file = chance.choice(files)
        bit = chance.randrange(8 * file.stat().st_size)
        flipped(file, bit)
        found = damage(output)
        assert found is not None and (file.name in found or file.name == MANIFEST), (file, bit)
        flipped(file, bit)
    assert damage(output) is None


def test_coreutils_read_the_manifest(tmp_path):
    """`sha256sum` agrees, on names too that need an escape."""
    for name in ("plain", "in/a folder", "back\\slash", "two\nlines", "cr\rname", "\\n", "ünï"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    seal(tmp_path)
    assert verify(tmp_path).good and len(read_manifest(tmp_path)) == 7
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", MANIFEST], cwd=tmp_path, check=True)
        written = subprocess.run(["sha256sum", *sorted(read_manifest(tmp_path))], cwd=tmp_path, capture_output=True)
        assert sorted(written.stdout.splitlines()) == sorted((tmp_path / MANIFEST).read_bytes().splitlines())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("x", "is cut off in line 1"),
        ("0" * 64 + "  a", "is cut off in line 1"),
        ("0" * 64 + "  a\n" + "A" * 64 + "  a\n", "is damaged in line 2"),
        ("0" * 64 + " *a\n", "is damaged in line 1"),
        ("0" * 64 + "  ../a\n", "is damaged in line 1"),
        ("0" * 64 + "  /etc/passwd\n", "is damaged in line 1"),
        ("0" * 64 + "  \n", "is damaged in line 1"),
        ("\n", "is damaged in line 1"),
    ],
)
def test_a_hostile_manifest_is_refused_by_line(tmp_path, content, said):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=said):
        verify(tmp_path)


def test_verify_names_what_differs_is_missing_and_is_extra(outputs, tmp_path, capsys):
    output = shutil.copytree(outputs("sparse24"), tmp_path / "out")
    (output / "report.html").write_text("written later by a command")
    (output / ".gitattributes").write_text("by the Hub")
    assert main(["verify", str(output)]) == 0
    assert "files are as they were written" in capsys.readouterr().out
    flipped(output / "config.json", 100)
    (output / "tokenizer.json").unlink()
    (output / "modeling_evil.py").write_text("")
    assert main(["verify", str(output), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["differing"], found["missing"]) == (["config.json"], ["tokenizer.json"])
    assert found["extra"] == ["modeling_evil.py"] and not found["good"]
    assert main(["verify", str(output)]) == 1
    shown = capsys.readouterr().out
    assert "config.json differs from what was written\ntokenizer.json is missing\nmodeling_evil.py is not in" in shown
    assert not sparsify.verify(output).good


def test_a_directory_without_a_manifest_is_said_to_have_none(outputs, tmp_path, capsys):
    output = shutil.copytree(outputs("sparse24"), tmp_path / "out")
    (output / MANIFEST).unlink()
    assert main(["verify", str(output)]) == 1
    assert f"has no {MANIFEST}, so that nothing says" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "nothing")]) == 1
    assert "is no directory" in capsys.readouterr().err


def test_an_export_has_a_manifest_of_its_own(outputs, tmp_path):
    """That of the source stays behind; one that lies in a folder is a file like any other, whatever is in it."""
    source = shutil.copytree(outputs("sparse24"), tmp_path / "source")
    (source / "extra").mkdir()
    (source / "extra" / MANIFEST).write_text("no manifest of ours")
    out = export(source, "dense", tmp_path / "out", quiet=True)
    assert verify(out).good and f"extra/{MANIFEST}" in read_manifest(out)
    assert read_manifest(out)["model.safetensors"] != read_manifest(source)["model.safetensors"]


# ------------------------------------------------------------------------------------------------------ on loading


@pytest.mark.parametrize("how", ["differs", "extra", "gone"])
def test_loaders_verify_when_asked(outputs, tmp_path, monkeypatch, how):
    output = shutil.copytree(outputs("sparse24"), tmp_path / "out")
    monkeypatch.setenv(VARIABLE, "1")
    AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16)
    if how == "differs":
        header = int.from_bytes((output / "model.safetensors").read_bytes()[:8], "little")
        flipped(output / "model.safetensors", 8 * (8 + header + 5))  # codes, of which any bits are valid
    elif how == "extra":
        shutil.copy(output / "model.safetensors", output / "other.safetensors")
    else:
        (output / MANIFEST).unlink()
    said = {"differs": "model.safetensors differs", "extra": "other.safetensors is not in", "gone": "has no SHA256SUMS"}
    with pytest.raises(CheckpointError, match=said[how]):
        AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16)
    monkeypatch.setenv(VARIABLE, "0")
    AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16)


def test_a_snapshot_of_the_hub_may_lack_files(outputs, tmp_path, monkeypatch):
    output = shutil.copytree(outputs("sparse24"), tmp_path / "snapshots" / "0123")
    (output / "tokenizer.json").unlink()
    monkeypatch.setenv(VARIABLE, "1")
    AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16)


# ------------------------------------------------------------------------------------------------- runs that go on

RECIPE = """
version: 1
calibration: {{source: "file:{text}", samples: 4, sequence_length: 32}}
passes:
  - prune: {{method: sparsegpt}}
  - quantize: {{method: gptq, bits: 4, group_size: 32}}
"""
TRAINED = (
    RECIPE
    + "  - distill: {{tokens: 128, sequence_length: 32, batch_size: 1, save_every: 1, teacher_logits: cached, "
    + "loss: {{squarehead: 0}}}}\n"
)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """`interrupted(kind)`: the files of a whole output, a work directory of the same run that was ended late, how to go on."""
    place = tmp_path_factory.mktemp("runs")
    source, text = save_tiny(place / "source", dtype=torch.bfloat16), tiny_text(place / "text.txt")
    made = {}

    def make(kind):
        if kind not in made:
            recipe = parse_recipe((TRAINED if kind == "trained" else RECIPE).format(text=text))
            apply(recipe, str(source), place / f"{kind}-whole", quiet=True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(CheckpointWriter, "finish", _end)
                with pytest.raises(Killed):
                    apply(recipe, str(source), place / f"{kind}-out", quiet=True)
            made[kind] = recipe
        go_on = partial(apply, made[kind], str(source), resume=True)
        return bytes_of(place / f"{kind}-whole"), place / f"{kind}-out.partial", go_on

    return make


def _end(*_):
    raise Killed


def copied(interrupted, kind, tmp_path):
    """The interrupted run in a directory of the test."""
    whole, work, go_on = interrupted(kind)
    shutil.copytree(work, tmp_path / "out.partial")
    return whole, tmp_path / "out.partial", lambda: go_on(tmp_path / "out")


@pytest.mark.parametrize("kind", ["apply", "trained"])
def test_a_damaged_part_is_named_and_made_again(interrupted, tmp_path, capfd, kind):
    whole, work, go_on = copied(interrupted, kind, tmp_path)
    assert verify(work).good and verify(work).unfinished
    parts = "parts-1" if kind == "trained" else "parts"
    file = work / parts / "block-0001.safetensors"
    flipped(file, 8 * file.stat().st_size - 9)
    assert verify(work).differing == (f"{parts}/block-0001.safetensors",)
    go_on()
    assert f"{parts}/block-0001.safetensors is damaged" in capfd.readouterr().err
    assert bytes_of(tmp_path / "out") == whole and verify(tmp_path / "out").good


def test_a_part_that_is_gone_is_made_again(interrupted, tmp_path):
    whole, work, go_on = copied(interrupted, "trained", tmp_path)
    (work / "parts-1" / "outside.safetensors").unlink()
    go_on()
    assert bytes_of(tmp_path / "out") == whole


def test_a_damaged_state_of_training_is_left_out(interrupted, tmp_path, capfd):
    """And what the teacher said, where that is damaged, is computed again."""
    whole, work, go_on = copied(interrupted, "trained", tmp_path)
    last = max((work / "training-1").glob("checkpoint-*"))
    flipped(last / "optimizer.safetensors", 8 * ((last / "optimizer.safetensors").stat().st_size // 2))
    (teacher,) = (work / "training-1" / "teacher").glob("*.safetensors")
    flipped(teacher, 8 * teacher.stat().st_size - 1)
    shutil.rmtree(work / "parts-1")
    go_on()
    said = capfd.readouterr().err
    assert (
        f"{last} is left out: optimizer.safetensors differs" in said
        and f"{teacher} is damaged; it is made again" in said
    )
    assert bytes_of(tmp_path / "out") == whole


@pytest.mark.parametrize("name", ["calibration.safetensors", "notes/block-0000.json", "training-1/rows.safetensors"])
def test_what_cannot_be_made_again_alone_is_refused_by_name(interrupted, tmp_path, name):
    _, work, go_on = copied(interrupted, "trained", tmp_path)
    flipped(work / name, 8 * (work / name).stat().st_size - 20)
    with pytest.raises(CheckpointError, match=f"{name} is damaged: .*; remove {work} and start again"):
        go_on()
    assert not (tmp_path / "out").exists() and work.exists()


def test_a_file_that_is_being_replaced_is_never_unsound(tmp_path, monkeypatch):
    """Killed before or after the rename, the manifest knows the file that is there."""
    file = tmp_path / "note.json"
    keep_json(file, 1)
    for moment in ("before", "after"):
        with monkeypatch.context() as patch:
            patch.setattr("sparsify.manifest.publish", _killed(moment))
            with pytest.raises(Killed):
                keep_json(file, moment)
        assert json.loads(file.read_text()) == (1 if moment == "before" else "after")
        assert not unsound(tmp_path, "*.json") and verify(tmp_path).good
    keep_json(file, 2)
    assert len(read_manifest(tmp_path)["note.json"]) == 1


def _killed(moment):
    def publish(aside, file):
        if moment == "after":
            aside.replace(file)
        raise Killed

    return publish


def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch):
    """Errors of writing and flushing do not by themselves."""

    def broken(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError) as caught:
        keep_json(tmp_path / "note.json", 1)
    assert str(tmp_path) in caught.value.filename and not list(tmp_path.iterdir())


def test_a_run_that_was_ended_just_after_its_output_appeared_is_complete(interrupted, tmp_path, monkeypatch, capfd):
    whole, work, go_on = copied(interrupted, "apply", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "discard", _end)
        with pytest.raises(Killed):
            go_on()
    assert work.exists() and bytes_of(tmp_path / "out") == whole
    assert go_on().output == tmp_path / "out" and "was complete already" in capfd.readouterr().err
    assert not work.exists() and bytes_of(tmp_path / "out") == whole


# ---------------------------------------------------------------------------------------------- what is measured last


def test_the_evaluation_is_in_the_manifest_and_is_made_up_for(tmp_path):
    """It is measured before the output appears, so that a run that ends meanwhile goes on with it."""
    source, text = save_tiny(tmp_path / "source", dtype=torch.bfloat16), tiny_text(tmp_path / "text.txt")
    recipe = parse_recipe(RECIPE.format(text=text))
    with pytest.raises(Killed):
        apply(recipe, str(source), tmp_path / "out", quiet=True, evaluate=_end)
    assert not (tmp_path / "out").exists()

    def damaged(directory):
        raise CheckpointError("no such task")

    with pytest.raises(CheckpointError, match="no such task; the compressed model is kept: go on with --resume"):
        apply(recipe, str(source), tmp_path / "out", resume=True, quiet=True, evaluate=damaged)
    seen = []

    def measure(directory):
        seen.append(load_file(directory / "model.safetensors"))
        return {"model": str(directory), "perplexity": 2.0, "seconds": 3.0}

    done = apply(recipe, str(source), tmp_path / "out", resume=True, quiet=True, evaluate=measure)
    expected = {"model": str(tmp_path / "out"), "perplexity": 2.0}
    assert (
        done.metrics["evaluation"] == json.loads((tmp_path / "out/metrics.json").read_text())["evaluation"] == expected
    )
    assert seen and verify(tmp_path / "out").good


def test_a_file_of_a_work_directory_is_entered_before_it_appears(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr("sparsify.manifest.write_manifest", lambda folder, digests: order.append("manifest"))
    monkeypatch.setattr("sparsify.manifest.publish", lambda aside, file: order.append("file"))
    (tmp_path / "aside").write_text("x")
    keep(tmp_path / "aside", tmp_path / "file")
    assert order == ["manifest", "file"]
