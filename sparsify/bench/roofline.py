"""`sparsify bench roofline`: an estimate of decoding and prompt time on a GPU that is not at hand, for three kinds of weights.

The model, per product of M rows with a weight [N, K]:

    time = overhead + (memory^s + compute^s)^(1/s)
    memory  = (bytes of the weight and of the activations) / (BANDWIDTH x datasheet bandwidth)
    compute = 2 M N K / (reach x datasheet dense bf16 rate)

`reach` is what a kind of kernel attains of the rate of dense products; `s` says how well loading and computing overlap: 1
is one after the other, infinity is the roofline. A step of decoding is all products of a model, its attention reading
the cache of keys and values, a few small kernels per layer and the engine's own time. The constants come from published
measurements of Marlin and Sparse-Marlin and from ours on an H100; tests/bench/test_roofline.py holds the model to those
measurements. It is an estimate everywhere: nothing here was run on the GPU that it is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from sparsify.bench.shapes import Linear, ModelShape, model_shape
from sparsify.errors import SparsifyError

DENSE, INT4, OURS = "dense bf16", "dense INT4 (Marlin)", "2:4 INT4 (sparsify)"
KINDS = (DENSE, INT4, OURS)
BITS = {DENSE: 16.0, INT4: 4.0, OURS: 3.0}  # per weight, without scales
BANDWIDTH = (
    0.85  # of the datasheet's that streaming kernels attain: cuBLAS with one row on an H100 SXM, 2.85 of 3.35 TB/s
)
SMALL_KERNELS = 6  # per layer beside the products: norms, rotary embedding, attention, activation
SMALL_KERNEL_SECONDS = 4e-6
# What an engine does per step on the host and for sampling. Fitted to Marlin's 2.8x in vLLM (arXiv 2408.11743); the 3.3x of
# Sparse-Marlin there is then predicted.
STEP_SECONDS = 2e-3


@dataclass(frozen=True)
class Family:
    """How kernels behave on a kind of GPU. reach, sharpness (s), overhead in seconds: by kind of weights.

    decodes: large products of ours are dense ones of weights that are written out (runtime/backends/cuda.py).
    """

    reach: dict[str, float]
    sharpness: dict[str, float]
    overhead: dict[str, float]
    decodes: bool = False


# Marlin is within 10% of fp16 with very many rows (arXiv 2408.11743), and both Marlins stay on the roofline until they reach the
# ridge (README of IST-DASLab/marlin, of IST-DASLab/Sparse-Marlin). Ours is assumed to overlap as Sparse-Marlin does, and to
# gain over Marlin in compute what it gains on the H100.
AMPERE = Family(
    reach={DENSE: 0.80, INT4: 0.72, OURS: 0.87},
    sharpness={DENSE: 4, INT4: 8, OURS: 8},
    overhead={DENSE: 4e-6, INT4: 5e-6, OURS: 5e-6},
)
# GeForce multiplies at half rate when it sums in float32, so decoding is not what limits; Sparse-Marlin's README has twice the speed
# of dense fp16 with many rows on an RTX 3090.
GEFORCE = Family(
    reach={DENSE: 0.90, INT4: 0.90, OURS: 1.80},
    sharpness={DENSE: 4, INT4: 8, OURS: 8},
    overhead={DENSE: 4e-6, INT4: 5e-6, OURS: 5e-6},
)
# Measured: cuBLAS uses wgmma; Marlin and ours use mma.sync and mma.sp, which reach less of the rate on Hopper.
HOPPER = Family(
    reach={DENSE: 0.72, INT4: 0.34, OURS: 0.42},
    sharpness={DENSE: 4, INT4: 2.5, OURS: 1.5},
    overhead={DENSE: 4e-6, INT4: 6e-6, OURS: 5e-6},
    decodes=True,
)


@dataclass(frozen=True)
class Gpu:
    """Datasheet figures. bandwidth: bytes per second; rate: dense bf16 operations per second that sum in float32."""

    name: str
    bandwidth: float
    rate: float
    family: Family


GPUS = {
    # NVIDIA A100 datasheet (80 GB SXM): 2039 GB/s, 312 TFLOPS
    "a100": Gpu("A100 80 GB SXM", 2039e9, 312e12, AMPERE),
    # NVIDIA RTX A6000 datasheet: 768 GB/s, 309.7 TFLOPS with sparsity
    "a6000": Gpu("RTX A6000", 768e9, 154.8e12, AMPERE),
    # NVIDIA L40S datasheet: 864 GB/s, 362 TFLOPS (733 with sparsity)
    "l40s": Gpu("L40S", 864e9, 362e12, AMPERE),
    # NVIDIA H100 datasheet (SXM): 3.35 TB/s, 1979 TFLOPS with sparsity
    "h100": Gpu("H100 SXM", 3350e9, 989.4e12, HOPPER),
    # NVIDIA Ada GPU architecture whitepaper: RTX 4090, 1008 GB/s, 165.2 TFLOPS fp16 with fp32 accumulate
    "4090": Gpu("RTX 4090", 1008e9, 165.2e12, GEFORCE),
    # NVIDIA RTX Blackwell GPU architecture whitepaper: RTX 5090, 1792 GB/s, 209.5 TFLOPS bf16 with fp32 accumulate
    "5090": Gpu("RTX 5090", 1792e9, 209.5e12, GEFORCE),
    # GPUs of the published measurements. A10 datasheet: 600 GB/s, 125 TFLOPS. GA102 whitepaper: RTX 3090, 936 GB/s, 71 TFLOPS
    "a10": Gpu("A10", 600e9, 125e12, AMPERE),
    "3090": Gpu("RTX 3090", 936e9, 71e12, GEFORCE),
}


@dataclass(frozen=True)
class Estimate:
    """Seconds of one step that decodes a token for each of `batch` sequences, or of reading `prompt` tokens, by kind."""

    what: str
    batch: int
    tokens: int
    seconds: dict[str, float]

    @property
    def ratios(self) -> dict[str, float]:
        """Times faster than dense bf16."""
        return {kind: self.seconds[DENSE] / seconds for kind, seconds in self.seconds.items()}


@dataclass(frozen=True)
class Roofline:
    """One run of the model."""

    gpu: str
    model: str
    context: int
    group_size: int
    rows: list[Estimate]

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(row), "ratios": row.ratios} for row in self.rows]
        return {"estimate": True, **asdict(self), "rows": rows}


def product_seconds(gpu: Gpu, kind: str, m: int, n: int, k: int, group_size: int) -> float:
    """One product of M rows with a weight [N, K]. group_size: inputs per 16-bit scale, of the quantized kinds."""
    family = gpu.family
    bits = BITS[kind] + (0 if kind == DENSE else 16 / group_size)
    memory = (n * k * bits / 8 + 2 * m * (n + k)) / (BANDWIDTH * gpu.bandwidth)
    compute = 2 * m * n * k / (family.reach[kind] * gpu.rate)
    s = family.sharpness[kind]
    seconds = family.overhead[kind] + (memory**s + compute**s) ** (1 / s)
    if kind == OURS and family.decodes:
        written = n * k * (bits / 8 + 2) / (BANDWIDTH * gpu.bandwidth) + family.overhead[kind]
        seconds = min(seconds, written + product_seconds(gpu, DENSE, m, n, k, group_size))
    return seconds


def pass_seconds(
    gpu: Gpu, kind: str, shape: ModelShape, tokens: int, sequences: int, context: int, group: int
) -> float:
    """One pass of `tokens` tokens in all, of sequences that have `context` tokens each, through a model.

    The output head stays in bf16 and is computed for one token of each sequence.
    """
    linears: Sequence[Linear] = shape.merged()
    products = sum(linear.count * product_seconds(gpu, kind, tokens, linear.n, linear.k, group) for linear in linears)
    head = product_seconds(gpu, DENSE, sequences, shape.vocabulary, shape.hidden, group)
    cache = sequences * context * 2 * shape.kv_heads * shape.head_dim * 2 / (BANDWIDTH * gpu.bandwidth)
    scores = 4 * tokens * context * shape.heads * shape.head_dim / (gpu.family.reach[DENSE] * gpu.rate)
    return products + head + shape.layers * (max(cache, scores) + SMALL_KERNELS * SMALL_KERNEL_SECONDS) + STEP_SECONDS


def roofline(
    gpu: str, model: str, batches: Sequence[int] = (1, 8, 16, 32, 64, 128), context: int = 1024, prompt: int = 2048,
    group_size: int = 64,
) -> Roofline:  # fmt: skip
    """Decoding with some numbers of sequences that hold `context` tokens, and reading a prompt, on a GPU by its short name."""
    if gpu not in GPUS:
        raise SparsifyError(f"--gpu {gpu} is unknown; choose from {', '.join(GPUS)}")
    if any(number < 1 for number in (*batches, context, prompt)):
        raise SparsifyError("--batch, --context and --prompt take positive numbers")
    shape, where = model_shape(model), GPUS[gpu]
    rows = [
        Estimate(
            "decode", batch, batch,
            {kind: pass_seconds(where, kind, shape, batch, batch, context, group_size) for kind in KINDS},
        )
        for batch in batches
    ]  # fmt: skip
    # causal: a token of a prompt sees half of it on average
    read = {kind: pass_seconds(where, kind, shape, prompt, 1, prompt // 2, group_size) for kind in KINDS}
    return Roofline(where.name, model, context, group_size, [*rows, Estimate("prompt", 1, prompt, read)])


def table(result: Roofline) -> Table:
    """One row per batch: milliseconds, tokens per second of ours, times faster than dense."""
    view = Table(
        title=f"ESTIMATE, not measured: {result.model} on {result.gpu}, groups of {result.group_size}",
        caption=f"decode: one token for each sequence, which holds {result.context} tokens; times of a model with documented "
        "assumptions (sparsify/bench/roofline.py), checked against published measurements of Marlin and Sparse-Marlin",
        title_justify="left",
        caption_justify="left",
    )
    view.add_column("")
    view.add_column("batch", justify="right")
    view.add_column("tokens", justify="right")
    for kind in KINDS:
        view.add_column(f"{kind} ms", justify="right")
    for kind in KINDS[1:]:
        view.add_column(f"{kind} : dense", justify="right")
    view.add_column("ours, tokens/s", justify="right")
    for row in result.rows:
        view.add_row(
            row.what, str(row.batch), str(row.tokens),
            *(f"{row.seconds[kind] * 1e3:.2f}" for kind in KINDS),
            *(f"{row.ratios[kind]:.2f}x" for kind in KINDS[1:]),
            f"{row.tokens / row.seconds[OURS]:.0f}",
        )  # fmt: skip
    return view
