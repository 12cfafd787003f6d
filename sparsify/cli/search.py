"""`sparsify search`: choose for every linear what it becomes, for a budget."""

import argparse

from sparsify.cli.command import (
    ALLOWS_UNKNOWN,
    IS_QUIET,
    SHOWS_JSON,
    TAKES_RECIPE,
    TRUSTS_CODE,
    Commands,
    Outcome,
    add_command,
)


def search(args: argparse.Namespace) -> Outcome:
    """Run `search`."""
    from sparsify.errors import RecipeError
    from sparsify.recipe import load_recipe
    from sparsify.search.budget import parse_budget
    from sparsify.search.choices import choice_named
    from sparsify.search.run import Settings
    from sparsify.search.run import search as run

    recipe = load_recipe(args.recipe, args.set, args.model)
    if recipe.model is None:
        raise RecipeError("the recipe names no model: add --model with a directory, a Hub id or embedded:NAME")
    settings = Settings(
        choices=None if args.choices is None else [choice_named(name) for name in args.choices],
        text=args.text,
        samples=args.samples,
        sequence_length=args.sequence_length,
        precision=args.precision,
        speed=args.speed,
        verify=args.verify,
    )
    budgets = [parse_budget(text) for text in args.budget]
    result = run(recipe, recipe.model, args.output, budgets, settings, args.resume, args.quiet)
    files = [result.output / found.file for found in result.found if found.file is not None]
    shown = [f"recipe: {file}     sparsify apply {file} --output DIR" for file in files]
    return Outcome({"output": str(result.output), **result.to_json()}, [result.table(), *shown])


def add_search(commands: Commands) -> None:
    """Register `search`."""
    command = add_command(
        commands, "search", search, "choose for every linear of a model what it becomes, for a budget",
        TAKES_RECIPE, IS_QUIET, SHOWS_JSON, TRUSTS_CODE, ALLOWS_UNKNOWN,
        shown=(
            "sparsify search 2of4-w4a16 --model M --budget bits=3.5 --output out/search     writes out/search/bits-3.5.yaml",
            "sparsify apply out/search/bits-3.5.yaml --output out/model                     applies it",
            "sparsify search 2of4-w4a16 --model M --budget bits=3.5 --budget bytes=90MB --verify 2 --output out/search",
            "sparsify search 2of4-w4a16 --model M --budget speed=1.8x --output out/search --resume     from what was measured",
            "sparsify report out/model --search out/search/search.json                      draws how sensitive each linear is",
        ),
    )  # fmt: skip
    command.description = (
        "Choose for every group of linears that vLLM loads as one (q, k, v; gate, up; others by themselves) whether it is dense "
        "or 2:4, with 16, 8 or 4 bits. Each choice is solved once on the calibration text and measured by itself on other text: "
        "the KL divergence from the dense model, in nats per token. The sum over the groups predicts that of a selection, and the "
        "selection of least divergence within the budget becomes a recipe."
    )
    command.add_argument(
        "--budget", "-b", action="append", required=True, metavar="KIND=VALUE",
        help="bits=3.5 (mean bits per weight of the linears, masks and scales counted), bytes=90MB (all tensors of the checkpoint), "
        "speed=1.8x (of the linears, one token at a time, relative to dense) or kl=0.2 (predicted; the smallest model within it); "
        "repeatable",
    )  # fmt: skip
    command.add_argument(
        "--output", "-o", required=True, metavar="DIR",
        help="directory for search.json and a recipe for each budget; must not exist, but with --resume",
    )  # fmt: skip
    command.add_argument(
        "--choices", nargs="+", metavar="CHOICE",
        help="what a group may become: dense-16, dense-8, dense-4, 2:4-16, 2:4-8, 2:4-4 (default: all that the recipe's passes "
        "can express), 8 and 4 bits with a group size where it is not the recipe's: 2:4-4-channel, dense-4-128; fewer take less time",
    )  # fmt: skip
    command.add_argument(
        "--text", metavar="SOURCE",
        help="text to measure on, file:PATH or hub:ID (default: what follows the calibration rows of the recipe; other text of the "
        "model's own where it writes that)",
    )  # fmt: skip
    command.add_argument("--samples", type=int, default=8, metavar="N", help="rows of that text (8)")
    command.add_argument(
        "--sequence-length", type=int, metavar="N", help="tokens of a row (default: as many as a calibration row has)"
    )
    command.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32",
        help="of the measurements: bfloat16 is faster where the machine multiplies it, and its rounding hides small divergences",
    )  # fmt: skip
    command.add_argument(
        "--speed", choices=("measured", "modelled"), default="measured",
        help="for a budget of speed: the kernels are timed on this machine, or time is modelled as the bytes that are read",
    )  # fmt: skip
    command.add_argument(
        "--verify", type=int, default=0, metavar="N",
        help="really compress N selections, those of the budgets first, and measure them beside what was predicted; before "
        "them the recipe as it was given, by which predictions are scaled",
    )  # fmt: skip
    command.add_argument(
        "--resume", action="store_true",
        help="go on with an interrupted search, or choose for other budgets from the measurements of a finished one",
    )  # fmt: skip
