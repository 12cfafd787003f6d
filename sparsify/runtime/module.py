"""`Sparse24Linear`: the torch module that stands where an `nn.Linear` stood."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import CheckpointError
from sparsify.formats import ModuleScheme, get_format
from sparsify.formats.sparse24 import all_zero, checked_tensors, tensor_layout
from sparsify.runtime.backends import announce, choose_backend
from sparsify.runtime.dequantized import DequantizedWeight
from sparsify.runtime.op import sparse24_linear

logger = logging.getLogger(__name__)


class Sparse24Linear(nn.Linear):
    """y = x @ W.T + bias with W: [N, K] held as the tensors of a sparse24 checkpoint.

    The checkpoint's tensors are buffers under their names on disk, so that state dicts and `save_pretrained` give back
    the very bytes. What a back end makes of them is a cache beside them, prepared for one device and one dtype of
    activations and rebuilt when either changes. To everybody else it is an `nn.Linear` whose weight is frozen: gradients
    pass through it to what lies before, so adapters beside it can be trained.
    """

    def __init__(self, name: str, scheme: ModuleScheme, scale_dtype: torch.dtype, bias: bool) -> None:
        """name: of the module in its checkpoint, for error messages. scale_dtype: of weight_scale or weight_values.

        The tensors are empty: loading fills them. They are created on torch's default device.
        """
        nn.Module.__init__(self)  # the weight of an nn.Linear is what this one does not hold
        self.name = name
        self.scheme = scheme
        self.out_features, self.in_features = scheme.shape
        for suffix, (shape, dtype) in tensor_layout(scheme, scale_dtype).items():
            self.register_buffer(suffix, torch.empty(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(scheme.shape[0]), requires_grad=False) if bias else None  # type: ignore[assignment]
        self.dtype = scale_dtype  # of the activations: what the weight is dequantized to
        self._forget()

    def _forget(self) -> None:
        self._backend: str | None = None
        self._prepared: list[Tensor] = []
        self._prepared_for: tuple[torch.device, torch.dtype] | None = None
        self._zero = False  # nothing to multiply with: a sublayer that depth pruning removed

    def packed_tensors(self) -> dict[str, Tensor]:
        """The tensors of the checkpoint, by suffix."""
        return {suffix: self.get_buffer(suffix) for suffix in tensor_layout(self.scheme, torch.bfloat16)}

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[N, K] in the type of the activations, read-only, dequantized anew whenever it is computed with."""
        device = self.get_buffer("weight_values" if self.scheme.bits == 16 else "weight_packed").device
        return DequantizedWeight(self.name, self.scheme.shape, self.dtype, device, lambda: self.dense(self.dtype))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[N, K] in `dtype` with zeros in place."""
        with torch.no_grad():
            return get_format("sparse24").decode(self.name, self.packed_tensors(), self.scheme).dense(dtype)

    @torch.compiler.disable
    def prepare(self, dtype: torch.dtype) -> None:
        """Check the tensors and hand them to a back end for activations of `dtype`; CheckpointError names a bad one."""
        tensors = self.packed_tensors()
        device = next(iter(tensors.values())).device
        if device.type == "meta":
            raise CheckpointError(f"{self.name} holds no weights (offloaded or not loaded); move it to a device first")
        self.dtype = dtype
        with torch.no_grad():
            checked_tensors(self.name, tensors, self.scheme)
            self._zero = all_zero(tensors, self.scheme)
            if self._zero:
                self._prepared_for = (device, dtype)
                return
            backend = choose_backend(self.scheme, device, dtype)
            self._prepared = backend.prepare(tensors, self.scheme, dtype)
        self._backend, self._prepared_for = backend.name, (device, dtype)
        announce(logger, backend, self.scheme, device)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K]. Returns [..., N]."""
        if self._prepared_for != (x.device, x.dtype):
            self.prepare(x.dtype)
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            y: Tensor = _FrozenProduct.apply(x, self.bias, self)
            return y
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x @ W.T + bias by the back end that is prepared."""
        if self._zero:
            nothing = x.new_zeros(*x.shape[:-1], self.out_features)
            return nothing if bias is None else nothing + bias
        assert self._backend is not None
        return sparse24_linear(x, self._prepared, bias, self.scheme, self._backend)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Sparse24Linear":
        """Follow `.to(device)`, but keep the scales as they are on disk: `.half()` must not round a bfloat16 scale."""
        kept = {suffix: tensor for suffix, tensor in self.packed_tensors().items() if tensor.is_floating_point()}
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for suffix, tensor in kept.items():
            moved = self.get_buffer(suffix)
            if moved.dtype != tensor.dtype:
                setattr(self, suffix, tensor.to(moved.device))
        self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the checkpoint's tensors only; they prepare again at first use."""
        return {**self.__dict__, "_backend": None, "_prepared": [], "_prepared_for": None}

    def extra_repr(self) -> str:
        size = f", group_size={self.scheme.group_size}" if self.scheme.bits < 16 else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.scheme.bits}, pattern={self.scheme.pattern}{size}"
        )


class _FrozenProduct(torch.autograd.Function):
    """The product of a frozen compressed linear, differentiable in its input and bias: dx = dy @ W, W dequantized for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, linear: Sparse24Linear) -> Tensor:
        ctx.linear = linear
        return linear.product(x, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dx = dy @ ctx.linear.dense(dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None
