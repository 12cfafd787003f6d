"""Pages about servers under load, checked without a browser."""

import copy
import json
import re

import pytest

from sparsify import cli
from sparsify.errors import CheckpointError
from sparsify.report import render_page, report_on_load
from sparsify.report.guidellm import read_guidellm
from sparsify.report.line_chart import Line, Mark, line_chart
from sparsify.report.under_load import all_series, load_table, under_load

from .sample import sample_guidellm, sample_load, sample_metrics
from .test_report import Document


@pytest.fixture
def run(tmp_path):
    """The directory of a run of `bench serve`."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "serve.json").write_text(json.dumps(sample_load()))
    return tmp_path / "run"


@pytest.fixture
def guidellm(tmp_path):
    file = tmp_path / "benchmarks.json"
    file.write_text(json.dumps(sample_guidellm()))
    return file


def test_the_page_of_a_run(run, capsys):
    assert cli.main(["report", str(run), "--json"]) == 0
    page = (run / "report.html").read_text()
    assert json.loads(capsys.readouterr().out) == {"report": str(run / "report.html")}
    document = Document(page)
    for said in (
        "Servers under load",
        "random:128/64",
        "4 requests per second, of dense",
        "ttft within 500 ms",
        "vllm serve MODEL",
    ):
        assert said in document.text, said
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org", "", page)
    titles = re.findall(r"<title>([^<]*)</title>", page)
    dense = sample_load()["models"][0]["points"]
    assert f"dense, p50, 1 per second: {dense[1]['figures']['p50_ttft_ms']['median']:.3g} ms" in titles
    assert (
        titles.count("dense, p50, 6 per second: saturated") == 4
    )  # time to the first and per further token, in two widths
    assert not [title for title in titles if "6 per second" in title and " ms" in title and title.startswith("dense")]
    assert len([title for title in titles if title.startswith("sparse24, p99, 6 per second: ")]) == 4


def test_the_table_is_what_was_measured():
    load = sample_load()
    table = load_table(all_series([{**load, "name": "run"}]))
    assert all(len(row) == len(table.head) for row in table.rows)
    assert [row[0] for row in table.rows] == ["dense"] * 5 + ["sparse24"] * 5
    asked = [row[1] if isinstance(row[1], str) else f"{row[1].text} {row[1].sub}" for row in table.rows[:5]]
    assert asked == ["all at once", "1/s 25%", "2/s 50%", "3/s 75%", "6/s 150%"]
    saturated, at_once, first = table.rows[4], table.rows[0], table.rows[1]
    assert set(saturated[3:9]) == {"saturated"} and set(at_once[3:9]) == {"–"}
    found = load["models"][0]["points"][1]["figures"]["p99_tpot_ms"]
    assert first[2] == "1.00×" and table.rows[9][2] == "1.50×"  # 6 of 4 requests per second, saturated by the other
    assert first[6].text == f"{found['median']:.3g} ms"
    assert first[6].sub == f"{found['least']:.3g} ms to {found['greatest']:.3g} ms"
    assert (saturated[9].text, saturated[10].text, saturated[12].text) == ("256", "4", "3.6")


def test_models_of_two_runs_are_told_apart():
    load = sample_load()
    runs = [{**load, "name": "monday"}, {**load, "name": "friday"}]
    assert [one.name for one in all_series(runs)][:3] == ["dense (monday)", "sparse24 (monday)", "dense (friday)"]
    assert len({one.css for one in all_series(runs)}) == 4


def test_a_failure_ends_with_its_log():
    load = copy.deepcopy(sample_load())
    load["models"][1] |= {
        "points": [],
        "server": {},
        "failure": {"short": "x", "reason": "sparse24 <died>", "lines": ["last <line>"]},
    }
    page = render_page(sample_metrics(2), runs=[{**load, "name": "run"}])
    assert "sparse24 &lt;died&gt;" in page and "last &lt;line&gt;" in page
    assert "Under load" in Document(page).text
    assert "Under load" not in render_page(sample_metrics(2))


def test_guidellm_in_the_same_pictures(run, guidellm):
    report_on_load([run], guidellm=[guidellm])
    page = (run / "report.html").read_text()
    titles = re.findall(r"<title>([^<]*)</title>", page)
    assert "org/tiny, p50, 2 per second: 80 ms" in titles and "org/tiny, p99, 0.5 per second: 200 ms" in titles
    assert "org/tiny, p50, 6 per second: saturated" in titles  # 4.1 of 6
    assert "dense, p50, 6 per second: saturated" in titles
    text = Document(page).text
    assert "org/tiny: 3 of 53 requests failed at 6 per second; figures are of the others" in text
    assert "guidellm 0.8.1" in text and "one at a time" in text


def test_guidellm_alone(guidellm, capsys):
    assert cli.main(["report", "--guidellm", str(guidellm)]) == 0
    assert "org/tiny" in guidellm.with_suffix(".html").read_text()
    points = read_guidellm(guidellm)["models"][0]["points"]
    assert [(p["rate"], p["saturated"]) for p in points] == [(0.5, False), (2.0, False), (6.0, True), (None, True)]
    figures = points[1]["figures"]
    assert figures["p50_tpot_ms"]["median"] == 21.0  # without the first token, as vLLM's
    assert figures["p99_e2el_ms"]["median"] == 2500.0 and figures["output_throughput"]["median"] == 1.9 * 64
    assert figures["request_goodput"] is None


@pytest.mark.parametrize("content", ["[]", "{}", '{"benchmarks": []}', '{"benchmarks": [{}]}', '{"benchmarks": 3}'])
def test_what_is_not_guidellms(content, tmp_path):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"other.json is no benchmarks.json as GuideLLM 0.8 writes it"):
        report_on_load([], guidellm=[tmp_path / "other.json"])


def test_what_cannot_be_drawn(run, tmp_path, capsys):
    def refused(*arguments):
        assert cli.main(["report", *map(str, arguments)]) == 1
        return capsys.readouterr().err

    assert "nothing to draw" in refused()
    assert "--bench belongs to a checkpoint" in refused(run, "--bench", run / "serve.json")
    assert "a/metrics.json is missing; is this a complete checkpoint" in refused(tmp_path / "a", tmp_path / "b")
    load = sample_load()
    del load["models"][0]["points"][0]["figures"]
    (run / "serve.json").write_text(json.dumps(load))
    assert "serve.json is not as sparsify writes it" in refused(run)
    (run / "serve.json").write_text("[]")
    assert "is not what `sparsify bench serve` writes" in refused(run)
    assert under_load([]) is None


def test_a_line_chart_begins_at_zero():
    marks = [Mark(1, 10, 8, 12), Mark(2, 20, 20, 20)]
    svg = line_chart([Line("a", "s0", marks, crosses=[4.0], levels=[40.0])], 416, "chart", "{:g}".format)
    heights = {title: float(y) for y, title in re.findall(r'cy="([\d.]+)"[^>]*><title>([^<]*)', svg)}
    places = {title: float(x) for x, title in re.findall(r'cx="([\d.]+)"[^>]*><title>([^<]*)', svg)}
    first, second, cross = "a, 1 per second: 10", "a, 2 per second: 20", "a, 4 per second: saturated"
    [level] = re.findall(r'y1="([\d.]+)"[^>]*class="line s0 dotted"', svg)
    assert heights[first] - heights[second] == pytest.approx((heights[second] - float(level)) / 2, abs=0.02)
    assert places[cross] - places[second] == pytest.approx(2 * (places[second] - places[first]), abs=0.02)
    assert heights[cross] < float(level)  # above everything that was measured
