"""Run by the Python of .venv-gptqmodel: GPTQModel's GPTQ on rows of tokens. `python -I gptqmodel_gptq.py JOB.json`, its path absolute

The job: model (directory), rows (safetensors with `tokens`, int64 [rows, length]), bits, group_size, dtype to compute in,
output (directory), result (JSON: versions, seconds of `quantize`).
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(len(os.sched_getaffinity(0))))

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file


def main(job_file: str) -> None:
    os.chdir(Path(job_file).parent)  # it writes a log into the working directory
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    rows = load_file(job["rows"])["tokens"]
    config = QuantizeConfig(bits=job["bits"], group_size=job["group_size"], sym=True, desc_act=False)
    model = GPTQModel.load(job["model"], config, device="cpu", dtype=getattr(torch, job["dtype"]))
    data = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
    started = time.monotonic()
    model.quantize(data, batch_size=1)
    seconds = time.monotonic() - started
    model.save(job["output"])
    versions = {name: version(name) for name in ("gptqmodel", "torch", "transformers")}
    Path(job["result"]).write_text(json.dumps({"versions": versions, "solver_seconds": round(seconds, 2)}))


if __name__ == "__main__":
    main(sys.argv[1])
