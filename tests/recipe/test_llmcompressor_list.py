"""The recipes of llm-compressor's examples and tests, entry by entry: what each becomes here, or why it is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsify.errors import RecipeError
from sparsify.recipe import dump_recipe, parse_recipe, recipe_from

LIST = yaml.safe_load((Path(__file__).parent / "llmcompressor_list.yaml").read_text(encoding="utf-8"))
ENTRIES = LIST["recipes"]
DOCS = Path(__file__).parents[2] / "docs" / "llm-compressor.md"
IDS = [f"{index}-{Path(entry['path']).name}" for index, entry in enumerate(ENTRIES)]


def text_of(modifiers: list[dict[str, Any]]) -> str:
    """The recipe as a file of llm-compressor."""
    stage = {f"{index}_modifiers": entry for index, entry in enumerate(modifiers)}
    return yaml.safe_dump({"quant_stage": stage}, sort_keys=False)


def objects_of(modifiers: list[dict[str, Any]]) -> list[Any]:
    """The same as Python objects that dump their settings, as llm-compressor's do."""
    return [
        type(name, (), {"model_dump": lambda self, values=values: {**values, "group": None, "started_": False}})()
        for entry in modifiers
        for name, values in entry.items()
    ]


@pytest.mark.parametrize("entry", [e for e in ENTRIES if "becomes" in e], ids=lambda e: Path(e["path"]).name)
def test_a_listed_recipe_means_what_the_list_says(entry: dict[str, Any]) -> None:
    recipe = parse_recipe(text_of(entry["modifiers"]))
    handed = [name for step in recipe.llm_compressor or [] for name in step if name != "QuantizationModifier"]
    assert handed == entry.get("handed_over", [])
    assert recipe.model_copy(update={"llm_compressor": None}) == recipe_from(entry["becomes"])
    assert recipe_from(objects_of(entry["modifiers"])) == recipe


@pytest.mark.parametrize("entry", [e for e in ENTRIES if "whole" in e], ids=lambda e: Path(e["path"]).name)
def test_a_listed_recipe_that_llm_compressor_runs_whole_keeps_its_settings(entry: dict[str, Any]) -> None:
    recipe = parse_recipe(text_of(entry["modifiers"]))
    written = {"llm_compressor": entry["modifiers"], "passes": [], "export": {"format": entry["whole"]}}
    assert recipe.whole and recipe == recipe_from(written)
    assert recipe.llm_compressor == entry["modifiers"]
    assert recipe_from(objects_of(entry["modifiers"])) == recipe
    assert parse_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize("entry", [e for e in ENTRIES if "refused" in e], ids=lambda e: Path(e["path"]).name)
def test_a_listed_recipe_that_is_refused_says_what_it_is_that_has_no_counterpart(entry: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text_of(entry["modifiers"]), "recipe.yaml")
    assert entry["refused"] in str(caught.value) and str(caught.value).startswith("recipe.yaml:")


def test_every_entry_is_decided_and_the_page_counts_them() -> None:
    assert all(len({"becomes", "whole", "refused"} & set(entry)) == 1 for entry in ENTRIES)
    loaded = [entry for entry in ENTRIES if "refused" not in entry]
    handed = [entry for entry in loaded if "handed_over" in entry]
    whole = [entry for entry in loaded if "whole" in entry]
    page = " ".join(DOCS.read_text(encoding="utf-8").split())
    assert LIST["commit"] in page
    assert f"{len(ENTRIES)} recipes: {len(loaded)} load" in page
    assert f"{len(handed)} of them with modifiers that llm-compressor runs first, {len(whole)} run by it whole" in page
