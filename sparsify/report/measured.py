"""Sections about what was measured: accuracy, size, speed, answers, and how it was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from sparsify import units
from sparsify.recipe.sources import SELF, sources_in_words
from sparsify.report import svg
from sparsify.report.figures import EMBEDDINGS, export_format_of, sizes
from sparsify.report.parts import HALF, THIRD, Cell, Facts, Table, picture, reasons

# ratio, title, the absolute value beside it
PANELS: tuple[tuple[str, str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("decode", "Decoding", lambda row: f"{row['latency']['decode_tokens_per_second']:.1f} tok/s"),
    ("ttft", "First token", lambda row: units.duration(row["latency"]["ttft"])),
    ("throughput", "Throughput", lambda row: f"{row['throughput']['output_tokens_per_second']:.1f} tok/s"),
)


def accuracy(
    metrics: Mapping[str, Any], evaluated: Sequence[Mapping[str, Any]], labels: Sequence[str] | None = None
) -> dict[str, Any] | None:
    """Context of accuracy.html.j2: figures of every evaluated model, text by text, and on tasks. None without any."""
    if not evaluated:
        return None
    labels = labels or labels_of(evaluated)
    names = dict.fromkeys(name for row in evaluated for name in row["texts"])
    failed = [{"failure": row.get("tasks_failure")} for row in evaluated]
    return {
        "texts": [accuracy_on(name, metrics, evaluated, labels) for name in names],
        "tasks": task_table(evaluated, labels),
        "tasks_note": tasks_note(evaluated),
        "tasks_title": next((f"Tasks of {row['preset']}" for row in evaluated if row.get("preset")), "Zero-shot tasks"),
        "tasks_metric": metrics_of(evaluated),
        "reasons": reasons([*(text for row in evaluated for text in row["texts"].values()), *failed]),
    }


def accuracy_on(
    name: str, metrics: Mapping[str, Any], evaluated: Sequence[Mapping[str, Any]], labels: Sequence[str]
) -> dict[str, Any]:
    """Perplexity, agreement and divergence of the models that were scored on one text."""
    scored = [
        (label, {**row, **row["texts"][name]})
        for label, row in zip(labels, evaluated, strict=True)
        if name in row["texts"]
    ]
    labels, evaluated = [label for label, _ in scored], [row for _, row in scored]
    first = evaluated[0]
    own = first.get("text_source") == "self"
    perplexities = perplexity_bars(metrics, evaluated, labels)
    agreements = [
        svg.Bar(label, float(row["top1_agreement"]), units.percent(row["top1_agreement"]), colour(row, metrics))
        for label, row in scored
        if row.get("top1_agreement") is not None
    ]
    divergences = (f"{label} {units.number(row['kl'], 3)}" for label, row in scored if row.get("kl") is not None)
    return {
        "text": "text the dense model sampled itself" if own else first.get("text") or "the given text",
        "tokens": f"{int(first['tokens']):,}",
        "sequence_length": first["sequence_length"],
        "perplexity": picture(
            lambda w: svg.bars(perplexities, w, "Perplexity"), f"perplexity-{name}", ["model", "perplexity"],
            [*([["dense", first["dense_perplexity"]]] if first.get("dense_perplexity") else []),
             *([label, row.get("perplexity")] for label, row in scored)], HALF,
        ),
        "agreement": picture(
            lambda w: svg.bars(agreements, w, "Top-1 agreement", full=1.0), f"agreement-{name}",
            ["model", "same likeliest token", "common among five", "KL"],
            [[label, row.get("top1_agreement"), row.get("top5_agreement"), row.get("kl")] for label, row in scored], HALF,
        ) if agreements else None,
        "divergences": "; ".join(divergences),
        "worst": [(label, worst_tokens(row["worst"])) for label, row in scored if row.get("worst")],
    }  # fmt: skip


def worst_tokens(found: Sequence[Mapping[str, Any]]) -> Table:
    """The tokens at which a model is farthest from the dense one, in context, with what both expected there."""
    head = ["KL", "place", "text before", "token", "text after", "the dense model expected", "this model expected"]
    rows: list[list[str | Cell]] = [
        [
            units.number(one["kl"]), f"chunk {one['chunk']}, {one['position']}", one["before"],
            Cell(visible(one["token"]), code=True),
            one["after"], guesses(one["dense"]), guesses(one["model"]),
        ]
        for one in found
    ]  # fmt: skip
    return Table(head, rows)


def guesses(found: Sequence[Mapping[str, Any]]) -> str:
    """`the 62%` and so on, a line each."""
    return "\n".join(f"{visible(one['token'])} {units.percent(one['probability'], 0)}" for one in found)


def visible(token: str) -> str:
    """A token with spaces and line breaks that can be seen."""
    return token.replace(" ", "␣").replace("\n", "⏎")


def task_table(evaluated: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Table | None:
    """A row per model and task, and the mean of several tasks; None without tasks."""
    rows: list[list[str | Cell]] = []
    for label, row in zip(labels, evaluated, strict=True):
        tasks = row.get("tasks") or {}
        for score in [*tasks.values(), *([row["tasks_mean"]] if len(tasks) > 1 else [])]:
            rows.append(
                [
                    label, str(score["task"]), with_error(score["accuracy"], score["accuracy_stderr"]),
                    units.percent(score["dense_accuracy"]), between(score.get("recovery"), score.get("recovery_interval")),
                    units.percent(score["chance"]), units.percent(score["above_chance"]),
                    between(score["difference"], score.get("difference_interval")), units.percent(score["flips"]),
                ]
            )  # fmt: skip
    head = ["model", "task", "accuracy", "dense", "recovery", "chance", "above chance", "difference", "flips"]
    return Table(head, rows) if rows else None


def tasks_note(evaluated: Sequence[Mapping[str, Any]]) -> str:
    """How many items of each task were scored."""
    tasks: Mapping[str, Any] = next((row["tasks"] for row in evaluated if row.get("tasks")), {})
    return ", ".join(
        f"{name} {score['items']}"
        + (f" of {score['items_in_file']}" if score["items"] < score["items_in_file"] else "")
        for name, score in tasks.items()
    )


def metrics_of(evaluated: Sequence[Mapping[str, Any]]) -> str:
    """What counts as right: acc_norm, unless a preset has others."""
    scores = [score for row in evaluated if row.get("preset") for score in row["tasks"].values()]
    named = dict.fromkeys(f"{score['metric']} ({score['task']})" for score in scores)
    return ", ".join(named) or "log-likelihood per character, acc_norm"


def between(value: float | None, interval: Sequence[float] | None) -> str | Cell:
    """A share with its interval beside it."""
    if value is None:
        return "–"
    return Cell(
        units.percent(value), sub="" if interval is None else " to ".join(f"{100 * end:.1f}" for end in interval)
    )


def with_error(value: float | None, error: float | None) -> str | Cell:
    """A share with its standard error beside it."""
    return "–" if value is None else Cell(units.percent(value), sub="" if error is None else f"± {100 * error:.1f}")


def perplexity_bars(
    metrics: Mapping[str, Any], evaluated: Sequence[Mapping[str, Any]], labels: Sequence[str]
) -> list[svg.Bar]:
    """The dense model first, where it is known. A failed model has a bar without length, one out of range the longest."""
    entries = []
    if dense := evaluated[0].get("dense_perplexity"):
        entries.append(svg.Bar("dense", float(dense), units.number(float(dense)), "dense"))
    scored = [row for row in evaluated if not row.get("failure")]
    finite = [float(row["perplexity"]) for row in scored if row.get("perplexity") is not None]
    longest = max(finite + [bar.value for bar in entries] + [1.0])
    for label, row in zip(labels, evaluated, strict=True):
        value = row.get("perplexity")
        if failed := row.get("failure"):
            entries.append(svg.Bar(label, 0.0, failed["short"], colour(row, metrics)))
            continue
        drawn = longest if value is None else float(value)
        entries.append(svg.Bar(label, drawn, units.number(value), colour(row, metrics)))
    return entries


def labels_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Formats when they tell the models apart, as they usually do; otherwise names."""
    formats = [str(row.get("format") or row.get("model")) for row in rows]
    if len(set(formats)) == len(formats):
        return formats
    return [str(row.get("model")).rstrip("/").rsplit("/", 1)[-1] for row in rows]


def colour(row: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """The CSS class of a model's bars."""
    if row.get("format") == export_format_of(metrics):
        return "ours"
    return "dense" if row.get("format") == "dense" else "third"


def size(metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Context of size.html.j2; None where the sizes were not recorded."""
    stacks = sizes(metrics)
    if not stacks:
        return None
    parts = list(dict.fromkeys(name for _, stack in stacks for name in stack))
    rows = []
    for name in parts:
        before, after = (stack.get(name, 0) for _, stack in stacks)
        factor = units.ratio(before / after) if after and before != after else "same" if before == after else "–"
        rows.append([name, units.size(before), units.size(after), factor])
    before, after = (sum(stack.values()) for _, stack in stacks)
    rows.append(["total", units.size(before), units.size(after), units.ratio(before / after)])
    return {
        "mostly_embeddings": EMBEDDINGS in parts and stacks[1][1][EMBEDDINGS] > after / 2,
        "picture": picture(
            lambda w: svg.stacked_bars(stacks, w),
            "size",
            ["checkpoint", "part", "bytes"],
            [[label, part, nbytes] for label, stack in stacks for part, nbytes in stack.items()],
            HALF,
        ),
        "parts": parts,
        "table": Table(["", *(label for label, _ in stacks), "smaller"], rows),
    }


def speed(bench: Mapping[str, Any]) -> dict[str, Any] | None:
    """Context of speed.html.j2; None without a benchmark."""
    models = bench.get("models") or []
    if not models:
        return None
    base = models[0]
    panels = []
    for key, title, written in PANELS:
        if any(key in model["ratios"] for model in models):
            entries = [bar(model, key, written, bar_colour(i, len(models))) for i, model in enumerate(models)]
            draw = partial(svg.labelled_bars, entries, label=f"{title}: ratios to {base['model']}", reference=1.0)
            rows = [[model["model"], model["ratios"].get(key)] for model in models]
            panels.append((title, picture(draw, f"speed-{key}", ["model", "ratio"], rows, THIRD)))
    return {
        "base": base["model"],
        "compares": not base.get("failure"),
        "panels": panels,
        "table": speed_table(models),
        "reasons": reasons(models),
        "workload": workload(bench),
    }


def bar(model: Mapping[str, Any], key: str, written: Callable[[Mapping[str, Any]], str], css: str) -> svg.Bar:
    """The bar of a ratio, or one without length with the reason."""
    name = str(model["model"])
    if failed := model.get("failure"):
        return svg.Bar(name, 0.0, failed["short"], css)
    return svg.Bar(name, float(model["ratios"][key]), units.ratio(model["ratios"][key]), css, aside=written(model))


def bar_colour(i: int, count: int) -> str:
    """Dense first, ours last, the rest between."""
    return "dense" if i == 0 else "ours" if i == count - 1 else "third"


def speed_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """Ratios to the first model, and absolute values beside them."""
    head = ["model", "size"]
    if any(model.get("latency") for model in models):
        head += ["decode", "first token", "per token"]
    if any(model.get("throughput") for model in models):
        head.append("throughput")
    rows = []
    for m in models:
        ratios = m["ratios"]
        row: list[str | Cell] = [str(m["model"]), ratio_cell(ratios["size"], units.size(m["nbytes"]))]
        if times := m.get("latency"):
            row.append(ratio_cell(ratios.get("decode"), f"{times['decode_tokens_per_second']:.1f} tok/s"))
            row.append(ratio_cell(ratios.get("ttft"), units.duration(times["ttft"])))
            row.append(ratio_cell(ratios.get("decode"), units.duration(times["itl"])))
        if rates := m.get("throughput"):
            row.append(ratio_cell(ratios.get("throughput"), f"{rates['output_tokens_per_second']:.1f} tok/s"))
        if failed := m.get("failure"):
            row += [failed["short"], *["–"] * (len(head) - 3)]
        rows.append(row)
    return Table(head, rows)


def ratio_cell(ratio: float | None, absolute: str) -> str | Cell:
    """A ratio with the absolute value beside it, or the value alone."""
    return absolute if ratio is None else Cell(units.ratio(ratio), sub=absolute)


def workload(bench: Mapping[str, Any]) -> str:
    """The conditions of a speed figure in a sentence."""
    parts = []
    if work := bench.get("latency"):
        parts.append(f"Latency: batch {work['batch_size']}, {work['input_len']} tokens in, {work['output_len']} out")
    if load := bench.get("throughput"):
        parts.append(
            f"Throughput: {load['prompts']} prompts at once, {load['input_len']} tokens in, {load['output_len']} out"
        )
    parts.append("without torch.compile" if bench.get("eager") else "with torch.compile")
    if bench.get("repeats", 1) > 1:
        parts.append(f"median of {bench['repeats']} interleaved rounds")
    return "; ".join(parts) + "."


def answers(bench: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Every prompt with what each model replied, where the benchmark asked any: (prompt, [(model, reply)])."""
    models = bench.get("models") or []
    return [
        (prompt, [(m["model"], m["answers"][i].strip()) for m in models if len(m.get("answers") or []) > i])
        for i, prompt in enumerate(bench.get("prompts") or [])
    ]


def method(
    metrics: Mapping[str, Any], evaluated: Sequence[Mapping[str, Any]], bench: Mapping[str, Any]
) -> dict[str, Any]:
    """Context of method.html.j2: machine, versions, commands, and what decides which limits of the figures it names."""
    texts = [text for row in evaluated for text in row["texts"].values()]
    return {
        "facts": method_facts(metrics, evaluated, bench),
        "commands": bench.get("commands") or [],
        "speed": bool(bench),
        "gpus": bool((bench.get("machine") or {}).get("gpus")),
        "one_round": bench.get("repeats", 1) == 1,
        "evaluated": bool(texts),
        "own_text": any(text.get("text_source") == "self" for text in texts),
        "destroyed": any(text.get("perplexity") is None and not text.get("failure") for text in texts),
    }


def method_facts(metrics: Mapping[str, Any], evaluated: Sequence[Mapping[str, Any]], bench: Mapping[str, Any]) -> Facts:
    """Model, calibration, machine, versions and environment of the figures."""
    facts: Facts = [("base model", [Cell(str(metrics.get("base_model") or "unknown"), code=True)])]
    if calibration := metrics.get("calibration"):
        source = sources_in_words(calibration)
        named = "text sampled from the model itself" if source == SELF else source
        amount = f"{calibration.get('samples')} × {calibration.get('sequence_length')} tokens"
        facts.append(("calibration", [f"{named}, {amount}"]))
    if seconds := metrics.get("seconds"):
        facts.append(("compiling took", [units.span(seconds)]))
    if peak := metrics.get("peak_memory_bytes"):
        facts.append(("peak memory", [units.size(peak)]))
    if machine := bench.get("machine"):
        described = f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB"
        gpus = ", ".join(machine.get("gpus") or []) or "none"
        facts += [("machine", [described]), ("GPUs", [gpus])]
    versions: dict[str, str] = {}
    for source_of_versions in (metrics, *evaluated, bench):
        versions |= source_of_versions.get("versions") or {}
    if versions:
        facts.append(("versions", [", ".join(f"{name} {number}" for name, number in versions.items())]))
    if environment := bench.get("environment"):
        facts.append(("environment", [Cell(f"{name}={value}", code=True) for name, value in environment.items()]))
    return facts
