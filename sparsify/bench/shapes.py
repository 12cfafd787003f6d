"""Shapes of models: those of a checkpoint's config, and built-in ones of models that need not be at hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsify.errors import SparsifyError


@dataclass(frozen=True)
class Linear:
    """`count` linears with N outputs and K inputs, named after what they do in a decoder block."""

    name: str
    n: int
    k: int
    count: int = 1

    @property
    def label(self) -> str:
        return f"{self.name} {self.n}x{self.k}"


@dataclass(frozen=True)
class ModelShape:
    """What decides the cost of a decoder-only model of the Llama family."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    def modules(self) -> dict[str, tuple[int, int]]:
        """(N, K) of every linear of the decoder blocks by its name in a checkpoint."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        block = {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        return {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in block.items()}

    def merged(self) -> list[Linear]:
        """The linears of one decoder block as vLLM runs them: q, k and v are one, gate and up are one."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            Linear("qkv", queries + 2 * keys, self.hidden, self.layers),
            Linear("o", self.hidden, queries, self.layers),
            Linear("gate_up", 2 * self.intermediate, self.hidden, self.layers),
            Linear("down", self.hidden, self.intermediate, self.layers),
        ]


# llama-3.2-1b has the vocabulary of smollm2 here, so that the blocks and not a table of 128256 rows decide.
BUILT_IN: Mapping[str, ModelShape] = {
    "smollm2-135m": ModelShape(576, 1536, 30, 9, 3, 64, 49152, tied=True),
    "llama-3.2-1b": ModelShape(2048, 8192, 16, 32, 8, 64, 49152, tied=True),
    "llama-3.1-8b": ModelShape(4096, 14336, 32, 32, 8, 128, 128256, tied=False),
}


def model_shape(spec: str) -> ModelShape:
    """The shape of a built-in name, or of whatever `open_checkpoint` opens."""
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    from sparsify.model.checkpoint import open_checkpoint

    try:
        checkpoint = open_checkpoint(spec)
    except SparsifyError as error:
        raise SparsifyError(f"{error}; built-in shapes: {', '.join(BUILT_IN)}") from None
    return shape_of_config(spec, checkpoint.config)


def shape_of_config(spec: str, config: Mapping[str, Any]) -> ModelShape:
    """Read a config.json; SparsifyError names the key that is missing."""
    text = config.get("text_config")
    config = {**config, **(text if isinstance(text, dict) else {})}

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or value < 1:
            raise SparsifyError(f"{spec}: its config.json has no {key}, so its shapes are not known: give --shape NxK")
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    return ModelShape(
        hidden=hidden,
        intermediate=number("intermediate_size"),
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden // heads),
        vocabulary=number("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def parse_shape(text: str) -> Linear:
    """`NxK`, for instance 14336x4096: N outputs, K inputs."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(re.fullmatch("[0-9]{1,9}", part) and int(part) for part in parts):
        raise SparsifyError(f"{text[:100]!r} is no shape: write outputs x inputs, as in 14336x4096")
    return Linear("linear", int(parts[0]), int(parts[1]))


def distinct(linears: list[Linear]) -> list[Linear]:
    """Each (N, K) once, in order, with the names of all that have it."""
    found: dict[tuple[int, int], Linear] = {}
    for linear in linears:
        key = (linear.n, linear.k)
        old = found.get(key)
        if old is None:
            found[key] = linear
        elif old.name != linear.name:
            found[key] = Linear(f"{old.name}, {linear.name}", *key, old.count + linear.count)
    return list(found.values())
