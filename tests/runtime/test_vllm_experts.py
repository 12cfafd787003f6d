"""The vLLM plugin's experts on vLLM's own layer, without an engine: loading, splitting, and only what a batch is routed to.

The reference is a plain loop over tokens and their experts in float64.
"""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("vllm", reason="vLLM is not installed; make setup installs it")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from sparsify.errors import CheckpointError
from sparsify.formats import ModuleScheme, get_format
from sparsify.model.linear import LinearWeights
from sparsify.runtime import vllm_experts, vllm_plugin
from sparsify.runtime.backends import cuda
from sparsify.runtime.backends.triton import Triton
from sparsify.runtime.vllm_experts import Sparse24MoEMethod
from sparsify.runtime.vllm_metrics import Loading
from sparsify.runtime.vllm_plugin import Sparse24Config
from tests.helpers.compressed import round_linear
from tests.runtime.test_cuda import SM_COUNT, library  # noqa: F401
from tests.runtime.test_triton import interpreter  # noqa: F401

EXPERTS, HIDDEN, WIDTH = 5, 64, 128
PREFIX = "model.layers.0.mlp.experts"
QWEN, MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
Mixture = dict[str, LinearWeights]  # by the linear's name in the checkpoint


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    vllm_plugin.register()
    with set_current_vllm_config(VllmConfig()):
        yield


def make_mixture(names: tuple[str, str, str] = QWEN, seed: int = 0, biases: bool = False, **kind: Any) -> Mixture:
    generator = torch.Generator().manual_seed(seed)
    kind = {"group_size": 32, **kind}
    mixture = {}
    for expert in range(EXPERTS):
        for leaf in names:
            n, k = (HIDDEN, WIDTH) if leaf == names[2] else (WIDTH, HIDDEN)
            weight = 0.2 * torch.randn(n, k, generator=generator)
            bias = torch.randn(n, generator=generator) if biases else None
            mixture[f"{PREFIX}.{expert}.{leaf}"] = replace(round_linear(weight, **kind), bias=bias)
    return mixture


def config_for(mixture: Mixture, ignore: list[str] | None = None) -> Sparse24Config:
    schemes = {name: ModuleScheme.of(weights) for name, weights in mixture.items()}
    return Sparse24Config.from_config(get_format("sparse24").quantization_config(schemes, ignore or []) or {})


def make_layer(
    mixture: Mixture,
    dtype: torch.dtype = torch.float32,
    tp: tuple[int, int] = (0, 1),
    ep: tuple[int, int] = (0, 1),
    names: tuple[str, str, str] = QWEN,
    cls: type[RoutedExperts] = RoutedExperts,
    ignore: list[str] | None = None,
    more: dict[str, Any] | None = None,
    **moe: Any,
) -> RoutedExperts:
    """vLLM's layer of one rank of several; tp, ep: (rank, ranks) that split experts or share them out."""
    parallel = replace(
        FusedMoEParallelConfig.make_no_parallel(),
        tp_rank=tp[0], tp_size=tp[1], ep_rank=ep[0], ep_size=ep[1], use_ep=ep[1] > 1,
    )  # fmt: skip
    manager = ExpertMapManager(
        max_num_batched_tokens=64, top_k=2, global_num_experts=EXPERTS, num_redundant_experts=0, num_expert_group=None,
        moe_parallel_config=parallel, placement_strategy="linear", enable_eplb=False,
    )  # fmt: skip
    settings = {
        "num_experts": EXPERTS, "num_logical_experts": EXPERTS, "num_local_experts": manager.local_num_experts,
        "experts_per_token": 2, "hidden_dim": HIDDEN, "intermediate_size": WIDTH, "activation": MoEActivation.SILU,
        "device": "cpu", "routing_method": RoutingMethodType.Renormalize, "moe_parallel_config": parallel,
        "in_dtype": dtype,
    }  # fmt: skip
    gate, up, down = names
    return cls(
        PREFIX, dtype, FusedMoEConfig(**{**settings, **moe}), config_for(mixture, ignore), expert_map_manager=manager,
        ckpt_gate_proj_name=gate, ckpt_up_proj_name=up, ckpt_down_proj_name=down, **(more or {}),
    )  # fmt: skip


def load(
    layer: RoutedExperts, mixture: Mixture, edit: Callable[[dict[str, Tensor]], Any] = lambda tensors: None
) -> None:
    """What vLLM's models do: hand the layer the tensors of the checkpoint by their names in it."""
    tensors = {}
    for name, weights in mixture.items():
        for suffix, tensor in get_format("sparse24").encode(weights).items():
            tensors[f"{name.removeprefix(PREFIX + '.')}.{suffix}"] = tensor
    edit(tensors)
    list(layer.load_weights(tensors.items()))


def loaded(mixture: Mixture, *arguments: Any, **settings: Any) -> RoutedExperts:
    layer = make_layer(mixture, *arguments, **settings)
    load(layer, mixture)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def routed(tokens: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [T, K], the weights of their experts [T, 2] and the experts; none is given to the last expert."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    ids = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:2] for _ in range(tokens)])
    return x, torch.rand(tokens, 2, generator=generator), ids.int()


def apply(layer: RoutedExperts, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    return layer.forward_modular(x, weights, ids)


def expected(
    mixture: Mixture, x: Tensor, weights: Tensor, ids: Tensor, names: tuple[str, str, str] = QWEN,
    activation: Callable[[Tensor], Tensor] = functional.silu, clamp: tuple[float, float, float] | None = None,
) -> Tensor:  # fmt: skip
    output = torch.zeros(x.shape, dtype=torch.float64)
    for token, (row, of_row) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        for expert, weight in zip(row, of_row, strict=True):
            if expert >= 0:
                gate, up, down = (mixture[f"{PREFIX}.{expert}.{leaf}"] for leaf in names)
                t = x[token].double()
                g, u = of_linear(gate, t), of_linear(up, t)
                if clamp is None:
                    between = activation(g) * u
                else:
                    limit, alpha, beta = clamp
                    g, u = g.clamp(max=limit), u.clamp(-limit, limit)
                    between = g * torch.sigmoid(alpha * g) * (u + beta)
                output[token] += weight * of_linear(down, between)
    return output


def of_linear(linear: LinearWeights, t: Tensor) -> Tensor:
    product = linear.dense(torch.float64) @ t
    return product if linear.bias is None else product + linear.bias


def close(ours: Tensor, exact: Tensor) -> None:
    share = 0.02 if ours.dtype == torch.bfloat16 else 1e-5
    assert ours.shape == exact.shape and (ours.double() - exact).abs().max() <= share * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "kind",
    [{}, {"group_size": 0}, {"bits": 8}, {"bits": 16}, {"pattern": "dense"}, {"symmetric": False}],
    ids=str,
)
def test_experts_are_those_of_a_plain_loop(kind: dict[str, Any], dtype: torch.dtype) -> None:
    mixture = make_mixture(**kind)
    layer = loaded(mixture, dtype)
    assert isinstance(layer.quant_method, Sparse24MoEMethod)
    assert not list(layer.parameters())  # the packed bytes are not kept beside what the back end made
    for tokens in (7, 1):
        batch = routed(tokens, dtype)
        ours = apply(layer, *batch)
        assert ours.dtype == dtype
        close(ours, expected(mixture, *batch))


def test_names_of_mixtral_other_activations_and_float16_scales() -> None:
    mixture = make_mixture(MIXTRAL, scale_dtype=torch.float16)
    layer = loaded(mixture, names=MIXTRAL, activation=MoEActivation.GELU)
    close(apply(layer, *routed(7)), expected(mixture, *routed(7), MIXTRAL, functional.gelu))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("settings", "clamp"),
    [
        ({"activation": MoEActivation.SWIGLUOAI}, (7.0, 1.702, 1.0)),
        ({"more": {"swiglu_limit": 2.0}}, (2.0, 1.0, 0.0)),
        ({"swiglu_limit": 3.0, "more": {"swiglu_limit": 2.0, "swiglu_alpha": 1.5}}, (2.0, 1.0, 0.0)),
        (
            {"activation": MoEActivation.SWIGLUOAI_UNINTERLEAVE, "swiglu_limit": 3.0, "swiglu_alpha": 1.5, "swiglu_beta": 0.5},
            (3.0, 1.5, 0.5),
        ),
        ({}, None),
    ],
)  # fmt: skip
def test_biases_and_clamped_activations(
    settings: dict[str, Any], clamp: tuple[float, float, float] | None, dtype: torch.dtype
) -> None:
    mixture = make_mixture(biases=True)
    layer = loaded(mixture, dtype, has_bias=True, **settings)
    x, weights, ids = routed(7, dtype)
    for rows in (7, 1):
        batch = 8 * x[:rows], weights[:rows], ids[:rows]  # such that some are beyond the limit
        close(apply(layer, *batch), expected(mixture, *batch, clamp=clamp))
    assert not list(layer.parameters())


def test_ranks_add_up_biases_once() -> None:
    mixture = make_mixture(biases=True)
    settings: dict[str, Any] = {"has_bias": True, "activation": MoEActivation.SWIGLUOAI}
    for split in ("tp", "ep"):
        ranks = [loaded(mixture, **{split: (rank, 2)}, **settings) for rank in range(2)]
        ours = sum(apply(layer, *routed(7)) for layer in ranks)
        close(ours, expected(mixture, *routed(7), clamp=(7.0, 1.702, 1.0)))


def test_weights_of_a_router_that_are_multiplied_into_what_experts_read() -> None:
    mixture = make_mixture()
    layer = loaded(mixture, more={"apply_router_weight_on_input": True}, experts_per_token=1)
    x, weights, ids = routed(7)
    weights, ids = weights[:, :1], ids[:, :1]
    close(apply(layer, x, weights, ids), expected(mixture, x * weights, torch.ones_like(weights), ids))


def test_only_the_experts_of_a_batch_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = make_mixture()
    layer = loaded(mixture)
    seen: list[int] = []
    product = vllm_experts.sparse24_linear

    def counted(x: Tensor, *rest: Any) -> Tensor:
        seen.append(len(x))
        return product(x, *rest)

    monkeypatch.setattr(vllm_experts, "sparse24_linear", counted)
    x, weights, _ = routed(4)
    ids = torch.tensor([[3, 1], [1, -1], [-1, -1], [1, 3]], dtype=torch.int32)
    close(apply(layer, x, weights, ids), expected(mixture, x, weights, ids))
    assert seen == [3, 3, 2, 2]  # rows of expert 1 and of expert 3, without padding, twice each
    assert not apply(layer, x, weights, torch.full_like(ids, -1)).any()
    assert apply(layer, x[:0], weights[:0], ids[:0]).shape == (0, HIDDEN)
    assert len(seen) == 4


@pytest.mark.parametrize("kind", [{}, {"group_size": 0, "symmetric": False}, {"bits": 16}], ids=str)
def test_tensor_parallel_splits_every_expert(kind: dict[str, Any]) -> None:
    mixture = make_mixture(**kind)
    whole, ranks = loaded(mixture), [loaded(mixture, tp=(rank, 2)) for rank in range(2)]
    close(sum(apply(layer, *routed(7)) for layer in ranks), expected(mixture, *routed(7)))
    sizes = [sum(buffer.nbytes for buffer in layer.buffers()) for layer in (whole, *ranks)]
    assert sizes[1] == sizes[2] < 0.6 * sizes[0]


def test_expert_parallel_keeps_the_experts_of_its_rank() -> None:
    mixture = make_mixture()
    ranks = [loaded(mixture, ep=(rank, 2)) for rank in range(2)]
    close(sum(apply(layer, *routed(9)) for layer in ranks), expected(mixture, *routed(9)))
    assert [layer.sparse24_w13_0.shape[0] for layer in ranks] == [3, 2]
    x, weights, ids = routed(3)
    assert not apply(ranks[1], x, weights, torch.full_like(ids, 1)).any()  # the other rank's
    part = {name: weights for name, weights in mixture.items() if int(name.split(".")[-2]) >= 3}
    alone = make_layer(mixture, ep=(1, 2))
    load(alone, part)  # what is not its own may be missing
    alone.quant_method.process_weights_after_loading(alone)
    assert torch.equal(apply(alone, *routed(9)), apply(ranks[1], *routed(9)))


def test_what_tensor_parallel_cannot_split_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=rf"{PREFIX}\.\*\.down_proj: tensor parallel 4 gives each rank 32 of 128"):
        make_layer(make_mixture(group_size=64), tp=(0, 4))


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        ("3.up_proj.weight_meta", lambda t: t.fill_(0x41), "two ascending positions"),
        ("3.down_proj.weight_scale", lambda t: t.fill_(float("inf")), "finite"),
        (
            "0.gate_proj.weight_packed",
            lambda t: t[:, 1:],
            r"expected torch.int32 \[128, 4\], found torch.int32 \[128, 3\]",
        ),
        ("2.gate_proj.weight_packed", lambda t: t[1:], r"found torch.int32 \[127, 4\]"),
        ("2.gate_proj.weight_packed", lambda t: t.long(), "found torch.int64"),
        ("2.gate_proj.weight_scale", lambda t: t.half(), "expected torch.bfloat16 .*found torch.float16"),
        ("4.down_proj.weight_meta", lambda t: None, "does not hold it"),
        ("4.up_proj.bias", lambda t: None, "does not hold it"),
        ("1.gate_proj.bias", lambda t: t[1:], r"expected torch.float32 \[128\], found torch.float32 \[127\]"),
        ("1.down_proj.bias", lambda t: t.double(), "found torch.float64"),
        ("1.up_proj.bias", lambda t: t.fill_(float("nan")), "finite"),
    ],
)
def test_damaged_tensors_are_refused_by_name(
    tensor: str, change: Callable[[Tensor], Tensor | None], message: str
) -> None:
    biases = tensor.endswith("bias")

    def edit(tensors: dict[str, Tensor]) -> None:
        changed = change(tensors.pop(tensor).clone())
        if changed is not None:
            tensors[tensor] = changed

    layer = make_layer(make_mixture(), has_bias=biases)
    with pytest.raises(CheckpointError, match=rf"{PREFIX}\.{tensor}: .*{message}"):
        load(layer, make_mixture(biases=biases), edit)
        layer.quant_method.process_weights_after_loading(layer)


class OfItsOwn(RoutedExperts):
    def weight_loader(self, *arguments: Any, **settings: Any) -> Any:
        raise NotImplementedError


class OfCommonOnes(RoutedExperts):
    """As that of vLLM's transformers back end."""

    def get_expert_mapping(self, *arguments: Any, **settings: Any) -> list[tuple[str, str, int, str]]:
        return super().get_expert_mapping(*arguments, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": MoEActivation.SWIGLUSTEP}, "their activation is swiglustep;"),
        ({"activation": MoEActivation.SWIGLUOAI_UNINTERLEAVE}, "their activation is swigluoai_uninterleave;"),
        ({"activation": MoEActivation.GELU, "swiglu_limit": 7.0}, "their activation is gelu, clamped"),
        ({"activation": MoEActivation.GELU, "more": {"swiglu_limit": 7.0}}, "their activation is gelu, clamped"),
        ({"more": {"apply_router_weight_on_input": True}}, "multiplied into what the experts read"),
        ({"is_lora_enabled": True}, "without --enable-lora"),
        ({"cls": OfItsOwn}, r"in a way of its own \(OfItsOwn\)"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{PREFIX}: vLLM cannot serve .*{message}.*transformers runs them"):
        make_layer(make_mixture(), **settings)


def test_a_class_that_only_adds_names_is_served() -> None:
    mixture = make_mixture()
    close(apply(loaded(mixture, cls=OfCommonOnes), *routed(5)), expected(mixture, *routed(5)))


def test_a_gpu_needs_eager_mode_where_the_processor_chooses_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = VllmConfig()
    config.model_config = type("Config", (), {"enforce_eager": False, "dtype": torch.float32})()
    monkeypatch.setenv("SPARSIFY_BACKEND", "reference")
    with set_current_vllm_config(config):
        with pytest.raises(CheckpointError, match="back end reference .* add --enforce-eager"):
            loaded(make_mixture(), device="cuda")
        config.model_config.enforce_eager = True
        loaded(make_mixture(), device="cuda")


@pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")
@pytest.mark.parametrize("kind", [{}, {"group_size": 0, "symmetric": False}, {"bits": 16}, {"biases": True}], ids=str)
def test_the_triton_back_end_serves_all_experts_in_one_launch(
    interpreter: ModuleType,  # noqa: F811
    kind: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU only in name, CUDA graphs included: the kernels are interpreted."""
    monkeypatch.setenv("SPARSIFY_BACKEND", "triton")
    config = VllmConfig()
    config.model_config = type("Config", (), {"enforce_eager": False, "dtype": torch.bfloat16})()
    mixture = make_mixture(**kind)
    clamp, settings = None, {}
    if kind.get("biases"):
        clamp, settings = (7.0, 1.702, 1.0), {"has_bias": True, "activation": MoEActivation.SWIGLUOAI}
    with set_current_vllm_config(config):
        ranks = [loaded(mixture, torch.bfloat16, ep=(rank, 2), device="cuda", **settings) for rank in range(2)]
    assert ranks[0].quant_method.forms[0].startswith("triton")
    monkeypatch.setattr(vllm_experts, "sparse24_linear", None)  # no expert is computed by itself
    x, weights, ids = routed(5, torch.bfloat16)
    ids[1, 0] = -1
    close(sum(apply(layer, x, weights, ids) for layer in ranks), expected(mixture, x, weights, ids, clamp=clamp))
    for layer in ranks:
        assert apply(layer, x[:0], weights[:0], ids[:0]).shape == (0, HIDDEN)


def test_a_gpu_takes_triton_for_experts_whatever_single_linears_take(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, scheme = torch.device("cuda"), ModuleScheme(4, 64, "2:4", (128, 64))
    monkeypatch.delenv("SPARSIFY_BACKEND", raising=False)
    monkeypatch.setattr(vllm_experts, "choose_backend", lambda *of: cuda.Cuda())
    for serves, name in ((None, "triton"), ("not here", "cuda")):
        monkeypatch.setattr(Triton, "reason_unavailable", lambda self, serves=serves: serves)
        monkeypatch.setattr(Triton, "supports", lambda self, *of: None)
        assert vllm_experts.experts_backend(scheme, gpu, torch.bfloat16).name == name
    monkeypatch.setattr(Triton, "reason_unavailable", lambda self: None)
    monkeypatch.setenv("SPARSIFY_BACKEND", "cuda")
    assert vllm_experts.experts_backend(scheme, gpu, torch.bfloat16).name == "cuda"


def test_experts_that_are_compressed_in_other_ways_are_not_one_layer() -> None:
    mixture = make_mixture()
    name = f"{PREFIX}.1.down_proj"
    mixture[name] = round_linear(torch.randn(HIDDEN, WIDTH), bits=8, group_size=32)
    with pytest.raises(CheckpointError, match=rf"must be compressed alike; found {name}: .*transformers runs"):
        make_layer(mixture)
    del mixture[name]
    with pytest.raises(CheckpointError, match=f"must be compressed alike; found {name}: dense"):
        make_layer(mixture, ignore=[name])


def test_dense_experts_stay_vllms_own() -> None:
    other = {name.replace("layers.0", "layers.1"): weights for name, weights in make_mixture().items()}
    dense = make_layer(other, ignore=list(make_mixture()))
    assert isinstance(dense.quant_method, UnquantizedFusedMoEMethod)


@pytest.mark.parametrize("biases", [False, True])
def test_weights_can_be_replaced_in_place(biases: bool) -> None:
    layer = make_layer(make_mixture(), has_bias=biases)
    record_metadata_for_reloading(layer)
    load(layer, make_mixture(biases=biases))
    layer.quant_method.process_weights_after_loading(layer)
    places = {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}
    for seed in (1, 2):
        initialize_layerwise_reload(layer)
        mixture = make_mixture(seed=seed, biases=biases)
        load(layer, mixture)
        finalize_layerwise_reload(layer, None)
        close(apply(layer, *routed(5)), expected(mixture, *routed(5)))
        assert {name: buffer.data_ptr() for name, buffer in layer.named_buffers()} == places and places


def test_dummy_weights_are_valid() -> None:
    config = VllmConfig()
    config.load_config.load_format = "dummy"
    with set_current_vllm_config(config):
        layer = make_layer(make_mixture())
    layer.quant_method.process_weights_after_loading(layer)
    y = apply(layer, *routed(3))
    assert torch.isfinite(y).all() and y.abs().max() > 0


def test_torch_compile_sees_one_op() -> None:
    layer = loaded(make_mixture())
    batch = routed(7)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda *given: apply(layer, *given), backend=keep, fullgraph=True)
    assert torch.equal(compiled(*batch), apply(layer, *batch))
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [
        torch.ops.sparsify.sparse24_experts.default
    ]


def test_metrics_count_the_experts_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    loading = Loading()
    monkeypatch.setattr(vllm_experts, "LOADING", loading)
    layer = loaded(make_mixture())
    nbytes = {labels["layer"]: value for name, labels, value in loading.samples() if name == "sparsify_linear_bytes"}
    assert nbytes == {
        "experts.gate_up_proj": layer.sparse24_w13_0.nbytes,
        "experts.down_proj": layer.sparse24_w2_0.nbytes,
    }


def test_the_cuda_back_end_serves(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """With a GPU only in name: the kernel's library is one that runs on the processor."""
    mixture = make_mixture(group_size=64)
    monkeypatch.setenv("SPARSIFY_BACKEND", "cuda")
    with cuda.emulated(library, SM_COUNT):
        monkeypatch.setattr(cuda, "_gpus", lambda: [torch.device("cpu")])
        layer = loaded(mixture, torch.bfloat16)
        assert layer.quant_method.forms[0].startswith("cuda 4 64 2:4")
        batch = routed(5, torch.bfloat16)
        close(apply(layer, *batch), expected(mixture, *batch))
