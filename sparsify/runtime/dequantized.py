"""The weight of a compressed linear for code that wants a dense matrix: dequantized when it is computed with, never stored."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsify.errors import SparsifyError


class DequantizedWeight(Tensor):
    """A tensor [N, K] whose shape, dtype and device cost nothing, and whose numbers come from `dense` in every operation.

    It is there for code that multiplies with `linear.weight` itself (Mamba), asks for its dtype or device (peft, vLLM), or
    dequantizes it once (DeepSeek's attention in vLLM). Autograd keeps this tensor, not the dense one, for the backward pass.
    It cannot be written to: what is written would be lost.
    """

    _is_hf_initialized = True  # transformers: nothing is missing here, so nothing is to be drawn at random
    linear: str
    dense: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device, dense: Callable[[], Tensor]
    ) -> "DequantizedWeight":
        """name: of the linear, for error messages. dense: gives [N, K] in `dtype` on `device`."""
        made: DequantizedWeight = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        made.linear, made.dense = name, dense
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"DequantizedWeight({self.linear}, shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"
        )

    @property
    def data(self) -> Tensor:
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        raise self._read_only()

    def _read_only(self) -> SparsifyError:
        return SparsifyError(
            f"{self.linear}: its weight is compressed and cannot be changed in place; merge adapters into the `dense` export of "
            "this checkpoint (sparsify export --format dense), or train them inside the mask with the lora pass"
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            if isinstance(given, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                raise given._read_only()
        if func is torch.ops.aten.detach.default:
            weight = args[0]
            return cls(weight.linear, weight.shape, weight.dtype, weight.device, weight.dense)
        args, kwargs = pytree.tree_map_only(cls, lambda weight: weight.dense(), (args, kwargs))
        return func(*args, **kwargs)
