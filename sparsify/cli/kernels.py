"""`sparsify kernels`: build the native kernels, list them, check them, look at their machine code."""

import argparse

from sparsify.cli.command import FAILED, IS_QUIET, SHOWS_JSON, Commands, Outcome, add_command, numbers


def build_kernels(args: argparse.Namespace) -> Outcome:
    """Run `kernels build`."""
    from sparsify.native.build_cuda import parse_archs
    from sparsify.native.builds import build_all, table

    archs = parse_archs(args.arch) if args.arch else ()
    builds = build_all(args.kernels, archs)
    failed = any(build.problem for build in builds)
    return Outcome({"kernels": [build.to_json() for build in builds]}, [table(builds)], FAILED if failed else 0)


def add_build_kernels(kernels: Commands) -> None:
    """Register `kernels build`."""
    command = add_command(
        kernels, "build", build_kernels, "compile the native kernels into the cache",
        IS_QUIET, SHOWS_JSON,
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


def check_kernels(args: argparse.Namespace) -> Outcome:
    """Run `kernels check`."""
    from sparsify.bench.gpu_kernels import check_here
    from sparsify.bench.gpu_report import tables

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


def add_check_kernels(kernels: Commands) -> None:
    """Register `kernels check`."""
    command = add_command(
        kernels, "check", check_kernels, "are the kernels right, and on a GPU how fast: the first command to run on a new one",
        IS_QUIET, SHOWS_JSON,
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
        help="put the times into this file, by which back ends are chosen (docs/kernels.md)",
    )


def inspect_kernels(args: argparse.Namespace) -> Outcome:
    """Run `kernels inspect`."""
    from sparsify.bench.sass import LIMITS, inspect, markdown, table
    from sparsify.native.build_cuda import parse_archs

    result = inspect(parse_archs(args.arch) if args.arch else tuple(LIMITS))
    return Outcome(result.to_json(), [markdown(result) if args.markdown else table(result)])


def add_inspect_kernels(kernels: Commands) -> None:
    """Register `kernels inspect`."""
    command = add_command(
        kernels, "inspect", inspect_kernels,
        "what nvcc made of the CUDA kernel: registers, spills, shared memory, occupancy, sparse tensor core instructions",
        SHOWS_JSON,
        shown=("sparsify kernels inspect", "sparsify kernels inspect --arch 90"),
    )  # fmt: skip
    command.add_argument("--arch", metavar="SM,SM", help="GPU architectures (80,86,89,90,100,120)")
    command.add_argument("--markdown", action="store_true", help="print the table of docs/kernels.md")


def list_kernels(args: argparse.Namespace) -> Outcome:
    """Run `kernels list`."""
    from sparsify.native.builds import list_all, table

    builds = list_all()
    return Outcome({"kernels": [build.to_json() for build in builds]}, [table(builds)])


def add_list_kernels(kernels: Commands) -> None:
    """Register `kernels list`."""
    add_command(kernels, "list", list_kernels, "show the native kernels and where they were built", SHOWS_JSON)


def add_kernels(commands: Commands) -> None:
    """Register `kernels` and its commands."""
    kernels = commands.add_parser(
        "kernels",
        help="build the native kernels ahead of time, list them, check them",
        description="Native kernels are built on first use; images and machines without a compiler want them built before.",
    ).add_subparsers(dest="kernels_command", required=True, metavar="COMMAND")
    add_build_kernels(kernels)
    add_check_kernels(kernels)
    add_inspect_kernels(kernels)
    add_list_kernels(kernels)
