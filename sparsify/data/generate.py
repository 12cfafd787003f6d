"""Calibration text that the model writes itself, so that no data set is needed.

Sampling at temperature 1 from the model's own distribution: Liu et al. 2023 (LLM-QAT, arXiv:2305.17888, section 3.1) and
Williams et al. 2024 (self-calibration, arXiv:2410.17170). Nothing is cut off the distribution (no top-k, no top-p):
truncated sampling falls into loops, full sampling does not, and the text then has the statistics the model was trained on.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from sparsify.errors import CalibrationError
from sparsify.progress import progress_bar

CACHE_BYTES = 2 << 30  # keys and values of one batch stay below this
MAX_BATCH = 128
WORK_PER_THREAD = 4e9  # multiply-adds of one step below which a further thread waits more than it computes
DRAW_ROWS = 16  # rows drawn at once: bounds the float64 copies of the vocabulary


class _RoomyLayer(DynamicLayer):
    """Keys and values in a buffer of the final length. DynamicLayer copies all of them for every new token, which at
    batch 128 takes longer than the model."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.used = length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.key_buffer = key_states.new_empty(*key_states.shape[:2], self.length, key_states.shape[-1])
        self.value_buffer = value_states.new_empty(*value_states.shape[:2], self.length, value_states.shape[-1])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """key_states, value_states: [B, H, new, D]. Returns all keys and values so far: [B, H, used, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.used + key_states.shape[2]
        self.key_buffer[:, :, self.used : end] = key_states
        self.value_buffer[:, :, self.used : end] = value_states
        self.used = end
        self.keys, self.values = self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]
        return self.keys, self.values


@torch.inference_mode()
def sample_rows(
    model: Any,
    samples: int,
    sequence_length: int,
    seed: int,
    opening: int | None,
    endings: Collection[int] = (),
    quiet: bool = False,
) -> Tensor:
    """Text sampled by `model`. Returns int64 [samples, sequence_length], full rows without padding.

    Every row starts with the token `opening` (without one, with a token drawn uniformly). After a token of `endings` the
    document is over and a fresh one is opened in the same row, as documents follow each other in pretraining; it sees the
    one before, exactly as it will when the row runs through the model for calibration.

    One uniform number per token decides (inverse transform sampling), drawn ahead from `seed`, so the text does not depend
    on how rows are batched, up to the rounding of the model's own arithmetic.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(samples, sequence_length, generator=generator, dtype=torch.float64)
    batches = draws.split(batch_size(model.config, samples, sequence_length))
    was_training, threads = model.training, torch.get_num_threads()
    model.eval()
    torch.set_num_threads(useful_threads(threads, len(batches[0]) * model.num_parameters()))
    try:
        with progress_bar("sampling calibration text", total=len(batches) * sequence_length, quiet=quiet) as bar:
            return torch.cat([_sample_batch(model, batch, opening, endings, bar.advance) for batch in batches])
    finally:
        torch.set_num_threads(threads)
        model.train(was_training)


def useful_threads(available: int, work: float) -> int:
    """Threads for a step of so many multiply-adds. A step is hundreds of short kernels, and threads meet after each: with
    another process on the same cores, two threads took seven times as long as one for 32 rows of a 135M model."""
    return max(1, min(available, int(work / WORK_PER_THREAD)))


def batch_size(config: Any, samples: int, sequence_length: int) -> int:
    """As many rows at once as keep the keys and values of a batch within bounds, split evenly."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    row = 2 * 2 * text.num_hidden_layers * heads * head * sequence_length
    batches = -(-samples // max(1, min(MAX_BATCH, CACHE_BYTES // row)))
    return -(-samples // batches)


def _sample_batch(
    model: Any, draws: Tensor, opening: int | None, endings: Collection[int], advance: Callable[[], None]
) -> Tensor:
    """draws: [B, S] in [0, 1). Returns tokens [B, S] on the CPU."""
    length = draws.shape[1]
    draws = draws.to(model.device)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    openings = (draws * vocabulary).long() if opening is None else torch.full_like(draws, opening, dtype=torch.long)
    # Many models open a document with the token that ended the one before; it must not be doubled.
    ends = torch.tensor([token for token in endings if token != opening], dtype=torch.long, device=model.device)
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    tokens = openings.clone()
    for column in range(1, length):
        last = tokens[:, column - 1]
        logits = model(input_ids=last[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
        drawn = inverse_transform(logits, draws[:, column])
        tokens[:, column] = torch.where(torch.isin(last, ends), openings[:, column], drawn)
        advance()
    advance()
    return tokens.cpu()


def inverse_transform(logits: Tensor, u: Tensor) -> Tensor:
    """The token at which the cumulative probability passes u. logits: [B, V], u: [B] float64 in [0, 1). Returns [B]."""
    drawn = []
    for some_logits, some_u in zip(logits.split(DRAW_ROWS), u.split(DRAW_ROWS), strict=True):
        cumulative = torch.softmax(some_logits.double(), -1).cumsum(-1)
        total = cumulative[:, -1:]
        if not torch.isfinite(total).all():
            raise CalibrationError(
                "the model cannot write calibration text: its logits are NaN or infinite; check the checkpoint, "
                "or calibrate on a text with calibration.source=file:PATH"
            )
        drawn.append(torch.searchsorted(cumulative, some_u[:, None] * total, right=True)[:, 0])
    return torch.cat(drawn).clamp_(max=logits.shape[1] - 1)
