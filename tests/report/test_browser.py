"""The page in a real browser: what is visible, at what width, in which colours, and that nothing is fetched."""

import csv
import io
import json
import time
import xml.etree.ElementTree as ElementTree

import pytest

from sparsify.report import report_on_load, report_on_several, write_report

from .browser import Browser, find_browser
from .sample import (
    sample_bench,
    sample_evaluations,
    sample_guidellm,
    sample_load,
    sample_metrics,
    sample_search,
    sample_tasks,
)

PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="Chromium is not installed: apt-get install chromium, or set SPARSIFY_CHROMIUM to one"
)

WIDTHS = [400, 720, 1280]
# Elements that stick out of the window although no ancestor scrolls or hides the overflow.
STICKING_OUT = """
[...document.querySelectorAll('body *')].filter(e => {
  if (e.closest('.scroll, pre') || !e.getClientRects().length) return false;
  const box = e.getBoundingClientRect();
  return box.right > innerWidth + 0.5 || box.left < -0.5;
}).map(e => e.outerHTML.slice(0, 120))
"""
# Text of a picture that leaves its picture: gutters are computed from estimated widths of characters.
CLIPPED = """
[...document.querySelectorAll('svg text')].filter(t => t.getClientRects().length).filter(t => {
  const text = t.getBoundingClientRect(), picture = t.ownerSVGElement.getBoundingClientRect();
  return text.left < picture.left - 1 || text.right > picture.right + 1 || text.bottom > picture.bottom + 1;
}).map(t => t.textContent)
"""


@pytest.fixture(scope="module")
def browser():
    with Browser(PROGRAM) as running:
        yield running


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(
        tmp_path_factory.mktemp("report") / "report.html", sample_metrics(),
        [{**row, **sample_tasks()} for row in sample_evaluations()], sample_bench(), search=sample_search(),
    )  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_fits_the_window(browser, report, width):
    browser.open(report, width)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(STICKING_OUT) == []
    assert browser.evaluate(CLIPPED) == []


def test_silent_and_offline(browser, report):
    browser.open(report, 1280)
    assert browser.complaints() == []
    assert browser.requests() == [report.resolve().as_uri()]


@pytest.mark.parametrize("width", [400, 1280])
def test_visible_content(browser, report, width):
    browser.open(report, width)
    text = browser.evaluate("document.body.innerText")
    for figure in ("smollm2-135m-instruct", "2.69×", "3.25", "41.41", "67.3%", "1.72×", "Layer by layer", "down_proj"):
        assert figure in text, figure
    headings = browser.evaluate("[...document.querySelectorAll('h2')].map(h => h.innerText)")
    assert headings == [
        "Accuracy",
        "Size",
        "Accuracy, size and speed",
        "Speed",
        "Answers",
        "Layer by layer",
        "How sensitive each linear is",
        "Left dense",
        "Recipe",
        "How this was measured",
    ]
    cells = "[...document.querySelectorAll('.cell')].filter(c => c.getClientRects().length)"
    visible = f"{cells}.filter(c => c.querySelector('title').textContent.includes(': error '))"
    assert browser.evaluate(f"{visible}.length") == 210, "one cell per linear, in one of the two drawings"
    assert browser.evaluate(f"{cells}.length") == 210 + 2 * 4 * 30, (
        "and one per group that chooses, in the two maps of a search"
    )
    title = browser.evaluate(f"{visible}[0].querySelector('title').textContent")
    assert title.startswith("block 0, q_proj: error ") and "model.layers.0.self_attn.q_proj 576 × 576" in title
    colours = browser.evaluate(f"new Set({visible}.map(c => getComputedStyle(c).fill)).size")
    assert colours == 7


def test_bars_are_drawn_to_scale(browser, report):
    browser.open(report, 1280)
    widths = browser.evaluate(
        "[...document.querySelectorAll('.panels .wide')].slice(0, 1).flatMap(p => [...p.querySelectorAll('rect')])"
        ".map(r => r.getBoundingClientRect().width)"
    )
    assert widths[2] / widths[0] == pytest.approx(0.0139 / 0.0081, rel=0.01)
    assert widths[1] / widths[0] == pytest.approx(0.0139 / 0.0166, rel=0.01)


def contrast(browser, selector):
    """WCAG contrast of the text of an element against the page behind it."""

    def luminance(colour):
        channels = [float(c) / 255 for c in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    ink, behind = browser.evaluate(
        f"(() => {{ let e = document.querySelector('{selector}'); const ink = getComputedStyle(e).color;"
        "while (getComputedStyle(e).backgroundColor === 'rgba(0, 0, 0, 0)') e = e.parentElement;"
        "return [ink, getComputedStyle(e).backgroundColor] })()"
    )
    light, dark = sorted((luminance(ink), luminance(behind)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_in_both_schemes(browser, report, scheme):
    browser.open(report, 1280, scheme=scheme)
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(246, 246, 242)", "dark": "rgb(15, 19, 22)"}[scheme]
    for selector in ("h1", ".lead", ".note", ".figure .under", ".chips li", "thead th", ".sub", "pre code", "footer"):
        assert contrast(browser, selector) >= 4.5, (scheme, selector)


def test_page_without_measurements(browser, tmp_path):
    page = write_report(tmp_path / "report.html", {**sample_metrics(80), "sizes": {}})
    for width in WIDTHS:
        browser.open(page, width)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(CLIPPED) == []
    assert browser.evaluate("document.body.innerText").count("not measured") >= 3
    assert browser.complaints() == []


def test_long_and_hostile_names(browser, tmp_path):
    """Names of any length from anybody's files neither run nor widen the page."""
    metrics = sample_metrics(3)
    metrics["base_model"] = "org/" + "a-very-long-name-of-a-model" * 6 + "<script>document.title='hacked'</script>"
    for layer in metrics["layers"]:
        layer["module"] = layer["module"].replace("_proj", "_projection_with_a_long_name_" * 3)
    bench = sample_bench()
    for model in bench["models"]:
        model["model"] += "-with-a-label-that-goes-on-and-on-and-on-and-on"
    page = write_report(tmp_path / "report.html", metrics, sample_evaluations(), bench)
    for width in WIDTHS:
        browser.open(page, width)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(STICKING_OUT) == []
        assert browser.evaluate(CLIPPED) == []
    assert browser.evaluate("document.scripts.length") == 1, "our own"
    assert browser.complaints() == []


@pytest.fixture(scope="module")
def load_report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load")
    (folder / "run").mkdir()
    (folder / "run" / "serve.json").write_text(json.dumps(sample_load(("dense", "a-model-of-a-long-name-" * 4))))
    (folder / "benchmarks.json").write_text(json.dumps(sample_guidellm()))
    return report_on_load([folder / "run"], folder / "report.html", [folder / "benchmarks.json"])


@pytest.mark.parametrize("width", WIDTHS)
def test_servers_under_load_fit_the_window(browser, load_report, width):
    browser.open(load_report, width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(STICKING_OUT) == []
    assert browser.evaluate(CLIPPED) == []
    assert browser.complaints() == [] and browser.requests() == [load_report.resolve().as_uri()]
    visible = "[...document.querySelectorAll('.charts svg')].filter(s => s.getClientRects().length)"
    assert browser.evaluate(f"{visible}.length") == 4
    # one line of each model is drawn in its own colour, in both schemes
    for scheme in ("light", "dark"):
        browser.open(load_report, width, scheme=scheme)
        colours = browser.evaluate(
            f"new Set({visible}.flatMap(s => [...s.querySelectorAll('.mark')]).map(m => getComputedStyle(m).stroke)).size"
        )
        assert colours == 3


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Two checkpoints with all that a page of several shows, one of a long name."""
    folder = tmp_path_factory.mktemp("several")
    rows = []
    for name, row in zip(("pack", "a-checkpoint-of-a-long-name-" * 3), sample_evaluations(), strict=True):
        (folder / name).mkdir()
        (folder / name / "metrics.json").write_text(json.dumps(sample_metrics(12)))
        guess = [{"token": " the", "probability": 0.5}]
        worst = {
            "kl": 3.5, "chunk": 0, "position": 7, "before": "the words before " * 5, "token": " cat", "after": "a line\nafter",
            "dense": guess * 5, "model": guess * 5,
        }  # fmt: skip
        scored = {**row, "model": str(folder / name), **sample_tasks(), "worst": [worst] * 20}
        rows.append({**scored, "texts": {"wikitext2-test.txt": scored}})
    (folder / "run").mkdir()
    (folder / "run" / "serve.json").write_text(json.dumps(sample_load()))
    return report_on_several(
        [folder / one["model"].rsplit("/", 1)[1] for one in rows], folder / "report.html", rows, [sample_bench()],
        [sample_search(12)], [folder / "run"],
    )  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_several_checkpoints_fit_the_window(browser, several, width):
    browser.open(several, width)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(STICKING_OUT) == []
    assert browser.evaluate(CLIPPED) == []
    assert browser.complaints() == [] and browser.requests() == [several.resolve().as_uri()]


def test_tables_are_equal_to_the_json(browser, several):
    browser.open(several, 1280)
    cells = "[...document.querySelectorAll('[aria-label=\"Every model\"] tr')].map(r => [...r.children].map(c => c.innerText))"
    head, *rows = browser.evaluate(cells)
    found = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    for name, row in zip(("pack", "a-checkpoint-of-a-long-name-" * 3), sample_evaluations(), strict=True):
        shown = found[name]
        assert float(shown["perplexity, wikitext2-test.txt"]) == pytest.approx(row["perplexity"], abs=0.005)
        assert float(shown["KL, wikitext2-test.txt"]) == pytest.approx(row["kl"], abs=5e-5)
        assert shown["size"] == f"{row['nbytes'] / 1e6:.3g} MB"
        assert shown["accuracy on tasks"].startswith("40.0%") and shown["recovery"].startswith("80.0%")
    assert float(found["dense"]["tokens/s, one request"]) == pytest.approx(1 / 0.0139, rel=5e-3)
    assert float(found["dense"]["tokens/s, many requests"]) == 412
    bar = '[data-name="perplexity-wikitext2-test.txt-and-size"]'
    points = browser.evaluate(
        f"document.querySelector('{bar}').closest('figure').querySelectorAll('.wide svg circle title').length"
    )
    assert points == 3


SAVED = """
(async () => {
  window.saved = [];
  const make = URL.createObjectURL;
  URL.createObjectURL = content => { window.saved.push(content); return make.call(URL, content); };
  HTMLAnchorElement.prototype.click = function () { window.names = [...(window.names || []), this.download]; };
})()
"""


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_pictures_are_saved_with_the_keyboard(browser, report, width, scheme):
    browser.open(report, width, scheme=scheme)
    browser.evaluate(SAVED)
    for kind in ("SVG", "PNG"):
        button = f'document.querySelector(\'.save[data-name="error-of-linears"] button[aria-label$="{kind}"]\')'
        browser.evaluate(f"{button}.focus()")
        assert browser.evaluate(f"document.activeElement === {button}")
        for event in ("keyDown", "keyUp"):
            browser.call(
                "Input.dispatchKeyEvent", type=event, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )
    deadline = time.monotonic() + 120
    while browser.evaluate("(window.names || []).length") < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert browser.evaluate("window.names") == ["error-of-linears.svg", "error-of-linears.png"]
    assert browser.evaluate("saved.map(s => s.type)") == ["image/svg+xml", "image/png"]
    assert browser.evaluate("saved[1].size") > 2000
    browser.evaluate("saved[0].text().then(t => window.text = t)")
    while browser.evaluate("typeof text") == "undefined" and time.monotonic() < deadline:
        time.sleep(0.1)
    root = ElementTree.fromstring(browser.evaluate("text"))
    cells = [one for one in root.iter("{http://www.w3.org/2000/svg}rect") if "cell" in one.get("class", "")]
    assert len(cells) == 210 and all("fill: rgb(" in one.get("style") for one in cells)
    ground = {"light": "rgb(255, 255, 255)", "dark": "rgb(23, 28, 32)"}[scheme]
    assert f"fill: {ground}" in next(root.iter("{http://www.w3.org/2000/svg}rect")).get("style")
    browser.evaluate("createImageBitmap(saved[1]).then(b => window.bitmap = [b.width, b.height])")
    while browser.evaluate("typeof bitmap") == "undefined" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert browser.evaluate("bitmap") == [2 * float(root.get("width")), 2 * float(root.get("height"))]
    table = browser.evaluate(
        "decodeURIComponent(document.querySelector('.save[data-name=\"error-of-linears\"] a').href.split(',').slice(1).join(','))"
    )
    rows = list(csv.DictReader(io.StringIO(table, newline="")))
    assert [float(row["relative error"]) for row in rows] == [
        one["relative_error"] for one in sample_metrics()["layers"]
    ]
    assert browser.complaints() == []
