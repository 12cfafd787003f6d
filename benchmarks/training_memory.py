"""Peak memory of training passes on random weights, beside what `plan` predicts of each.

    python benchmarks/random_model.py out/small --hidden 1024 --intermediate 4096 --heads 16 4 --blocks 4 --samples 32
    python benchmarks/training_memory.py out/small --output out/training-memory.json

The model is compressed once without data and then trained for three steps in every way that changes what is held: all at once, in
micro-batches, with gradient checkpointing, averaged weights, a cached teacher, moments in 8 bits, in float32, as adapters that are
merged or not, block by block, and on two processes. `peak_anonymous_bytes` of run.json is the measurement (of two processes that of
the first), where there is a GPU its `peak_gpu_bytes`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

COMPRESS = "prune: {method: magnitude}", "quantize: {method: rtn, bits: 4, group_size: 64}"
TEXT = "tokens: 6k, batch_size: 4, sequence_length: 512"
PASS = "{kind}: {{" + TEXT + ", teacher: {model}, loss: {{kl: 1, squarehead: 0, cross_entropy: 0}}}}"
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "distill": ("distill", []),
    "micro-batches of 1": ("distill", ["micro_batch_size=1"]),
    "gradient checkpointing": ("distill", ["gradient_checkpointing=true"]),
    "mean of the last weights": ("distill", ["average=0.5"]),
    "cached teacher": ("distill", ["teacher_logits=cached"]),
    "moments in 8 bits": ("distill", ["optimizer=adamw_8bit"]),
    "float32": ("distill", ["precision=float32", "micro_batch_size=2"]),
    "lora, merged": ("lora", []),
    "lora, adapter": ("lora", ["export=adapter"]),
    "lora, gradient checkpointing": ("lora", ["gradient_checkpointing=true"]),
    "two processes": ("distill", []),
    "block by block": ("tune", []),
}


def write_recipe(file: Path, model: Path, passes: tuple[str, ...]) -> Path:
    """A recipe file with these passes on the random tokens of a model."""
    lines = ["version: 1"]
    lines += [f'calibration: {{source: "file:{model / "tokens.safetensors"}", samples: 16, sequence_length: 512}}']
    lines += ["passes:", *(f"  - {one}" for one in passes), "export: {format: sparse24, head: null}", ""]
    file.write_text("\n".join(lines))
    return file


def sparsify(*arguments: str, processes: int = 1) -> str:
    """Run a command of sparsify; returns what it prints."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", f"--nproc-per-node={processes}", "-m"]
    ran = subprocess.run([*start, "sparsify", *arguments], capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {ran.returncode}:\n{ran.stderr[-2000:]}")
    return ran.stdout


def measure(name: str, dense: Path, compressed: Path, folder: Path) -> dict[str, Any]:
    """One variant: what was predicted and what was measured."""
    kind, changes = VARIANTS[name]
    processes = 2 if name == "two processes" else 1
    tunes = kind == "tune"
    passes = (*COMPRESS, "tune: {epochs: 1, batch_size: 4}") if tunes else (PASS.format(kind=kind, model=dense),)
    recipe = write_recipe(folder / "recipe.yaml", dense, passes)
    base = [str(recipe), "--model", str(dense if tunes else compressed)]
    base += [part for change in changes for part in ("--set", f"passes.{kind}.{change}")]
    planned = json.loads(sparsify("plan", *base, "--processes", str(processes), "--json"))["estimate"]
    output = folder / name.replace(" ", "-").replace(",", "")
    sparsify("apply", *base, "--output", str(output), "--quiet", processes=processes)
    record = json.loads((output / "run.json").read_text())
    predicted = planned["memory"] if tunes else planned["training"][0]
    on_gpu = "peak_gpu_bytes" in record
    measured = record["peak_gpu_bytes" if on_gpu else "peak_anonymous_bytes"]
    items = predicted["gpu" if on_gpu else "host"]
    expected = sum(items.values())
    return {
        "variant": name, "changes": changes, "where": "GPU" if on_gpu else "host", "measured": measured,
        "predicted": expected, "ratio": expected / measured, "items": items,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory that random_model.py wrote")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=[*VARIANTS], metavar="NAME")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    dense, found = args.model.resolve(), []
    with tempfile.TemporaryDirectory(prefix="sparsify-training-memory-") as place:
        folder = Path(place)
        compressed = folder / "compressed"
        recipe = write_recipe(folder / "compress.yaml", dense, COMPRESS)
        sparsify("apply", str(recipe), "--model", str(dense), "--output", str(compressed), "--quiet")
        for name in args.only:
            found.append(measure(name, dense, compressed, folder))
            one = found[-1]
            print(f"{name}: {one['ratio']:.3f} of {one['measured'] / 1e9:.2f} GB of the {one['where']}", flush=True)
    record = {
        "date": datetime.date.today().isoformat(), "machine": platform.processor() or platform.machine(),
        "command": ["python", *sys.argv], "config": json.loads((dense / "config.json").read_text()), "runs": found,
    }  # fmt: skip
    if args.output is not None:
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
