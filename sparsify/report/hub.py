"""A finished checkpoint on the Hugging Face Hub: its model card with the figures that were measured, and the upload."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sparsify.errors import CheckpointError, SparsifyError
from sparsify.evaluation.presets import PRESETS
from sparsify.files import PARTIAL, read_json
from sparsify.manifest import LATER, MANIFEST, manifest_text, read_manifest, verify
from sparsify.report.compare import called, comparison_table, is_dense, models_of
from sparsify.report.figures import as_list
from sparsify.report.parts import Cell, Table

CARD = "README.md"
HEADING = "## Measured"
FRONT = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
SECTION = re.compile(rf"^{HEADING}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
NAME = re.compile(r"[\w.-]+/[\w.-]+")


def card_with_figures(
    card: str,
    name: str,
    evaluations: Sequence[Mapping[str, Any]],
    bench: Sequence[Mapping[str, Any]] = (),
    runs: Sequence[Mapping[str, Any]] = (),
) -> str:
    """A model card with the table of the report, and with the same figures as `model-index` in its metadata, which the Hub shows.

    card: README.md of `sparsify apply`; name: of the model; evaluations, bench, runs: what `eval --json`, `bench --json` and
    `bench serve` wrote, also about other models, which stand in the table alone
    """
    found = FRONT.match(card)
    metadata = yaml.safe_load(found[1]) if found else {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{CARD} begins with metadata that are no mapping; apply the recipe again")
    text = card[found.end() :] if found else card
    rows = [(called(row["model"]), row) for row in as_list(list(evaluations))]
    if results := model_index([row for label, row in rows if label == name and not is_dense(row)]):
        metadata["model-index"] = [{"name": name, "results": results}]
    models = models_of(rows, {}, bench, runs)
    text = SECTION.sub("", text)
    if models:
        section = f"{HEADING}\n\n{markdown(comparison_table(models))}\n\n{_notes(rows)}\n\n"
        at = text.find("## Recipe")
        text = text + f"\n{section}" if at < 0 else text[:at] + section + text[at:]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n{text}"


def model_index(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The results of one model as the Hub's metadata have them (Hub documentation, model cards, `model-index`)."""
    results = []
    for row in rows:
        for text in row["texts"].values():
            if text.get("perplexity") is not None:
                metrics = [{"type": "perplexity", "value": text["perplexity"], "name": "perplexity"}]
                if text.get("kl") is not None:
                    metrics.append({"type": "kl", "value": text["kl"], "name": "KL divergence from the dense model"})
                results.append(_result("Language modeling", "text", str(text["text"]), metrics))
        for score in (row.get("tasks") or {}).values():
            shots = f"{score.get('fewshot', 0)} shots"
            metrics = [
                {"type": score.get("metric", "acc_norm"), "value": score["accuracy"], "name": f"accuracy, {shots}"}
            ]
            if score.get("recovery") is not None:
                metrics.append({"type": "recovery", "value": score["recovery"], "name": "accuracy / dense accuracy"})
            known = next((one for one in PRESETS.get(row.get("preset") or "", ()) if one.name == score["task"]), None)
            kind = known.data[0] if known else score["task"]
            place = {"config": known.data[1], "split": known.scored} if known else {}
            results.append(_result("Tasks", kind, score["task"], metrics, place))
    return results


def _result(
    task: str, kind: str, data: str, metrics: list[dict[str, Any]], place: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """kind: the id of the dataset on the Hub, where it is there; place: its subset and split"""
    return {
        "task": {"type": "text-generation", "name": task},
        "dataset": {"type": kind, "name": data, **{key: value for key, value in (place or {}).items() if value}},
        "metrics": metrics,
    }


def markdown(table: Table) -> str:
    """A table of the report for a page in Markdown."""

    def cell(value: str | Cell) -> str:
        text = value if isinstance(value, str) else f"{value.text} ({value.sub})" if value.sub else value.text
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join(f"| {' | '.join(cell(value) for value in line)} |" for line in lines)


def _notes(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """How the figures came about."""
    notes = []
    for text in {name: text for _, row in rows for name, text in row["texts"].items()}.values():
        notes.append(f"{text['text']}: {text['tokens']} tokens in chunks of {text['sequence_length']}, float32.")
    tasks = {name: score for _, row in rows for name, score in (row.get("tasks") or {}).items()}
    if tasks:
        counts = ", ".join(
            f"{name} ({score['items']} items, {score.get('fewshot', 0)} shots, {score.get('metric', 'acc_norm')})"
            for name, score in tasks.items()
        )
        notes.append(
            f"Tasks, by lm-evaluation-harness: {counts}. Recovery is the mean accuracy as a part of the dense model's; in brackets "
            "95% of a bootstrap over the items, paired with the dense model."
        )
    return " ".join(notes)


def push(
    directory: str | Path,
    repository: str,
    evaluations: Sequence[Mapping[str, Any]] = (),
    bench: Sequence[Mapping[str, Any]] = (),
    runs: Sequence[Mapping[str, Any]] = (),
    private: bool = False,
    message: str | None = None,
) -> dict[str, Any]:
    """Upload a finished checkpoint in one commit, after every file was compared with its SHA-256.

    repository: ORG/NAME, made where it is not there; evaluations, bench, runs: of `card_with_figures`, for the model card, which
    otherwise has the evaluation of metrics.json. The directory itself is not changed: the card and the manifest that lists it are
    written on the way. Raises CheckpointError for a directory that is unfinished or damaged.
    """
    directory = Path(directory)
    if not NAME.fullmatch(repository):
        raise SparsifyError(f"{repository!r} is no name on the Hub; give ORG/NAME")
    refuse_unfinished(directory)
    digests = read_manifest(directory)
    metrics = read_json(directory / "metrics.json") if "metrics.json" in digests else {}
    name = called(directory.resolve())
    given = [*evaluations] or [{**row, "model": name} for row in as_list(metrics.get("evaluation"))]
    files: dict[str, bytes | Path] = {one: directory / one for one in digests}
    files |= {one: directory / one for one in LATER if (directory / one).is_file()}
    if CARD in digests:
        card = card_with_figures((directory / CARD).read_text(encoding="utf-8"), name, given, bench, runs).encode()
        files[CARD] = card
        digests[CARD] = {hashlib.sha256(card).hexdigest()}
    files[MANIFEST] = os.fsencode(manifest_text(digests))
    return _upload(files, repository, private, message or f"{name}, compressed by sparsify")


def refuse_unfinished(directory: Path) -> None:
    """CheckpointError where a directory is not a finished one of ours with every file as it was written."""
    if directory.name.endswith(PARTIAL) or (
        directory.with_name(directory.name + PARTIAL).exists() and not directory.exists()
    ):
        raise CheckpointError(
            f"{directory} is of a run that has not finished; finish it with --resume before it is pushed"
        )
    found = verify(directory)
    if not found.good:
        what = found.describe().splitlines()[0]
        raise CheckpointError(
            f"{directory} is not pushed: {what}; `sparsify verify {directory}` names everything that is not as it was written"
        )
    if "config.json" not in read_manifest(directory):
        raise CheckpointError(f"{directory} has no config.json: it is no checkpoint")


def _upload(files: Mapping[str, bytes | Path], repository: str, private: bool, message: str) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    from sparsify.progress import stage

    api = HfApi(library_name="sparsify")
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in sorted(files.items())
    ]
    try:
        with stage(f"pushing {len(operations)} files to {repository}"):
            api.create_repo(repository, private=private or None, exist_ok=True)  # None: as the organization has it
            done = api.create_commit(repository, operations, commit_message=message)
    except (LocalTokenNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = (
            "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
            if status in (401, 403)
            else ""
        )
        raise SparsifyError(
            f"{repository}: the Hub did not take it ({reason})" + (f"; {hint}" if hint else "")
        ) from error
    return {"repository": repository, "files": len(operations), "commit": done.oid, "url": done.commit_url}
