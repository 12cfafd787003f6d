"""Records become rows of tokens: each record one document, documents one after another, cut into full rows."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsify.data.files import FIELDS
from sparsify.data.fitting import refuse_surrogates
from sparsify.errors import CalibrationError


def tokenize(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Token ids of a text of any length; without `special` no begin or end marks are added."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def documents(records: Iterable[tuple[str, Mapping[str, Any]]], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each record, ended by the tokenizer's end-of-text token so that documents stay apart."""
    for place, record in records:
        refuse_surrogates([record.get(field) for field in FIELDS], place)
        if record.get("messages") is not None:
            yield tokenize(tokenizer, _chat(tokenizer, record["messages"], place), special=False)
        elif isinstance(text := record.get("text"), str):
            ids = tokenize(tokenizer, text)
            end = tokenizer.eos_token_id
            yield ids if end is None or not ids or ids[-1] == end else [*ids, end]
        else:
            found = ", ".join(map(str, record)) or "nothing"
            raise CalibrationError(
                f"{place} holds {found}; a record needs one of {' or '.join(FIELDS)} ('text' as a string)"
            )


def _chat(tokenizer: Any, messages: Any, place: str) -> str:
    """The conversation as the model was trained to see it."""
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{place} holds chat messages but the model's tokenizer has no chat template; "
            f"use records with 'text', or the instruct version of the model"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except (
        Exception
    ) as error:  # templates are programs that come with the model: whatever they raise is about the record
        raise CalibrationError(f"{place}: the chat template refuses these messages ({error})") from None


def rows_of(ids: Iterable[list[int]], samples: int, sequence_length: int, name: str, short: bool = False) -> Tensor:
    """The first `samples` consecutive full rows of the concatenated documents. Returns int64 [samples, sequence_length].

    Reads no further than it must, and says how far a text that is too short would reach. short: such a one gives the rows
    that it holds, if that is any."""
    wanted = samples * sequence_length
    stream: list[int] = []
    for document in ids:
        stream += document
        if len(stream) >= wanted:
            return torch.tensor(stream[:wanted], dtype=torch.long).reshape(samples, sequence_length)
    rows = len(stream) // sequence_length
    if short and rows:
        return torch.tensor(stream[: rows * sequence_length], dtype=torch.long).reshape(rows, sequence_length)
    options = [f"lower calibration.samples to {rows}"] if rows else []
    if (shorter := len(stream) // samples) >= 2:
        options.append(f"lower calibration.sequence_length to {shorter}")
    raise CalibrationError(
        f"{name} holds {len(stream)} tokens, which make {rows} samples of {sequence_length}, but {samples} were asked for; "
        f"give more text{''.join(f' or {option}' for option in options)}"
    )
