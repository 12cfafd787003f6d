"""The back ends of `sparsify::sparse24_linear`, one per file, fastest first.

Where several serve a linear on a GPU, measured times decide (`measured_choice.py`), and the order of `BACKENDS` where there
are none.

A back end turns the tensors of a checkpoint into its own layout once, at load time (`prepare`), and multiplies with
them afterwards (`linear`). To add one: write a file beside this one and put an instance into `BACKENDS`.
"""

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sparsify.errors import SparsifyError
from sparsify.formats import ModuleScheme
from sparsify.runtime.backends import measured_choice
from sparsify.runtime.backends.cpu import Cpu
from sparsify.runtime.backends.cuda import Cuda
from sparsify.runtime.backends.reference import Reference
from sparsify.runtime.backends.torch24 import Torch24
from sparsify.runtime.backends.triton import Triton
from sparsify.runtime.zero_points import held_in_words

ENVIRONMENT_VARIABLE = "SPARSIFY_BACKEND"


class Backend(Protocol):
    """One implementation of the sparse24 linear. Stateless: everything it needs later is in `prepared`."""

    name: str

    def reason_unavailable(self) -> str | None:
        """None when this back end can run on this machine, else what is missing and how to get it."""

    def supports(self, scheme: ModuleScheme, device: torch.device, dtype: torch.dtype) -> str | None:
        """None when it can serve a linear of this scheme on `device` with activations of `dtype`, else why not."""

    def prepare(self, tensors: Mapping[str, Tensor], scheme: ModuleScheme, dtype: torch.dtype) -> list[Tensor]:
        """The checkpoint's tensors (by suffix: weight_packed, ...; already checked) in this back end's own layout."""

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, scheme: ModuleScheme) -> Tensor:
        """x: [..., K]; bias: [N] or None. Returns [..., N] in the dtype of x, never a view of x."""


BACKENDS: tuple[Backend, ...] = (Cpu(), Cuda(), Torch24(), Triton(), Reference())


def known_backends() -> list[str]:
    """Names of all back ends, fastest first."""
    return [backend.name for backend in BACKENDS]


@functools.cache
def get_backend(name: str) -> Backend:
    """The back end called `name`; SparsifyError listing the known ones when there is none."""
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise SparsifyError(f"unknown back end {name!r}; known back ends: {', '.join(known_backends())}")


def choose_backend(scheme: ModuleScheme, device: torch.device, dtype: torch.dtype) -> Backend:
    """The fastest back end that serves this linear here, or the first one in SPARSIFY_BACKEND (`cuda,triton`) that does.

    Where none of the forced back ends can serve the linear, that is an error, never a silent replacement.
    """
    forced = [name.strip() for name in os.environ.get(ENVIRONMENT_VARIABLE, "").split(",") if name.strip()]
    candidates: Sequence[Backend] = BACKENDS
    if forced:
        try:
            candidates = [get_backend(name) for name in forced]
        except SparsifyError as error:
            raise SparsifyError(f"{ENVIRONMENT_VARIABLE}: {error}") from None
    reasons = []
    serving = []
    for backend in candidates:
        reason = backend.reason_unavailable() or backend.supports(scheme, device, dtype)
        if reason is not None:
            reasons.append(f"{backend.name}: {reason}")
            continue
        serving.append(backend)
        if forced or device.type == "cpu":  # one order holds for every processor, and the reference need not be asked
            break
    if serving:
        measured = (
            measured_choice.fastest([backend.name for backend in serving], scheme, device) if serving[1:] else None
        )
        return get_backend(measured) if measured else serving[0]
    n, k = scheme.shape
    what = f"a {scheme.pattern} {scheme.bits}-bit linear [{n}, {k}] on {device} with {dtype}"
    remedy = (
        f"; unset {ENVIRONMENT_VARIABLE} to let sparsify choose, or let it name another back end too" if forced else ""
    )
    raise SparsifyError(f"no back end serves {what} ({'; '.join(reasons)}){remedy}")


def announce(logger: logging.Logger, backend: Backend, scheme: ModuleScheme, device: torch.device) -> None:
    """Say which back end serves, once per logger and kind of linear."""
    kind = f"{scheme.pattern} {scheme.bits}-bit linears on {device.type}"
    _announce_once(logger, f"sparse24: back end {backend.name!r} serves {kind}")


def announce_zero_points(logger: logging.Logger, stored: ModuleScheme, held: ModuleScheme, dtype: torch.dtype) -> None:
    """Say what zero points cost, once per logger and kind of linear.

    stored, held: the linear on disk and as the back end has it (`without_zero_points`); dtype: of the activations
    """
    if not stored.symmetric:
        _announce_once(logger, f"sparse24: {held_in_words(stored, held, dtype)}")


@functools.cache
def _announce_once(logger: logging.Logger, line: str) -> None:
    logger.info("%s", line)
