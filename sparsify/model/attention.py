"""Causal attention in bfloat16 on CPUs, as batched products of tiles.

`scaled_dot_product_attention` computes on CPUs at the speed of float32 whatever its inputs are, and its time for one new token
grows with the number of query heads instead of that of the keys. Where products in bfloat16 are fast, plain batched products of
tiles that stay in a cache take a third of its time, with gradients half (`docs/kernel-log.md`). The scores of a tile are rounded to
bfloat16, as in transformers' own `eager` attention; they are never all there at once, and for gradients they are computed anew
(FlashAttention, arXiv:2205.14135, section 3.1; its statistics per row are not needed, since a row of a tile holds all of its keys).

What has a mask, dropout or another type goes to transformers' own function, and so does everything where products in bfloat16
are slow: with AVX2 alone tiles took 26 times as long. A run keeps what it was begun with (`Choice.tiles`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsify import compute
from sparsify.native import build
from sparsify.native.arguments import loaded, pointer
from sparsify.processor import kernel_level

NAME = "sdpa"  # of what is replaced in transformers' registry
SOFTMAX = "cpu/softmax"  # the kernel
QUERIES = 128  # in a tile
CHANGES = ("position_bias", "cache")  # what transformers' function makes use of beside its named arguments
SCORES = 1 << 21  # in the tiles that are computed together: as much as stays in the caches of a processor


@contextmanager
def tiled_attention() -> Iterator[None]:
    """transformers models attend by tiles meanwhile where that is possible and faster; all other attention stays as it is."""
    theirs = ALL_ATTENTION_FUNCTIONS[NAME]
    if getattr(theirs, "tiled", False) or not compute.choose().tiles:
        yield
        return

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, Any]:
        """As transformers calls it. query: [B, H, T, D]; key: [B, H_kv, S, D]; value: [B, H_kv, S, D_v]. Returns [B, T, H, D_v]."""
        if torch.is_autocast_enabled("cpu") and query.device.type == "cpu":  # which casts for torch's own function
            query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        others_change_it = any(others.get(name) is not None for name in CHANGES)
        if _is_suited(query, key, value) and attention_mask is None and not dropout and not others_change_it:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            if query.shape[2] == 1:
                return _of_one_token(query, key, value, scale).transpose(1, 2), None
            if causal and query.shape[2] == key.shape[2]:
                return causal_attention(query, key, value, scale).transpose(1, 2), None
        return theirs(module, query, key, value, attention_mask, dropout, scaling, is_causal, **others)

    attend.tiled = True  # type: ignore[attr-defined]
    ALL_ATTENTION_FUNCTIONS[NAME] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[NAME] = theirs


def _is_suited(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether tiles are faster with such tensors. In float32 they are not: torch's own function computes in that type."""
    return all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in (query, key, value))


def _of_one_token(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of the last token, whose query heads that share a key are the rows of one product.

    query: [B, H, 1, D]; key: [B, H_kv, S, D]; value: [B, H_kv, S, D_v]. Returns [B, H, 1, D_v]."""
    b, h, _, d = query.shape
    rows = query.reshape(b, key.shape[1], h // key.shape[1], d)
    return scaled_dot_product_attention(rows, key, value, scale=scale).reshape(b, h, 1, -1)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale Q K' + causal mask) V, with gradients. query: [B, H, T, D]; key: [B, H_kv, T, D]; value: [B, H_kv, T, D_v].
    Returns [B, H, T, D_v]."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return _Causal.apply(query, key, value, scale)
    return torch.ops.sparsify.causal_attention(query, key, value, scale)


def _attended(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`causal_attention` without gradients, of tensors in memory."""
    q, k, v = _by_key(query * scale, key), key.flatten(0, 1), value.flatten(0, 1)
    out = q.new_empty(*q.shape[:3], v.shape[2])
    for heads in _together(q):
        keys, values = k[heads].transpose(1, 2).contiguous(), v[heads]
        for rows in _tiles(q):
            p = _probabilities(q[heads, :, rows], keys, rows)
            out[heads, :, rows] = (p @ values[:, : rows.stop]).unflatten(1, (q.shape[1], -1))
    return out.view(*query.shape[:3], -1)


def _fake_attended(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


# One operation, so that what watches a forward (`Release`) sees one and not three hundred.
_LIBRARY = torch.library.Library("sparsify", "FRAGMENT")
_LIBRARY.define("causal_attention(Tensor query, Tensor key, Tensor value, float scale) -> Tensor")
_LIBRARY.impl("causal_attention", _attended, "CPU")
torch.library.register_fake("sparsify::causal_attention", _fake_attended, lib=_LIBRARY)


class _Causal(torch.autograd.Function):
    """`causal_attention`, computed anew tile by tile for its gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        output = _attended(query, key, value, scale)
        ctx.save_for_backward(query, key, value, output)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, output = ctx.saved_tensors
        (gradient,) = gradients
        q, k, v = _by_key(query * ctx.scale, key), key.flatten(0, 1), value.flatten(0, 1)
        dO = _by_key(gradient, key)
        inner = _by_key((gradient * output).sum(-1, keepdim=True), key)  # of each row of P and its gradient
        dQ = torch.empty_like(q)
        dK, dV = (torch.zeros(x.shape, dtype=torch.float32) for x in (k, v))
        for heads in _together(q):
            keys, values = (x[heads].transpose(1, 2).contiguous() for x in (k, v))
            for rows in _tiles(q):
                before = slice(0, rows.stop)
                p = _probabilities(q[heads, :, rows], keys, rows)
                own, given = (x[heads, :, rows].flatten(1, 2) for x in (q, dO))
                dV[heads, before] += p.transpose(1, 2) @ given
                dS = (given @ values[:, :, before]).sub_(inner[heads, :, rows].flatten(1, 2)).mul_(p)
                dQ[heads, :, rows] = (dS @ k[heads, before]).mul_(ctx.scale).unflatten(1, (q.shape[1], -1))
                dK[heads, before] += dS.transpose(1, 2) @ own
        return dQ.view_as(query), dK.to(k.dtype).view_as(key), dV.to(v.dtype).view_as(value), None


def _by_key(x: Tensor, key: Tensor) -> Tensor:
    """[B, H, T, D] as [B H_kv, H / H_kv, T, D]: the heads that share a key together."""
    return x.reshape(x.shape[0] * key.shape[1], -1, *x.shape[2:])


def _together(q: Tensor) -> Iterator[slice]:
    """Keys whose tiles are computed together. q: [B H_kv, H / H_kv, T, D]."""
    each = max(1, SCORES // (q.shape[1] * QUERIES * q.shape[2]))
    return (slice(start, start + each) for start in range(0, len(q), each))


def _tiles(q: Tensor) -> Iterator[slice]:
    """The queries of each tile."""
    return (slice(start, min(start + QUERIES, q.shape[2])) for start in range(0, q.shape[2], QUERIES))


def _probabilities(q: Tensor, keys: Tensor, rows: slice) -> Tensor:
    """What the queries of a tile give to each key up to the last of them. q: [n, G, rows, D]; keys: [n, D, T].
    Returns [n, G rows, rows.stop]."""
    n, heads, length, _ = q.shape
    scores = q.flatten(1, 2) @ keys[:, :, : rows.stop]
    if build.load(SOFTMAX) is not None:
        return causal_softmax(scores, length)
    later = scores.new_full((length, length), float("-inf")).triu(1)
    scores.view(n, heads, length, -1)[..., rows] += later
    return torch.softmax(scores, -1)


def causal_softmax(scores: Tensor, queries: int) -> Tensor:
    """softmax of the scores of `queries` queries, one after the other, in place, by `kernels/cpu/softmax.cpp`.

    scores: bfloat16 [n, G queries, S], contiguous. Of each `queries` rows the last sees all S keys, the others one less each."""
    n, rows, columns = scores.shape
    assert scores.dtype == torch.bfloat16 and scores.is_contiguous() and rows % queries == 0 and columns >= queries
    failed = loaded(SOFTMAX).sparsify_causal_softmax(
        pointer(scores), *map(ctypes.c_int64, (n * rows, columns, queries)), torch.get_num_threads(), kernel_level()
    )
    if failed:
        raise MemoryError(f"softmax of {columns} scores")
    return scores
