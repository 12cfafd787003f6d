"""The commands. Each one parses its arguments, calls one function of the package and prints what it returned.

Nothing heavy is imported before a command runs, so that `sparsify --help` is instant. While a command runs, whatever
libraries print on stdout goes to stderr: stdout carries the result alone, with `--json` exactly one JSON object.
"""

import argparse
import errno
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify import __version__
from sparsify.distributed import is_main
from sparsify.errors import RecipeError, SparsifyError
from sparsify.progress import on_terminal, patiently, silenced
from sparsify.threads import prepare

if TYPE_CHECKING:
    from sparsify.bench.kernels import KernelOptions
    from sparsify.recipe import Recipe

FAILED = 1
INTERRUPTED = 130
NO_BARS = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # bars of libraries, where none can be drawn
PIPE_WIDTH = 160  # columns of a table that is not printed on a terminal


@dataclass(frozen=True)
class Outcome:
    """What a command found: plain JSON values, the same for people (strings and rich tables), and the exit status."""

    data: dict[str, Any]
    shown: Sequence[Any]
    status: int = 0


Handler = Callable[[argparse.Namespace], Outcome]

# Defaults of the workloads, said here too because importing sparsify.bench to print a help page would take seconds.
# A test holds them equal to those of sparsify.bench.
LATENCY = {"input_len": 128, "output_len": 64, "batch_size": 1, "iterations": 5, "warmup": 2}
THROUGHPUT = {"input_len": 128, "output_len": 64, "prompts": 32, "warmup": 4}
DEPTH_DROPS = ("10%", "20%", "30%", "50%")
WORKLOAD_HELP = {
    "input_len": "prompt tokens per request",
    "output_len": "generated tokens per request",
    "batch_size": "requests that run together",
    "iterations": "measured repetitions",
    "warmup": "repetitions before measuring",
    "prompts": "requests handed over at once",
}
MODELS_HELP = (
    "checkpoint directories; NAME=DIR names one; shape:NAME@FORMAT measures the speed of a model that is not there "
    "(NAME: smollm2-135m, llama-3.2-1b, llama-3.1-8b; FORMAT: dense, sparse24, pack-quantized; then +bits8, +group128, "
    "+head8 for an 8-bit output head, +layers4, +tied, +untied)"
)
THREADS_HELP = (
    "cores that compute: auto (vLLM keeps one for itself), all, or a list as VLLM_CPU_OMP_THREADS_BIND takes it (0-3)"
)
INT8_HELP = (
    "on a CPU, multiply compressed linears in int8 where several tokens are multiplied at once, as llama.cpp does always: "
    "faster, results about 1%% off (SPARSIFY_CPU_INT8)"
)
ONE_PROCESS_HELP = "vLLM's scheduler and worker in one process, so that neither waits busily on a core that computes"


# ---------------------------------------------------------------------------------------------------------- commands


def apply(args: argparse.Namespace) -> Outcome:
    from sparsify.compiler.apply import apply
    from sparsify.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.set, args.model)
    result = apply(
        recipe,
        named_model(recipe.model),
        args.output,
        resume=args.resume,
        quiet=args.quiet,
        evaluate=recipe_evaluation(recipe, args.quiet),
        spill=args.spill,
    )
    return Outcome(result.to_json(), [result.table()])


def recipe_evaluation(recipe: "Recipe", quiet: bool) -> Callable[[Path], dict[str, Any]] | None:
    """What the `evaluation` section of a recipe asks for, as a call on the finished directory."""
    asked = recipe.evaluation
    if asked is None:
        return None

    def measure(directory: Path) -> dict[str, Any]:
        from sparsify.evaluation import evaluate

        return evaluate(directory, recipe.model, asked.text, asked.sequence_length, asked.chunks, quiet=quiet).to_json()

    return measure


def report(args: argparse.Namespace) -> Outcome:
    from sparsify.files import read_json
    from sparsify.report import report_on

    evaluation, bench = (read_json(file) if file else None for file in (args.evaluation, args.bench))
    page = report_on(Path(args.directory), args.output, evaluation, bench, dense=args.dense)
    return Outcome({"report": str(page)}, [f"report: {page}"])


def plan(args: argparse.Namespace) -> Outcome:
    from sparsify.compiler.plan import make_plan
    from sparsify.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.set, args.model)
    result = make_plan(recipe, named_model(recipe.model))
    return Outcome(result.to_json(), [result.table()])


def recipes(args: argparse.Namespace) -> Outcome:
    from rich.table import Table

    from sparsify.recipe import ready_recipes

    table = Table("recipe", "what it does", "file")
    found = {}
    for name, path in ready_recipes().items():
        found[name] = {"path": str(path), "description": first_comment(path.read_text(encoding="utf-8"))}
        table.add_row(name, found[name]["description"], str(path))
    return Outcome({"recipes": found}, [table])


def first_comment(text: str) -> str:
    """The sentence a recipe begins with; the line before it tells editors where the schema is."""
    lines = (line.lstrip("#").strip() for line in text.splitlines() if line.startswith("#"))
    return next((line for line in lines if line and not line.startswith("yaml-language-server")), "")


def inspect(args: argparse.Namespace) -> Outcome:
    from sparsify.formats.inspect import inspect, render

    result = inspect(args.directory, quiet=args.quiet)
    return Outcome(result.to_json(), [render(result)])


def export(args: argparse.Namespace) -> Outcome:
    from sparsify.compiler.convert import export

    written = export(
        args.source, args.format, args.output, args.head, args.head_group_size, args.quiet, args.calibration
    )
    shown = [f"{args.format} checkpoint written to {written}"]
    if args.head == 4 and args.calibration is None:
        shown.append(
            "The output head was rounded to nearest, which costs accuracy with 4 bits; "
            "with --calibration file:TEXT it is solved on that text and loses far less."
        )
    return Outcome({"output": str(written), "format": args.format}, shown)


def evaluate(args: argparse.Namespace) -> Outcome:
    from sparsify.evaluation import evaluate, table

    result = evaluate(
        args.directory,
        args.dense,
        args.text,
        sequence_length=args.sequence_length,
        chunks=args.chunks,
        quiet=args.quiet,
    )
    return Outcome(result.to_json(), [table([result])])


def bench(args: argparse.Namespace) -> Outcome:
    from sparsify.bench import BenchOptions, LatencyWorkload, ThroughputWorkload, latency, table, throughput

    options = BenchOptions(
        repeats=args.repeats,
        eager=args.eager,
        engine_args=args.vllm_args,
        threads=args.threads,
        best_threads=args.best_threads,
        one_process=args.one_process,
        int8=args.int8,
        greedy=args.greedy,
        quiet=args.quiet,
    )
    if args.benchmark == "latency":
        workload = LatencyWorkload(**{name: getattr(args, name) for name in LATENCY})
        result = latency(args.directories, workload, options)
    else:
        load = ThroughputWorkload(**{name: getattr(args, name) for name in THROUGHPUT})
        result = throughput(args.directories, load, options)
    # without the first model there is nothing to compare the others with
    return Outcome(result.to_json(), [table(result)], 0 if result.compares else FAILED)


def bench_kernels(args: argparse.Namespace) -> Outcome:
    from sparsify.bench.kernels import bench_kernels, linears_of, table

    result = bench_kernels(linears_of(args.models, args.shape), kernel_options(args))
    return Outcome(result.to_json(), [table(result)])


def bench_recipes(args: argparse.Namespace) -> Outcome:
    from sparsify.bench.recipes import compare_recipes, table

    results = compare_recipes(
        args.recipes,
        args.model,
        args.text or ["self"],
        Path(args.output),
        args.set,
        args.sequence_length,
        args.chunks,
        args.quiet,
    )
    return Outcome({"recipes": [result.to_json() for result in results]}, [table(results)])


def bench_roofline(args: argparse.Namespace) -> Outcome:
    from sparsify.bench.roofline import roofline, table

    result = roofline(args.gpu, args.model, args.batch, args.context, args.prompt, args.group_size)
    return Outcome(result.to_json(), [table(result)])


def bench_depth(args: argparse.Namespace) -> Outcome:
    from sparsify.bench.depth import DepthOptions, compare_depth, table

    options = DepthOptions(
        drops=args.drop,
        methods=args.methods,
        heal=None if args.heal == "none" else args.heal,
        speed=args.speed,
        overrides=args.set,
        sequence_length=args.sequence_length,
        chunks=args.chunks,
        quiet=args.quiet,
    )
    rows, speed = compare_depth(args.model, args.text or ["self"], Path(args.output), options)
    data = {"rows": [row.to_json() for row in rows], "speed": None if speed is None else asdict(speed)}
    return Outcome(data, [table(rows, speed)])


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


def numbers(text: str) -> list[int]:
    """1,8,32"""
    return [int(part) for part in text.split(",")]


def group_size(text: str) -> int:
    """A number, or 0 for `channel`: one scale per output."""
    return 0 if text == "channel" else int(text)


def serve(args: argparse.Namespace) -> Outcome:
    from sparsify.bench import serve

    serve(args.directory, args.vllm_args, args.threads, args.one_process, args.int8)
    return Outcome({}, [])


def build_kernels(args: argparse.Namespace) -> Outcome:
    from sparsify.native.build_cuda import parse_archs
    from sparsify.native.builds import build_all, table

    archs = parse_archs(args.arch) if args.arch else ()
    builds = build_all(args.kernels, archs)
    failed = any(build.problem for build in builds)
    return Outcome({"kernels": [build.to_json() for build in builds]}, [table(builds)], FAILED if failed else 0)


def list_kernels(args: argparse.Namespace) -> Outcome:
    from sparsify.native.builds import list_all, table

    builds = list_all()
    return Outcome({"kernels": [build.to_json() for build in builds]}, [table(builds)])


def check_kernels(args: argparse.Namespace) -> Outcome:
    from sparsify.bench.gpu_kernels import check_here, tables

    report = check_here(
        gpu=args.gpu,
        linears=args.shape,
        rows=args.rows or (),
        group_size=args.group_size,
        quick=args.quick,
        seconds=args.seconds,
        only=args.backend,
        output=args.output,
        times=args.times,
    )
    return Outcome(report.to_json(), tables(report), 0 if report.right else FAILED)


def inspect_kernels(args: argparse.Namespace) -> Outcome:
    from sparsify.bench.sass import LIMITS, inspect, markdown, table
    from sparsify.native.build_cuda import parse_archs

    result = inspect(parse_archs(args.arch) if args.arch else tuple(LIMITS))
    return Outcome(result.to_json(), [markdown(result) if args.markdown else table(result)])


def doctor(args: argparse.Namespace) -> Outcome:
    from sparsify.doctor import examine, table

    report = examine()
    return Outcome(report.to_json(), [table(report), report.summary()], 0 if report.healthy else FAILED)


def demo(args: argparse.Namespace) -> Outcome:
    from sparsify.demo import run_demo

    result = run_demo(args.output, quiet=args.quiet)
    return Outcome(result.to_json(), [result.table()], 0 if result.speed.compares else FAILED)


def named_model(model: str | None) -> str:
    """The model of a recipe after `--model` was applied; a recipe may leave it open."""
    if model is None:
        raise RecipeError("the recipe names no model: add --model with a directory, a Hub id or embedded:NAME")
    return model


# ------------------------------------------------------------------------------------------------------------ parser


def command_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error (or set SPARSIFY_DEBUG=1)")
    shows_json = argparse.ArgumentParser(add_help=False)
    shows_json.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout and nothing else there"
    )
    is_quiet = argparse.ArgumentParser(add_help=False)
    is_quiet.add_argument("--quiet", "-q", action="store_true", help="print the result and errors, no progress")
    takes_recipe = argparse.ArgumentParser(add_help=False)
    takes_recipe.add_argument(
        "recipe", metavar="RECIPE", help="name of a ready recipe (see `sparsify recipes`) or a YAML file"
    )
    takes_recipe.add_argument(
        "--model",
        "-m",
        metavar="M",
        help="directory, .gguf file, Hub id or embedded:NAME; overrides the recipe's model",
    )
    takes_recipe.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="change a setting of the recipe: calibration.samples=64, passes.prune.method=wanda; repeatable",
    )

    parser = argparse.ArgumentParser(
        prog="sparsify",
        description="Compile a large language model to a 2:4 sparse, 4-bit checkpoint, and serve it in vLLM.",
        epilog=examples(
            "sparsify demo                                      the whole story on a small embedded model",
            "sparsify apply 2of4-w4a16 --model M --output DIR   compile",
            "sparsify inspect DIR                               what is in it, and is it really 2:4",
            "sparsify serve DIR                                 OpenAI-compatible server",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"sparsify {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        to: Any, name: str, handler: Handler, about: str, *parents: argparse.ArgumentParser, shown: Sequence[str] = ()
    ) -> argparse.ArgumentParser:
        # --debug is accepted before and after the command; SUPPRESS keeps the second place from resetting the first.
        late = argparse.ArgumentParser(add_help=False)
        late.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        command: argparse.ArgumentParser = to.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=examples(*shown),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[*parents, late],
        )
        command.set_defaults(handler=handler)
        return command

    command = add(
        commands, "apply", apply, "apply a recipe to a model and write the checkpoint",
        takes_recipe, is_quiet, shows_json,
        shown=(
            "sparsify apply 2of4-w4a16 --model embedded:smollm2-135m-instruct --output out/smollm2",
            "sparsify apply my.yaml --model ./llama --output out/llama --set calibration.samples=256",
            "sparsify apply my.yaml --model ./llama --output out/llama --resume     go on after an interruption",
        ),
    )  # fmt: skip
    command.add_argument("--output", "-o", required=True, metavar="DIR", help="directory to write; must not exist")
    command.add_argument(
        "--resume", action="store_true", help="go on with a run that was interrupted; the result is the same"
    )
    command.add_argument(
        "--spill",
        action="store_true",
        help="keep the calibration activations in a file beside the output, not in memory",
    )

    add(
        commands, "plan", plan, "show what a recipe will do to a model, without doing it",
        takes_recipe, is_quiet, shows_json,
        shown=("sparsify plan 2of4-w4a16 --model embedded:smollm2-135m-instruct",),
    )  # fmt: skip

    command = add(
        commands, "inspect", inspect, "show sparsity, 2:4 validity, bits and bytes of every tensor",
        is_quiet, shows_json,
        shown=("sparsify inspect out/smollm2",),
    )  # fmt: skip
    command.add_argument("directory", metavar="DIR", help="checkpoint directory")

    command = add(
        commands, "export", export, "write a checkpoint in another format",
        is_quiet, shows_json,
        shown=(
            "sparsify export out/smollm2 --format pack-quantized --output out/smollm2-stock     runs without sparsify",
            "sparsify export out/smollm2 --format sparse24 --head 8 --output out/smollm2-head     quantizes lm_head too",
            "sparsify export out/smollm2 --format sparse24 --head 4 --calibration file:train.txt --output out/smollm2-head4",
            "sparsify export embedded:smollm2-135m-instruct --format dense --output out/dense",
        ),
    )  # fmt: skip
    command.add_argument(
        "source", metavar="DIR|MODEL", help="checkpoint directory, .gguf file, Hub id or embedded:NAME"
    )
    command.add_argument(
        "--format", "-f", required=True, metavar="F", help="sparse24, pack-quantized, marlin-24 or dense"
    )
    command.add_argument("--output", "-o", required=True, metavar="DIR", help="directory to write; must not exist")
    command.add_argument(
        "--head", type=int, choices=(4, 8, 16), metavar="BITS",
        help="quantize the output head (lm_head) to 8 or 4 bits; 16 multiplies a quantized one out again",
    )  # fmt: skip
    command.add_argument(
        "--calibration", metavar="TEXT",
        help="solve the head by GPTQ on this text (file:PATH, hub:ID, or self: the model writes it) instead of rounding it "
        "to nearest, which with 4 bits loses far more",
    )  # fmt: skip
    command.add_argument(
        "--head-group-size", metavar="G", help="inputs per scale of the head: 32, 64 (default), 128 or channel"
    )

    command = add(
        commands, "eval", evaluate, "measure perplexity, and the distance from the dense model",
        is_quiet, shows_json,
        shown=(
            "sparsify eval out/smollm2 --text test.txt",
            "sparsify eval out/smollm2 --dense embedded:smollm2-135m-instruct --text test.txt",
        ),
    )  # fmt: skip
    command.add_argument("directory", metavar="DIR", help="checkpoint directory")
    command.add_argument("--dense", metavar="M", help="dense model to compare with: KL divergence, top-1 agreement")
    command.add_argument("--text", metavar="FILE", help="plain text; without it the dense model samples its own")
    command.add_argument(
        "--sequence-length", type=int, metavar="N", help="tokens per chunk (1024; 512 on sampled text)"
    )
    command.add_argument("--chunks", type=int, metavar="N", help="chunks to score (48; 16 on sampled text)")

    command = add(
        commands, "report", report, "draw a self-contained HTML page about a checkpoint: layers, sizes, accuracy, speed",
        is_quiet, shows_json,
        shown=(
            "sparsify report out/smollm2",
            "sparsify report out/smollm2 --evaluation eval.json --bench bench.json   what eval --json and bench --json printed",
        ),
    )  # fmt: skip
    command.add_argument("directory", metavar="DIR", help="checkpoint directory that `sparsify apply` wrote")
    command.add_argument("--evaluation", metavar="FILE", help="output of `sparsify eval --json`")
    command.add_argument("--bench", metavar="FILE", help="output of `sparsify bench --json`")
    command.add_argument("--dense", metavar="M", help="the dense model, to split its size into linears and the rest")
    command.add_argument("--output", "-o", metavar="FILE", help="where to write (default DIR/report.html)")

    benchmarks = commands.add_parser(
        "bench",
        help="measure latency or throughput in vLLM, several models in one run; or single linears",
        description="latency and throughput run vLLM's own benchmarks and compare with the first model; kernels measures "
        "one linear at a time, without vLLM's engine.",
    ).add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, workload, about in (
        ("latency", LATENCY, "time of one batch of requests: first token, each further token"),
        ("throughput", THROUGHPUT, "tokens per second of many requests together"),
    ):
        command = add(
            benchmarks, name, bench, about,
            is_quiet, shows_json,
            shown=(
                f"sparsify bench {name} out/dense out/smollm2",
                f"sparsify bench {name} dense=out/dense sparse=out/smollm2 --repeats 3 -- --dtype bfloat16",
                f"sparsify bench {name} shape:llama-3.2-1b@dense shape:llama-3.2-1b@sparse24+head8 --best-threads",
            ),
        )  # fmt: skip
        command.usage = f"sparsify bench {name} [options] DIR [DIR ...] [-- ENGINE_ARGS]"
        command.add_argument("directories", metavar="DIR", nargs="+", help=MODELS_HELP)
        for setting, value in workload.items():
            option = "--" + setting.replace("_", "-")
            command.add_argument(
                option, type=int, default=value, metavar="N", help=f"{WORKLOAD_HELP[setting]} (default {value})"
            )
        command.add_argument("--repeats", type=int, default=1, metavar="N", help="rounds over all models (default 1)")
        command.add_argument("--eager", action="store_true", help="without torch.compile: starts faster, runs slower")
        command.add_argument(
            "--greedy", action="store_true", help="take the best token; vLLM's benchmarks draw one at temperature 1"
        )
        threads = command.add_mutually_exclusive_group()
        threads.add_argument("--threads", metavar="auto|all|LIST", help=THREADS_HELP)
        threads.add_argument(
            "--best-threads",
            action="store_true",
            help="measure every model with --threads auto and with all, and report each at its own best",
        )
        command.add_argument("--one-process", action="store_true", help=ONE_PROCESS_HELP)
        command.add_argument("--int8", action="store_true", help=INT8_HELP)

    command = add(
        benchmarks, "kernels", bench_kernels,
        "time of single linears: ours, torch's, vLLM's, llama.cpp's, beside the machine's peaks",
        is_quiet, shows_json,
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

    command = add(
        benchmarks, "roofline", bench_roofline,
        "estimate decoding and prompt time on a GPU that is not at hand: dense bf16, dense INT4, 2:4 INT4",
        shows_json,
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

    command = add(
        commands, "serve", serve, "serve a checkpoint with vLLM's OpenAI-compatible server",
        shown=("sparsify serve out/smollm2", "sparsify serve out/smollm2 -- --port 8001 --max-model-len 2048"),
    )  # fmt: skip
    command.usage = "sparsify serve [options] DIR [-- VLLM_ARGS]"
    command.add_argument("directory", metavar="DIR", help="checkpoint directory")
    command.add_argument("--threads", metavar="auto|all|LIST", help=THREADS_HELP)
    command.add_argument("--one-process", action="store_true", help=ONE_PROCESS_HELP)
    command.add_argument("--int8", action="store_true", help=INT8_HELP)

    command = add(
        benchmarks, "recipes", bench_recipes, "apply several recipes to one model; accuracy, time and memory of each",
        is_quiet, shows_json,
        shown=(
            "sparsify bench recipes 2of4 w4a16 2of4-w4a16 --model embedded:smollm2-135m-instruct --output out/recipes",
            "sparsify bench recipes 2of4-w4a16 plain=2of4-w4a16,solver.error_propagation=0 "
            "--model DIR --text test.txt --set calibration.source=file:train.txt --output out/recipes",
        ),
    )  # fmt: skip
    command.add_argument(
        "recipes",
        metavar="RECIPE",
        nargs="+",
        help="file or ready recipe; NAME=RECIPE,KEY=VALUE,... gives one a name and changes of its own",
    )
    command.add_argument("--model", metavar="MODEL", help="the dense model, unless the recipes name it")
    command.add_argument(
        "--output", "-o", required=True, metavar="DIR", help="directory for the results, which are kept"
    )
    command.add_argument(
        "--text", action="append", metavar="FILE", help="text to score, or self; repeatable (default self)"
    )
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change of every recipe that has such a setting"
    )
    command.add_argument("--sequence-length", type=int, metavar="N", help="tokens per scored chunk")
    command.add_argument("--chunks", type=int, metavar="N", help="chunks scored")

    command = add(
        benchmarks, "depth", bench_depth, "depth methods at several shares of the layers, before and after healing",
        is_quiet, shows_json,
        shown=(
            "sparsify bench depth --model embedded:smollm2-135m-instruct --text test.txt --output out/depth "
            "--set calibration.source=file:train.txt",
            "sparsify bench depth --model DIR --drop 20% --methods angular finercut --heal none --speed --output out/depth",
        ),
    )  # fmt: skip
    command.add_argument("--model", metavar="MODEL", required=True, help="the dense model")
    command.add_argument(
        "--output",
        "-o",
        required=True,
        metavar="DIR",
        help="directory for the recipes and their results, which are kept",
    )
    command.add_argument(
        "--text", action="append", metavar="FILE", help="text to score, or self; repeatable (default self)"
    )
    command.add_argument(
        "--drop",
        nargs="+",
        default=list(DEPTH_DROPS),
        metavar="SHARE",
        help="shares of the layers (10%% 20%% 30%% 50%%)",
    )
    command.add_argument(
        "--methods", nargs="+", default=["deepest", "angular", "streamline", "finercut"], metavar="METHOD",
        help="deepest, angular, streamline, finercut (in pairs), finercut-free (default the first four)",
    )  # fmt: skip
    command.add_argument(
        "--heal", default="500k", metavar="TOKENS", help="tokens that adapters learn from, or none (default 500k)"
    )
    command.add_argument(
        "--speed",
        action="store_true",
        help="decode in vLLM with the dense model and the last method's result at every share",
    )
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change of every recipe that has such a setting"
    )
    command.add_argument("--sequence-length", type=int, metavar="N", help="tokens per scored chunk")
    command.add_argument("--chunks", type=int, metavar="N", help="chunks scored")

    kernels = commands.add_parser(
        "kernels",
        help="build the native kernels ahead of time, list them, check them",
        description="Native kernels are built on first use; images and machines without a compiler want them built before.",
    ).add_subparsers(dest="kernels_command", required=True, metavar="COMMAND")
    command = add(
        kernels, "build", build_kernels, "compile the native kernels into the cache",
        is_quiet, shows_json,
        shown=(
            "sparsify kernels build",
            "sparsify kernels build cpu/gram",
            "sparsify kernels build --arch 80,86,89,90,100,120     one file for every GPU from Ampere to Blackwell",
        ),
    )  # fmt: skip
    command.add_argument(
        "kernels", metavar="KERNEL", nargs="*", help="names as `sparsify kernels list` shows them (all)"
    )
    command.add_argument(
        "--arch", metavar="SM,SM", help="GPU architectures for the CUDA kernels (those of the GPUs here); needs nvcc"
    )
    command = add(
        kernels, "check", check_kernels, "are the kernels right, and on a GPU how fast: the first command to run on a new one",
        is_quiet, shows_json,
        shown=(
            "sparsify kernels check --gpu --output check.json",
            "sparsify kernels check --gpu --quick",
            "sparsify kernels check --gpu --shape 28672x8192 --rows 1,16,256",
        ),
    )  # fmt: skip
    command.add_argument(
        "--gpu", action="store_true", help="check and time the kernels of the GPU (default: the CPU's)"
    )
    command.add_argument(
        "--shape", action="append", default=[], metavar="NxK", help="outputs x inputs to time; repeatable (Llama's)"
    )
    command.add_argument("--rows", type=numbers, metavar="M,M", help="tokens multiplied at once (1 to 4096)")
    command.add_argument(
        "--group-size", type=int, default=64, choices=(32, 64, 128), help="inputs per scale (default 64)"
    )
    command.add_argument("--backend", action="append", default=[], metavar="NAME", help="only this one; repeatable")
    command.add_argument("--quick", action="store_true", help="fewer shapes")
    command.add_argument(
        "--seconds", type=float, default=180, metavar="S", help="leave out what is not measured by then (default 180)"
    )
    command.add_argument("--output", "-o", metavar="FILE", help="write everything that was found as JSON")
    command.add_argument(
        "--times",
        metavar="FILE",
        help="put the times into this file, by which back ends are chosen (kernels/README.md)",
    )
    command = add(
        kernels, "inspect", inspect_kernels,
        "what nvcc made of the CUDA kernel: registers, spills, shared memory, occupancy, sparse tensor core instructions",
        shows_json,
        shown=("sparsify kernels inspect", "sparsify kernels inspect --arch 90"),
    )  # fmt: skip
    command.add_argument("--arch", metavar="SM,SM", help="GPU architectures (80,86,89,90,100,120)")
    command.add_argument("--markdown", action="store_true", help="print the table of kernels/README.md")
    add(kernels, "list", list_kernels, "show the native kernels and where they were built", shows_json)

    add(
        commands, "doctor", doctor, "say what is installed, what this machine can run, and what is missing",
        is_quiet, shows_json,
    )  # fmt: skip

    command = add(
        commands, "demo", demo, "compile, serve and compare a small embedded model: the whole story",
        is_quiet, shows_json,
        shown=("sparsify demo --output out/demo",),
    )  # fmt: skip
    command.add_argument(
        "--output", "-o", default="out/demo", metavar="DIR", help="directory to write (default out/demo)"
    )

    add(commands, "recipes", recipes, "list the ready recipes", shows_json)
    return parser


def examples(*lines: str) -> str | None:
    return "examples:\n" + "\n".join(f"  {line}" for line in lines) if lines else None


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments after `--` go to vLLM untouched."""
    own, extra = list(argv), []
    if "--" in own:
        at = own.index("--")
        own, extra = own[:at], own[at + 1 :]
    parser = command_parser()
    args = parser.parse_args(own)
    takes_engine_arguments = args.command == "serve" or getattr(args, "benchmark", "kernels") in (
        "latency",
        "throughput",
    )
    if extra and not takes_engine_arguments:
        parser.error(f"{args.command} takes no arguments after --")
    args.vllm_args = extra
    return args


# ------------------------------------------------------------------------------------------------- running and errors


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status. Usage errors exit with 2 on the way."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(argv)
    quiet = getattr(args, "quiet", False)
    # before a handler imports the libraries that read these once
    prepare(NO_BARS if (quiet or not on_terminal()) and args.command != "serve" else None)
    try:
        with only_results_on_stdout(args.command != "serve"), silenced(quiet), patiently("loading libraries"):
            outcome = args.handler(args)
        if is_main():  # of several processes that torchrun started, one speaks
            show(outcome, getattr(args, "json", False))
        return outcome.status
    except (KeyboardInterrupt, Exception) as error:
        if args.debug or os.environ.get("SPARSIFY_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        status, sentence = explain(error, args, argv)
        if sentence:
            print(sentence, file=sys.stderr)
        return status


@contextmanager
def only_results_on_stdout(active: bool = True) -> Iterator[None]:
    """Sends to stderr what libraries, native code and child processes write to stdout."""
    if not active:
        yield
        return
    sys.stdout.flush()
    python_stdout, real_stdout = sys.stdout, os.dup(1)
    try:
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        yield
    finally:
        sys.stdout = python_stdout
        os.dup2(real_stdout, 1)
        os.close(real_stdout)


def show(outcome: Outcome, as_json: bool) -> None:
    """Print the result on stdout."""
    if as_json:
        print(json.dumps(outcome.data, indent=2, allow_nan=False))
    elif outcome.shown:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, soft_wrap=not sys.stdout.isatty())
        for part in outcome.shown:
            console.print(part, markup=False, highlight=False)
    sys.stdout.flush()


def explain(error: BaseException, args: argparse.Namespace, argv: Sequence[str]) -> tuple[int, str]:
    """The exit status and the one sentence for an error that ended a command."""
    again = ""
    if args.command == "apply":
        command = [*argv] if "--resume" in argv else [*argv, "--resume"]
        again = f"; finished blocks are kept, go on with: {shlex.join(['sparsify', *command])}"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, f"interrupted{again}"
    if isinstance(error, BrokenPipeError):  # the reader of our stdout has gone, as in `sparsify inspect DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED, ""
    if isinstance(error, SparsifyError):
        return FAILED, f"error: {error}"
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left on device" in str(error):
        return (
            FAILED,
            f"error: no space left on the disk{at_file(error)}: free some{again or ' and run the command again'}",
        )
    if isinstance(error, PermissionError):
        return FAILED, f"error: permission denied{at_file(error)}: choose another place or change its rights"
    if isinstance(error, OSError) and error.strerror:
        return FAILED, f"error: {error.strerror}{at_file(error)}"
    if isinstance(error, MemoryError):
        return FAILED, f"error: out of memory: use fewer or shorter calibration samples{again}"
    kind, said = type(error).__name__, " ".join(str(error).split())
    hint = "this is a bug in sparsify or in what it calls; run again with --debug for the traceback"
    return FAILED, f"error: {kind}: {said or 'no message'} ({hint})"


def at_file(error: BaseException) -> str:
    name = getattr(error, "filename", None)
    return f" ({name})" if name else ""


if __name__ == "__main__":
    sys.exit(main())
