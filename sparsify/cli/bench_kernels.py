"""`sparsify bench kernels` and `sparsify bench roofline`: single linears, timed here or estimated for a GPU that is not here."""

import argparse
from typing import TYPE_CHECKING

from sparsify.cli.command import IS_QUIET, SHOWS_JSON, Commands, Outcome, add_command, numbers

if TYPE_CHECKING:
    from sparsify.bench.kernels import KernelOptions


def bench_kernels(args: argparse.Namespace) -> Outcome:
    """Run `bench kernels`."""
    from sparsify.bench.kernels import bench_kernels, linears_of, table

    result = bench_kernels(linears_of(args.models, args.shape), kernel_options(args))
    return Outcome(result.to_json(), [table(result)])


def kernel_options(args: argparse.Namespace) -> "KernelOptions":
    """What the arguments of `bench kernels` ask for."""
    from sparsify.bench.kernels import ROWS, KernelOptions

    return KernelOptions(
        rows=tuple(args.rows) if args.rows else ROWS,
        bits=args.bits,
        group_size=args.group_size,
        pattern=args.pattern,
        dtype=args.dtype,
        peers=tuple(args.against),
        cold=args.cold,
        rounds=args.rounds,
        peaks=not args.no_peaks,
        quiet=args.quiet,
    )


def group_size(text: str) -> int:
    """A number, or 0 for `channel`: one scale per output."""
    return 0 if text == "channel" else int(text)


def add_bench_kernels(benchmarks: Commands) -> None:
    """Register `bench kernels`."""
    command = add_command(
        benchmarks, "kernels", bench_kernels,
        "time of single linears: ours, torch's, vLLM's, llama.cpp's, beside the machine's peaks",
        IS_QUIET, SHOWS_JSON,
        shown=(
            "sparsify bench kernels llama-3.2-1b",
            "sparsify bench kernels --shape 28672x8192 --rows 1,8,32 --bits 8 --pattern dense",
            "sparsify bench kernels out/smollm2 --cold     no weights left in a cache by the call before",
            "SPARSIFY_LLAMA_CPP=llama.cpp/build sparsify bench kernels llama-3.1-8b --against torch-fp32 llama.cpp",
        ),
    )  # fmt: skip
    command.add_argument(
        "models",
        metavar="MODEL",
        nargs="*",
        help="checkpoint, embedded:NAME, or smollm2-135m, llama-3.2-1b, llama-3.1-8b",
    )
    command.add_argument("--shape", action="append", default=[], metavar="NxK", help="outputs x inputs; repeatable")
    command.add_argument(
        "--rows", type=numbers, metavar="M,M", help="tokens multiplied at once (1 to 2048 in ten steps)"
    )
    command.add_argument("--bits", type=int, default=4, choices=(4, 8, 16), help="of our weights (default 4)")
    command.add_argument(
        "--group-size", type=group_size, default=64, metavar="G", help="inputs per scale, or channel (default 64)"
    )
    command.add_argument("--pattern", default="2:4", choices=("2:4", "dense"), help="of our weights (default 2:4)")
    command.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of our activations (bfloat16)"
    )
    command.add_argument(
        "--against",
        nargs="*",
        default=["torch", "torch-fp32", "wna16", "llama.cpp"],
        choices=("torch", "torch-fp32", "wna16", "w4a8", "llama.cpp", "llama.cpp-q4_0"),
        help="peers: torch (bfloat16) and torch-fp32; wna16, vLLM's W4A16, and w4a8, its default where there is AMX (8-bit "
        "activations); llama.cpp, ggml's Q4_1, and llama.cpp-q4_0 (default torch torch-fp32 wna16 llama.cpp). A row says "
        "why one cannot be measured. llama.cpp is not installed with sparsify: pip install llama-cpp-python compiles it, or "
        "SPARSIFY_LLAMA_CPP names a folder with ggml's shared libraries. With SPARSIFY_CPU_LEVEL its library of that level "
        "is taken, for which it is compiled with CMAKE_ARGS='-DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON "
        "-DGGML_CPU_ALL_VARIANTS=ON -DCMAKE_INSTALL_BINDIR=llama_cpp/lib'",
    )
    command.add_argument(
        "--cold", action="store_true", help="cycle through copies of the weights that exceed the cache"
    )
    command.add_argument("--rounds", type=int, default=5, metavar="N", help="turns per baseline (default 5)")
    command.add_argument("--no-peaks", action="store_true", help="do not measure the machine's peaks (saves 10 s)")


def bench_roofline(args: argparse.Namespace) -> Outcome:
    """Run `bench roofline`."""
    from sparsify.bench.roofline import roofline, table

    result = roofline(args.gpu, args.model, args.batch, args.context, args.prompt, args.group_size)
    return Outcome(result.to_json(), [table(result)])


def add_bench_roofline(benchmarks: Commands) -> None:
    """Register `bench roofline`."""
    command = add_command(
        benchmarks, "roofline", bench_roofline,
        "estimate decoding and prompt time on a GPU that is not at hand: dense bf16, dense INT4, 2:4 INT4",
        SHOWS_JSON,
        shown=(
            "sparsify bench roofline --gpu a100 --model llama-3.1-8b",
            "sparsify bench roofline --gpu 4090 --model out/llama --batch 1,4,16 --context 4096",
        ),
    )  # fmt: skip
    command.add_argument("--gpu", required=True, metavar="GPU", help="a100, a6000, l40s, h100, 4090, 5090 (a10, 3090)")
    command.add_argument(
        "--model", "-m", required=True, metavar="M", help="checkpoint, smollm2-135m, llama-3.2-1b or llama-3.1-8b"
    )
    command.add_argument(
        "--batch", type=numbers, default=[1, 8, 16, 32, 64, 128], metavar="B,B", help="sequences (1,8,16,32,64,128)"
    )
    command.add_argument("--context", type=int, default=1024, metavar="N", help="tokens each holds (default 1024)")
    command.add_argument("--prompt", type=int, default=2048, metavar="N", help="tokens of a prompt (default 2048)")
    command.add_argument(
        "--group-size", type=int, default=64, choices=(32, 64, 128), help="inputs per scale (default 64)"
    )
