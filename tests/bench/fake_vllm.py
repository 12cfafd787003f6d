"""Stands in for vLLM's command line: `serve DIR ...` is a small HTTP server, `bench serve ...` a queue worked out on paper,
`bench startup ...` invented seconds.

FAKE_LOG collects what ran. FAKE_MODELS maps a model's directory name to {"capacity": requests per second} and, to fail,
"mode" with "at", the request rate at which it does: dies, hangs, refuses, drops one request; or the driver breaks, or forgets
a figure. Without "at" a server dies or hangs when it starts.
"""

import contextlib
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

MODELS = json.loads(os.environ.get("FAKE_MODELS", "{}"))
METRICS = """# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="model"} 0.25
vllm:num_requests_running{engine="0",model_name="model"} 3.0
vllm:num_requests_running{engine="1",model_name="model"} 2.0
vllm:num_requests_waiting{engine="0",model_name="model"} 1.0
"""


def note(**event):
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(json.dumps({**event, "time": time.monotonic()}) + "\n")


def option(name, default=None):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def serve():
    model = Path(sys.argv[2]).name
    setting = MODELS.get(model, {})
    note(serve=model, arguments=sys.argv[3:], key=os.environ.get("VLLM_API_KEY"))
    print("INFO Loading weights took 1.25 seconds")
    print("INFO torch.compile took 2.50 s in total")
    print("INFO GPU KV cache size: 12,345 tokens, Maximum concurrency for 224 tokens per request: 55.11x", flush=True)
    if "mode" in setting and "at" not in setting:
        if setting["mode"] == "dies":
            print("(EngineCore pid=7) ValueError: the flux capacitor is cold", flush=True)
            sys.exit(3)
        time.sleep(60)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/die":
                print("RuntimeError: out of flux", flush=True)
                os._exit(4)
            self.send_response(200)
            self.end_headers()
            self.wfile.write({"/metrics": METRICS, "/model": model}.get(self.path, "").encode())

        def log_message(self, *arguments):
            pass

    ThreadingHTTPServer((option("--host"), int(option("--port"))), Handler).serve_forever()


def bench():
    here = f"http://{option('--host')}:{option('--port')}"
    model = urlopen(f"{here}/model").read().decode()
    rate, seed, count = float(option("--request-rate")), int(option("--seed")), int(option("--num-prompts"))
    setting = MODELS.get(model, {"capacity": 8})
    note(bench=model, rate=rate, seed=seed, arguments=sys.argv[3:])
    fails = setting.get("mode") if setting.get("at") == option("--request-rate") else None
    if fails == "dies":
        with contextlib.suppress(URLError, OSError):
            urlopen(f"{here}/die")
    if fails in ("dies", "hangs"):
        time.sleep(60)
    if fails == "breaks":
        print("ValueError: no tokenizer", flush=True)
        sys.exit(1)
    refused = count if fails == "refuses" else 1 if fails == "drops" else 0
    starts = [1000.0 + (i / rate) for i in range(count)]
    ends, free = [], 0.0
    for start in starts:
        free = max(free, start) + 1 / setting["capacity"]
        ends.append(free)
    latencies = [end - start for start, end in zip(starts, ends, strict=True)]
    middle = sorted(latencies)[count // 2] * 1000
    duration = ends[-1] - starts[0]
    result = {
        "num_prompts": count, "completed": count - refused, "failed": refused, "duration": duration,
        "request_rate": "inf" if rate == float("inf") else rate,
        "request_throughput": count / duration, "output_throughput": 64 * count / duration,
        "total_token_throughput": 192 * count / duration,
        "request_goodput": count / duration / 2 if "--goodput" in sys.argv else None,
        "start_times": starts, "latencies": latencies, "ttfts": [t / 2 for t in latencies],
        "itls": [[0.01]] * count, "generated_texts": ["x"] * count,
        "errors": ["Traceback\nBad Request: too long"] * refused + [""] * (count - refused),
    }  # fmt: skip
    for metric, share in (("ttft", 0.5), ("tpot", 0.01), ("itl", 0.01), ("e2el", 1.0)):
        for p, factor in ((50, 1.0), (90, 1.5), (99, 2.0)):
            result[f"p{p}_{metric}_ms"] = middle * share * factor * seed  # so that rounds differ
    result["rtfx"] = float("nan")
    if fails == "forgets":
        print("INFO done", flush=True)
        del result["latencies"]
    (Path(option("--result-dir")) / option("--result-filename")).write_text(json.dumps(result))


def startup():
    model = Path(option("--model")).name
    note(startup=model, arguments=sys.argv[3:])
    if MODELS.get(model, {}).get("mode") == "starts badly":
        print("RuntimeError: Subprocess failed: no flux", flush=True)
        sys.exit(1)
    cold, warm = int(option("--num-iters-cold")), int(option("--num-iters-warm"))
    result = {
        "avg_cold_startup_time": 30.0, "cold_startup_times": [30.0 + i for i in range(cold)],
        "cold_compilation_times": [20.0] * cold, "warm_startup_times": [9.0 + i for i in range(warm)],
        "warm_compilation_times": [1.5] * warm,
    }  # fmt: skip
    Path(option("--output-json")).write_text(json.dumps(result))


if __name__ == "__main__":
    startup() if sys.argv[1:3] == ["bench", "startup"] else serve() if sys.argv[1] == "serve" else bench()
