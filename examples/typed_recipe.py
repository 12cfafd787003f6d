"""A recipe as Python objects: every field is checked when it is constructed, and editors complete it.

python examples/typed_recipe.py MODEL OUTPUT
"""

import sys

from rich import print as show

from sparsify import Calibration, Export, Head, Prune, Quantize, Recipe, apply, plan


def main(model: str, output: str) -> None:
    recipe = Recipe(
        calibration=Calibration(source="self", samples=4, sequence_length=32),
        passes=[Prune(method="sparsegpt"), Quantize(method="gptq", bits=4, group_size=32)],
        export=Export(format="sparse24", head=Head(bits=8, group_size="channel")),
    )
    show(plan(recipe, model).table())  # what each linear becomes and what it costs; nothing is computed yet
    result = apply(recipe, model, output)
    show(result.metrics["sizes"])


if __name__ == "__main__":
    main(*sys.argv[1:3])
