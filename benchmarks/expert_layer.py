"""One layer of experts of Qwen3-30B-A3B's shape: sparse24 as vLLM runs it, against torch's dense experts.

python benchmarks/expert_layer.py [--device cuda] [--experts 128] [--repeats 20] [--record FILE]

Prints a row for each number of tokens: milliseconds of 2:4 + 4-bit experts, of dense experts (on a CPU in float32 and in bfloat16
by the loop over the chosen ones that transformers runs too, on a GPU in bfloat16 by torch's grouped product), and the ratio to
the faster of these beside what the bytes allow, 16 / 3.25 (4-bit values, positions and scales of groups of 64). All run in turns
on the same tokens, which change with every repeat, so that the weights come from memory; the median counts. On a GPU every
repeat is one CUDA graph, and the error of a sparse product relative to float64 is printed too.
"""

import argparse
import datetime
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.bench.baselines import random_tensors
from sparsify.bench.cuda_graphs import captured, replay_seconds
from sparsify.bench.machine import describe_machine, installed_versions
from sparsify.files import write_json
from sparsify.formats import ModuleScheme, get_format
from sparsify.model.experts import given
from sparsify.runtime.backends import Backend, choose_backend, get_backend

HIDDEN, WIDTH, CHOSEN = 2048, 768, 8  # of Qwen3-30B-A3B, with 128 experts
GROUP = 64
TOKENS = {"cpu": (1, 32), "cuda": (1, 4, 16, 64, 256, 1024)}
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
Stored = list[dict[str, Tensor]]  # of one linear, the tensors of every expert


def stored(experts: int, scheme: ModuleScheme, device: str) -> Stored:
    """Random tensors of one linear of every expert."""
    return [random_tensors(scheme, number, torch.device(device)) for number in range(experts)]


def schemes() -> tuple[ModuleScheme, ModuleScheme]:
    """Of gate and up together, and of down."""
    return ModuleScheme(4, GROUP, "2:4", (2 * WIDTH, HIDDEN)), ModuleScheme(4, GROUP, "2:4", (HIDDEN, WIDTH))


def prepared(
    tensors: Stored, scheme: ModuleScheme, backend: Backend, room: Callable[[int, Tensor], Tensor]
) -> list[Tensor]:
    """As the back end holds them, every part with the experts along its first axis. room: makes such a part."""
    stacked: list[Tensor] = []
    for number, one in enumerate(tensors):
        parts = backend.prepare(one, scheme, torch.bfloat16)
        stacked = stacked or [room(len(tensors), part) for part in parts]
        for whole, part in zip(stacked, parts, strict=True):
            whole[number].copy_(part)
    return stacked


def gated(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return functional.silu(gate) * up


def sparse_on_cpu(experts: int) -> Layer:
    from sparsify.runtime.vllm_experts import Form, room, sparse24_experts

    parts, forms = [], []
    for scheme in schemes():
        backend = choose_backend(scheme, torch.device("cpu"), torch.bfloat16)
        parts.append(prepared(stored(experts, scheme, "cpu"), scheme, backend, room))
        forms.append(str(Form(backend.name, scheme)))
    return lambda x, weights, ids: sparse24_experts(
        x.bfloat16(), weights, ids, None, *parts, (forms[0], forms[1]), "silu"
    )


def sparse_on_gpu(gate_up: Stored, down: Stored) -> Layer:
    from sparsify.runtime.backends.triton_experts import routed_experts

    def room(experts: int, part: Tensor) -> Tensor:
        return part.new_empty((experts, *part.shape))

    triton = get_backend("triton")
    first, second = (
        prepared(tensors, scheme, triton, room) for tensors, scheme in zip((gate_up, down), schemes(), strict=True)
    )
    return lambda x, weights, ids: routed_experts(
        x.bfloat16(), ids, weights, first, second, (None, None), schemes(), gated
    )


def dense_on_cpu(experts: int, dtype: torch.dtype) -> Layer:
    gate_up = torch.randn(experts, 2 * WIDTH, HIDDEN, dtype=dtype).mul_(0.02)
    down = torch.randn(experts, HIDDEN, WIDTH, dtype=dtype).mul_(0.02)

    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        x = x.to(dtype)
        output = torch.zeros_like(x)
        for number, tokens, places in given(ids, experts):
            y = functional.linear(gated(functional.linear(x[tokens], gate_up[number])), down[number])
            output.index_add_(0, tokens, y * weights[tokens, places, None].to(dtype))
        return output

    return run


def dense_on_gpu(experts: int) -> Layer:
    """torch's grouped product of bfloat16, on tokens sorted by expert."""
    gate_up = torch.randn(experts, 2 * WIDTH, HIDDEN, dtype=torch.bfloat16, device="cuda").mul_(0.02)
    down = torch.randn(experts, HIDDEN, WIDTH, dtype=torch.bfloat16, device="cuda").mul_(0.02)
    numbers = torch.arange(1, experts + 1, device="cuda")

    def run(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        chosen, order = ids.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(chosen, numbers).int()
        tokens = order // ids.shape[1]
        both = functional.grouped_mm(x.bfloat16()[tokens], gate_up.mT, offs=ends)
        y = functional.grouped_mm(gated(both), down.mT, offs=ends)
        y = y * weights.reshape(-1)[order, None].bfloat16()
        return torch.zeros_like(x, dtype=torch.bfloat16).index_add_(0, tokens, y)

    return run


def decoded(tensors: Stored, scheme: ModuleScheme) -> list[Tensor]:
    """The weights of every expert in float64."""
    decode = get_format("sparse24").decode
    return [decode("random", one, scheme).dense(torch.float64) for one in tensors]


def error(layer: Layer, gate_up: list[Tensor], down: list[Tensor], tokens: int) -> float:
    """|y - y64| / |y64| of the sparse layer, y64 from the decoded weights in float64."""
    x, weights, ids = (tensor.cuda() for tensor in routed(len(down), tokens))
    exact = torch.zeros(tokens, HIDDEN, dtype=torch.float64, device="cuda")
    for number, rows, places in given(ids, len(down)):
        y = gated(x[rows].bfloat16().double() @ gate_up[number].T) @ down[number].T
        exact.index_add_(0, rows, y * weights[rows, places, None])
    return float((layer(x, weights, ids).double() - exact).norm() / exact.norm())


def routed(experts: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the weights of their experts and their numbers."""
    return torch.randn(tokens, HIDDEN), *torch.rand(tokens, experts).topk(CHOSEN)


def milliseconds(layers: Mapping[str, Layer], experts: int, tokens: int, repeats: int, device: str) -> dict[str, float]:
    """The median of each layer; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(repeats + 1):
        batch = [tensor.to(device) for tensor in routed(experts, tokens)]
        for name, layer in layers.items():
            times[name].append(1000 * (seconds_on_gpu(layer, batch) if device == "cuda" else seconds(layer, batch)))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def seconds(layer: Layer, batch: list[Tensor]) -> float:
    began = time.perf_counter()
    layer(*batch)
    return time.perf_counter() - began


def seconds_on_gpu(layer: Layer, batch: list[Tensor]) -> float:
    """Of the replay of a graph, weights from memory: a tensor larger than the second-level cache is written before each."""
    device = torch.device("cuda")
    flush = torch.empty(2**28, dtype=torch.uint8, device=device)
    graph = captured(lambda: layer(*batch), device)
    found = []
    for _ in range(5):
        flush.zero_()
        found += replay_seconds(graph, 1, device, warm=False)
    return statistics.median(found)


def measure(device: str, experts: int, repeats: int, rows: dict[int, Any]) -> None:
    """Print the table; rows: takes the times of each number of tokens."""
    layers: dict[str, Layer] = {}
    if device == "cuda":
        gate_up, down = (stored(experts, scheme, "cuda") for scheme in schemes())
        exact = [decoded(tensors, scheme) for tensors, scheme in zip((gate_up, down), schemes(), strict=True)]
        layers = {"sparse24": sparse_on_gpu(gate_up, down), "bfloat16": dense_on_gpu(experts)}
    else:
        layers["sparse24"] = sparse_on_cpu(experts)
        layers |= {str(dtype)[6:]: dense_on_cpu(experts, dtype) for dtype in (torch.float32, torch.bfloat16)}
    columns = ["tokens", *(f"{name} ms" for name in layers), "ratio to the faster", "by the bytes"]
    columns += ["error"] if device == "cuda" else []
    print(f"| {' | '.join(columns)} |\n|" + " --- |" * len(columns))
    for tokens in TOKENS[device]:
        rows[tokens] = found = milliseconds(layers, experts, tokens, repeats, device)
        ratio = min(time for name, time in found.items() if name != "sparse24") / found["sparse24"]
        cells = [str(tokens), *(f"{found[name]:.3f}" for name in layers), f"{ratio:.2f}", f"{16 / 3.25:.2f}"]
        if device == "cuda":
            found["error"] = error(layers["sparse24"], *exact, tokens)
            cells.append(f"{found['error']:.1e}")
        print(f"| {' | '.join(cells)} |", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=TOKENS, default="cpu")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--record", metavar="FILE", help="where the figures are written as JSON too")
    options = parser.parse_args()
    rows: dict[int, Any] = {}
    measure(options.device, options.experts, options.repeats, rows)
    if options.record:
        record = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "benchmarks/expert_layer.py", *sys.argv[1:]]),
            "machine": describe_machine(), "versions": installed_versions(), "milliseconds": rows,
        }  # fmt: skip
        write_json(options.record, record)


if __name__ == "__main__":
    main()
