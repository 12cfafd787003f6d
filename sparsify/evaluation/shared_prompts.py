"""Log-likelihoods of the answers to a prompt, where several answers have one prompt and it is computed once.

lm-evaluation-harness computes every answer together with its prompt: multiple choice of four answers computes each prompt four
times. Here the keys and values of a prompt are kept and every answer attends to them. Prompts of equal length are computed
together, so that nothing is padded in front of an answer.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin

TOKENS = 2048  # of prompts and their answers that are computed together
LOGITS = 512  # tokens of answers in one forward pass, for each of which there are all logits
FEW = 64  # tokens of a pass to which shorter answers are added whatever their length
LIKE = 0.75  # how long an answer is at least, relative to the longest of its pass, where it is not
TOLERANCE = 0.01  # by which a log-likelihood may differ from the harness's, absolutely and relatively

Request = tuple[tuple[str, str], list[int], list[int]]  # prompt and answer as text, their tokens
Score = tuple[float, bool]  # log-likelihood, whether greedy decoding gives this answer


class Prompt(NamedTuple):
    """Tokens of a prompt, and the answers to it by the number of their request."""

    tokens: tuple[int, ...]
    answers: dict[int, list[int]]

    @property
    def longest(self) -> int:
        return max(map(len, self.answers.values()))

    @property
    def size(self) -> int:
        """Tokens of it and its answers."""
        return len(self.tokens) + sum(map(len, self.answers.values()))


class Row(NamedTuple):
    """An answer: the number of its request and of its prompt in the pass, and its tokens."""

    number: int
    prompt: int
    tokens: list[int]


class SharedPrompts:
    """What lets the harness's model of transformers compute a prompt once for all answers to it; goes before its `HFLM`.

    Where a layer keeps anything but keys and values (a recurrent state is not continued by several tokens in every
    implementation), where no prompt is shared, and where two prompts that are computed both ways differ, the harness computes.
    """

    model: Any  # these four are the harness's
    device: Any
    max_length: int
    cache_hook: Any

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False, **options: Any) -> list[Score]:
        prompts = by_prompt(requests, self.max_length)
        passes = list(batches(prompts))
        if len(prompts) == len(requests) or not self._agrees(requests, passes):
            return super()._loglikelihood_tokens(  # type: ignore[misc]
                requests, disable_tqdm=disable_tqdm, **options
            )
        scores: dict[int, Score] = {}
        for batch in passes:
            found = self._score(batch)
            assert found is not None  # _agrees had an answer
            scores |= found
            for number, one in found.items():
                self.cache_hook.add_partial("loglikelihood", requests[number][0], one)
        return [scores[number] for number in range(len(requests))]

    def _agrees(self, requests: list[Request], passes: list[list[Prompt]]) -> bool:
        """Whether two of the shortest prompts that an answer's own tokens continue are scored as by the harness."""
        continued = [batch for batch in passes if any(prompt.longest > 1 for prompt in batch)]
        mine = self._score((continued or passes)[-1][:2])
        if mine is None:
            return False
        unnamed = [(None, *requests[number][1:]) for number in mine]  # so that the hook is not told of them
        theirs = super()._loglikelihood_tokens(unnamed, disable_tqdm=True)  # type: ignore[misc]
        # NaN is for the caller to refuse, wherever it comes from
        return not any(
            abs(one - other) > TOLERANCE * (1 + abs(other))
            for (one, _), (other, _) in zip(mine.values(), theirs, strict=True)
        )

    @torch.inference_mode()
    def _score(self, prompts: list[Prompt]) -> dict[int, Score] | None:
        """Score all answers to prompts of one length by their requests' numbers; None where keys and values cannot be continued."""
        ids = torch.tensor([prompt.tokens for prompt in prompts], device=self.device)
        found = self.model(input_ids=ids, use_cache=True, **self._last_only)
        kept: Any = getattr(found, "past_key_values", None)
        if not keeps_only_keys(kept):
            return None
        scores = {}
        for rows in of_like_lengths(prompts):
            owners = torch.tensor([row.prompt for row in rows], device=self.device)
            tokens = pad_sequence([torch.tensor(row.tokens) for row in rows], batch_first=True, padding_value=-1)
            tokens = tokens.to(self.device)
            logits = found.logits[:, -1:].index_select(0, owners)
            if tokens.shape[1] > 1:
                own = deepcopy(kept)  # a pass appends its keys to it
                own.reorder_cache(owners)
                answers = tokens[:, :-1].clamp(min=0)
                more = self.model(input_ids=answers, past_key_values=own, use_cache=True).logits
                logits = torch.cat([logits, more], 1)
            likely, greedy = score(logits, tokens)
            for row, one, greediest in zip(rows, likely.tolist(), greedy.tolist(), strict=True):
                scores[row.number] = (one, greediest)
        return scores

    @property
    def _last_only(self) -> dict[str, int]:
        """What asks this model for the logits of the last token alone."""
        return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}


def score(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihood [rows] of the tokens [rows, T] of each row under logits [rows, T, V], and whether all of them have the
    greatest logit. Tokens of -1 are not there."""
    logits, given = logits.float(), tokens >= 0
    likely = logits.gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    return likely.where(given, 0).sum(1), ((logits.argmax(-1) == tokens) | ~given).all(1)


def keeps_only_keys(kept: Any) -> bool:
    """Whether a cache holds keys and values of attention in every layer, and nothing else."""
    return isinstance(kept, Cache) and all(
        isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in kept.layers
    )


def by_prompt(requests: list[Request], positions: int) -> list[Prompt]:
    """The distinct prompts, longest first, one that does not fit before its answer without its beginning, as the harness cuts it."""
    found: dict[tuple[int, ...], dict[int, list[int]]] = defaultdict(dict)
    for number, (_, before, after) in enumerate(requests):
        found[tuple(before[-(positions + 1 - len(after)) :])][number] = after
    prompts = [Prompt(*one) for one in found.items()]
    return sorted(prompts, key=lambda prompt: (-len(prompt.tokens), -prompt.longest))


def batches(prompts: list[Prompt]) -> Iterator[list[Prompt]]:
    """Prompts of equal length that have at most TOKENS tokens with their answers, or single ones."""
    batch: list[Prompt] = []
    for prompt in prompts:
        like = batch and len(batch[0].tokens) == len(prompt.tokens)
        if batch and (not like or sum(one.size for one in batch) + prompt.size > TOKENS):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def of_like_lengths(prompts: list[Prompt]) -> Iterator[list[Row]]:
    """The answers to some prompts, longest first, in passes of at most LOGITS tokens or one answer, with little padding."""
    rows = [
        Row(number, index, tokens) for index, prompt in enumerate(prompts) for number, tokens in prompt.answers.items()
    ]
    rows.sort(key=lambda row: -len(row.tokens))
    some: list[Row] = []
    for row in rows:
        longest = len(some[0].tokens) if some else 0
        short = len(row.tokens) < LIKE * longest and len(some) * longest >= FEW
        if some and (short or (len(some) + 1) * longest > LOGITS):
            yield some
            some = []
        some.append(row)
    if some:
        yield some
