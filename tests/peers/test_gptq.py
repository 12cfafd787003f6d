"""The gptq that we write, loaded by AutoGPTQ and GPTQModel, and compared byte for byte with what their packers write."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify.compiler.convert import export
from sparsify.formats.gptq_packing import unpack_zero_points
from tests.helpers.compressed import compress, make_dense
from tests.peers.conftest import Peer

pytestmark = pytest.mark.peers
PROGRAM = Path(__file__).with_name("gptq_program.py")
KINDS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "group_size": 64, "pattern": "dense"},
    "4 bits, 2:4": {"bits": 4, "group_size": 32},
    "8 bits, channel": {"bits": 8, "group_size": 0, "pattern": "dense"},
}
# GPTQModel reads other settings of single linears too
MIXED = {r"o_proj": {"bits": 8, "pattern": "dense"}, r"1\.mlp\.down": None}
BOUND = 0.0  # logits are equal to the bit: both multiply in bfloat16 with weights rounded once


@pytest.mark.parametrize(
    ("package", "kind"), [(p, k) for p in ("autogptq", "gptqmodel") for k in KINDS] + [("gptqmodel", "mixed")]
)
def test_it_loads_with_equal_logits_and_its_bytes_are_those_of_the_packer(
    peer: Peer, tmp_path: Path, package: str, kind: str
) -> None:
    python = peer(package)
    make_dense("llama", tmp_path / "model", num_attention_heads=4, num_key_value_heads=2)
    compress(tmp_path / "model", tmp_path / "gptq", "gptq", MIXED if kind == "mixed" else None, **KINDS.get(kind, {}))
    export(tmp_path / "gptq", "dense", tmp_path / "dense", quiet=True)
    save_file({"tokens": torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 50, 60, 70, 80]])}, tmp_path / "tokens")
    paths = [str(tmp_path / name) for name in ("gptq", "dense", "tokens", "result")]
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([python, PROGRAM, package, *paths], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = load_file(tmp_path / "gptq" / "model.safetensors"), load_file(tmp_path / "result")
    logits, expected = theirs.pop("logits"), theirs.pop("expected")
    assert expected.abs().max() > 1 and (logits - expected).abs().max() <= BOUND
    assert len(theirs) == 4 * sum(name.endswith("qweight") for name in ours)
    version = 1 if package == "autogptq" else 2  # GPTQModel packs version 2 and makes version 1 of it when it saves
    for name, tensor in theirs.items():
        stored = ours[name]
        if name.endswith("qzeros"):
            bits = 32 * tensor.shape[1] // ours[name.replace("qzeros", "scales")].shape[1]
            assert not unpack_zero_points(tensor, bits, version).any()
            assert version == 2 or torch.equal(tensor, stored), name
        elif name.endswith("scales"):
            assert torch.equal(tensor.float(), stored.float()), name
        else:
            assert tensor.dtype == stored.dtype and torch.equal(tensor, stored), name
