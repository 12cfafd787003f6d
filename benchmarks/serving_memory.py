"""Memory that vLLM takes while it loads a checkpoint and afterwards, beyond that of an engine with a model of almost nothing.

    python benchmarks/random_model.py out/tiny --hidden 64 --intermediate 128 --heads 4 2 --blocks 1 --vocabulary 512
    python benchmarks/random_model.py out/large --hidden 4096 --intermediate 14336 --heads 32 8 --blocks 8
    sparsify apply RECIPE --model out/large --output out/sparse24    (the same of out/tiny)
    python benchmarks/serving_memory.py out/tiny-sparse24 out/sparse24 --output out/serving-memory.json

Each directory is loaded by an engine of its own that runs in one process (RssAnon + RssShmem, sampled by a thread). The first one
is the engine that others are compared with: libraries, KV cache and buffers are the same for all. Bytes on disk are those of
the tensor files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LOAD = """
import json, os, sys
from sparsify import bench, memory

directory = sys.argv[1]
bench.prepare_engine([directory])
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
from vllm import LLM, SamplingParams

with memory.peak_anonymous() as peak:
    engine = LLM(directory, skip_tokenizer_init=True, enforce_eager=True, max_model_len=512, max_num_batched_tokens=512)
    loaded = memory.anonymous()
    peak.sample()
engine.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False))
print(json.dumps({"peak_bytes": peak.nbytes, "loaded_bytes": loaded, "after_answer_bytes": memory.anonymous()}))
"""
HELD = ("peak_bytes", "loaded_bytes", "after_answer_bytes")


def load(directory: Path) -> dict[str, Any]:
    """What one engine takes, in bytes."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(directory)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{directory} could not be loaded:\n{done.stderr[-2000:]}")
    files = directory.glob("*.safetensors")
    return {"directory": directory.name, "bytes_on_disk": sum(f.stat().st_size for f in files)} | json.loads(
        done.stdout.splitlines()[-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("idle", type=Path, help="checkpoint directory of a model of almost nothing")
    parser.add_argument("directories", type=Path, nargs="+")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    idle, *found = (load(directory) for directory in (args.idle, *args.directories))
    for one in found:
        one["beyond_idle_relative_to_disk"] = {
            name: round((one[name] - idle[name]) / one["bytes_on_disk"], 3) for name in HELD
        }
        print(json.dumps(one), flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps({"command": sys.argv, "idle": idle, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
