"""One layer of experts of Qwen3-30B-A3B's shape on this CPU: sparse24 as vLLM runs it, against torch's dense experts.

python benchmarks/expert_layer.py [--experts 128] [--repeats 20] [--record FILE]

Prints a row for one token and one for 32: milliseconds of 2:4 + 4-bit experts, of dense experts in float32 and bfloat16, and
the ratio to the faster of these beside what the bytes allow, 16 / 3.25 (4-bit values, positions and scales of groups of 64).
The dense experts are the loop over the chosen ones that transformers runs too. All run in turns on the same tokens, which
change with every repeat, so that the weights come from memory; the median counts.
"""

import argparse
import datetime
import shlex
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.bench.machine import describe_machine, installed_versions
from sparsify.files import write_json
from sparsify.formats import ModuleScheme, get_format
from sparsify.model.experts import given
from sparsify.runtime.backends import choose_backend
from sparsify.runtime.vllm_experts import Form, room, sparse24_experts

HIDDEN, WIDTH, CHOSEN = 2048, 768, 8  # of Qwen3-30B-A3B, with 128 experts
GROUP = 64
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def compressed(experts: int, n: int, k: int) -> tuple[list[Tensor], str]:
    """Random weights [experts, n, k] as the back end holds them, and their form."""
    scheme = ModuleScheme(4, GROUP, "2:4", (n, k))
    backend = choose_backend(scheme, torch.device("cpu"), torch.bfloat16)
    stacked: list[Tensor] = []
    for number in range(experts):
        tensors = {
            "weight_packed": torch.randint(-(2**31), 2**31 - 1, (n, k // 16), dtype=torch.int32),
            "weight_meta": torch.full((n, k // 8), 0x44, dtype=torch.uint8),
            "weight_scale": torch.full((n, k // GROUP), 0.01, dtype=torch.bfloat16),
        }
        get_format("sparse24").decode("random", tensors, scheme)  # they are what the format allows
        prepared = backend.prepare(tensors, scheme, torch.bfloat16)
        stacked = stacked or [room(experts, tensor) for tensor in prepared]
        for whole, tensor in zip(stacked, prepared, strict=True):
            whole[number].copy_(tensor)
    return stacked, str(Form(backend.name, scheme))


def sparse_layer(experts: int) -> Layer:
    gate_up, first = compressed(experts, 2 * WIDTH, HIDDEN)
    down, second = compressed(experts, HIDDEN, WIDTH)
    return lambda x, weights, ids: sparse24_experts(
        x.bfloat16(), weights, ids, None, gate_up, down, (first, second), "silu"
    )


def dense_layer(experts: int, dtype: torch.dtype) -> Layer:
    gate_up = torch.randn(experts, 2 * WIDTH, HIDDEN, dtype=dtype).mul_(0.02)
    down = torch.randn(experts, HIDDEN, WIDTH, dtype=dtype).mul_(0.02)

    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        x = x.to(dtype)
        output = torch.zeros_like(x)
        for number, tokens, places in given(ids, experts):
            gate, up = functional.linear(x[tokens], gate_up[number]).chunk(2, -1)
            y = functional.linear(functional.silu(gate) * up, down[number])
            output.index_add_(0, tokens, y * weights[tokens, places, None].to(dtype))
        return output

    return run


def milliseconds(layers: dict[str, Layer], experts: int, tokens: int, repeats: int) -> dict[str, float]:
    """The median of each layer; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(repeats + 1):
        x = torch.randn(tokens, HIDDEN)
        weights, ids = torch.rand(tokens, experts).topk(CHOSEN)
        for name, layer in layers.items():
            began = time.perf_counter()
            layer(x, weights, ids)
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--record", metavar="FILE", help="where the figures are written as JSON too")
    options = parser.parse_args()
    layers = {
        "sparse24": sparse_layer(options.experts),
        "float32": dense_layer(options.experts, torch.float32),
        "bfloat16": dense_layer(options.experts, torch.bfloat16),
    }
    print("| tokens | sparse24 ms | float32 ms | bfloat16 ms | ratio to the faster | by the bytes |\n|" + " --- |" * 6)
    record = {
        "date": datetime.date.today().isoformat(), "command": shlex.join(["python", "benchmarks/expert_layer.py", *sys.argv[1:]]),
        "machine": describe_machine(), "versions": installed_versions(), "milliseconds": (rows := {}),
    }  # fmt: skip
    for tokens in (1, 32):
        found = milliseconds(layers, options.experts, tokens, options.repeats)
        rows[tokens] = found
        ratio = min(found["float32"], found["bfloat16"]) / found["sparse24"]
        times = " | ".join(f"{found[name]:.2f}" for name in layers)
        print(f"| {tokens} | {times} | {ratio:.2f} | {16 / 3.25:.2f} |", flush=True)
    if options.record:
        write_json(options.record, record)


if __name__ == "__main__":
    main()
