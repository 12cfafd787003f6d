"""Where the model writes its own text. The `meta` device stands in for a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.data.self_generated import generator


@pytest.mark.parametrize(
    ("place", "free", "expected"), [("meta", 3.0, "meta"), ("meta", 1.5, "cpu"), ("cpu", 3.0, "cpu")]
)
def test_it_writes_on_the_gpu_where_it_leaves_room(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, free: float, expected: str
) -> None:
    """free: memory of the GPU, in sizes of the model."""
    llama.save_pretrained(tmp_path)
    size = int(free * llama.get_memory_footprint())
    monkeypatch.setattr(generator, "device", lambda: place)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size, size))
    assert generator.open_writer(tmp_path, torch.float32).device.type == expected
