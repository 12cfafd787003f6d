"""`sparsify apply`, `plan` and `recipes`: from a recipe and a dense model to a compressed checkpoint."""

import argparse

from sparsify.cli.command import (
    ALLOWS_UNKNOWN,
    IS_QUIET,
    SHOWS_JSON,
    TAKES_LIMITS,
    TAKES_RECIPE,
    TRUSTS_CODE,
    Commands,
    Outcome,
    add_command,
)


def apply(args: argparse.Namespace) -> Outcome:
    """Run `apply`."""
    from sparsify import api
    from sparsify.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.set, args.model)
    result = api.apply(
        recipe, output=args.output, resume=args.resume, quiet=args.quiet,
        spill=args.spill, memory=args.memory, gpu_memory=args.gpu_memory,
    )  # fmt: skip
    return Outcome(result.to_json(), [result.table()])


def add_apply(commands: Commands) -> None:
    """Register `apply`."""
    command = add_command(
        commands, "apply", apply, "apply a recipe to a model and write the checkpoint",
        TAKES_RECIPE, TAKES_LIMITS, IS_QUIET, SHOWS_JSON, TRUSTS_CODE, ALLOWS_UNKNOWN,
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


def plan(args: argparse.Namespace) -> Outcome:
    """Run `plan`."""
    from sparsify import api
    from sparsify.recipe import load_recipe

    asked = load_recipe(args.recipe, args.set, args.model)
    result = api.plan(
        asked, spill=args.spill, memory=args.memory, gpu_memory=args.gpu_memory, config_only=args.config_only,
        processes=args.processes,
    )  # fmt: skip
    return Outcome(result.to_json(), [result.table()])


def add_plan(commands: Commands) -> None:
    """Register `plan`."""
    command = add_command(
        commands, "plan", plan, "show what a recipe will do to a model, without doing it",
        TAKES_RECIPE, TAKES_LIMITS, IS_QUIET, SHOWS_JSON, TRUSTS_CODE, ALLOWS_UNKNOWN,
        shown=(
            "sparsify plan 2of4-w4a16 --model embedded:smollm2-135m-instruct",
            "sparsify plan 2of4-w4a16 --model ./llama --memory 16GB     what fits into so much, and what does not",
            "sparsify plan 2of4-w4a16 --model ./llama/config.json --config-only     before its weights are here",
        ),
    )  # fmt: skip
    command.add_argument(
        "--config-only",
        action="store_true",
        help="plan from a config.json alone: M is that file, its directory or a Hub id; no weights and no tokenizer are read",
    )
    command.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="what each of N processes takes that torchrun starts (default: those that there are)",
    )


def recipes(args: argparse.Namespace) -> Outcome:
    """Run `recipes`."""
    from rich.table import Table
    from rich.text import Text

    from sparsify.recipe import ready_recipes

    table = Table("recipe", "what it does", "file")
    found = {}
    for name, path in ready_recipes().items():
        found[name] = {"path": str(path), "description": first_comment(path.read_text(encoding="utf-8"))}
        table.add_row(Text(name), Text(found[name]["description"]), Text(str(path)))
    return Outcome({"recipes": found}, [table])


def first_comment(text: str) -> str:
    """The sentence a recipe begins with; the line before it is for editors and names the schema."""
    lines = (line.lstrip("#").strip() for line in text.splitlines() if line.startswith("#"))
    return next((line for line in lines if line and not line.startswith("yaml-language-server")), "")


def add_recipes(commands: Commands) -> None:
    """Register `recipes`."""
    add_command(commands, "recipes", recipes, "list the built-in recipes", SHOWS_JSON)
