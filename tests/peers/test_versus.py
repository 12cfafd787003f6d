"""The programs of `make versus` in their own environments on a tiny model: what we read of a peer's file is what the peer reads."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.versus.rows import PEERS
from sparsify import api
from sparsify.evaluation import load_model
from sparsify.formats.inspect import inspect
from tests.helpers.tiny import VOCABULARY, save_tiny
from tests.peers.conftest import Peer

pytestmark = pytest.mark.peers
OWN_LOADER = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
checkpoint, tokens, result = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
with torch.no_grad():
    save_file({"logits": model(load_file(tokens)["tokens"]).logits.contiguous()}, result)
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in `dense`; beside it calibration rows and tokens that nothing was calibrated on."""
    root = tmp_path_factory.mktemp("versus")
    save_tiny(root / "dense", dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for name, rows in (("rows", 8), ("tokens", 2)):
        save_file(
            {"tokens": torch.randint(4, VOCABULARY, (rows, 64), generator=generator)}, root / f"{name}.safetensors"
        )
    return root


def run(python: Path, arguments: list[str]) -> None:
    ended = subprocess.run([str(python), "-I", *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]


def compressed(python: Path, program: str, root: Path, output: Path, **options: object) -> dict[str, object]:
    """Run a program on the tiny model; what it says of itself."""
    job = {
        "model": str(root / "dense"), "rows": str(root / "rows.safetensors"), "bits": 4, "group_size": 32,
        "dtype": "float32", "output": str(output), "result": str(output.parent / "result.json"), **options,
    }  # fmt: skip
    file = output.parent / "job.json"
    file.write_text(json.dumps(job))
    run(python, [str(PEERS / f"{program}.py"), str(file)])
    return json.loads((output.parent / "result.json").read_text())


@pytest.mark.parametrize("prune", [False, True])
def test_llmcompressor_reads_its_file_as_we_do(peer: Peer, dense: Path, tmp_path: Path, prune: bool) -> None:
    python, output = peer("peers"), tmp_path / "model"
    said = compressed(python, "llmcompressor_gptq", dense, output, prune=prune)
    assert said["versions"]["llmcompressor"]
    run(python, ["-c", OWN_LOADER, str(output), str(dense / "tokens.safetensors"), str(tmp_path / "logits")])
    theirs = load_file(tmp_path / "logits")["logits"]
    with torch.no_grad():
        ours = load_model(output).model(load_file(dense / "tokens.safetensors")["tokens"]).logits
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    assert (
        4.5 <= inspect(output, quiet=True).totals()["bits_per_weight"] < 4.6
    )  # scales of 16 bits per 32 inputs; shapes


def test_gptqmodel_reads_its_file_as_we_do(
    peer: Peer, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python, output = peer("gptqmodel"), tmp_path / "model"
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    assert compressed(python, "gptqmodel_gptq", dense, output)["versions"]["gptqmodel"]
    api.export(output, "dense", tmp_path / "read", quiet=True)
    program, tokens = str(Path(__file__).with_name("gptq_program.py")), str(dense / "tokens.safetensors")
    run(python, [program, "gptqmodel", str(output), str(tmp_path / "read"), tokens, str(tmp_path / "logits")])
    found = load_file(tmp_path / "logits")  # both in bfloat16, of its own file and of what we read of it
    assert torch.allclose(found["logits"], found["expected"], rtol=0.05, atol=0.05)
