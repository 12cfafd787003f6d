"""`shape:NAME@FORMAT`: the speed of a model that one does not have.

vLLM fills the weights itself (`--load-format dummy`), so a directory with config.json is a whole model. A tokenizer lies
beside it, one made-up word per token, because vLLM's throughput benchmark writes its prompts with one: so such a model
is started with the very arguments of a real one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from sparsify.bench.shapes import BUILT_IN, ModelShape
from sparsify.errors import SparsifyError
from sparsify.files import write_json
from sparsify.formats import ModuleScheme, get_format
from sparsify.formats.scheme import scheme_problem
from sparsify.formats.sparse24 import tensor_layout

PREFIX = "shape:"
FORMATS = ("dense", "sparse24", "pack-quantized")
ENGINE_ARGUMENTS = ("--load-format", "dummy")
FLOAT_BYTES = 2  # bfloat16
POSITIONS = 8192
HEAD = "lm_head"
OPTION = re.compile(r"(bits|group|head|layers)(\d+)|(channel|tied|untied)")


@dataclass(frozen=True)
class DummyModel:
    """A model that consists of its shape.

    bits, group_size (0: one scale per output): of the linears in the blocks, where the format compresses them.
    head_bits: of a quantized dense lm_head, None for a bfloat16 one.
    """

    shape: ModelShape
    format: str
    bits: int = 4
    group_size: int = 64
    head_bits: int | None = None

    def schemes(self) -> dict[str, ModuleScheme]:
        """How the compressed linears are compressed, by module."""
        if self.format == "dense":
            return {}
        pattern = "2:4" if self.format == "sparse24" else "dense"
        found = {}
        for name, (n, k) in self.shape.modules().items():
            group = k if self.bits == 16 or not self.group_size else self.group_size
            found[name] = ModuleScheme(self.bits, group, pattern, (n, k))
        if self.head_bits:
            n, k = self.shape.vocabulary, self.shape.hidden
            found[HEAD] = ModuleScheme(self.head_bits, self.group_size or k, "dense", (n, k))
        return found

    def nbytes(self) -> int:
        """What the checkpoint would weigh."""
        shape, schemes = self.shape, self.schemes()
        table = shape.vocabulary * shape.hidden * FLOAT_BYTES
        total = table + (2 * shape.layers + 1) * shape.hidden * FLOAT_BYTES
        if not shape.tied and HEAD not in schemes:
            total += table
        for name, (n, k) in shape.modules().items():
            total += n * k * FLOAT_BYTES if name not in schemes else 0
        for scheme in schemes.values():
            layout = tensor_layout(scheme, torch.bfloat16).values()
            total += sum(prod(size) * torch.empty(0, dtype=dtype).element_size() for size, dtype in layout)
            if self.format == "pack-quantized":
                total += 2 * 8  # weight_shape
        return total

    def config(self) -> dict[str, Any]:
        """The whole config.json."""
        shape, schemes = self.shape, self.schemes()
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocabulary,
            "tie_word_embeddings": shape.tied,
            "max_position_embeddings": POSITIONS,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "bfloat16",
        }
        quantization = get_format(self.format).quantization_config(schemes, [] if HEAD in schemes else [HEAD])
        return config if quantization is None else {**config, "quantization_config": quantization}

    def write(self, directory: Path) -> Path:
        """config.json and a tokenizer; returns the directory."""
        directory.mkdir(parents=True)
        write_json(directory / "config.json", self.config())
        for name, content in _tokenizer(self.shape.vocabulary).items():
            (directory / name).write_text(json.dumps(content), encoding="utf-8")
        return directory


def is_dummy(spec: str) -> bool:
    """Whether a model is given by its shape, `shape:NAME@FORMAT`."""
    return spec.startswith(PREFIX)


def parse_dummy(spec: str) -> DummyModel:
    """`shape:NAME@FORMAT+OPTION+OPTION`; SparsifyError says what is wrong with it."""
    name, at, rest = spec.removeprefix(PREFIX).partition("@")
    format, *options = (rest if at else "dense").split("+")
    if name not in BUILT_IN:
        raise SparsifyError(f"{spec}: shape {name!r} is unknown; known shapes: {', '.join(BUILT_IN)}")
    if format not in FORMATS:
        raise SparsifyError(f"{spec}: format {format!r} is unknown; choose from {', '.join(FORMATS)}")
    model = DummyModel(BUILT_IN[name], format)
    for option in options:
        model = _with_option(spec, model, option)
    return _checked(spec, model)


def _with_option(spec: str, model: DummyModel, option: str) -> DummyModel:
    match = OPTION.fullmatch(option)
    if match is None:
        known = "bits4|8|16, group32|64|128, channel, head4|8, layersN, tied, untied"
        raise SparsifyError(f"{spec}: option {option!r} is unknown; known are {known}")
    number = int(match[2] or 0)
    if match[1] == "bits":
        return replace(model, bits=number)
    if match[1] == "group":
        return replace(model, group_size=number)
    if match[1] == "head":
        return replace(model, head_bits=number, shape=replace(model.shape, tied=False))
    if match[1] == "layers":
        return replace(model, shape=replace(model.shape, layers=number))
    if option == "channel":
        return replace(model, group_size=0)
    return replace(model, shape=replace(model.shape, tied=option == "tied"))


def _checked(spec: str, model: DummyModel) -> DummyModel:
    if model.shape.layers < 1:
        raise SparsifyError(f"{spec}: a model needs at least one layer")
    if model.head_bits and (model.format != "sparse24" or model.shape.tied):
        raise SparsifyError(f"{spec}: a quantized output head needs the format sparse24 and no +tied")
    if model.format == "pack-quantized" and model.bits == 16:
        raise SparsifyError(f"{spec}: pack-quantized holds 4 or 8 bits")
    for name, scheme in model.schemes().items():
        if problem := scheme_problem(scheme):
            raise SparsifyError(f"{spec}: {name}: {problem}")
    return model


def _tokenizer(vocabulary: int) -> Mapping[str, Any]:
    """A tokenizer with as many words as the model has tokens: text and tokens go back and forth without loss."""
    # Special tokens are found inside of words too, so no word may begin with one.
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = {word: number for number, word in enumerate(special.values())}
    words |= {f"w{number}": number for number in range(len(words), vocabulary)}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": special["unk_token"]},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": POSITIONS, **special}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}
