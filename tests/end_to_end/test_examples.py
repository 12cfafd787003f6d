"""The example that serves: a real server of vLLM, started and asked as a user would, and ended again."""

import importlib.util
from pathlib import Path

import pytest
import torch

import sparsify
from tests.helpers.tiny import save_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("needs_vllm")]

ROUNDED = {
    "passes": [{"prune": {"method": "magnitude"}}, {"quantize": {"method": "rtn", "bits": 4, "group_size": 32}}],
}


def test_the_example_serves(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    source = save_tiny(
        tmp_path / "dense", dtype=torch.bfloat16, hidden_size=128, num_attention_heads=2, head_dim=64
    )  # vLLM's attention on CPUs knows heads of 32 and more
    sparsify.apply(ROUNDED, source, tmp_path / "tiny-2of4", quiet=True)
    spec = importlib.util.spec_from_file_location("example_serve", repository / "examples" / "serve.py")
    assert spec is not None and spec.loader is not None
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    text = serve.main(str(tmp_path / "tiny-2of4"), "The sea", "--enforce-eager")  # compiling takes another half minute
    assert isinstance(text, str) and text
    with pytest.raises(SystemExit, match="the server ended with exit code"):
        serve.main(str(tmp_path / "nowhere"))
