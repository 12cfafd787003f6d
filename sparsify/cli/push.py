"""`sparsify push`: a finished checkpoint on the Hugging Face Hub."""

import argparse

from sparsify.cli.command import IS_QUIET, SHOWS_JSON, Commands, Outcome, add_command


def push(args: argparse.Namespace) -> Outcome:
    """Run `push`."""
    from sparsify.files import read_json
    from sparsify.report import load_runs
    from sparsify.report.figures import rows_of
    from sparsify.report.hub import push

    evaluations, bench = ([read_json(file) for file in files] for files in (args.evaluation, args.bench))
    done = push(
        args.directory, args.repository, rows_of(evaluations), bench, load_runs(args.serve),
        private=args.private, message=args.message,
    )  # fmt: skip
    return Outcome(done, [f"{done['files']} files pushed to {done['repository']}: {done['url']}"])


def add_push(commands: Commands) -> None:
    """Register `push`."""
    command = add_command(
        commands, "push", push, "upload a finished checkpoint to the Hugging Face Hub, with its figures in the model card",
        IS_QUIET, SHOWS_JSON,
        shown=(
            "sparsify push out/smollm2 org/smollm2-2of4 --private",
            "sparsify push out/smollm2 org/smollm2-2of4 --evaluation eval.json --bench bench.json --serve out/serve",
        ),
    )  # fmt: skip
    command.description = (
        "Compare every file of a finished checkpoint with its SHA-256, then upload all in one commit. The model card gets the "
        "table of `sparsify report` and the same figures as metadata (model-index). An unfinished or damaged directory is refused. "
        "The token is that of `hf auth login` or of HF_TOKEN."
    )
    command.add_argument(
        "directory", metavar="DIR", help="checkpoint directory that `sparsify apply` or `export` wrote"
    )
    command.add_argument("repository", metavar="ORG/NAME", help="model on the Hub; made where it is not there")
    command.add_argument(
        "--evaluation", action="append", default=[], metavar="FILE",
        help="output of `sparsify eval --json` for the model card (default: the evaluation of the run); repeatable",
    )  # fmt: skip
    command.add_argument(
        "--bench", action="append", default=[], metavar="FILE", help="output of `sparsify bench --json`; repeatable"
    )
    command.add_argument(
        "--serve", action="append", default=[], metavar="RUN", help="directory of `sparsify bench serve`; repeatable"
    )
    command.add_argument("--private", action="store_true", help="make the repository private where it is made")
    command.add_argument("--message", metavar="TEXT", help="commit message")
