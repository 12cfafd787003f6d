"""Plain text rewritten the way research corpora hold it (Penn Treebank, WikiText, the WMT sets): punctuation stands apart, as
the Moses tokenizer leaves it, and words that are rare are `<unk>`.

Models read much text in this form, and perplexity is often measured on it, yet they hardly write it by themselves. Inputs
that no calibration row holds are directions in which the error of a compressed linear is free to grow.
"""

import re
from collections.abc import Collection, Iterable
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

RARE = 3  # tokens into which a tokenizer splits a word that it saw seldom
UNKNOWN = "<unk>"
_WORD = re.compile(r"[^\W\d_]{4,}")
_RULES = (
    (re.compile(r"\s*\n\s*"), " \n "),
    (re.compile(r"(?<=\w)-(?=\w)"), " @-@ "),
    (re.compile(r"(?<=\d)([,.])(?=\d)"), r" @\1@ "),
    (re.compile(r"(?<=\w)('(?:s|re|ve|d|m|ll)|n't)\b"), r" \1"),
    (re.compile(r"(?<!@)([,;:!?()\[\]\"“”])(?!@)"), r" \1 "),
    (re.compile(r"(?<=[\w)])\.(?=\s|$)"), " ."),
    (re.compile(r" #+ ([^\n]+) \n"), r" = \1 = \n"),
    (re.compile(r" {2,}"), " "),
)


def apart(text: str) -> str:
    """`The well-known 1,200 (or so).` becomes `The well @-@ known 1 @,@ 200 ( or so ) .`"""
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def without_rare_words(text: str, tokenizer: Any) -> str:
    """Words of four letters and more that the tokenizer splits into many tokens become `<unk>`."""
    words = sorted(set(_WORD.findall(text)))
    if not words:
        return text
    split = tokenizer([f" {word}" for word in words], add_special_tokens=False, verbose=False)["input_ids"]
    rare = {word for word, ids in zip(words, split, strict=True) if len(ids) >= RARE}
    return _WORD.sub(lambda match: UNKNOWN if match[0] in rare else match[0], text)


def corpus_rows(tokens: Tensor, tokenizer: Any, marks: Collection[int]) -> Tensor:
    """Rows of documents in the form of a corpus. tokens: int64 [R, S]; returns the same shape.

    Tokens of `marks` stay. The rewritten documents follow each other and are cut into rows again; the form is longer than
    the text, and should it ever be shorter, the first documents fill the end once more."""
    stream: list[int] = []
    for row in tokens.tolist():
        for part in _split(row, marks):
            if len(part) == 1 and part[0] in marks:
                stream += part
                continue
            text = apart(without_rare_words(tokenizer.decode(part), tokenizer))
            stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not stream:
        return tokens
    return torch.tensor(list(islice(cycle(stream), tokens.numel())), dtype=torch.long).reshape(tokens.shape)


def _split(row: Iterable[int], marks: Collection[int]) -> list[list[int]]:
    """The runs of a row between its marks, and the marks, in order."""
    parts: list[list[int]] = []
    fresh = True
    for token in row:
        if token in marks or fresh:
            parts.append([])
        parts[-1].append(token)
        fresh = token in marks
    return parts
