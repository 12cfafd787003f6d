"""Where the built-in recipes are: beside the package in a source tree, inside it in an installed wheel."""

from pathlib import Path

from sparsify.files import PACKAGE


def recipe_directories(package: Path) -> list[Path]:
    """Places to look, first match wins. `package` is the directory of the `sparsify` package.

    A wheel carries the recipes as `sparsify/_recipes`. The schema beside them tells our `recipes/` of a source tree
    from a stranger's, because the parent of an installed package is the whole of site-packages."""
    candidates = (package / "_recipes", package.parent / "recipes")
    return [directory for directory in candidates if (directory / "schema.json").is_file()]


def ready_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with sparsify."""
    for directory in recipe_directories(PACKAGE):
        return {path.stem: path for path in sorted(directory.glob("*.yaml"))}
    return {}
