"""Two checkpoint directories that no test loads, and the fake vLLM process."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sparsify.bench.run as bench_run
from sparsify.bench import engine_process


def write_checkpoint(directory: Path, width: int, config: dict) -> Path:
    directory.mkdir()
    save_file({"weight": torch.zeros(10, width, dtype=torch.bfloat16)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def models(tmp_path):
    base = {"max_position_embeddings": 2048, "vocab_size": 49152}
    sparse = {**base, "quantization_config": {"quant_method": "sparse24", "version": 1, "bits": 4, "group_size": 64}}
    return [write_checkpoint(tmp_path / "dense", 400, base), write_checkpoint(tmp_path / "small", 100, sparse)]


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    """Replaces the worker's command line; returns a function that reads what ran."""
    log = tmp_path / "ran.jsonl"
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(bench_run, "require_vllm", lambda: None)
    script = Path(__file__).with_name("fake_worker.py")
    monkeypatch.setattr(engine_process, "worker_command", lambda job: [sys.executable, str(script), str(job)])
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]
