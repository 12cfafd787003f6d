"""Rows of text that the model writes itself, so that no data set is needed: more than asked for, of which the best are kept."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
from torch import Tensor

from sparsify.data.fitting import refuse_beyond
from sparsify.data.mixture import interleave
from sparsify.data.self_generated.prompts import chat_script, chat_turns, document_mark, documents_script, endings_of
from sparsify.data.self_generated.ptb_style import corpus_rows
from sparsify.data.self_generated.sample import Script, Temperature, sample_rows
from sparsify.errors import CalibrationError
from sparsify.recipe.schema import SelfText
from sparsify.recipe.sources import shares

CHAT_SHARE = 0.25  # where the model has a chat template and the recipe says nothing
NGRAM = 4
LEAST_DISTINCT = 0.5  # prose of 512 tokens repeats a tenth of its 4-grams; a loop nearly all


def own_rows(
    model: Any, tokenizer: Any, samples: int, sequence_length: int, seed: int, options: SelfText, quiet: bool = False
) -> Tensor:
    """Returns int64 [samples, sequence_length]: conversations and plain documents in the proportion of `options`."""
    turns = chat_turns(tokenizer)
    if options.chat and turns is None:
        raise CalibrationError(
            "calibration.self.chat asks for conversations but the model's tokenizer has no chat template whose turns end in "
            "a special token; set it to 0, or use the instruct version of the model"
        )
    share = (CHAT_SHARE if turns is not None else 0.0) if options.chat is None else options.chat
    kept = shares(samples, [share, 1 - share])
    written = [math.ceil(count * options.candidates) for count in kept]
    mark = document_mark(tokenizer, turns)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    given = [] if turns is None else [*turns.first, *turns.answer, *turns.further]
    refuse_beyond(given, vocabulary, tokenizer, "the chat template")
    refuse_beyond([] if mark is None else [mark], vocabulary, tokenizer, "the beginning of a document")

    def script(row: int) -> Script:
        random = Random(f"{seed} {row}")  # of its own per row, so that the text does not depend on the batching
        if row < written[0] and turns is not None:
            return chat_script(turns, random)
        return documents_script(tokenizer, mark, vocabulary, options.openings, random)

    for row in range(sum(written)):  # what the model is to go on from, before it writes for minutes
        refuse_beyond(
            next(iter(script(row))).tokens, vocabulary, tokenizer, "calibration.self, the beginning of a text,"
        )
    marks = endings_of(tokenizer, model, mark, turns)
    heats = [heat for count in written for heat in _evenly(options.coolest, options.temperature, count)]
    tokens, likelihood = sample_rows(
        model,
        [script(row) for row in range(sum(written))],
        sequence_length,
        seed,
        marks,
        [Temperature(options.first_temperature, heat, options.first_tokens) for heat in heats],
        quiet,
    )
    kinds = zip(tokens.split(written), likelihood.split(written), kept, strict=True)
    chats, plain = (rows[best_rows(rows, likely, count)] for rows, likely, count in kinds)
    corpus, _ = shares(len(plain), [options.corpora, 1 - options.corpora])
    of_corpus = torch.arange(len(plain)) * corpus // max(len(plain), 1)  # spread evenly over the temperatures
    chosen = torch.diff(of_corpus, append=torch.tensor([corpus])) > 0
    rewritten = corpus_rows(plain[chosen], tokenizer, {*marks, *([] if mark is None else [mark])})
    return interleave([chats, rewritten, plain[~chosen]], seed)


def _evenly(low: float, high: float, count: int) -> list[float]:
    """`count` values from the middle of as many equal parts of [low, high]."""
    return [low + (high - low) * (index + 0.5) / count for index in range(count)]


def best_rows(tokens: Tensor, likelihood: Tensor, count: int) -> Tensor:
    """Which `count` rows to keep, ascending. Rows that loop go first, then those that the model itself finds least likely: a
    small model that has lost the thread knows it.

    tokens: [R, S]; likelihood: [R], mean log-likelihood per token. Returns int64 [count]."""
    looping = distinct_ngrams(tokens) < LEAST_DISTINCT
    order = sorted(range(len(tokens)), key=lambda row: (bool(looping[row]), -float(likelihood[row])))
    return torch.tensor(sorted(order[:count]), dtype=torch.long)


def distinct_ngrams(tokens: Tensor, n: int = NGRAM) -> Tensor:
    """The share of each row's n-grams that differ from all others of the row. tokens: [R, S]. Returns float64 [R]."""
    n = min(n, tokens.shape[1])
    grams = tokens.unfold(1, n, 1)  # [R, S-n+1, n]
    counts = [len(set(map(tuple, row))) for row in grams.tolist()]
    return torch.tensor(counts, dtype=torch.float64) / grams.shape[1]
