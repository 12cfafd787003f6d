"""Run by the Python of .venv-peers: llm-compressor's `oneshot` on rows of tokens. `python -I llmcompressor_gptq.py JOB.json`

The job: model (directory), rows (safetensors with `tokens`, int64 [rows, length]), prune (whether SparseGPT to 2:4 comes
before GPTQ), bits, group_size, dtype to compute in, output (directory), result (JSON: versions, seconds of `oneshot`).
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    rows = load_file(job["rows"])["tokens"]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    weights = {
        "num_bits": job["bits"], "type": "int", "symmetric": True, "strategy": "group", "group_size": job["group_size"],
    }  # fmt: skip
    scheme = {"targets": ["Linear"], "weights": weights}
    recipe = [GPTQModifier(targets="Linear", ignore=["lm_head"], config_groups={"w4a16": scheme})]
    if job["prune"]:
        recipe.insert(0, SparseGPTModifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["lm_head"]))
    started = time.monotonic()
    # its pipeline for several modifiers runs each over the whole model, one after the other
    oneshot(
        model=model, dataset=data, recipe=recipe, max_seq_length=rows.shape[1], num_calibration_samples=len(rows),
        pipeline="independent" if job["prune"] else "sequential",
    )  # fmt: skip
    seconds = time.monotonic() - started
    model.to(torch.bfloat16).save_pretrained(job["output"], save_compressed=True)
    AutoTokenizer.from_pretrained(job["model"]).save_pretrained(job["output"])
    versions = {name: version(name) for name in ("llmcompressor", "compressed-tensors", "torch", "transformers")}
    Path(job["result"]).write_text(json.dumps({"versions": versions, "solver_seconds": round(seconds, 2)}))


if __name__ == "__main__":
    main(sys.argv[1])
