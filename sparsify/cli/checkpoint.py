"""`sparsify inspect`, `verify`, `export`, `eval` and `report`: what is in a checkpoint, how good it is, and other formats."""

import argparse
from pathlib import Path

from sparsify.cli.command import (
    ALLOWS_UNKNOWN,
    FAILED,
    IS_QUIET,
    SHOWS_JSON,
    TAKES_PRESET,
    TAKES_TASKS,
    TRUSTS_CODE,
    Commands,
    Outcome,
    add_command,
    numbers,
)

# sparsify.evaluation.ALL, repeated here because importing it to parse arguments would take seconds. A test holds them equal.
ALL_CHUNKS = 2**31


def inspect(args: argparse.Namespace) -> Outcome:
    """Run `inspect`."""
    from sparsify import api
    from sparsify.formats.inspect import render

    result = api.inspect(args.directory, quiet=args.quiet)
    return Outcome(result.to_json(), [render(result)])


def add_inspect(commands: Commands) -> None:
    """Register `inspect`."""
    command = add_command(
        commands, "inspect", inspect, "show sparsity, 2:4 validity, bits and bytes of every tensor",
        IS_QUIET, SHOWS_JSON, TRUSTS_CODE, ALLOWS_UNKNOWN,
        shown=("sparsify inspect out/smollm2",),
    )  # fmt: skip
    command.add_argument("directory", metavar="DIR", help="checkpoint directory")


def verify(args: argparse.Namespace) -> Outcome:
    """Run `verify`."""
    from sparsify import api

    found = api.verify(args.directory, quiet=args.quiet)
    return Outcome(found.to_json(), [found.describe()], 0 if found.good else FAILED)


def add_verify(commands: Commands) -> None:
    """Register `verify`."""
    command = add_command(
        commands, "verify", verify, "compare every file of an output with the SHA-256 that was written with it",
        IS_QUIET, SHOWS_JSON,
        shown=(
            "sparsify verify out/smollm2                 exit status 1 where a file differs, is missing or was added",
            "sparsify verify out/smollm2.partial         what an interrupted run has finished",
        ),
    )  # fmt: skip
    command.add_argument("directory", metavar="DIR", help="directory that sparsify has written")


def export(args: argparse.Namespace) -> Outcome:
    """Run `export`."""
    from sparsify.compiler.convert import exported
    from sparsify.compiler.left_dense import some_not_held

    written = exported(
        args.source, args.format, args.output, args.head, args.head_group_size, args.quiet, args.calibration
    )
    shown = [
        f"{args.format} checkpoint written to {written.output}",
        *some_not_held(args.format, written.dense_modules),
    ]
    if args.head == 4 and args.calibration is None:
        shown.append(
            "The output head was rounded to nearest, which costs accuracy with 4 bits; "
            "with --calibration file:TEXT it is solved on that text and loses far less."
        )
    dense = [{"module": module, "reason": reason} for module, reason in written.dense_modules.items()]
    return Outcome({"output": str(written.output), "format": args.format, "dense_modules": dense}, shown)


def add_export(commands: Commands) -> None:
    """Register `export`."""
    command = add_command(
        commands, "export", export, "write a checkpoint in another format",
        IS_QUIET, SHOWS_JSON, TRUSTS_CODE, ALLOWS_UNKNOWN,
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
        "--format", "-f", required=True, metavar="F", help="sparse24, pack-quantized, gptq, marlin-24 or dense"
    )
    command.add_argument("--output", "-o", required=True, metavar="DIR", help="directory to write; must not exist")
    command.add_argument(
        "--head", type=int, choices=(4, 8, 16), metavar="BITS",
        help="quantize the output head (lm_head) to 8 or 4 bits; 16 dequantizes one that is quantized",
    )  # fmt: skip
    command.add_argument(
        "--calibration", metavar="TEXT",
        help="solve the head by GPTQ on this text (file:PATH, hub:ID, or self: the model writes it) instead of rounding it "
        "to nearest, which with 4 bits loses far more",
    )  # fmt: skip
    command.add_argument(
        "--head-group-size", metavar="G", help="inputs per scale of the head: 32, 64 (default), 128 or channel"
    )


def evaluate(args: argparse.Namespace) -> Outcome:
    """Run `eval`."""
    from sparsify.errors import SparsifyError
    from sparsify.evaluation import evaluate, harness_command, read_tasks, tables, write_task_files

    shown: list[str] = []
    files: list[str] = []
    if args.write_task_files:
        if not args.tasks or args.preset:
            raise SparsifyError("--write-task-files writes the tasks of --tasks FOLDER; give that too, and no --preset")
        tasks = read_tasks(args.tasks, args.limit)
        files = [str(file) for file in write_task_files(tasks, args.write_task_files)]
        command = harness_command(tasks, args.directory or "DIR", args.write_task_files, args.limit)
        shown = [f"task files for lm-evaluation-harness: {args.write_task_files}", command]
    if args.directory is None:
        if not files:
            raise SparsifyError("nothing to evaluate: give a checkpoint directory")
        return Outcome({"task_files": files}, shown)
    if args.backend == "vllm":
        from sparsify.bench import prepare_engine

        prepare_engine(path for path in (args.directory, args.dense) if path)
    lengths = args.sequence_length
    result = evaluate(
        args.directory,
        args.dense,
        args.text,
        sequence_length=lengths[0] if lengths and len(lengths) == 1 else lengths,
        chunks=args.chunks,
        tasks=args.tasks,
        limit=args.limit,
        preset=args.preset,
        backend=args.backend,
        quiet=args.quiet,
    )
    return Outcome({**result.to_json(), **({"task_files": files} if files else {})}, [*tables([result]), *shown])


def _chunks(given: str) -> int:
    """`all`, or a number; a ValueError for anything else, which argparse reports."""
    return ALL_CHUNKS if given == "all" else int(given)


def add_evaluate(commands: Commands) -> None:
    """Register `eval`."""
    command = add_command(
        commands, "eval", evaluate, "measure perplexity, the distance from the dense model, and accuracy on tasks",
        IS_QUIET, SHOWS_JSON, TRUSTS_CODE, ALLOWS_UNKNOWN, TAKES_TASKS, TAKES_PRESET,
        shown=(
            "sparsify eval out/smollm2 --text test.txt",
            "sparsify eval out/smollm2 --dense embedded:smollm2-135m-instruct --text test.txt --text self",
            "sparsify eval out/smollm2 --dense embedded:smollm2-135m-instruct --tasks tasks --limit 200",
            "sparsify eval out/llama --dense ./llama --text test.txt --sequence-length 1024,2048,4096 --chunks all",
            "sparsify eval out/llama --dense ./llama --preset openllm-v1 --tasks data --backend vllm",
        ),
    )  # fmt: skip
    command.add_argument("directory", metavar="DIR", nargs="?", help="checkpoint directory")
    command.add_argument(
        "--dense", metavar="M", help="dense model to compare with: KL divergence, agreement, what is left above chance"
    )
    command.add_argument(
        "--text", action="append", metavar="FILE",
        help="plain text, or self: the dense model samples it; repeatable (default self, or none with --tasks)",
    )  # fmt: skip
    command.add_argument(
        "--sequence-length",
        type=numbers,
        metavar="N",
        help="tokens per chunk (1024; 512 on sampled text), or several: 1024,2048,4096",
    )
    command.add_argument(
        "--chunks",
        type=_chunks,
        metavar="N",
        help="chunks to score (48; 16 on sampled text), or all of a file, as papers do",
    )
    command.add_argument(
        "--write-task-files", metavar="OUT",
        help="write the tasks into OUT as files for `lm_eval --include_path OUT`; without DIR nothing is scored",
    )  # fmt: skip


def report(args: argparse.Namespace) -> Outcome:
    """Run `report`."""
    from sparsify.errors import SparsifyError
    from sparsify.files import read_json
    from sparsify.report import is_load_run, report_on, report_on_load, report_on_several
    from sparsify.report.figures import rows_of

    runs = [directory for directory in args.directories if is_load_run(directory)]
    checkpoints = [directory for directory in args.directories if directory not in runs]
    evaluations, bench, searches = (
        [read_json(file) for file in files] for files in (args.evaluation, args.bench, args.search)
    )
    rows = rows_of(evaluations)
    if len(checkpoints) > 1:
        if args.dense is not None:
            raise SparsifyError("--dense splits the size of one checkpoint; leave it away with several")
        page = report_on_several(
            checkpoints, args.output or "report.html", rows, bench, searches,
            runs=runs, guidellm=args.guidellm, figures=args.figures,
        )  # fmt: skip
    elif checkpoints:
        if option := next((name for name in ("bench", "search") if len(getattr(args, name)) > 1), None):
            raise SparsifyError(f"--{option} is given twice, for one checkpoint; give one of them")
        page = report_on(
            Path(checkpoints[0]), args.output, rows, bench[0] if bench else None, dense=args.dense,
            search=searches[0] if searches else None, runs=runs, guidellm=args.guidellm, figures=args.figures,
        )  # fmt: skip
    else:
        given = ("evaluation", "bench", "search", "dense")
        if option := next((name for name in given if getattr(args, name)), None):
            raise SparsifyError(f"--{option} belongs to a checkpoint; name its directory too")
        page = report_on_load(runs, args.output, args.guidellm, args.figures)
    written = {"report": str(page), **({"figures": args.figures} if args.figures else {})}
    shown = [f"report: {page}"]
    if args.figures:
        from sparsify.report.figure_files import converter

        png = ", PNG" if converter() else "; no PNG, which needs rsvg-convert or Chromium"
        shown.append(f"figures: {args.figures} (SVG, CSV{png})")
    return Outcome(written, shown)


def add_report(commands: Commands) -> None:
    """Register `report`."""
    command = add_command(
        commands, "report", report, "draw a self-contained HTML page: layers, sizes, accuracy and speed of checkpoints, or servers "
        "under load",
        IS_QUIET, SHOWS_JSON,
        shown=(
            "sparsify report out/smollm2",
            "sparsify report out/smollm2 --evaluation eval.json --bench bench.json   what eval --json and bench --json printed",
            "sparsify report out/smollm2 out/serve                                   with the run of bench serve in out/serve",
            "sparsify report out/a out/b out/serve --evaluation a.json --evaluation b.json --output report.html",
            "sparsify report out/smollm2 --figures figures                           every picture as SVG, CSV and PNG",
            "sparsify report out/serve --guidellm benchmarks.json                    servers under load, without a checkpoint",
        ),
    )  # fmt: skip
    command.add_argument(
        "directories", metavar="DIR", nargs="*",
        help="checkpoint directories that `sparsify apply` wrote, and directories of `sparsify bench serve`",
    )  # fmt: skip
    command.add_argument(
        "--evaluation", action="append", default=[], metavar="FILE", help="output of `sparsify eval --json`; repeatable"
    )
    command.add_argument(
        "--bench", action="append", default=[], metavar="FILE",
        help="output of `sparsify bench --json`; repeatable with several checkpoints",
    )  # fmt: skip
    command.add_argument(
        "--search", action="append", default=[], metavar="FILE",
        help="search.json of `sparsify search`: how sensitive each linear is; repeatable with several checkpoints",
    )  # fmt: skip
    command.add_argument(
        "--figures",
        metavar="OUT",
        help="write every picture into OUT too: SVG, CSV, and PNG where rsvg-convert or Chromium is there",
    )
    command.add_argument("--dense", metavar="M", help="the dense model, to split its size into linears and the rest")
    command.add_argument(
        "--output",
        "-o",
        metavar="FILE",
        help="where to write (default report.html: in the checkpoint, or here of several, else in the first run)",
    )
    command.add_argument(
        "--guidellm", action="append", default=[], metavar="FILE",
        help="benchmarks.json of GuideLLM, drawn as latency under load; repeatable",
    )  # fmt: skip
