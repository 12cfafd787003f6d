"""The table of a run, drawn from its JSON alone: `python -m benchmarks.versus.page RECORD.json PAGE.md` draws it again."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sparsify.bench.result import latency_figures, throughput_figures
from sparsify.bench.workload import LatencyWorkload, ThroughputWorkload
from sparsify.evaluation.result import between, number, share
from sparsify.files import atomic_write, read_json
from sparsify.units import size, span

Result = Mapping[str, Any]
NONE = "–"


def write_page(target: Path, result: Result, record: str | None = None) -> None:
    """record: the file name of the JSON in `benchmarks/results`, which the page links to; None where it lies beside the page."""
    atomic_write(target, page(result, record))


def page(result: Result, record: str | None = None) -> str:
    """Markdown."""
    link = "versus.json" if record is None else f"../../benchmarks/results/{record}"
    parts = ["# Versus the others", *_introduction(result, link)]
    parts += ["## Accuracy and size", accuracy(result), *_about_accuracy(result)]
    parts += ["## Cost and speed", cost(result), *_about_cost(result)]
    if any(row["failures"] for row in result["rows"]):
        parts += ["## What did not run", *_failures(result)]
    parts += ["## Commands", *_commands(result)]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# -------------------------------------------------------------------------------------------------------------- tables


def accuracy(result: Result) -> str:
    """One row per model: bits, the share of 2:4 groups, perplexity, KL, tasks."""
    scored = [row["score"] for row in result["rows"] if row["score"]]
    tasks = list(next((score["tasks"] for score in scored if score.get("tasks")), {}))
    head = ["", "bits per weight", "groups 2:4", "files", "perplexity", "KL to dense", "same next token", *tasks]
    head += ["mean", "recovery", "left above chance"] if tasks else []
    lines = []
    for row in result["rows"]:
        score = row["score"]
        if not score:
            lines.append([row["title"], _why(row, "compress", "score")] + [NONE] * (len(head) - 2))
            continue
        text = score["text"]
        cells = [row["title"], f"{score['block_bits']:.2f}", share(score["two_of_four"]), size(score["file_bytes"])]
        cells += [number(text["perplexity"]), number(text["kl"], 3), share(text["top1_agreement"])]
        if tasks:
            found = score.get("tasks") or {}
            cells += [share(found[name]["accuracy"]) if name in found else NONE for name in tasks]
            mean = score.get("tasks_mean") or {}
            cells += [share(mean.get("accuracy")), _recovery(row, mean), _above(row, mean)]
        lines.append(cells)
    return table(head, lines)


def _recovery(row: Mapping[str, Any], mean: Mapping[str, Any]) -> str:
    """The share of the dense model's mean accuracy, with its interval."""
    return NONE if row["row"] == "dense" else between(mean.get("recovery"), mean.get("recovery_interval"))


def _above(row: Mapping[str, Any], mean: Mapping[str, Any]) -> str:
    """What is left of the dense model's accuracy above chance, with the paired difference of the accuracies."""
    if row["row"] == "dense" or mean.get("above_chance") is None:
        return share(mean.get("above_chance"))
    return f"{share(mean['above_chance'])} ({share(mean['difference'], mean['difference_stderr'], '+')})"


def cost(result: Result) -> str:
    """One row per model: time and memory of compressing, tokens per second."""
    sequences = result["settings"]["prompts"]
    head = ["", "compressing", "memory", "runs in", "one sequence, tokens/s", f"{sequences} sequences, tokens/s"]
    first = next((speeds(result, row) for row in result["rows"] if row["row"] == "dense"), None)
    lines = []
    for row in result["rows"]:
        made = row["compress"]
        spent = [NONE, NONE] if not made else [span(made["seconds"]), size(made["peak_bytes"])]
        if made and made.get("copied"):
            spent = ["the source itself", NONE]
        if not made and any(failure["step"] == "compress" for failure in row["failures"]):
            spent = [_why(row, "compress"), NONE]
        found = speeds(result, row)
        if found is None:
            rates = [_why(row, "speed"), NONE]
        else:
            rates = [_with_ratio(mine, base) for mine, base in zip(found, first or (None, None), strict=True)]
        lines.append([row["title"], *spent, row["engine"], *rates])
    return table(head, lines)


def _with_ratio(mine: float, base: float | None) -> str:
    return f"{mine:.1f}" if base is None else f"{mine:.1f} ({mine / base:.2f}x)"


def speeds(result: Result, row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Tokens per second of one sequence after its first token, and of all prompts at once, as `sparsify bench` counts them: medians
    over rounds. None without a round."""
    if not (rounds := row["speed"]):
        return None
    work = result["settings"]
    latency = LatencyWorkload(work["input_len"], work["output_len"])
    load = ThroughputWorkload(work["input_len"], work["output_len"], work["prompts"])
    one = [latency_figures(r["first_token_seconds"], r["request_seconds"], latency) for r in rounds]
    elapsed = [seconds for found in rounds for seconds in found["elapsed_seconds"]]
    total = load.prompts * (load.input_len + load.output_len)
    return median(f.decode_tokens_per_second for f in one), throughput_figures(
        elapsed, total, load
    ).output_tokens_per_second


def _why(row: Mapping[str, Any], *steps: str) -> str:
    return next((f["short"] for f in row["failures"] if f["step"].startswith(steps)), "not yet run")


# --------------------------------------------------------------------------------------------------------------- words


def _introduction(result: Result, link: str) -> list[str]:
    prepared, settings = result["prepared"], result["settings"]
    machine = prepared["machine"]
    dates = sorted(step["date"][:10] for step in _steps(result))
    when = "not yet measured" if not dates else dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    rows, length = prepared["shape"]
    found = [
        f"{settings['model']} compressed and measured by `make versus`, one row each, every package in an environment of its own. "
        f"{when}, {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB; sparsify {result['sparsify']}. "
        f"[Record]({link}).",
        f"All methods calibrate on the same {rows} rows of {length} tokens ({_name(settings['calibration'])}), with groups of "
        f"{settings['group_size']} inputs and 4 bits, and compute in {prepared['compute']}; llama.cpp takes no calibration here.",
    ]
    if settings["quick"]:
        found.insert(0, "**A trial with `--quick`: it shows that every row runs. Its figures mean nothing.**")
    if not result["complete"]:
        found.insert(0, "**Not complete**: run the command again, and it goes on with what is missing.")
    return found


def _about_accuracy(result: Result) -> list[str]:
    settings = result["settings"]
    score = next((row["score"] for row in result["rows"] if row["score"]), None)
    if score is None:
        return []
    text = score["text"]
    lines = [
        f"Perplexity and KL(dense || model), nats per token, on {_name(settings['text'])}: {text['chunks']} chunks of "
        f"{text['sequence_length']} tokens, float32 ([protocol](../evaluation.md)). Every row is opened by sparsify's own readers and "
        "scored as dequantized weights by the same code, so a figure says what the stored weights are worth, not what an engine "
        "rounds while it runs (llama.cpp rounds activations to 8 bits). GGUF files are decoded by the `gguf` package, to bfloat16.",
        "Bits per weight: all that is stored of the linears inside of blocks, scales too. Groups 2:4: of four consecutive inputs of "
        "a weight, two or more are zero; by chance about none is. Files: all weights, with the embedding, which GGUF files "
        "quantize and the others keep in 16 bits; ours stores an output head of 8 bits beside the embedding.",
    ]
    if score.get("tasks"):
        counted = ", ".join(f"{name} {one['items']}" for name, one in score["tasks"].items())
        lines.append(
            f"Tasks: accuracy per character (acc_norm) on the first items of each ({counted}), zero-shot, by lm-evaluation-harness. "
            "Recovery: mean accuracy / dense mean accuracy, with a 95% interval of a bootstrap over the items, paired. "
            "Left above chance: (accuracy - chance) / (dense accuracy - chance) of the mean, with the difference of the mean to "
            "dense ± its standard error over the same items."
        )
    else:
        lines.append("Tasks were not scored: `--tasks FOLDER` names their files.")
    types = [
        (row["title"], row["score"]["types"]) for row in result["rows"] if row["score"] and row["score"].get("types")
    ]
    for title, kinds in types:
        lines.append(
            f"{title}: linears of blocks stored as "
            + ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
            + "."
        )
    if any((row["compress"] or {}).get("copied") for row in result["rows"]):
        lines.append(
            "The source is itself a Q4_1 file, and the dense model is what it decodes to: Q4_1 is the dense model by "
            "construction, its KL of 0 says nothing of the method, and every other 4-bit method starts from weights "
            "that 4 bits with a minimum per 32 hold."
        )
    if any("Q5_0" in kinds or "Q8_0" in kinds for title, kinds in types if "Q4_K_M" in title):
        lines.append(
            "Blocks of K-quants hold 256 weights; where they do not divide the inputs, llama.cpp takes Q5_0 or Q8_0 instead."
        )
    return lines


def _about_cost(result: Result) -> list[str]:
    settings, prepared = result["settings"], result["prepared"]
    rounds = max((len(row["speed"]) for row in result["rows"]), default=0)
    return [
        "Compressing: the whole process, from its start to the written files, and the highest heap and shared memory of it and its "
        "children. What a package fetches or compiles once is not counted.",
        f"Tokens per second: {settings['input_len']} tokens in, {settings['output_len']} out, greedy, {prepared['threads']} threads. "
        f"One sequence: after its first token, median of {settings['iterations']} in each of {rounds} rounds over all rows; "
        f"{settings['prompts']} sequences: all at once, answers over the whole time, reading included. In brackets, times the dense "
        "model in vLLM. llama.cpp runs through its own library (llama-cpp-python), vLLM through its benchmarks.",
    ]


def _failures(result: Result) -> list[str]:
    found = []
    for row in result["rows"]:
        for failure in row["failures"]:
            found.append(f"**{row['title']}**, {failure['step']}: {failure['reason']}")
            if failure["log"]:
                found.append("```text\n" + "\n".join(failure["log"]) + "\n```")
    return found


def _commands(result: Result) -> list[str]:
    commands = [f"# {row['title']}\n{row['compress']['command']}" for row in result["rows"] if row["compress"]]
    versions: dict[str, str] = dict(result["prepared"]["versions"])
    told = [f"sparsify's own environment: {_versions(versions)}."]
    for row in result["rows"]:
        if row["compress"] and row["compress"].get("versions"):
            told.append(f"{row['title']}: {_versions(row['compress']['versions'])}.")
    return [
        "```text\n" + "\n\n".join(commands) + "\n```" if commands else "None yet.",
        "\n".join(f"- {line}" for line in told),
    ]


def _versions(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _steps(result: Result) -> list[Mapping[str, Any]]:
    return [step for row in result["rows"] for step in (row["compress"], row["score"], *row["speed"]) if step]


def _name(source: Any) -> str:
    """A file of the record by its name; what is no file as it was given."""
    if isinstance(source, Mapping):
        return ", ".join(source)
    return "text that the dense model writes" if source == "self" else str(source)


if __name__ == "__main__":
    write_page(Path(sys.argv[2]), read_json(sys.argv[1]), Path(sys.argv[1]).name)
