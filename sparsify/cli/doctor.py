"""`sparsify doctor`: what is installed, what this machine can run, what is missing."""

import argparse

from sparsify.cli.command import FAILED, IS_QUIET, SHOWS_JSON, Commands, Outcome, add_command


def doctor(args: argparse.Namespace) -> Outcome:
    """Run `doctor`."""
    from sparsify.doctor import examine, table

    report = examine()
    return Outcome(report.to_json(), [table(report), report.summary()], 0 if report.healthy else FAILED)


def add_doctor(commands: Commands) -> None:
    """Register `doctor`."""
    add_command(
        commands, "doctor", doctor, "say what is installed, what this machine can run, and what is missing",
        IS_QUIET, SHOWS_JSON,
    )  # fmt: skip
