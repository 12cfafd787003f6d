"""Run by the Python of .venv-llamacpp: what `llama-quantize --allow-requantize` does, by the same function of the library.

python llamacpp_quantize.py JOB.json; the job: gguf (a GGUF file of any type), type (as Q4_K_M), threads, output (a .gguf
file), result (JSON: versions, seconds of quantizing).
"""

import ctypes
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import llama_cpp


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job['type']}")
    settings.nthread = job["threads"]
    settings.allow_requantize = True
    started = time.monotonic()
    status = llama_cpp.llama_model_quantize(job["gguf"].encode(), job["output"].encode(), ctypes.byref(settings))
    if status:
        sys.exit(f"llama_model_quantize failed with {status}")
    seconds = time.monotonic() - started
    versions = {"llama-cpp-python": version("llama-cpp-python")}
    Path(job["result"]).write_text(json.dumps({"versions": versions, "solver_seconds": round(seconds, 2)}))


if __name__ == "__main__":
    main(sys.argv[1])
