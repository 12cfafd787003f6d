"""Peak memory of `sparsify apply` on random weights, against numbers of tokens and blocks, beside what `plan` predicts.

    python benchmarks/random_model.py out/small --hidden 1024 --intermediate 4096 --heads 16 4 --samples 128
    python benchmarks/memory.py out/small --samples 16 64 128 --output out/memory.json -- --memory 4GB

What follows `--` goes to `apply`. The recipe is `2of4-w4a16` with `sparsegpt`, without coordinate descent and without the
head, as --set changes it; with --whole it is as it stands but for the head. Anonymous and shared memory (RssAnon + RssShmem)
is sampled from outside every 20 ms; run.json has what the run sampled itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PAPERS = ("solver.coordinate_descent=0", "passes.prune.method=sparsegpt")


def anonymous(process: int) -> int:
    """RssAnon + RssShmem in bytes; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def measure(command: list[str], log: Path) -> tuple[int, float]:
    """Run a command; returns the peak of its anonymous memory and the seconds that it took."""
    start, peak = time.perf_counter(), 0
    with log.open("w") as stream:
        running = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        while running.poll() is None:
            peak = max(peak, anonymous(running.pid))
            time.sleep(0.02)
    if running.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {running.returncode}:\n{log.read_text()[-2000:]}")
    return peak, time.perf_counter() - start


def run(model: Path, samples: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One compression and one prediction."""
    settings = [f"calibration.source=file:{model / 'tokens.safetensors'}", f"calibration.samples={samples}"]
    settings += [f"calibration.sequence_length={args.length}", "export.head=null"]
    settings += [*(() if args.whole else PAPERS), *(args.set or [])]
    base = [args.recipe, "--model", str(model)]
    base += [part for setting in settings for part in ("--set", setting)]
    sparsify = [sys.executable, "-m", "sparsify"]
    output = folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    peak, seconds = measure([*sparsify, "apply", *base, "--output", str(output), *args.apply], folder / "log")
    found = {"model": model.name, "tokens": samples * args.length, "seconds": round(seconds, 1), "peak_bytes": peak}
    record = json.loads((output / "run.json").read_text())
    names = (
        "peak_anonymous_bytes",
        "peak_memory_bytes",
        "peak_gpu_bytes",
        "peak_gpu_reserved_bytes",
        "compute",
        "memory",
        "phases",
    )
    found |= {name: record[name] for name in names if name in record}
    predicted = subprocess.run(
        [*sparsify, "plan", *base, "--json", *args.apply], capture_output=True, text=True, check=True
    )
    found["predicted"] = (
        json.loads(predicted.stdout)["estimate"].get("memory") or json.loads(predicted.stdout)["estimate"]
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--samples", type=int, nargs="+", default=[16])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--recipe", default="2of4-w4a16")
    parser.add_argument("--whole", action="store_true", help="leave the recipe's mask search and coordinate descent in")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path)
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:cut])
    args.apply = arguments[cut + 1 :]
    found = []
    for model in args.models:
        for samples in args.samples:
            with tempfile.TemporaryDirectory(prefix="sparsify-memory-") as folder:
                found.append(run(model, samples, args, Path(folder)))
            print(json.dumps(found[-1]), flush=True)
    if args.output is not None:
        args.output.write_text(json.dumps({"command": sys.argv, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
