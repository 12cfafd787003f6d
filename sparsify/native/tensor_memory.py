"""Memory of tensors on the CPU that others of the same size can take when it is free again.

torch asks the C library for aligned memory, and glibc (2.36 was measured) never gives such a piece the place of one of its own
size. What is freed between two tensors that stay was lost: a walk over SmolLM2-135M held 1.36 GB where 1.11 are enough
(`docs/kernel-log.md`). So tensors get memory from `malloc`, aligned by `kernels/cpu/tensor_memory.cpp`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from sparsify.errors import SparsifyError
from sparsify.native.build import open_library

KERNEL = "cpu/tensor_memory"

logger = logging.getLogger(__name__)


@contextmanager
def reusable_tensor_memory() -> Iterator[bool]:
    """Tensors that are made meanwhile take memory of `malloc`. Yields whether they do: without a compiler they stay where torch puts
    them."""
    import torch  # noqa: F401  (brings the library whose allocator is replaced)

    try:
        library = open_library(KERNEL)
    except SparsifyError as error:
        logger.info("%s: %s; tensors lie where torch puts them", KERNEL, error)
        yield False
        return
    outermost = library.sparsify_use_malloc()
    try:
        yield True
    finally:
        if outermost:
            library.sparsify_use_before()
