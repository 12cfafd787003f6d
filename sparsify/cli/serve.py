"""`sparsify serve`: vLLM's OpenAI-compatible server on a checkpoint."""

import argparse

from sparsify.cli.command import ALLOWS_UNKNOWN, SETS_ENGINE, TRUSTS_CODE, Commands, Outcome, add_command

THREADS_HELP = (
    "cores that compute: auto (vLLM keeps one for itself), all, or a list as VLLM_CPU_OMP_THREADS_BIND takes it (0-3)"
)
HOST_HELP = "address to listen on (default 127.0.0.1, this machine alone); 0.0.0.0 is every interface, for which set VLLM_API_KEY"


def serve(args: argparse.Namespace) -> Outcome:
    """Run `serve`."""
    from sparsify.bench import serve

    serve(
        args.directory, args.vllm_args, args.threads, args.one_process, args.int8, host=args.host, verified=args.verify
    )
    return Outcome({}, [])


def add_serve(commands: Commands) -> None:
    """Register `serve`."""
    command = add_command(
        commands, "serve", serve, "serve a checkpoint with vLLM's OpenAI-compatible server", SETS_ENGINE, TRUSTS_CODE, ALLOWS_UNKNOWN,
        shown=("sparsify serve out/smollm2", "sparsify serve out/smollm2 -- --port 8001 --max-model-len 2048"),
    )  # fmt: skip
    command.usage = "sparsify serve [options] DIR [-- VLLM_ARGS]"
    command.add_argument("directory", metavar="DIR", help="checkpoint directory")
    command.add_argument("--host", metavar="ADDRESS", help=HOST_HELP)
    command.add_argument("--verify", action="store_true", help="compare every file with its SHA-256 first")
    command.add_argument("--threads", metavar="auto|all|LIST", help=THREADS_HELP)
