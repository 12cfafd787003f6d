"""What the plugin adds to vLLM's /metrics: from linears in worker processes to the text that Prometheus reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make setup installs it")

from prometheus_client import CollectorRegistry, generate_latest

from sparsify._version import __version__
from sparsify.runtime import vllm_metrics
from sparsify.runtime.vllm_metrics import Collector, Loading, Served

DOWN = Served("down_proj", "2:4", 4, "cpu", 1000)
HEAD = Served("lm_head", "dense", 8, "cpu", 500)
PROGRAM = """
from types import SimpleNamespace
from sparsify.runtime.vllm_metrics import LOADING, Served

keys = [type("Layer", (), {})() for _ in range(3)]
LOADING.begin(SimpleNamespace(data_parallel_index=0, rank=1))
for key in keys:
    LOADING.add(key, Served("o_proj", "2:4", 4, "cpu", 10), 0.5)
"""


class Layer:
    """What a weak reference can point to."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv("SPARSIFY_METRICS", str(tmp_path))
    return tmp_path


def scraped() -> list[str]:
    registry = CollectorRegistry()
    registry.register(Collector())
    return generate_latest(registry).decode().splitlines()


def test_linears_of_one_kind_are_counted_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((10.0, 12.0, 13.0, 15.5, 99.0))
    monkeypatch.setattr(vllm_metrics.time, "monotonic", lambda: next(clock))
    loading, layers = Loading(), [Layer() for _ in range(4)]
    loading.begin(None)
    loading.add(layers[0], DOWN, 0.25)
    loading.add(layers[1], DOWN, 0.25)
    loading.add(layers[2], HEAD, 1.0)
    loading.add(layers[2], HEAD, 7.0)  # loaded again: neither one more nor slower
    text = scraped()
    labels = '{backend="cpu",bits="4",engine="0",layer="down_proj",pattern="2:4",rank="0"}'
    assert f"sparsify_linears{labels} 2.0" in text
    assert f"sparsify_linear_bytes{labels} 2000.0" in text
    assert (
        'sparsify_linear_bytes{backend="cpu",bits="8",engine="0",layer="lm_head",pattern="dense",rank="0"} 500.0'
        in text
    )
    assert 'sparsify_load_seconds{engine="0",rank="0"} 5.5' in text
    assert 'sparsify_prepare_seconds{engine="0",rank="0"} 1.5' in text
    assert f'sparsify_info{{engine="0",rank="0",version="{__version__}"}} 1.0' in text

    del layers[0]  # a model that is gone is no longer counted
    loading.add(Layer(), HEAD)
    assert f"sparsify_linears{labels} 1.0" in scraped()


def test_each_process_has_its_series(folder: Path) -> None:
    """A worker that is a process of its own, and half a file of one that died."""
    (folder / "1.json").write_text('[["sparsify_linears", {')
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, env=os.environ)
    loading, layer = Loading(), Layer()
    loading.begin(None)
    loading.add(layer, DOWN)
    counts = [line for line in scraped() if line.startswith("sparsify_linears{")]
    assert len(counts) == 2
    assert 'sparsify_linears{backend="cpu",bits="4",engine="0",layer="o_proj",pattern="2:4",rank="1"} 3.0' in counts
    assert 'sparsify_prepare_seconds{engine="0",rank="1"} 1.5' in scraped()


def test_several_api_servers_share_the_folder_of_prometheus_client(tmp_path: Path) -> None:
    """As vLLM does it with --api-server-count 2: its servers read the values that processes leave in a folder."""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, env=environment)
    read = (
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess as m; r = CollectorRegistry(); "
    )
    read += "m.MultiProcessCollector(r); print(generate_latest(r).decode())"
    text = subprocess.run(
        [sys.executable, "-c", read], check=True, env=environment, capture_output=True, text=True
    ).stdout
    assert 'sparsify_linears{backend="cpu",bits="4",engine="0",layer="o_proj",pattern="2:4",rank="1"} 3.0' in text
    assert "pid=" not in text


def test_the_first_process_makes_the_folder_and_takes_it_away() -> None:
    program = (
        "import os; from sparsify.runtime import vllm_metrics as m; m.share(); m.share(); print(os.environ[m.FOLDER]); "
    )
    program += "print(os.path.isdir(os.environ[m.FOLDER])); os.fork() or os._exit(0)"
    clean = {name: value for name, value in os.environ.items() if name != "SPARSIFY_METRICS"}
    run = subprocess.run([sys.executable, "-c", program], check=True, env=clean, capture_output=True, text=True)
    folder, there = run.stdout.split()
    assert there == "True" and not Path(folder).exists()


def test_a_folder_that_is_gone_does_not_end_serving(folder: Path) -> None:
    folder.rmdir()
    loading, layer = Loading(), Layer()
    loading.add(layer, DOWN)
    assert json.dumps(loading.samples())
    assert scraped() == []
