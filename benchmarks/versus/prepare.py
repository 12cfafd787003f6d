"""Before any row: the dense model as a directory, the calibration rows of all peers, our kernels.

`python -m benchmarks.versus.prepare JOB.json`; the job: settings, rows (where the calibration goes), result: a JSON file with

    dense       directory of the dense model
    gguf        the model as a GGUF file, or None; gguf_type: its general.file_type, as MOSTLY_Q4_1
    compute     the type that this machine computes in faster, which is what ours takes: float32 or bfloat16
    threads     cores that compute
    parameters  of the dense model
    fingerprint of the dense model
    shape       of the calibration: rows, tokens of each
    machine, versions
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from benchmarks.versus.program import call
from benchmarks.versus.settings import Settings
from sparsify.bench.machine import describe_machine, installed_versions
from sparsify.compiler.calibrate import text_rows
from sparsify.compiler.planning import make_plan
from sparsify.files import publish, write_json
from sparsify.model.checkpoint import gguf_file
from sparsify.recipe import load_recipe
from sparsify.threads import threads


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    settings, rows = Settings(**job["settings"]), Path(job["rows"])
    # they are built on first use, which is not to count as compressing; what cannot be built has a slower stand-in
    subprocess.run([sys.executable, "-m", "sparsify", "kernels", "build", "--quiet"], check=False)
    plan = make_plan(load_recipe("2of4-w4a16", settings.of_recipe(), settings.model), settings.model)
    tokens = text_rows(plan, plan.recipe.calibration, quiet=False)
    aside = rows.with_suffix(".partial")
    save_file({"tokens": tokens}, aside)
    publish(aside, rows)
    checkpoint = plan.checkpoint
    source = Path(settings.gguf) if settings.gguf else gguf_file(settings.model)
    write_json(
        job["result"],
        {
            "dense": str(checkpoint.loadable_directory().resolve()),
            "gguf": None if source is None else str(source.resolve()),
            "gguf_type": None if source is None else file_type(source),
            "compute": str(plan.compute.dtype).removeprefix("torch."),
            "threads": threads().count,
            "parameters": sum(math.prod(info.shape) for info in checkpoint.infos.values()),
            "fingerprint": checkpoint.fingerprint(),
            "shape": list(tokens.shape),
            "machine": describe_machine(),
            "versions": installed_versions() | {name: version(name) for name in ("gguf", "lm_eval") if find_spec(name)},
        },
    )


def file_type(gguf: Path) -> str | None:
    """MOSTLY_Q4_1 and the like; None where the file does not say."""
    from gguf import GGUFReader, LlamaFileType

    field: Any = GGUFReader(gguf).get_field("general.file_type")
    return None if field is None else LlamaFileType(int(field.contents())).name


if __name__ == "__main__":
    call(main)
