"""The whole command line as one argparse parser. Each command registers its own options, beside its handler."""

import argparse
from collections.abc import Sequence

from sparsify._version import __version__
from sparsify.cli import bench, checkpoint, compress, demo, doctor, kernels, push, search, serve
from sparsify.cli.command import examples

COMMANDS = (
    compress.add_apply,
    compress.add_plan,
    search.add_search,
    checkpoint.add_inspect,
    checkpoint.add_verify,
    checkpoint.add_export,
    checkpoint.add_evaluate,
    checkpoint.add_report,
    push.add_push,
    bench.add_bench,
    serve.add_serve,
    kernels.add_kernels,
    doctor.add_doctor,
    demo.add_demo,
    compress.add_recipes,
)


def command_parser() -> argparse.ArgumentParser:
    """The whole command line. Parsed arguments carry `handler`, the function that runs the command on them."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error (or set SPARSIFY_DEBUG=1)")
    parser = argparse.ArgumentParser(
        prog="sparsify",
        description="Compile a large language model to a 2:4 sparse, 4-bit checkpoint, and serve it in vLLM.",
        epilog=examples(
            "sparsify demo                                      compress, serve and compare a small embedded model",
            "sparsify apply 2of4-w4a16 --model M --output DIR   compile",
            "sparsify inspect DIR                               what is in it, and is it really 2:4",
            "sparsify serve DIR                                 OpenAI-compatible server",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"sparsify {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one call. Those after `--` go to vLLM untouched, as `vllm_args`; exits with 2 on a usage error."""
    own, extra = list(argv), []
    if "--" in own:
        at = own.index("--")
        own, extra = own[:at], own[at + 1 :]
    parser = command_parser()
    args = parser.parse_args(own)
    in_vllm = getattr(args, "benchmark", None) in ("latency", "throughput", "serve")
    takes_engine_arguments = args.command == "serve" or in_vllm
    if extra and not takes_engine_arguments:
        parser.error(f"{args.command} takes no arguments after --")
    args.vllm_args = extra
    return args
