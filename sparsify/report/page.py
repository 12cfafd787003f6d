"""The page itself: sections of HTML around the pictures. Every value that comes from outside goes through `esc`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from importlib.resources import files
from typing import Any

import yaml

from sparsify import units
from sparsify.recipe.sources import SELF, sources_in_words
from sparsify.report import svg
from sparsify.report.depth import block_map, depth_facts, removal_strip
from sparsify.report.figures import (
    EMBEDDINGS,
    Layer,
    as_list,
    bits_per_weight,
    by_kind,
    export_format_of,
    head_of,
    is_two_four,
    read_layers,
    short_kinds,
    sizes,
    stored_bits,
    subject,
)

HALF, THIRD = 416, 284  # width of a picture in one of two or three columns

# ratio, title, the absolute value beside it
PANELS: tuple[tuple[str, str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("decode", "Decoding", lambda row: f"{row['latency']['decode_tokens_per_second']:.1f} tok/s"),
    ("ttft", "First token", lambda row: units.duration(row["latency"]["ttft"])),
    ("throughput", "Throughput", lambda row: f"{row['throughput']['output_tokens_per_second']:.1f} tok/s"),
)


def esc(value: Any) -> str:
    """Text for HTML, quotes included."""
    return escape(str(value), quote=True)


def render_page(metrics: Mapping[str, Any], evaluations: Any = None, bench: Mapping[str, Any] | None = None) -> str:
    """The whole document as one string."""
    evaluated = without_dense(as_list(evaluations or metrics.get("evaluation")))
    layers = read_layers(metrics)
    measured_speed = bool((bench or {}).get("models"))
    # What was not measured is a short note: it goes where there is room, beside the sizes.
    beside = accuracy(metrics, evaluated) + ("" if measured_speed else speed(None))
    sections = [
        f'<div class="two"><div>{beside}</div><div>{size(metrics)}</div></div>',
        speed(bench) if measured_speed else "",
        answers(bench or {}),
        depth_section(metrics),
        training_section(metrics),
        layer_section(metrics, layers),
        dense_modules(metrics),
        recipe(metrics),
        method(metrics, evaluated, bench),
    ]
    title = f"{model_name(metrics)} – sparsify report"
    style = files("sparsify.report").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing may be fetched: the page must look the same from a mail, a bucket or a disk.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n'
        f'<link rel="icon" href="data:,">\n<title>{esc(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n'
        f"{header(metrics, layers, evaluated, bench)}\n<main>\n{''.join(sections)}\n</main>\n{footer(metrics)}\n"
        "</body>\n</html>\n"
    )


def without_dense(evaluated: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leaves out the row of the dense model itself: every other row carries its figures."""
    others = [row for row in evaluated if row.get("format") != "dense" or row.get("kl") != 0]
    return others or evaluated


def model_name(metrics: Mapping[str, Any]) -> str:
    """`embedded:NAME`, `org/NAME` and `a/path/NAME` are all called NAME."""
    return str(metrics.get("base_model") or "model").rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]


# ------------------------------------------------------------------------------------------------------------ parts


def figure(draw: Callable[[float], str], caption: str = "", wide: float = svg.WIDE) -> str:
    """A picture in the two widths; style.css shows one."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure><div class="wide">{draw(wide)}</div><div class="narrow">{draw(svg.NARROW)}</div>{below}</figure>'


def table(head: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], label: str) -> str:
    """head: (title, class) per column;  rows: HTML of every cell. The first cell of a row is its heading."""
    titles = "".join(f'<th scope="col"{_class(css)}>{esc(title)}</th>' for title, css in head)
    body = ""
    for row in rows:
        cells = "".join(f"<td{_class(css)}>{cell}</td>" for cell, (_, css) in zip(row[1:], head[1:], strict=True))
        body += f'<tr><th scope="row"{_class(head[0][1])}>{row[0]}</th>{cells}</tr>'
    # A region that scrolls sideways must be reachable with the keyboard.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(label)}"><table>'
        f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _class(css: str) -> str:
    return f' class="{css}"' if css else ""


def facts(entries: Sequence[tuple[str, str]]) -> str:
    """entries: (name, HTML)."""
    return '<dl class="facts">' + "".join(f"<dt>{esc(k)}</dt><dd>{v}</dd>" for k, v in entries) + "</dl>"


# --------------------------------------------------------------------------------------------------------- sections


def header(
    metrics: Mapping[str, Any], layers: Sequence[Layer], evaluated: Sequence[Mapping[str, Any]], bench: Any
) -> str:
    chips = "".join(f"<li>{esc(chip)}</li>" for chip in describe(metrics, layers))
    kinds = len({layer.kind for layer in layers})
    blocks = len({layer.block for layer in layers})
    said = f"{len(layers)} linears in {blocks} decoder blocks were compressed" if layers else "Nothing was compressed"
    if depth := metrics.get("depth"):
        shorter = f"{depth['layers_before']} decoder layers became {depth['layers_after']}"
        said = f"{shorter}, and {said}" if layers else shorter
    if seconds := metrics.get("seconds"):
        said += f" in {units.span(seconds)}"
    return (
        f'<header class="top"><div class="brand">{svg.emblem()}<span>sparsify</span></div>'
        f'<h1>{esc(model_name(metrics))}</h1><p class="lead">{esc(said)}.</p><ul class="chips">{chips}</ul>'
        f'<dl class="figures" data-kinds="{kinds}">{headline(metrics, layers, evaluated, bench)}</dl></header>'
    )


def describe(metrics: Mapping[str, Any], layers: Sequence[Layer]) -> list[str]:
    """What was done, in a few words each."""
    chips = []
    if layers and all(is_two_four(layer) for layer in layers):
        chips.append("2:4 sparse")
    elif any(is_two_four(layer) for layer in layers):
        chips.append(f"{sum(map(is_two_four, layers))} of {len(layers)} linears 2:4 sparse")
    quantized = sorted({layer.bits for layer in layers if layer.bits < 16})
    chips += [f"{bits}-bit weights" for bits in quantized]
    # One number for all of them is a group size; per-channel scales have as many as there are input widths.
    groups = {layer.group_size for layer in layers if layer.bits < 16}
    if quantized and len(groups) == 1:
        chips.append(f"groups of {groups.pop()}")
    for entry in (metrics.get("recipe") or {}).get("passes") or []:
        kind, settings = pass_of(entry)
        if settings.get("method"):
            chips.append(f"{kind}: {settings['method']}")
    if head := head_of(metrics):
        chips.append(f"{head.bits}-bit output head")
    chips.append(f"format {export_format_of(metrics)}")
    return chips


def pass_of(entry: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """A pass is {kind: settings} in a YAML file and {"kind": kind, ...settings} in a dumped Recipe."""
    if "kind" in entry:
        return str(entry["kind"]), entry
    kind = next(iter(entry), "")
    settings = entry.get(kind)
    return str(kind), settings if isinstance(settings, Mapping) else {}


def headline(
    metrics: Mapping[str, Any], layers: Sequence[Layer], evaluated: Sequence[Mapping[str, Any]], bench: Any
) -> str:
    """The five figures people ask for first. What was not measured says so."""
    cards = []
    given, kind = metrics.get("sizes") or {}, export_format_of(metrics)
    dense, compressed = given.get("dense_bytes"), given.get("compressed_bytes")
    if dense and compressed:
        changed = f"smaller: {units.size(dense)} → {units.size(compressed)}"
        cards.append(card("Size on disk", units.ratio(dense / compressed), changed))
    else:
        cards.append(card("Size on disk", None, "not recorded"))
    bits = bits_per_weight(layers, metrics)
    under = "in the compressed linears, dense 16"
    if head := head_of(metrics):
        under = f"in the linears of the blocks, {stored_bits(head, kind):.2f} in the output head, dense 16"
    cards.append(card("Bits per weight", f"{bits:.2f}" if bits else None, under))
    row = subject(evaluated, kind)
    if row and row.get("failure"):
        cards.append(card("Perplexity", None, row["failure"]["reason"]))
    elif row and row.get("dense_perplexity"):
        before, after = row["dense_perplexity"], row.get("perplexity")
        cards.append(card("Perplexity", units.number(after), f"dense {units.number(before)}, on {text_of(row)}"))
    elif row:
        cards.append(card("Perplexity", units.number(row.get("perplexity")), f"on {text_of(row)}"))
    else:
        cards.append(card("Perplexity", None, "sparsify eval measures it"))
    agreement = row.get("top1_agreement") if row else None
    if agreement is not None:
        cards.append(card("Top-1 agreement", units.percent(agreement), "same next token as the dense model"))
    else:
        cards.append(card("Top-1 agreement", None, "sparsify eval --dense measures it"))
    cards.append(speed_card(bench, kind))
    return "".join(cards)


def speed_card(bench: Mapping[str, Any] | None, kind: str) -> str:
    models = (bench or {}).get("models") or []
    row = subject(models[1:], kind)
    if not row:
        return card("Tokens per second", None, "sparsify bench measures it")
    key, what = ("decode", "decoding") if "decode" in row["ratios"] else ("throughput", "throughput")
    if key not in row["ratios"]:
        failed = row.get("failure") or models[0].get("failure")
        return card("Tokens per second", None, failed["reason"] if failed else "sparsify bench measures it")
    mine, base = tokens_per_second(row, key), tokens_per_second(models[0], key)
    return card("Tokens per second", units.ratio(row["ratios"][key]), f"{what} in vLLM, {base:.1f} → {mine:.1f} tok/s")


def tokens_per_second(row: Mapping[str, Any], key: str) -> float:
    if key == "decode":
        return float(row["latency"]["decode_tokens_per_second"])
    return float(row["throughput"]["output_tokens_per_second"])


def card(name: str, big: str | None, under: str) -> str:
    value = f'<div class="big">{esc(big)}</div>' if big else '<div class="big none">not measured</div>'
    return f'<div class="figure"><dt>{esc(name)}</dt><dd>{value}<div class="under">{esc(under)}</div></dd></div>'


def text_of(row: Mapping[str, Any]) -> str:
    return "its own samples" if row.get("text_source") == "self" else str(row.get("text") or "the given text")


def accuracy(metrics: Mapping[str, Any], evaluated: Sequence[Mapping[str, Any]]) -> str:
    """Perplexity and agreement of every evaluated model."""
    if not evaluated:
        return section(
            "Accuracy",
            "<p class='note'>Not measured. <code>sparsify eval DIR --dense MODEL --text FILE</code> gives perplexity, "
            "divergence from the dense model and agreement with it.</p>",
        )
    first = evaluated[0]
    own = first.get("text_source") == "self"
    labels = labels_of(evaluated)
    entries = []
    if first.get("dense_perplexity"):
        before = float(first["dense_perplexity"])
        entries.append(svg.Bar("dense", before, units.number(before), "dense"))
    scored = [row for row in evaluated if not row.get("failure")]
    finite = [float(row["perplexity"]) for row in scored if row.get("perplexity") is not None]
    roof = max(finite + [bar.value for bar in entries] + [1.0])
    for label, row in zip(labels, evaluated, strict=True):
        value = row.get("perplexity")
        if failed := row.get("failure"):
            entries.append(svg.Bar(label, 0.0, failed["short"], colour(row, metrics)))
            continue
        drawn = roof if value is None else float(value)
        entries.append(svg.Bar(label, drawn, units.number(value), colour(row, metrics)))
    where = "text the dense model sampled itself" if own else esc(first.get("text") or "the given text")
    body = f"<p class='note'>On {where}: {int(first['tokens']):,} tokens, chunks of {first['sequence_length']}.</p>"
    body += "<h3>Perplexity, lower is better</h3>" + figure(lambda w: svg.bars(entries, w, "Perplexity"), wide=HALF)
    agreements = [
        svg.Bar(label, float(row["top1_agreement"]), units.percent(row["top1_agreement"]), colour(row, metrics))
        for label, row in zip(labels, evaluated, strict=True)
        if row.get("top1_agreement") is not None
    ]
    if agreements:
        body += "<h3>Same next token as the dense model</h3>"
        body += figure(lambda w: svg.bars(agreements, w, "Top-1 agreement", full=1.0), wide=HALF)
        divergences = "; ".join(
            f"{esc(label)} {units.number(row['kl'], 3)}"
            for label, row in zip(labels, evaluated, strict=True)
            if row.get("kl") is not None
        )
        body += f"<p class='note'>KL divergence from the dense model, nats per token: {divergences}.</p>"
    return section("Accuracy", body + reasons(evaluated))


def reasons(rows: Sequence[Mapping[str, Any]]) -> str:
    """Why some rows have no figures, a line each."""
    found = dict.fromkeys(row["failure"]["reason"] for row in rows if row.get("failure"))
    return "".join(f"<p class='note'>{esc(reason)}</p>" for reason in found)


def labels_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Formats when they tell the models apart, as they usually do; otherwise names."""
    formats = [str(row.get("format") or row.get("model")) for row in rows]
    if len(set(formats)) == len(formats):
        return formats
    return [str(row.get("model")).rstrip("/").rsplit("/", 1)[-1] for row in rows]


def colour(row: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    if row.get("format") == export_format_of(metrics):
        return "ours"
    return "dense" if row.get("format") == "dense" else "third"


def size(metrics: Mapping[str, Any]) -> str:
    stacks = sizes(metrics)
    if not stacks:
        return section("Size", "<p class='note'>The sizes of the checkpoints were not recorded.</p>")
    parts = list(dict.fromkeys(name for _, stack in stacks for name in stack))
    legend = "".join(
        f'<li><svg width="11" height="11" aria-hidden="true"><rect width="11" height="11" rx="3" class="part{i}"/>'
        f"</svg>{esc(name)}</li>"
        for i, name in enumerate(parts)
    )
    rows = []
    for name in parts:
        before, after = (stack.get(name, 0) for _, stack in stacks)
        factor = units.ratio(before / after) if after and before != after else "same" if before == after else "–"
        rows.append([esc(name), units.size(before), units.size(after), factor])
    before, after = (sum(stack.values()) for _, stack in stacks)
    rows.append(["total", units.size(before), units.size(after), units.ratio(before / after)])
    head = [("", ""), *((label, "") for label, _ in stacks), ("smaller", "")]
    note = "<p class='note'>Bytes of all tensors; tokenizer and configuration are not counted."
    if EMBEDDINGS in parts and stacks[1][1][EMBEDDINGS] > after / 2:
        note += " More than half of what is left are embeddings: in a small model they weigh most."
    return section(
        "Size",
        f"{note}</p>{figure(lambda w: svg.stacked_bars(stacks, w), wide=HALF)}"
        f'<ul class="legend">{legend}</ul>{table(head, rows, "Size by part")}',
    )


def speed(bench: Mapping[str, Any] | None) -> str:
    models = (bench or {}).get("models") or []
    if not bench or not models:
        return section(
            "Speed",
            "<p class='note'>Not measured. <code>sparsify bench latency DENSE_DIR DIR</code> and "
            "<code>sparsify bench throughput DENSE_DIR DIR</code> run vLLM's own benchmarks.</p>",
        )
    base = models[0]
    panels = ""
    for key, title, written in PANELS:
        if any(key in model["ratios"] for model in models):
            entries = [bar(model, key, written, bar_colour(i, len(models))) for i, model in enumerate(models)]
            draw = partial(svg.labelled_bars, entries, label=f"{title}: ratios to {base['model']}", reference=1.0)
            panels += f"<div><h3>{title}</h3>{figure(draw, wide=THIRD)}</div>"
    compared = f"Ratios to {base['model']} in vLLM, same run, same machine: longer is faster."
    if base.get("failure"):
        compared = f"No ratios, because {base['model']} did not run."
    body = f"<p class='note'>{esc(compared)}</p>"
    body += f'<div class="panels">{panels}</div>' if panels else ""
    body += f"{speed_table(models)}{reasons(models)}"
    body += f"<p class='note' style='margin-top:14px'>{esc(workload(bench))}</p>"
    return section("Speed", body)


def bar(model: Mapping[str, Any], key: str, written: Callable[[Mapping[str, Any]], str], css: str) -> svg.Bar:
    """The bar of a ratio, or one without length that says why there is none."""
    name = str(model["model"])
    if failed := model.get("failure"):
        return svg.Bar(name, 0.0, failed["short"], css)
    return svg.Bar(name, float(model["ratios"][key]), units.ratio(model["ratios"][key]), css, aside=written(model))


def answers(bench: Mapping[str, Any]) -> str:
    """What every model replied to the same prompts, where the benchmark asked any."""
    prompts, models = bench.get("prompts") or [], bench.get("models") or []
    body = ""
    for i, prompt in enumerate(prompts):
        replies = "".join(
            f"<dt>{esc(model['model'])}</dt><dd>{esc(model['answers'][i].strip() or '(nothing)')}</dd>"
            for model in models
            if len(model.get("answers") or []) > i
        )
        body += f'<h3>{esc(prompt)}</h3><dl class="reasons answers">{replies}</dl>'
    return section("Answers", f"<p class='note'>Greedy replies in vLLM, cut short.</p>{body}") if body else ""


def bar_colour(i: int, count: int) -> str:
    """Dense first, ours last, the rest between."""
    return "dense" if i == 0 else "ours" if i == count - 1 else "third"


def speed_table(models: Sequence[Mapping[str, Any]]) -> str:
    head = [("model", ""), ("size", "")]
    if any(model.get("latency") for model in models):
        head += [("decode", ""), ("first token", ""), ("per token", "")]
    if any(model.get("throughput") for model in models):
        head.append(("throughput", ""))
    rows = []
    for m in models:
        ratios = m["ratios"]
        row = [esc(m["model"]), _pair(ratios["size"], units.size(m["nbytes"]))]
        if times := m.get("latency"):
            row.append(_pair(ratios.get("decode"), f"{times['decode_tokens_per_second']:.1f} tok/s"))
            row.append(_pair(ratios.get("ttft"), units.duration(times["ttft"])))
            row.append(_pair(ratios.get("decode"), units.duration(times["itl"])))
        if rates := m.get("throughput"):
            row.append(_pair(ratios.get("throughput"), f"{rates['output_tokens_per_second']:.1f} tok/s"))
        if failed := m.get("failure"):
            row += [esc(failed["short"]), *["–"] * (len(head) - 3)]
        rows.append(row)
    return f'<div style="margin-top:18px">{table(head, rows, "Speed of every model")}</div>'


def _pair(ratio: float | None, absolute: str) -> str:
    return esc(absolute) if ratio is None else f'{units.ratio(ratio)} <span class="sub">{esc(absolute)}</span>'


def workload(bench: Mapping[str, Any]) -> str:
    """The conditions of a speed figure in a sentence."""
    said = []
    if work := bench.get("latency"):
        said.append(f"Latency: batch {work['batch_size']}, {work['input_len']} tokens in, {work['output_len']} out")
    if load := bench.get("throughput"):
        said.append(
            f"Throughput: {load['prompts']} prompts at once, {load['input_len']} tokens in, {load['output_len']} out"
        )
    said.append("without torch.compile" if bench.get("eager") else "with torch.compile")
    if bench.get("repeats", 1) > 1:
        said.append(f"median of {bench['repeats']} interleaved rounds")
    return "; ".join(said) + "."


def depth_section(metrics: Mapping[str, Any]) -> str:
    """Which layers were removed, and why these."""
    note = metrics.get("depth")
    if not note:
        return ""
    body = facts([(name, esc(value)) for name, value in depth_facts(note)])
    numbered = " Numbers: the step in which it went." if note.get("steps") else ""
    body += "<h3>What went</h3>" + figure(lambda w: removal_strip(note, w), f"Removed parts are pale.{numbered}")
    if steps := note.get("steps"):
        curve = [(number, float(step["distance"])) for number, step in enumerate(steps, 1)]
        label = f"{note['measure']} after each of {len(steps)} removals, at last {curve[-1][1]:.4g}"
        caption = f"{esc(note['measure'])} from the whole model, after each removal."
        body += "<h3>What it cost</h3>" + figure(partial(svg.loss_curve, curve, label=label), caption)
    if note.get("matrix"):
        measure = esc(note["measure"])
        caption = f"Pale: little changes across the block ({measure}). The frame marks the block that was removed."
        body += "<h3>Every block of layers</h3>" + figure(lambda w: block_map(note, w), caption, wide=HALF + 164)
    return section("Depth", body)


def training_section(metrics: Mapping[str, Any]) -> str:
    """What the training passes did: one table and one curve each."""
    bodies = []
    for note in metrics.get("training") or []:
        curve = [(int(step), float(loss)) for step, loss in note["curve"]]
        first, last = note["first"], note["last"]
        entries = [
            ("steps", f"{note['steps']:,}"),
            ("tokens", f"{units.count(note['tokens'])} of {note['rows']:,} rows"),
            ("teacher", f"<code>{esc(note['teacher'])}</code>" if note.get("teacher") else "none"),
        ]
        entries += [(name.replace("_", " "), f"{first[name]:.4g} → {last[name]:.4g}") for name in first if name in last]
        label = f"Loss of {note['kind']}, from {first['loss']:.4g} to {last['loss']:.4g}"
        picture = figure(partial(svg.loss_curve, curve, label=label), "Loss over the steps of training.")
        bodies.append(f"<h3>{esc(note['kind'])}</h3>{facts(entries)}{picture}")
    return section("Training", "".join(bodies)) if bodies else ""


def layer_section(metrics: Mapping[str, Any], layers: Sequence[Layer]) -> str:
    if not layers:
        return section("Layer by layer", "<p class='note'>No linear was compressed.</p>")
    measured = [layer for layer in layers if layer.relative_error is not None]
    if measured:
        body = (
            "<p>Relative error of a linear: how much of its output's energy is lost, ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖², on the "
            "calibration inputs that reach it in the compressed model."
            + (" Measured before the model was trained as a whole." if metrics.get("training") else "")
            + "</p>"
        )
        body += figure(lambda w: svg.heat_map(layers, w), "Every cell is one linear; point at it for its figures.")
        body += "<h3>Error by depth</h3>" + figure(
            lambda w: svg.depth_chart(layers, w), "Line: mean of a block. Band: its best to its worst linear."
        )
    else:
        body = (
            "<p class='note'>This recipe ran no data through the model, so there is no output error to show; "
            "<code>sparsify eval</code> says what it cost.</p>"
        )
    return section("Layer by layer", body + kind_table(layers, head_of(metrics)) + full_table(layers))


def kind_table(layers: Sequence[Layer], output_head: Layer | None = None) -> str:
    names = short_kinds(layer.kind for layer in layers)
    kinds = by_kind(layers)
    roof = max([kind.mean_error or 0 for kind in kinds] + [1e-30])
    rows = []
    for kind in kinds:
        shapes = ", ".join(f"{n} × {k}" for n, k in kind.shapes[:2]) + (" …" if len(kind.shapes) > 2 else "")
        mean = units.error(kind.mean_error)
        if kind.mean_error is not None:
            mean = svg.mini_bar(kind.mean_error / roof, f"mean error {mean}") + mean
        worst = "–"
        if kind.worst is not None:
            worst = f'{units.error(kind.worst.relative_error)} <span class="sub">block {kind.worst.block}</span>'
        rows.append([
            esc(names[kind.kind]), str(kind.count), shapes, units.count(kind.weights),
            ", ".join(map(str, kind.bits)), units.percent(kind.sparsity), mean, worst,
        ])  # fmt: skip
    if output_head is not None:
        n, k = output_head.shape
        name, weights = f'{esc(output_head.kind)} <span class="sub">output head</span>', units.count(n * k)
        rows.append([name, "1", f"{n} × {k}", weights, str(output_head.bits), "–", "–", "–"])
    head = [("linear", ""), ("count", ""), ("shape", ""), ("weights", ""), ("bits", ""), ("zeros", "")]
    return "<h3>By kind of linear</h3>" + table([*head, ("mean error", ""), ("worst", "")], rows, "Linears by kind")


def full_table(layers: Sequence[Layer]) -> str:
    rows = [
        [
            f"<code>{esc(layer.module)}</code>", f"{layer.shape[0]} × {layer.shape[1]}", str(layer.bits),
            str(layer.group_size or "–"), units.percent(layer.sparsity), units.error(layer.relative_error),
        ]
        for layer in layers
    ]  # fmt: skip
    head = [("module", ""), ("shape", ""), ("bits", ""), ("group", ""), ("zeros", ""), ("error", "")]
    return (
        f"<details><summary>All {len(layers)} linears as a table</summary>{table(head, rows, 'All linears')}</details>"
    )


def dense_modules(metrics: Mapping[str, Any]) -> str:
    entries = metrics.get("dense_modules") or []
    if not entries:
        return section("Left dense", "<p class='note'>Nothing: every linear was compressed.</p>")
    by_reason: dict[str, list[str]] = {}
    for entry in entries:
        by_reason.setdefault(str(entry.get("reason") or "no reason recorded"), []).append(str(entry.get("module")))
    listed = "".join(
        f'<dt>{esc(reason)} <span class="sub">{len(modules)}</span></dt><dd>{_modules(modules)}</dd>'
        for reason, modules in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    )
    return section(
        "Left dense",
        f'<p class="note">Parts of the model that kept their weights, and why.</p><dl class="reasons">{listed}</dl>',
    )


def _modules(modules: Sequence[str]) -> str:
    shown = ", ".join(f"<code>{esc(name)}</code>" for name in modules[:3])
    if len(modules) <= 3:
        return shown
    rest = ", ".join(f"<code>{esc(name)}</code>" for name in modules[3:])
    return f"{shown}<details><summary>and {len(modules) - 3} more</summary>{rest}</details>"


def recipe(metrics: Mapping[str, Any]) -> str:
    given = metrics.get("recipe")
    if not given:
        return ""
    text = given if isinstance(given, str) else yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=100)
    body = "<p class='note'>Run it again with <code>sparsify apply FILE --output DIR</code>.</p>"
    return section("Recipe", f'{body}<pre tabindex="0" aria-label="Recipe as YAML"><code>{esc(text)}</code></pre>')


def method(metrics: Mapping[str, Any], evaluated: Sequence[Mapping[str, Any]], bench: Mapping[str, Any] | None) -> str:
    """How it was measured: machine, versions, commands, and what the figures do not say."""
    entries = [("base model", f"<code>{esc(metrics.get('base_model') or 'unknown')}</code>")]
    if calibration := metrics.get("calibration"):
        source = sources_in_words(calibration)
        named = "text sampled from the model itself" if source == SELF else esc(source)
        size = f"{calibration.get('samples')} × {calibration.get('sequence_length')} tokens"
        entries.append(("calibration", f"{named}, {esc(size)}"))
    if seconds := metrics.get("seconds"):
        entries.append(("compiling took", units.span(seconds)))
    if peak := metrics.get("peak_memory_bytes"):
        entries.append(("peak memory", units.size(peak)))
    machine = (bench or {}).get("machine") or {}
    if machine:
        described = f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB"
        gpus = ", ".join(machine.get("gpus") or []) or "none"
        entries += [("machine", esc(described)), ("GPUs", esc(gpus))]
    versions: dict[str, str] = {}
    for source_of_versions in (metrics, *evaluated, bench or {}):
        versions |= source_of_versions.get("versions") or {}
    if versions:
        entries.append(("versions", esc(", ".join(f"{name} {number}" for name, number in versions.items()))))
    if environment := (bench or {}).get("environment"):
        listed = "<br>".join(f"<code>{esc(k)}={esc(v)}</code>" for k, v in environment.items())
        entries.append(("environment", listed))
    body = facts(entries)
    if commands := (bench or {}).get("commands"):
        body += "<h3>Commands behind the speed figures</h3>"
        body += f'<pre tabindex="0" aria-label="Commands"><code>{esc(chr(10).join(commands))}</code></pre>'
    notes = "".join(f"<li>{note}</li>" for note in honest_notes(metrics, evaluated, bench))
    return section("How this was measured", f'{body}<h3>What the figures do not say</h3><ul class="notes">{notes}</ul>')


def honest_notes(
    metrics: Mapping[str, Any], evaluated: Sequence[Mapping[str, Any]], bench: Mapping[str, Any] | None
) -> list[str]:
    """Limits of the figures on this page, as HTML."""
    notes = []
    if bench:
        notes.append(
            "Speed is a result only as a ratio: all models ran one after another in one run on one machine. "
            "Absolute times belong to that machine and to what else it was doing."
        )
        if not (bench.get("machine") or {}).get("gpus"):
            notes.append("Nothing here was run on a GPU: speed figures are of a CPU and say nothing about GPUs.")
        if bench.get("repeats", 1) == 1:
            notes.append(
                "Each model ran in one round; <code>--repeats</code> interleaves several and steadies the ratios."
            )
    if any(row.get("text_source") == "self" for row in evaluated):
        notes.append(
            "Accuracy was measured on text that the dense model sampled itself, because no file was given: it compares "
            "the models with each other and is no perplexity of a data set."
        )
    elif evaluated:
        notes.append("Perplexity depends on text, tokenizer and chunk length; compare it only under the same protocol.")
    if evaluated:
        notes.append("Perplexity and agreement do not replace an evaluation on the task the model will do.")
    if any(row.get("perplexity") is None and not row.get("failure") for row in evaluated):
        notes.append("∞: the perplexity left the range of numbers; such a model is destroyed.")
    notes.append("Sizes are bytes of tensors on disk, not of memory while serving, where the key-value cache is added.")
    return notes


def section(title: str, body: str) -> str:
    return f"<section><h2>{esc(title)}</h2>{body}</section>\n"


def footer(metrics: Mapping[str, Any]) -> str:
    return "<footer>Written by sparsify. The numbers are in <code>metrics.json</code> beside the model.</footer>"
