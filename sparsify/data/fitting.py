"""Text that a model cannot read: tokens that its embedding lacks, characters that are none. Named before anything computes."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparsify.errors import CalibrationError


def vocabulary_of(config: Any) -> int | None:
    """How many tokens the embedding of a transformers config has, where it says so."""
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def context_of(config: Any) -> int | None:
    """How many tokens a model has positions for, where its config says so. Rotary positions go beyond, tables do not."""
    text = config.get_text_config(decoder=True)
    sizes = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def refuse_beyond(tokens: Tensor | Sequence[int], vocabulary: int | None, tokenizer: Any, place: str) -> None:
    """Refuse token ids that the embedding does not have.

    tokenizer: None where the ids were given as such; place: the text they come from
    """
    if vocabulary is None or not len(tokens):
        return
    least, most = (int(tokens.min()), int(tokens.max())) if isinstance(tokens, Tensor) else (min(tokens), max(tokens))
    if least >= 0 and most < vocabulary:
        return
    if tokenizer is None:
        raise CalibrationError(
            f"{place} holds the token ids {least} to {most}, the model knows 0 to {vocabulary - 1}; "
            "were they made by another tokenizer?"
        )
    wrong = least if least < 0 else most
    token = tokenizer.convert_ids_to_tokens(wrong) if wrong >= 0 else None
    raise CalibrationError(
        f"{place} holds the token {token!r} with the id {wrong}, but the embedding of the model has {vocabulary} rows "
        f"(ids 0 to {vocabulary - 1}); take the tokenizer that belongs to the model, or that token out of the text"
    )


def refuse_surrogates(value: Any, place: str) -> None:
    """Refuse text, or nested lists and mappings of text, with half of a UTF-16 pair, which no tokenizer and no file takes."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise CalibrationError(
                f"{place} holds half of a surrogate pair (\\u{ord(value[error.start]):04x} at character {error.start} of a "
                "text), which is no character; repair the record or leave it out"
            ) from None
    elif isinstance(value, Mapping):
        for key, one in value.items():
            refuse_surrogates(key, place)
            refuse_surrogates(one, place)
    elif isinstance(value, list | tuple):
        for one in value:
            refuse_surrogates(one, place)
