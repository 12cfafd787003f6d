"""The vLLM plugin on vLLM's own layers, without an engine: merging, splitting, and refusing what is wrong.

Tensor parallelism is two layers that are told to be rank 0 and rank 1; engines with real ranks are in tests/end_to_end.
"""

import ctypes
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("vllm", reason="vLLM is not installed; make setup installs it")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear, vocab_parallel_embedding
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.models.utils import WeightsMapper

from sparsify.compiler.apply import apply
from sparsify.compiler.convert import export
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.formats import ModuleScheme, get_format
from sparsify.formats.reader import open_compressed
from sparsify.model.linear import LinearWeights
from sparsify.recipe import parse_recipe
from sparsify.runtime import vllm_plugin
from sparsify.runtime.backends import cuda
from sparsify.runtime.vllm_plugin import Sparse24Config, Sparse24LinearMethod
from tests.helpers.agreement import Agree, bits, close
from tests.helpers.compressed import round_linear
from tests.helpers.tiny import save_tiny
from tests.runtime.test_cuda import SM_COUNT, library  # noqa: F401

K = 256
MAGNITUDE = """
version: 1
passes:
  - prune: {method: magnitude}
  - quantize: {method: rtn, bits: 4, group_size: 32}
"""
KINDS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "group_size": 64},
    "4 bits, channel": {"bits": 4, "group_size": 0},
    "8 bits": {"bits": 8, "group_size": 32},
    "16 bits": {"bits": 16},
    "8 bits, dense": {"bits": 8, "group_size": 128, "pattern": "dense"},
    "4 bits, zero points": {"bits": 4, "group_size": 32, "symmetric": False},
    "4 bits, dense, channel, zero points": {"bits": 4, "group_size": 0, "pattern": "dense", "symmetric": False},
}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
Loads = list[tuple[Any, LinearWeights]]  # shard id, linear
Rank = Callable[[int, int], None]


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    vllm_plugin.register()
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    """`rank(r, world)`: what vLLM's layers are told from now on."""

    def become(rank: int, world: int) -> None:
        for module in (linear, parameter, vocab_parallel_embedding):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: world)

    become(0, 1)
    return become


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


def make_linear(n: int, seed: int = 0, k: int = K, **kind: Any) -> LinearWeights:
    return round_linear(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), **kind)


def config_for(modules: dict[str, LinearWeights], ignore: list[str] | None = None) -> Sparse24Config:
    schemes = {name: ModuleScheme.of(weights) for name, weights in modules.items()}
    described = get_format("sparse24").quantization_config(schemes, ignore or [])
    config = get_quantization_config("sparse24").from_config(described)
    config.packed_modules_mapping = FUSED
    assert isinstance(config, Sparse24Config)
    return config


def load(layer: nn.Module, loads: Loads, edit: Callable[[dict[str, Tensor]], Any] = lambda tensors: None) -> None:
    """Do with the tensors of a checkpoint what vLLM's models do."""
    for shard, weights in loads:
        tensors = get_format("sparse24").encode(weights)
        edit(tensors)
        for suffix, tensor in tensors.items():
            target = getattr(layer, suffix)
            target.weight_loader(target, tensor, *([] if shard is None else [shard]))
    layer.quant_method.process_weights_after_loading(layer)


def product(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.quant_method.apply(layer, x)


def expected(loads: Loads, x: Tensor) -> Tensor:
    return functional.linear(x, torch.cat([weights.dense(x.dtype) for _, weights in loads]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_plain_linear(kind: dict[str, Any], rank: Rank, dtype: torch.dtype, agree: Agree) -> None:
    name, weights = "model.layers.0.mlp.down_proj", make_linear(32, **kind)
    layer = ReplicatedLinear(
        K, 32, bias=False, params_dtype=dtype, quant_config=config_for({name: weights}), prefix=name
    )
    load(layer, [(None, weights)])
    x = torch.randn(5, K, dtype=dtype)
    agree(product(layer, x), expected([(None, weights)], x))
    assert not [n for n, _ in layer.named_parameters()]  # the packed bytes are not kept beside what the back end made


@pytest.mark.parametrize("pattern", ["2:4", "dense"])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_8_bits_with_zero_points(
    rank: Rank, dtype: torch.dtype, world: int, pattern: str, agree: Agree
) -> None:
    """Codes that fit no other 8-bit form: 16-bit values where those are exact, the dense weights elsewhere."""
    name, weights = "model.layers.0.self_attn.o_proj", make_linear(48, bits=8, symmetric=False, pattern=pattern)
    config, x, total = config_for({name: weights}), torch.randn(3, K, dtype=dtype), torch.zeros(3, 48, dtype=dtype)
    reference = agree is bits
    if not reference and (pattern == "dense" or dtype == torch.float32):
        layer = ReplicatedLinear(K, 48, bias=False, params_dtype=dtype, quant_config=config, prefix=name)
        with pytest.raises(SparsifyError, match="no back end serves .*cpu: it knows no zero points"):
            load(layer, [(None, weights)])
        return
    for r in range(world):
        rank(r, world)
        layer = RowParallelLinear(
            K, 48, bias=False, params_dtype=dtype, reduce_results=False, quant_config=config, prefix=name
        )
        load(layer, [(None, weights)])
        total += product(layer, x[:, r * K // world : (r + 1) * K // world])
    same = agree if world == 1 else close  # two sums, each rounded
    same(total, expected([(None, weights)], x))


def test_a_hostile_zero_point_is_refused_by_name(rank: Rank) -> None:
    name, weights = "model.layers.0.mlp.down_proj", make_linear(32, bits=4, symmetric=False)
    layer = ReplicatedLinear(K, 32, bias=False, quant_config=config_for({name: weights}), prefix=name)
    with pytest.raises(
        CheckpointError, match=rf"{name}\.weight_zero_point: expected zero points of 4 bits, .* found 99"
    ):
        load(layer, [(None, weights)], lambda tensors: tensors.update(weight_zero_point=weights.zero_point * 0 + 99))


def test_linears_of_which_one_has_zero_points_are_not_merged(rank: Rank) -> None:
    prefix = "model.layers.0.mlp."
    parts = {"gate_proj": make_linear(64, 1), "up_proj": make_linear(64, 2, symmetric=False)}
    config = config_for({prefix + name: weights for name, weights in parts.items()})
    with pytest.raises(CheckpointError, match="must be compressed alike, found .*symmetric=True.*symmetric=False"):
        MergedColumnParallelLinear(K, [64, 64], bias=False, quant_config=config, prefix=prefix + "gate_up_proj")


@pytest.mark.parametrize("world", [1, 2])
def test_merged_columns(kind: dict[str, Any], rank: Rank, world: int) -> None:
    prefix = "model.layers.0.mlp."
    parts = {"gate_proj": make_linear(64, 1, **kind), "up_proj": make_linear(64, 2, **kind)}
    loads: Loads = list(enumerate(parts.values()))
    config = config_for({prefix + name: weights for name, weights in parts.items()})
    x, pieces = torch.randn(3, K), []
    for r in range(world):
        rank(r, world)
        layer = MergedColumnParallelLinear(K, [64, 64], bias=False, quant_config=config, prefix=prefix + "gate_up_proj")
        load(layer, loads)
        pieces.append(product(layer, x).reshape(3, 2, 64 // world))
    torch.testing.assert_close(torch.cat(pieces, 2).reshape(3, 128), expected(loads, x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_merged_heads(kind: dict[str, Any], rank: Rank, world: int) -> None:
    """4 query heads and 2 key-value heads of 32: four ranks hold each key-value head twice."""
    prefix, head = "model.layers.0.self_attn.", 32
    sizes = {"q": 4 * head, "k": 2 * head, "v": 2 * head}
    loads: Loads = [(shard, make_linear(n, seed, **kind)) for seed, (shard, n) in enumerate(sizes.items())]
    config = config_for({f"{prefix}{shard}_proj": weights for shard, weights in loads})
    x, queries, keys = torch.randn(3, K), [], []
    for r in range(world):
        rank(r, world)
        layer = QKVParallelLinear(K, head, 4, 2, bias=False, quant_config=config, prefix=prefix + "qkv_proj")
        load(layer, loads)
        q, k, v = product(layer, x).split([4 * head // world, max(1, 2 // world) * head, max(1, 2 // world) * head], 1)
        queries.append(q)
        keys.append((k, v))
    distinct = keys[:: max(1, world // 2)]
    y = torch.cat([*queries, *(k for k, _ in distinct), *(v for _, v in distinct)], 1)
    torch.testing.assert_close(y, expected(loads, x), rtol=1e-5, atol=1e-4)


def test_fused_on_disk(kind: dict[str, Any], rank: Rank) -> None:
    """Phi-3 stores gate and up as one matrix."""
    name, weights = "model.layers.0.mlp.gate_up_proj", make_linear(128, **kind)
    config = config_for({name: weights})
    config.packed_modules_mapping = {"gate_up_proj": ["gate_up_proj"]}
    x, pieces = torch.randn(3, K), []
    for r in range(2):
        rank(r, 2)
        layer = MergedColumnParallelLinear(K, [64, 64], bias=False, quant_config=config, prefix=name)
        load(layer, [(None, weights)])
        pieces.append(product(layer, x).reshape(3, 2, 32))
    torch.testing.assert_close(
        torch.cat(pieces, 2).reshape(3, 128), expected([(None, weights)], x), rtol=1e-5, atol=1e-5
    )


def test_rows(kind: dict[str, Any], rank: Rank) -> None:
    name, weights = "model.layers.0.self_attn.o_proj", make_linear(48, **kind)
    config, x, total = config_for({name: weights}), torch.randn(3, K), torch.zeros(3, 48)
    for r in range(2):
        rank(r, 2)
        layer = RowParallelLinear(K, 48, bias=False, reduce_results=False, quant_config=config, prefix=name)
        load(layer, [(None, weights)])
        total += product(layer, x[:, r * K // 2 : (r + 1) * K // 2])
    torch.testing.assert_close(total, expected([(None, weights)], x), rtol=1e-5, atol=1e-4)


def test_rows_that_cut_a_group_are_refused(rank: Rank) -> None:
    name = "model.layers.0.self_attn.o_proj"
    config = config_for({name: make_linear(48, bits=4, group_size=128)})
    rank(0, 4)
    with pytest.raises(
        CheckpointError, match=rf"{name}: tensor parallel 4 gives each rank 64 of 256 .* multiple of 128"
    ):
        RowParallelLinear(K, 48, bias=False, quant_config=config, prefix=name)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", ["4 bits", "8 bits, dense", "16 bits"])
def test_head_with_a_padded_vocabulary(rank: Rank, name: str, world: int) -> None:
    weights = make_linear(96, **KINDS[name])
    config, x, pieces = config_for({"lm_head": weights}), torch.randn(3, K), []
    for r in range(world):
        rank(r, world)
        layer = ParallelLMHead(96, K, quant_config=config, prefix="lm_head")
        load(layer, [(None, weights)])
        pieces.append(product(layer, x))
    y = torch.cat(pieces, 1)
    assert y.shape == (3, 128)
    torch.testing.assert_close(y[:, :96], expected([(None, weights)], x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_head_of_a_model_that_was_tied(rank: Rank, tmp_path: Path, bits: Literal[4, 8]) -> None:
    """From the export's own files: config.json unties, the embedding stays dense, the vocabulary of 97 is padded."""
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16, vocab_size=97, tie_word_embeddings=True)
    apply(parse_recipe(MAGNITUDE), str(source), tmp_path / "tied", quiet=True)
    export(tmp_path / "tied", "sparse24", tmp_path / "out", bits, quiet=True)
    opened = open_compressed(tmp_path / "out")
    assert opened.config["tie_word_embeddings"] is False
    config = get_quantization_config("sparse24").from_config(opened.config["quantization_config"])
    weights, k = opened.linear("lm_head"), 64
    assert (weights.bits, weights.pattern) == (bits, "dense")
    head = ParallelLMHead(97, k, quant_config=config, prefix="lm_head")
    load(head, [(None, weights)])
    x = torch.randn(3, k)
    y = product(head, x)
    assert y.shape == (3, 128)
    scale = weights.scale.double().repeat_interleave(weights.group_size, 1)
    exact = x.double() @ (weights.codes.double() * scale).t()
    torch.testing.assert_close(y[:, :97].double(), exact, rtol=1e-5, atol=1e-4)
    assert config.get_quant_method(VocabParallelEmbedding(97, k, prefix="m"), "model.embed_tokens") is None


def test_files_are_verified_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the configuration that vLLM makes before it starts its workers."""
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    output = apply(parse_recipe(MAGNITUDE), str(source), tmp_path / "out", quiet=True).output
    settings = EngineArgs(str(output), dtype="bfloat16", max_model_len=32).create_model_config()
    monkeypatch.setenv("SPARSIFY_VERIFY", "1")
    VllmConfig(model_config=settings)
    (output / "generation_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="generation_config.json differs from what was written"):
        VllmConfig(model_config=settings)


def test_what_is_not_compressed_stays_as_it_is(rank: Rank) -> None:
    kept = "model.layers.1.mlp.down_proj"
    config = config_for({"model.layers.0.mlp.down_proj": make_linear(32)}, ignore=[kept, "lm_head"])
    layer = RowParallelLinear(K, 32, bias=False, quant_config=config, prefix=kept)
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)
    assert "weight" in dict(layer.named_parameters())
    for other in (
        ParallelLMHead(64, K, quant_config=config, prefix="lm_head"),
        VocabParallelEmbedding(64, K, prefix="e"),
    ):
        assert config.get_quant_method(other, "lm_head") is None
    outside = ColumnParallelLinear(K, 32, bias=False, quant_config=config, prefix="model.projector")
    assert isinstance(outside.quant_method, UnquantizedLinearMethod)


def test_merged_linears_must_be_compressed_alike(rank: Rank) -> None:
    prefix = "model.layers.0.mlp."
    parts = {f"{prefix}gate_proj": make_linear(64, bits=4), f"{prefix}up_proj": make_linear(64, bits=8)}
    with pytest.raises(
        CheckpointError, match=r"gate_proj, .*up_proj into one linear, so they must be compressed alike"
    ):
        MergedColumnParallelLinear(K, [64, 64], quant_config=config_for(parts), prefix=prefix + "gate_up_proj")
    half = config_for({f"{prefix}gate_proj": make_linear(64)}, ignore=[f"{prefix}up_proj"])
    with pytest.raises(CheckpointError, match=r"up_proj: dense"):
        MergedColumnParallelLinear(K, [64, 64], quant_config=half, prefix=prefix + "gate_up_proj")


def test_one_group_and_channel_are_alike(rank: Rank) -> None:
    """64 inputs in groups of 64, or one scale per channel: two names of one thing."""
    prefix = "model.layers.0.mlp."
    described = {
        "quant_method": "sparse24", "version": 1, "bits": 4, "group_size": 64, "pattern": "2:4", "ignore": [],
        "modules": {f"{prefix}up_proj": {"bits": 4, "group_size": "channel", "pattern": "2:4"}},
    }  # fmt: skip
    config = Sparse24Config.from_config(described)
    config.packed_modules_mapping = FUSED
    loads: Loads = [(i, make_linear(32, seed=i, k=64, bits=4, group_size=64)) for i in range(2)]
    layer = MergedColumnParallelLinear(64, [32, 32], bias=False, quant_config=config, prefix=prefix + "gate_up_proj")
    load(layer, loads)
    x = torch.randn(2, 64)
    torch.testing.assert_close(product(layer, x), expected(loads, x), rtol=1e-5, atol=1e-4)


def test_names_follow_the_model_class() -> None:
    config = config_for(
        {"model.layers.0.a": make_linear(32), "model.head": make_linear(32, bits=8)}, ["model.layers.1.a"]
    )
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert config.on_disk.ignore == {"language_model.model.layers.1.a"}
    assert set(config.on_disk.modules) == {"language_model.model.head"}


def test_a_draft_of_speculative_decoding_is_named_as_its_checkpoint(rank: Rank) -> None:
    """vLLM calls its modules `draft_model.lm_head` and so on, which neither `modules` nor `ignore` of config.json do."""
    weights = {"lm_head": make_linear(64, bits=8, pattern="dense"), "model.layers.0.mlp.up_proj": make_linear(64)}
    config = config_for(weights, ignore=["model.layers.1.mlp.up_proj"])
    head = ParallelLMHead(64, K, quant_config=config, prefix="draft_model.lm_head")
    assert isinstance(head.quant_method, Sparse24LinearMethod)
    assert head.quant_method.label == config.on_disk.modules["lm_head"]
    for block, kind in enumerate((Sparse24LinearMethod, UnquantizedLinearMethod)):
        name = f"draft_model.model.layers.{block}.mlp.up_proj"
        assert type(ColumnParallelLinear(K, 64, quant_config=config, prefix=name).quant_method) is kind


def test_workers_receive_the_configuration() -> None:
    config = config_for({"model.layers.0.a": make_linear(32), "model.head": make_linear(32, bits=8)})
    assert pickle.loads(pickle.dumps(config)).on_disk == config.on_disk


def spoil(suffix: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        changed = change(tensors.pop(suffix).clone())
        if changed is not None:
            tensors[suffix] = changed

    return edit


def set_first(value: Any) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[0, 0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("weight_meta", set_first(0x41), "two ascending positions"),
        ("weight_scale", set_first(float("inf")), "finite"),
        ("weight_scale", lambda t: t.float(), "expected torch.bfloat16, found torch.float32"),
        ("weight_packed", lambda t: t.long(), "expected torch.int32, found torch.int64"),
        ("weight_packed", lambda t: t[:, 1:], "does not fit into"),
        ("weight_meta", lambda t: t[1:], "does not fit into"),
        ("weight_packed", lambda t: None, "holds 0 of the 1 tensors"),
        ("weight_meta", lambda t: None, "holds 0 of the 1 tensors"),
    ],
)
def test_damaged_tensors_are_refused_by_name(
    rank: Rank, suffix: str, change: Callable[[Tensor], Tensor | None], message: str
) -> None:
    name, weights = "model.layers.0.mlp.down_proj", make_linear(32)
    layer = RowParallelLinear(K, 32, bias=False, quant_config=config_for({name: weights}), prefix=name)
    with pytest.raises(CheckpointError, match=rf"{name}\.{suffix}.*{message}"):
        load(layer, [(None, weights)], spoil(suffix, change))


@pytest.mark.parametrize("missing", ["q", "v"])
def test_missing_part_of_a_merged_linear(rank: Rank, missing: str) -> None:
    prefix = "model.layers.0.self_attn."
    loads: Loads = [(shard, make_linear(64)) for shard in "qkv"]
    config = config_for({f"{prefix}{shard}_proj": weights for shard, weights in loads})
    layer = QKVParallelLinear(K, 32, 2, 2, bias=False, quant_config=config, prefix=prefix + "qkv_proj")
    with pytest.raises(CheckpointError, match=r"qkv_proj\.weight_packed: the checkpoint holds 2 of the 3 tensors"):
        load(layer, [(shard, weights) for shard, weights in loads if shard != missing])


def test_scales_of_two_types_in_one_merged_linear(rank: Rank) -> None:
    prefix = "model.layers.0.mlp."
    half, brain = (make_linear(32, scale_dtype=dtype) for dtype in (torch.float16, torch.bfloat16))
    config = config_for({f"{prefix}gate_proj": half, f"{prefix}up_proj": half})
    layer = MergedColumnParallelLinear(K, [32, 32], bias=False, quant_config=config, prefix=prefix + "gate_up_proj")
    with pytest.raises(CheckpointError, match="expected torch.float16, found torch.bfloat16"):
        load(layer, [(0, half), (1, brain)])
    layer = MergedColumnParallelLinear(K, [32, 32], bias=False, quant_config=config, prefix=prefix + "gate_up_proj")
    load(layer, [(0, half), (1, half)])
    x = torch.randn(2, K)
    torch.testing.assert_close(product(layer, x), expected([(0, half), (1, half)], x), rtol=1e-5, atol=1e-4)


def test_tied_head_and_compressed_embeddings_are_refused(rank: Rank) -> None:
    config = config_for({"lm_head": make_linear(64), "model.embed_tokens": make_linear(64)})
    embeddings = VocabParallelEmbedding(64, K)
    head = ParallelLMHead(64, K, quant_config=config, prefix="lm_head")
    assert isinstance(head.quant_method, Sparse24LinearMethod)
    with pytest.raises(CheckpointError, match="lm_head is compressed and tied"):
        head.tie_weights(embeddings)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens: compressed embeddings cannot be served"):
        VocabParallelEmbedding(64, K, quant_config=config, prefix="model.embed_tokens")


def test_dummy_weights_are_valid(kind: dict[str, Any], rank: Rank) -> None:
    """`--load-format dummy` measures models that nobody has compressed yet."""
    config = VllmConfig()
    config.load_config.load_format = "dummy"
    name = "model.layers.0.mlp.down_proj"
    with set_current_vllm_config(config):
        layer = RowParallelLinear(K, 32, quant_config=config_for({name: make_linear(32, **kind)}), prefix=name)
    layer.quant_method.process_weights_after_loading(layer)
    y = product(layer, torch.randn(2, K))
    assert torch.isfinite(y).all() and y.abs().max() > 0


def test_the_cuda_back_end_serves(rank: Rank, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """From choice to product, with a GPU only in name: the kernel's library is one that runs on the processor."""
    prefix = "model.layers.0.mlp."
    parts = {"gate_proj": make_linear(64, 1), "up_proj": make_linear(64, 2)}
    loads: Loads = list(enumerate(parts.values()))
    config = config_for({prefix + name: weights for name, weights in parts.items()})
    monkeypatch.setenv("SPARSIFY_BACKEND", "cuda")
    layer = MergedColumnParallelLinear(
        K, [64, 64], bias=False, params_dtype=torch.bfloat16, quant_config=config, prefix=prefix + "gate_up_proj"
    )
    with cuda.emulated(library, SM_COUNT):
        monkeypatch.setattr(cuda, "_gpus", lambda: [torch.device("cpu")])
        load(layer, loads)
        assert layer.quant_method.backend == "cuda"
        x = torch.randn(5, K).bfloat16()
        torch.testing.assert_close(product(layer, x), expected(loads, x), rtol=2e-2, atol=0.15)


def test_forced_back_end_is_heard(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    name, weights = "model.layers.0.mlp.down_proj", make_linear(32)
    layer = RowParallelLinear(K, 32, bias=False, quant_config=config_for({name: weights}), prefix=name)
    monkeypatch.setenv("SPARSIFY_BACKEND", "nonesuch")
    with pytest.raises(Exception, match="known back ends: .*reference"):
        load(layer, [(None, weights)])


def reload(layer: nn.Module, loads: Loads) -> None:
    """What `LLM.collective_rpc("reload_weights")` does to one layer, and what waking up from sleep of level 2 is followed by."""
    initialize_layerwise_reload(layer)
    for shard, weights in loads:
        for suffix, tensor in get_format("sparse24").encode(weights).items():
            target = getattr(layer, suffix)
            target.weight_loader(target, tensor, *([] if shard is None else [shard]))
    finalize_layerwise_reload(layer, None)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_can_be_replaced_in_place_again_and_again(scale_dtype: torch.dtype, rank: Rank) -> None:
    """Into the memory that captured graphs read, with the checks of the first time."""
    prefix = "model.layers.0.mlp."
    names = ("gate_proj", "up_proj")
    first, second, third = (
        [(i, make_linear(64, 2 * time + i, scale_dtype=scale_dtype)) for i in range(2)] for time in range(3)
    )
    config = config_for({prefix + name: weights for name, (_, weights) in zip(names, first, strict=True)})
    layer = MergedColumnParallelLinear(
        K, [64, 64], bias=False, params_dtype=torch.float32, quant_config=config, prefix=prefix + "gate_up_proj"
    )
    record_metadata_for_reloading(layer)
    load(layer, first)
    places = {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}
    x = torch.randn(5, K)
    for loads in (second, third):
        reload(layer, loads)
        torch.testing.assert_close(product(layer, x), expected(loads, x), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(layer.weight.clone(), torch.cat([w.dense(torch.float32) for _, w in loads]))
        assert {name: buffer.data_ptr() for name, buffer in layer.named_buffers()} == places and places
        assert not list(layer.parameters())
    reload(layer, [(i, weights.zeroed()) for i, weights in first])
    assert not product(layer, x).any()
    with pytest.raises(
        CheckpointError, match=r"gate_up_proj\.weight_packed: the checkpoint holds 1 of the 2 tensors it needs"
    ):
        reload(layer, first[:1])


def test_a_linear_that_was_served_as_empty_cannot_get_weights(rank: Rank) -> None:
    name, weights = "model.layers.0.self_attn.o_proj", make_linear(32)
    layer = ReplicatedLinear(
        K, 32, bias=False, params_dtype=torch.float32, quant_config=config_for({name: weights}), prefix=name
    )
    record_metadata_for_reloading(layer)
    load(layer, [(None, weights.zeroed())])
    reload(layer, [(None, weights.zeroed())])
    assert not product(layer, torch.randn(5, K)).any()
    with pytest.raises(CheckpointError, match="o_proj: had no weights when the engine started; start it again"):
        reload(layer, [(None, weights)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_dense_weight_can_be_had(kind: dict[str, Any], rank: Rank, dtype: torch.dtype) -> None:
    """Multi-head latent attention dequantizes its kv_b_proj once; LoRA asks for the device."""
    name, weights = "model.layers.0.self_attn.kv_b_proj", make_linear(96, **kind)
    config = config_for({name: weights})
    layer = ColumnParallelLinear(K, 96, bias=False, params_dtype=dtype, quant_config=config, prefix=name)
    load(layer, [(None, weights)])
    wanted = weights.dense(torch.float32).to(dtype)
    torch.testing.assert_close(get_and_maybe_dequant_weights(layer, dtype), wanted)
    torch.testing.assert_close(layer.weight.clone(), wanted)
    assert layer.weight.device == torch.device("cpu") and layer.weight.dtype == dtype
    assert "weight" not in dict(layer.named_parameters()) | dict(layer.named_buffers())


@pytest.mark.parametrize("kind", [*KINDS.values(), {"bits": 4, "group_size": 32, "pattern": "dense"}], ids=str)
def test_a_linear_without_weights_is_not_multiplied(kind: dict[str, Any], rank: Rank, monkeypatch: Any) -> None:
    name, weights = "model.layers.0.self_attn.o_proj", make_linear(32, **kind).zeroed()
    config = config_for({name: weights})
    layer = ReplicatedLinear(K, 32, bias=False, params_dtype=torch.float32, quant_config=config, prefix=name)
    load(layer, [(None, weights)])
    monkeypatch.setattr(vllm_plugin, "sparse24_linear", None)
    assert not list(layer.parameters()) and not list(layer.buffers())
    assert torch.equal(product(layer, torch.randn(5, K)), torch.zeros(5, 32))
    assert torch.equal(layer.quant_method.apply(layer, torch.randn(5, K), torch.ones(32)), torch.ones(5, 32))
