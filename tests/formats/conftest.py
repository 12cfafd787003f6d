"""Random linears of every kind that formats store, and small checkpoints made of them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsify.formats.writer import CheckpointWriter
from sparsify.model.checkpoint import open_checkpoint
from sparsify.model.linear import CODE_RANGE, LinearWeights


def _two_four(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Zero two random positions of every quad, and in some quads three or four."""
    n, k = weight.shape
    order = torch.rand(n, k // 4, 4, generator=generator).argsort(2)
    extra = torch.rand(n, k // 4, 4, generator=generator) < 0.2
    return weight.masked_fill(((order >= 2) | extra).reshape(n, k), 0)


def _make_linear(
    n: int = 24,
    k: int = 128,
    bits: int = 4,
    group_size: int = 64,
    pattern: str = "2:4",
    bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    symmetric: bool = True,
) -> LinearWeights:
    generator = torch.Generator().manual_seed(seed)
    offset = torch.randn(n, generator=generator).to(dtype) if bias else None
    if bits == 16:
        values = _two_four(torch.randn(n, k, generator=generator), generator).to(dtype)
        return LinearWeights(16, pattern, k, values=values, bias=offset)
    low, high = CODE_RANGE[bits]
    codes = torch.randint(low, high + 1, (n, k), generator=generator)
    if pattern == "2:4" and symmetric:
        codes = _two_four(codes, generator)
    scale = (torch.rand(n, k // group_size, generator=generator) * 0.1 + 0.001).to(dtype)
    zero_point = None
    if not symmetric:
        zero_point = torch.randint(low, high + 1, (n, k // group_size), generator=generator).to(torch.int8)
        zero_point[0, 0], zero_point[-1, -1] = low, high
        zeros = zero_point.long().repeat_interleave(group_size, 1)
        if pattern == "2:4":
            codes = torch.where(_two_four(torch.ones(n, k), generator) == 0, zeros, codes)
    codes = codes.to(torch.int8)
    return LinearWeights(bits, pattern, group_size, codes=codes, scale=scale, bias=offset, zero_point=zero_point)


def _same(a: LinearWeights, b: LinearWeights) -> bool:
    """Whether two linears are equal to the bit."""

    def equal(x: Tensor | None, y: Tensor | None) -> bool:
        if x is None or y is None:
            return x is y
        return x.dtype == y.dtype and torch.equal(x, y)

    scheme = (a.bits, a.pattern, a.group_size) == (b.bits, b.pattern, b.group_size)
    names = ("codes", "scale", "values", "bias", "zero_point")
    return scheme and all(equal(getattr(a, name), getattr(b, name)) for name in names)


@pytest.fixture(autouse=True)
def single_thread():
    """Tiny tensors: threads only cost, and tests of others run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_linear():
    """`make_linear(n, k, bits, group_size, pattern, bias, dtype, seed, symmetric)`: a random linear."""
    return _make_linear


@pytest.fixture
def same():
    """`same(a, b)`: whether two linears are equal to the bit."""
    return _same


LLAMA = dict(
    vocab_size=64, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """`llama(tied=True)`: the directory of a tiny random bfloat16 Llama with what usually lies beside the weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = {}

    def make(tied: bool = True) -> Path:
        if tied not in made:
            torch.manual_seed(0)
            directory = tmp_path_factory.mktemp("llama") / "model"
            model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied)).to(torch.bfloat16)
            model.save_pretrained(directory)
            for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
                (directory / name).write_text(f"this is {name}")
            made[tied] = directory
        return made[tied]

    return make


@pytest.fixture(scope="session")
def compress():
    """`compress(source, output, format, recipe)`: write every block linear of a dense checkpoint with random codes.

    recipe: module -> arguments of `make_linear`, or None to leave that linear dense. Returns (output, linears).
    """

    def run(source: Path, output: Path, format: str, recipe=None, files=None):
        checkpoint = open_checkpoint(source)
        writer = CheckpointWriter(output, format, checkpoint)
        linears, tensors = plan(checkpoint, recipe or {})
        for part in sorted({part_of(name) for name in [*linears, *tensors]}):
            mine = {name: linear for name, linear in linears.items() if part_of(name) == part}
            others = {name: tensor for name, tensor in tensors.items() if part_of(name) == part}
            writer.write_part(part, mine, others)
        return writer.finish({}, files or {}), linears

    def plan(checkpoint, recipe):
        linears = {}
        for seed, name in enumerate(checkpoint.names()):
            module, shape = name.removesuffix(".weight"), checkpoint.shape(name)
            if len(shape) == 2 and (".layers." in name or module in recipe):
                kind = recipe.get(module, {})
                if kind is not None:
                    linears[module] = _make_linear(*shape, **{"group_size": 32, **kind}, seed=seed)
        written = {f"{module}.weight" for module in linears}
        return linears, {name: checkpoint.tensor(name) for name in checkpoint.names() if name not in written}

    def part_of(name):
        pieces = name.split(".")
        return f"block.{pieces[2]}" if ".layers." in name else "outside"

    return run
