"""Several checkpoints side by side: the front, the table against the JSON, the files of the pictures."""

import csv
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from sparsify import cli, units
from sparsify.report import figure_files, render_page
from sparsify.report.compare import called, comparison, models_of
from sparsify.report.scatter import Axis, Point, front, scatter

from .sample import sample_bench, sample_evaluations, sample_load, sample_metrics, sample_search, sample_tasks
from .test_report import Document

SMALL, GOOD = Axis("size", units.size, less=True), Axis("accuracy", "{:.2f}".format, less=False, zero=False)


def test_the_front_is_what_no_other_beats():
    points = [Point(name, x, y, "s0") for name, x, y in
              [("a", 1, 0.3), ("b", 2, 0.5), ("c", 2, 0.4), ("d", 3, 0.5), ("e", 4, 0.9), ("f", 1, 0.3)]]  # fmt: skip
    assert [point.name for point in front(points, SMALL, GOOD)] == ["a", "f", "b", "e"]
    more = Axis("speed", str, less=False)
    assert [point.name for point in front(points, more, GOOD)] == ["e"]


def test_points_are_drawn_where_they_are():
    points = [Point("a", 100, 0.4, "s0"), Point("b", 200, 0.5, "s1", (0.45, 0.55)), Point("c", 400, 0.6, "s2")]
    svg = scatter(points, SMALL, GOOD, 416)
    places = [tuple(map(float, place)) for place in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="5"', svg)]
    (ax, ay), (bx, by), (cx, cy) = places
    assert (cx - ax) / (bx - ax) == pytest.approx(3, rel=1e-2) and (ay - cy) / (ay - by) == pytest.approx(2, rel=1e-2)
    assert "on the front: a, b, c" in svg and svg.count('class="line s1"') == 1
    same = [Point(name, 1e6, 0.5, "s0") for name in ("one", "two")]
    levels = [
        float(y) for y in re.findall(r'y="([\d.]+)" text-anchor="\w+" class="label"', scatter(same, SMALL, GOOD, 330))
    ]
    assert abs(levels[0] - levels[1]) >= 14, "names of points in one place stand below each other"


@pytest.fixture
def two(tmp_path):
    """Two checkpoints as far as a report of several reads them, an evaluation of each, a benchmark, a run under load."""
    for name, row in zip(("pack", "sparse24"), sample_evaluations(), strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(sample_metrics(3)))
        score = {**row, "model": str(tmp_path / name), **sample_tasks(0.4 if name == "pack" else 0.45)}
        (tmp_path / f"{name}.json").write_text(json.dumps(score))
    (tmp_path / "bench.json").write_text(json.dumps(sample_bench()))
    (tmp_path / "search.json").write_text(json.dumps(sample_search(3)))
    (tmp_path / "serve").mkdir()
    (tmp_path / "serve" / "serve.json").write_text(json.dumps(sample_load()))
    return tmp_path


def arguments(two):
    return [
        "report", *(str(two / name) for name in ("pack", "sparse24", "serve")), "--evaluation", str(two / "pack.json"),
        "--evaluation", str(two / "sparse24.json"), "--bench", str(two / "bench.json"), "--search", str(two / "search.json"),
        "--output", str(two / "report.html"), "--json",
    ]  # fmt: skip


def test_one_page_of_several_runs(two, capsys):
    assert cli.main(arguments(two)) == 0
    document = Document((two / "report.html").read_text())
    for said in (
        "pack, sparse24: accuracy, size and speed side by side", "Accuracy on tasks and size", "Under load",
        "How sensitive each linear is", "Perplexity, wikitext2-test.txt and tokens/s, one request", "Left dense", "Recipe",
        # the table, from the JSON: size, perplexity, KL, accuracy, recovery, speeds
        "dense 269 MB 21.30 0.0000 50.0% – 71.9 412 256",
        "pack 122 MB 41.42 0.6840 40.0% 28.0 to 54.0 80.0% 62.0 to 99.0",
        "sparse24 99.9 MB 41.41 0.6830 45.0% 28.0 to 54.0 90.0% 62.0 to 99.0 123 655 410",
    ):  # fmt: skip
        assert said in document.text, said
    assert document.text.count("Layer by layer") == 2


def test_every_picture_as_files(two, monkeypatch, capsys):
    asked = []

    def convert(command, **_):
        asked.append(command)
        out = next(word.split("=", 1)[1] for word in command if word.startswith("--screenshot="))
        with open(out, "wb") as file:
            file.write(b"\x89PNG")

    monkeypatch.setattr(figure_files, "converter", lambda: ["/usr/bin/chromium"])
    monkeypatch.setattr(figure_files.subprocess, "run", convert)
    assert cli.main([*arguments(two), "--figures", str(two / "figures")]) == 0
    names = {file.stem for file in (two / "figures").iterdir()}
    endings = {
        suffix: {file.stem for file in (two / "figures").glob(f"*{suffix}")} for suffix in (".svg", ".csv", ".png")
    }
    assert all(found == names for found in endings.values()) and len(asked) == len(names) > 12
    assert {"perplexity-wikitext2-test.txt-and-size", "accuracy-on-tasks-and-size", "sensitivity", "error-of-linears",
            "error-of-linears-2", "load-ttft-ms"} <= names  # fmt: skip
    for file in (two / "figures").glob("*.svg"):
        root = ElementTree.parse(file).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and "var(" not in file.read_text(), file
    with open(two / "figures" / "perplexity-wikitext2-test.txt-and-size.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], float(row["size"]), float(row["perplexity, wikitext2-test.txt"])) for row in rows] == [
        ("dense", 269_030_016, 21.3), ("pack", 122_000_000, 41.42), ("sparse24", 99_886_000, 41.41),
    ]  # fmt: skip
    assert [row["on the front"] for row in rows] == ["True", "False", "True"]
    with open(two / "figures" / "error-of-linears.csv", newline="") as file:
        errors = {row["module"]: float(row["relative error"]) for row in csv.DictReader(file)}
    assert errors == {one["module"]: one["relative_error"] for one in sample_metrics(3)["layers"]}


def test_without_a_converter_there_is_no_png(two, monkeypatch, capsys):
    monkeypatch.setattr(figure_files.shutil, "which", lambda name: None)
    assert cli.main([*arguments(two)[:-1], "--figures", str(two / "figures")]) == 0
    assert "no PNG, which needs rsvg-convert or Chromium" in capsys.readouterr().out
    assert not list((two / "figures").glob("*.png")) and list((two / "figures").glob("*.csv"))


def test_models_of_several_records_are_one():
    rows = [(called(row["model"]), {**row, "texts": {"t": row}}) for row in sample_evaluations()]
    models = models_of(rows, {"other": 5}, [sample_bench()], [])
    assert [model.name for model in models] == ["dense", "pack", "sparse24", "other", "pack-quantized"]
    assert models[0].speed and models[2].speed and not models[1].speed, "matched by name alone, but for the dense one"
    assert comparison(models[:1]) is None


def test_figures_of_two_protocols_are_not_mixed():
    first, second = ({**row, "texts": {"t": {**row, "tokens": tokens}}, **sample_tasks()}
                     for row, tokens in zip(sample_evaluations(), (49104, 1023), strict=True))  # fmt: skip
    second["tasks"] = {"arc_easy": {**second["tasks"]["arc_easy"], "items": 20}}
    second["dense"] = "another"
    models = models_of([("a", first), ("b", second)], {}, [sample_bench(), sample_bench(), sample_bench()], [])
    assert [model.name for model in models][:5] == ["dense", "smollm2-135m-instruct", "a", "another", "b"]
    a, b = (dict(model.accuracy) for model in models if model.name in "ab")
    assert not a.keys() & b.keys()
    assert "perplexity, t, 1023 tokens in chunks of 1024" in b and "accuracy on tasks: arc_easy 20 items 0 shots" in b
    timed = next(model for model in models if model.name == "sparse24")
    assert list(timed.speed) == [f"tokens/s, {what}{record}" for record in ("", " (2)", " (3)")
                                 for what in ("one request", "many requests")]  # fmt: skip
    assert timed.nbytes and comparison(models)["table"].head[:2] == ["model", "size"]


def test_worst_tokens_are_shown_with_both_distributions():
    guess = [{"token": "\n", "probability": 0.61}, {"token": " the", "probability": 0.25}]
    worst = {
        "kl": 7.25, "chunk": 3, "position": 17, "before": "<b>before", "token": " cat", "after": "after", "dense": guess,
        "model": guess[::-1],
    }  # fmt: skip
    row = {**sample_evaluations()[1], "worst": [worst, {**worst, "kl": None}]}
    row["texts"] = {"wikitext2-test.txt": dict(row)}
    text = Document(render_page(sample_metrics(2), row)).text
    assert "sparse24: the 2 tokens farthest from the dense model" in text
    assert "7.25 chunk 3, 17 <b>before ␣cat after ⏎ 61% ␣the 25% ␣the 25% ⏎ 61%" in text


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--dense", "x"], "--dense splits the size of one checkpoint"),
        (["--bench", "serve/serve.json"], "--bench takes the JSON of `bench latency`"),
        (["--search", "bench.json"], "--search takes the search.json"),
        (["--evaluation", "search.json"], "is not as sparsify writes it"),
    ],
)
def test_what_several_checkpoints_refuse(two, extra, message, capsys):
    option, value = extra
    given = value if option == "--dense" else str(two / value)
    assert cli.main([*arguments(two), option, given]) == 1
    assert message in capsys.readouterr().err
