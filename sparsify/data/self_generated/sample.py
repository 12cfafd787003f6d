"""Sampling text from a model: rows that are always full, of documents and turns that others have opened.

Nothing is cut off the model's distribution (no top-k, no top-p): truncated sampling falls into loops, full sampling does
not, and the text then has the statistics that the model was trained on (Liu et al. 2023, LLM-QAT, arXiv:2305.17888,
section 3.1). Only the first tokens after an opening are drawn hotter, which spreads the subjects, and the temperature then
falls in a straight line (Carlini et al. 2021, arXiv:2012.07805, section 4.1; Williams et al. 2024, arXiv:2410.17170).
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer

from sparsify.errors import CalibrationError
from sparsify.model.attention import tiled_attention
from sparsify.model.pretrained import setting
from sparsify.progress import progress_bar

CACHE_BYTES = 2 << 30  # keys and values of one batch stay below this
MAX_BATCH = 128
GPU_FACTOR = 4  # on a GPU both bounds are so many times higher: a step of 128 rows of a small model leaves it idle
# Multiply-adds of one step below which a further thread waits more than it computes: in 16 bits with fast products, and in
# float32, where a core takes at least four times as long for each.
WORK_PER_THREAD = {2: 4e9, 4: 1e9}
CPU = torch.device("cpu")
DRAW_ROWS = 16  # rows drawn at once: so many probabilities of a vocabulary stay in a cache
RUN = 256  # tokens whose probabilities are summed first; only those of the run that is drawn are added up one by one


@dataclass(frozen=True)
class Segment:
    """Tokens that are given, not sampled: they open a document or a turn. varied: what follows starts hot."""

    tokens: tuple[int, ...]
    varied: bool = False


Script = Iterator[Segment]
"""What one row is made of: its first segment, then the one after each ending that the model writes. Never runs out."""


@dataclass(frozen=True)
class Temperature:
    """`first` for the first token after a varied segment, falling in a straight line to `then` within `tokens` tokens."""

    first: float = 1.0
    then: float = 1.0
    tokens: int = 0

    def at(self, token: int, varied: bool) -> float:
        if not varied or token >= self.tokens:
            return self.then
        return self.first + (self.then - self.first) * token / self.tokens


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


class _Row:
    """Where one row stands: given tokens that wait, and how many were sampled since."""

    def __init__(self, script: Script, temperature: Temperature) -> None:
        self.script, self.temperature = script, temperature
        self.sampled = 0
        self.varied = False
        self.waiting: deque[int] = deque()
        self.open(None)

    def open(self, ending: int | None) -> None:
        """Take the next segment. Many models open a document with the token that ended the one before, and most chat
        templates go on with the token that ended the turn: it is not doubled."""
        segment = next(self.script)
        doubled = ending is not None and segment.tokens[:1] == (ending,)
        self.waiting.extend(segment.tokens[doubled:])
        self.varied, self.sampled = segment.varied, 0


@torch.inference_mode()
@tiled_attention()
def sample_rows(
    model: Any,
    scripts: Sequence[Script],
    sequence_length: int,
    seed: int,
    endings: Collection[int] = (),
    temperatures: Sequence[Temperature] | None = None,
    quiet: bool = False,
) -> tuple[Tensor, Tensor]:
    """Text that `model` samples, one row per script, each at its temperature (1 when none are given).

    Returns the tokens, int64 [rows, sequence_length], full rows without padding, and the mean log-likelihood of the sampled
    ones under the model at temperature 1, float64 [rows] (0 where nothing was sampled).

    After a token of `endings` the script opens the next document or turn in the same row, as documents follow each other
    in pretraining; it sees the ones before, exactly as it will when the row runs through the model for calibration.

    One uniform number per token decides (inverse transform sampling), drawn ahead from `seed`, so the text does not depend
    on how rows are batched, up to the rounding of the model's own arithmetic.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(scripts), sequence_length, generator=generator, dtype=torch.float64)
    some = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    batches = draws.split(batch_size(model.config, len(scripts), sequence_length, some.device, some.dtype.itemsize))
    rows = iter(zip(scripts, temperatures or [Temperature()] * len(scripts), strict=True))
    was_training, threads = model.training, torch.get_num_threads()
    model.eval()
    torch.set_num_threads(useful_threads(threads, len(batches[0]) * model.num_parameters(), some.dtype))
    try:
        total = len(batches) * sequence_length
        with progress_bar("sampling calibration text", total=total, quiet=quiet) as bar:
            written = [
                _sample_batch(model, list(islice(rows, len(batch))), batch, frozenset(endings), bar.advance)
                for batch in batches
            ]
    finally:
        torch.set_num_threads(threads)
        model.train(was_training)
    return torch.cat([tokens for tokens, _ in written]), torch.cat([likelihood for _, likelihood in written])


def useful_threads(available: int, work: float, dtype: torch.dtype = torch.bfloat16) -> int:
    """Threads for a step of so many multiply-adds. A step is hundreds of short kernels, and threads meet after each: with
    another process on the same cores, two threads took seven times as long as one for 32 rows of a 135M model."""
    return max(1, min(available, int(work / WORK_PER_THREAD[min(dtype.itemsize, 4)])))


def batch_size(config: Any, samples: int, sequence_length: int, device: torch.device = CPU, itemsize: int = 2) -> int:
    """As many rows at once as keep the keys and values of a batch within bounds, split evenly.

    itemsize: bytes of one of their numbers

    On a GPU the bounds are higher, as far as half of its free memory goes."""
    most, room = MAX_BATCH, CACHE_BYTES
    if device.type == "cuda":
        most, room = GPU_FACTOR * most, min(GPU_FACTOR * room, torch.cuda.mem_get_info(device)[0] // 2)
    text = config.get_text_config(decoder=True)
    heads = setting(text, "num_key_value_heads") or setting(text, "num_attention_heads")
    head = setting(text, "head_dim") or text.hidden_size // setting(text, "num_attention_heads")
    row = 2 * itemsize * text.num_hidden_layers * heads * head * sequence_length
    batches = -(-samples // max(1, min(most, room // row)))
    return -(-samples // batches)


def _sample_batch(
    model: Any,
    started: Sequence[tuple[Script, Temperature]],
    draws: Tensor,
    endings: frozenset[int],
    advance: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """draws: [B, S] in [0, 1). Returns tokens [B, S] and mean log-likelihoods [B] on the CPU."""
    length = draws.shape[1]
    rows = [_Row(script, temperature) for script, temperature in started]
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    tokens = torch.empty(draws.shape, dtype=torch.long)
    total, count = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.float64)
    logits: Tensor | None = None
    for column in range(length):
        free = [index for index, row in enumerate(rows) if not row.waiting]
        if free:
            if logits is None:
                raise CalibrationError("a row needs at least one token to start with")
            heat = [rows[index].temperature.at(rows[index].sampled, rows[index].varied) for index in free]
            at = torch.tensor(free)
            u, warmth = draws[at, column], torch.tensor(heat, dtype=torch.float64)
            some = logits if len(free) == len(rows) else logits[at.to(logits.device)]
            drawn, likelihood = inverse_transform(some, u.to(logits.device), warmth)
            tokens[at, column] = drawn.cpu()
            total[at] += likelihood.cpu()
            count[at] += 1
        for index, row in enumerate(rows):
            if row.waiting:
                tokens[index, column] = row.waiting.popleft()
            else:
                row.sampled += 1
                if (token := int(tokens[index, column])) in endings:
                    row.open(token)
        advance()
        if column + 1 < length:
            step = tokens[:, column, None].to(model.device)
            logits = model(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1]
    return tokens, total / count.clamp(min=1)


def inverse_transform(logits: Tensor, u: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the cumulative probability at `temperature` passes u, and its log-likelihood at temperature 1.

    logits: [B, V]; u, temperature: [B] float64, u in [0, 1). Returns int64 [B] and float64 [B]."""
    drawn, likelihood = [], []
    temperature = temperature.to(logits.device)
    parts = zip(logits.split(DRAW_ROWS), u.split(DRAW_ROWS), temperature.split(DRAW_ROWS), strict=True)
    for some_logits, some_u, some_heat in parts:
        exact = some_logits.float()
        weights = torch.softmax(exact / some_heat[:, None].float(), -1)
        if missing := -weights.shape[1] % RUN:
            weights = pad(weights, (0, missing))
        runs = weights.unflatten(1, (-1, RUN))  # [B, V / RUN, RUN]
        sums = runs.sum(-1).double()
        ends = sums.cumsum(-1)
        if not torch.isfinite(ends[:, -1]).all():
            raise CalibrationError(
                "the model cannot write calibration text: its logits are NaN or infinite; check the checkpoint, "
                "or calibrate on a text with calibration.source=file:PATH"
            )
        wanted = some_u[:, None] * ends[:, -1:]
        run = _first_beyond(ends, wanted)
        inside = runs.gather(1, run[:, :, None].expand(-1, -1, RUN))[:, 0].cumsum(-1, dtype=torch.float64)
        token = run * RUN + _first_beyond(inside, wanted - (ends - sums).gather(1, run))
        drawn.append(token[:, 0])
        likelihood.append(torch.log_softmax(exact, -1).gather(1, token)[:, 0].double())
    return torch.cat(drawn), torch.cat(likelihood)


def _first_beyond(cumulative: Tensor, wanted: Tensor) -> Tensor:
    """The first place at which `cumulative` exceeds `wanted`, as far as rounding lets it; never one that adds nothing.

    cumulative: [B, n] float64, not falling, positive at its end; wanted: [B, 1]. Returns int64 [B, 1]."""
    end = cumulative[:, -1:]
    below = torch.minimum(wanted.clamp(min=0), torch.nextafter(end, torch.zeros_like(end)))
    return torch.searchsorted(cumulative, below, right=True)
