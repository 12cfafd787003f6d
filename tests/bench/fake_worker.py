"""Stands in for the process that runs vLLM: reads the same job, writes the same JSON, takes no time.

FAKE_LOG collects what ran and when, FAKE_MODE makes it fail; FAKE_BROKEN names the models whose op vLLM does not have, as
"MODEL" or "MODEL THREADS", separated by commas. Times are made up from the model's name; FAKE_SLOW maps
"MODEL THREADS" to a factor.
"""

import json
import os
import sys
import time
from pathlib import Path


def option(arguments, name):
    return arguments[arguments.index(name) + 1]


job = json.loads(Path(sys.argv[1]).read_text())
model = Path(option(job["engine"], "--model"))
mode = os.environ.get("FAKE_MODE", "")
environment = {k: v for k, v in os.environ.items() if k.startswith(("VLLM_", "SPARSIFY_CPU_"))}
begun = {"model": model.name, "start": time.monotonic(), "engine": job["engine"], "environment": environment}
begun["greedy"] = job["greedy"]
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(json.dumps(begun) + "\n")
print("INFO starting")
if mode == "crash":
    print("(EngineCore pid=7) ValueError: the flux capacitor is cold")
    print("RuntimeError: Engine core initialization failed. See root cause above.")
    sys.exit(3)
if mode == "killed":
    os.kill(os.getpid(), 9)
if mode == "sleep":
    time.sleep(60)
if mode == "nothing":
    sys.exit(0)
threads = os.environ["VLLM_CPU_OMP_THREADS_BIND"]
if {model.name, f"{model.name} {threads}"} & set(os.environ.get("FAKE_BROKEN", "").split(",")):
    # vLLM's engine reports and raises something general; here the library itself is asked for an op that it lacks
    import torch

    print("INFO loading weights")
    torch.ops._C.cpu_gemm_wna16(torch.ones(1))

slowness = 1.0 if model.name == "dense" else 0.5
slowness *= json.loads(os.environ.get("FAKE_SLOW", "{}")).get(f"{model.name} {threads}", 1)
for run in job["runs"]:
    arguments = run["arguments"]
    if run["benchmark"] == "latency":
        seconds = slowness * (0.1 + 0.01 * (int(option(arguments, "--output-len")) - 1))
        times = [seconds] * int(option(arguments, "--num-iters"))
        times[0] += 5  # one slow iteration, which a median ignores
        result = {"avg_latency": sum(times) / len(times), "latencies": times, "percentiles": {"50": seconds}}
    else:
        count = int(option(arguments, "--num-prompts"))
        tokens = count * (int(option(arguments, "--random-input-len")) + int(option(arguments, "--random-output-len")))
        result = {"elapsed_time": slowness * 2, "num_requests": count, "total_num_tokens": tokens,
                  "requests_per_second": count / slowness / 2, "tokens_per_second": tokens / slowness / 2}  # fmt: skip
    Path(option(arguments, "--output-json")).write_text(json.dumps(result))
if job["prompts"]:
    Path(job["answers"]).write_text(json.dumps([f"{model.name} says {prompt}" for prompt in job["prompts"]]))
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(json.dumps({"model": model.name, "end": time.monotonic()}) + "\n")
