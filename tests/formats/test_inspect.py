"""Inspection counts zeros itself and never trusts a label."""

import io
import json

import pytest
import torch
from rich.console import Console

from sparsify.compiler.convert import export
from sparsify.errors import CheckpointError
from sparsify.formats.inspect import inspect, render
from sparsify.model.checkpoint import open_checkpoint

RECIPE = {
    "model.layers.0.self_attn.v_proj": dict(bits=8, pattern="dense"),
    "model.layers.1.mlp.down_proj": dict(bits=16),
    "model.layers.2.self_attn.o_proj": None,
}


@pytest.fixture
def made(llama, compress, tmp_path):
    return compress(llama(), tmp_path / "made", "sparse24", RECIPE)


def test_every_tensor_is_measured(made, llama):
    out, linears = made
    inspection = inspect(out)
    rows = {t.name: t for t in inspection.tensors}
    assert inspection.format == "sparse24"
    for module, linear in linears.items():
        weight, row = linear.dense(torch.float32), rows[module]
        assert row.sparsity == pytest.approx((weight == 0).float().mean().item(), abs=1e-6)
        assert row.two_four == (linear.pattern == "2:4") and row.pattern == linear.pattern
        assert (row.bits, row.shape, row.dtype) == (linear.bits, linear.shape, "bfloat16")
        assert row.group_size == (None if linear.bits == 16 else linear.group_size)
    n, k = 192, 64
    assert rows["model.layers.0.mlp.up_proj"].nbytes == n * k * 3 // 8 + n * (k // 32) * 2
    assert rows["model.layers.0.mlp.up_proj"].dense_nbytes == n * k * 2
    assert rows["model.layers.1.mlp.down_proj"].nbytes == n * k * 9 // 8
    assert rows["model.layers.2.self_attn.o_proj.weight"].two_four is False
    assert rows["model.embed_tokens.weight"].two_four is None and rows["model.norm.weight"].sparsity is None


def test_totals_add_up(made, llama):
    out, linears = made
    totals = inspect(out).totals()
    dense = open_checkpoint(llama())
    assert totals["nbytes"] == open_checkpoint(out).nbytes() and totals["dense_nbytes"] == dense.nbytes()
    assert totals["parameters"] == sum(torch.Size(dense.shape(name)).numel() for name in dense.names())
    assert (totals["linears"], totals["compressed_linears"], totals["two_four_linears"]) == (21, 20, 19)
    weights = [linear.dense(torch.float32) for linear in linears.values()]
    weights.append(dense.tensor("model.layers.2.self_attn.o_proj.weight").float())
    zeros, count = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    assert totals["sparsity"] == pytest.approx(zeros / count)
    assert totals["ratio"] == totals["dense_nbytes"] / totals["nbytes"]


def test_the_same_weights_measure_the_same_in_every_format(llama, compress, tmp_path):
    out, _ = compress(llama(), tmp_path / "out", "sparse24")
    measured = {}
    for format in ("dense", "pack-quantized"):
        measured[format] = inspect(export(out, format, tmp_path / format)).totals()
    first = inspect(out).totals()
    for totals in measured.values():
        for key in ("parameters", "linears", "two_four_linears", "sparsity", "dense_nbytes"):
            assert totals[key] == first[key]
    assert first["nbytes"] < measured["pack-quantized"]["nbytes"] < measured["dense"]["nbytes"]
    assert measured["dense"]["compressed_linears"] == 0


def test_json_is_plain(made):
    text = json.dumps(inspect(made[0]).to_json(), allow_nan=False)
    read = json.loads(text)
    assert read["totals"]["compressed_linears"] == 20 and read["tensors"][0]["name"] == "model.embed_tokens.weight"


def test_the_table_groups_blocks(made):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(inspect(made[0])))
    text = console.export_text()
    lines = [line for line in text.splitlines() if "mlp.up_proj" in line]
    assert len(lines) == 1 and " 3 " in lines[0] and "3/3" in lines[0] and "192 x 64" in lines[0]
    assert "int4 g32 2:4" in lines[0] and "bfloat16 2:4" in text
    assert "self_attn.q_proj" in text and "model.embed_tokens" in text  # nothing wraps in a narrow terminal
    assert "20 of 21 linears compressed, 19 are 2:4" in text
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text


def test_a_damaged_checkpoint_is_refused(made):
    content = (made[0] / "model.safetensors").read_bytes()
    (made[0] / "model.safetensors").write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        inspect(made[0])
