"""Conversations as training rows: the tokens of the chat template, and which of them the assistant says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.data.files import RECORD_FILES, file_records, hub_records, refuse_other_kind
from sparsify.data.fitting import refuse_beyond, refuse_surrogates
from sparsify.errors import CalibrationError
from sparsify.recipe import Columns
from sparsify.recipe.sources import parse_source

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
IGNORED = -100  # a label that does not count, as everywhere in transformers


def conversation_rows(
    data: str,
    columns: Columns | None,
    tokenizer: Any,
    sequence_length: int,
    samples: int | None,
    seed: int,
    vocabulary: int | None = None,
) -> list[dict[str, Tensor]]:
    """One row per conversation, cut to `sequence_length`: input_ids int64 [T]; labels int64 [T], the next token where the
    assistant says it and IGNORED elsewhere.

    A conversation whose answers lie beyond the cut has nothing to teach and is left out. CalibrationError when a record is
    no conversation, none is left, or one holds a token beyond the `vocabulary` of the model.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            "the model's tokenizer has no chat template, so it is not known how conversations look to it; "
            "fine-tune the instruct version of the model"
        )
    rows: list[dict[str, Tensor]] = []
    read = 0
    for place, record in conversations(data, seed):
        if samples is not None and read == samples:
            break
        read += 1
        ids, by_assistant = render(tokenizer, messages_of(record, columns, place), place)
        refuse_beyond(ids[:sequence_length], vocabulary, tokenizer, place)
        row = training_row(ids[:sequence_length], by_assistant[:sequence_length])
        if (row["labels"] != IGNORED).any():
            rows.append(row)
    if not rows:
        why = f"none of its {read} conversations has an answer within {sequence_length} tokens; raise sequence_length"
        raise CalibrationError(f"{data}: {why if read else 'it holds no conversation'}")
    return rows


def conversations(data: str, seed: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, record) of each record, with all its fields."""
    source = parse_source(data)
    if source.kind == "hub":
        return hub_records(source, seed)
    path = source.path
    assert path is not None
    refuse_other_kind(path)
    if not path.is_file():
        raise CalibrationError(f"{path} does not exist (looked in {Path.cwd()}); give the path of the conversations")
    if path.suffix.lower() not in RECORD_FILES:
        raise CalibrationError(
            f"{path} is neither .jsonl nor .parquet; "
            'write one {"messages": [{"role": "user", "content": "..."}, ...]} per line'
        )
    return file_records(path, whole=True)


def messages_of(record: Mapping[str, Any], columns: Columns | None, place: str) -> list[dict[str, str]]:
    """The conversation of a record: its messages, or a prompt and an answer in the fields that `columns` names."""
    if columns is not None:
        missing = [name for name in (columns.prompt, columns.answer) if not isinstance(record.get(name), str)]
        if missing:
            raise CalibrationError(
                f"{place} has no text '{missing[0]}'; it has {', '.join(map(str, record)) or 'nothing'}"
            )
        return [
            {"role": "user", "content": record[columns.prompt]},
            {"role": "assistant", "content": record[columns.answer]},
        ]
    messages = record.get("messages")
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            messages = None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise CalibrationError(
            f"{place} holds {', '.join(map(str, record)) or 'nothing'}, no list of messages; "
            "name its fields with columns: {prompt: ..., answer: ...}"
        )
    if not any(message.get("role") == "assistant" for message in messages):
        raise CalibrationError(f"{place}: nothing in it is said by the assistant, so there is nothing to learn")
    return messages


def render(tokenizer: Any, messages: list[dict[str, str]], place: str) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and for each whether the assistant says it.

    Templates that mark the assistant's part themselves ({% generation %}) are asked. For others, an answer is what the
    conversation up to it adds to the prompt before it, end mark included: characters of one rendering, which is tokenised
    once, since text that is tokenised in pieces may not be what the model will see.
    """
    refuse_surrogates(messages, place)
    if not getattr(tokenizer, "is_fast", False):
        raise CalibrationError(
            "fine-tuning needs a fast tokenizer (tokenizer.json), which knows where each token stands"
        )
    try:
        if MARKED.search(tokenizer.get_chat_template()):
            encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return list(encoded["input_ids"]), [bool(one) for one in encoded["assistant_masks"]]
        text = _text(tokenizer, messages)
        spans = [
            _answer(tokenizer, messages, index, text, place)
            for index, message in enumerate(messages)
            if message.get("role") == "assistant"
        ]
    except CalibrationError:
        raise
    except (
        Exception
    ) as error:  # templates are programs that come with the model: whatever they raise is about the record
        raise CalibrationError(f"{place}: the chat template refuses these messages ({error})") from None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    by_assistant = [
        any(start < span_end and end > span_start for span_start, span_end in spans)
        for start, end in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), by_assistant


def _answer(tokenizer: Any, messages: list[dict[str, str]], index: int, text: str, place: str) -> tuple[int, int]:
    """Where in `text`, the whole conversation, the answer stands that is message `index`."""
    before = _text(tokenizer, messages[:index], add_generation_prompt=True)
    after = _text(tokenizer, messages[: index + 1]).rstrip()  # a line break after the end mark is never generated
    if not (text.startswith(after) and after.startswith(before)):
        raise CalibrationError(
            f"{place}: the chat template shows turn {index + 1} differently in a longer conversation, so its answer "
            "cannot be found; give conversations of one answer, or a template with {% generation %}"
        )
    return len(before), len(after)


def _text(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def training_row(ids: Iterable[int], by_assistant: Iterable[bool]) -> dict[str, Tensor]:
    """Inputs and next-token labels: a token that the assistant says is what its predecessor has to predict."""
    tokens = torch.tensor(list(ids), dtype=torch.long)
    labels = torch.where(torch.tensor(list(by_assistant), dtype=torch.bool), tokens, IGNORED)
    return {"input_ids": tokens, "labels": torch.cat([labels[1:], torch.full((1,), IGNORED)])}
