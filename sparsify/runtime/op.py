"""The op `sparsify::sparse24_linear`: one name for torch.compile, vLLM and transformers, whatever back end serves.

It is registered through `torch.library.Library` and not `torch.library.custom_op`: the latter wraps every call in
Python checks that cost more than a small product. It has no gradient on purpose: these weights are served, not trained.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.formats import ModuleScheme
from sparsify.runtime.backends import get_backend
from sparsify.runtime.backends.cpu import Cpu
from sparsify.runtime.backends.cuda import Cuda
from sparsify.runtime.devices import refuse_two_devices

NAME = "sparsify::sparse24_linear"
SCHEMA = (
    "sparse24_linear(Tensor x, Tensor[] prepared, Tensor? bias, SymInt out_features, str backend, int bits, "
    "int group_size, str pattern) -> Tensor"
)


@functools.cache
def _scheme(bits: int, group_size: int, pattern: str, n: int, k: int) -> ModuleScheme:
    return ModuleScheme(bits=bits, group_size=group_size, pattern=pattern, shape=(n, k))


def _sparse24_linear(
    x: Tensor,
    prepared: Sequence[Tensor],
    bias: Tensor | None,
    out_features: int,
    backend: str,
    bits: int,
    group_size: int,
    pattern: str,
) -> Tensor:
    scheme = _scheme(bits, group_size, pattern, out_features, x.shape[-1])
    return get_backend(backend).linear(x, prepared, bias, scheme)


def _fake_sparse24_linear(
    x: Tensor,
    prepared: Sequence[Tensor],
    bias: Tensor | None,
    out_features: int,
    backend: str,
    bits: int,
    group_size: int,
    pattern: str,
) -> Tensor:
    refuse_two_devices(x, *prepared, bias)
    return x.new_empty((*x.shape[:-1], out_features))


# The registration lives as long as this object.
_LIBRARY = torch.library.Library("sparsify", "FRAGMENT")
_LIBRARY.define(SCHEMA)
# One Python kernel for CPU, CUDA and every other device: the back end behind it was chosen for the device at load time.
_LIBRARY.impl("sparse24_linear", _sparse24_linear, "CompositeExplicitAutograd")
torch.library.register_fake(NAME, _fake_sparse24_linear, lib=_LIBRARY)
_OP = torch.ops.sparsify.sparse24_linear.default
_CUDA = Cuda()


def sparse24_linear(
    x: Tensor, prepared: list[Tensor], bias: Tensor | None, scheme: ModuleScheme, backend: str
) -> Tensor:
    """x @ W.T + bias. x: [..., K]; prepared: what `backend.prepare` returned for W: [N, K]. Returns [..., N]."""
    # Two have an op of their own, in C++: the general one spends longer in Python than a small product takes.
    if backend == Cpu.name:
        return torch.ops.sparsify.sparse24_linear_cpu(x, prepared[0], bias, scheme.shape[0])
    if backend == Cuda.name:
        return _CUDA.linear(x, prepared, bias, scheme)
    return _OP(x, prepared, bias, scheme.shape[0], backend, scheme.bits, scheme.group_size, scheme.pattern)
