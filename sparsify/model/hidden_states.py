"""Hidden states between two blocks of the walk, in memory or in a memory-mapped file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparsify.files import only_user, reserve


class Activations:
    """Hidden states of all micro-batches at the boundary between two blocks: on the device, in memory or in a file.

    shapes: of every micro-batch, [B, T, d]
    file:   where they lie; None keeps them in the memory of `place`
    device: where they are used; they are copied there when they are asked for, if they lie elsewhere
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        dtype: torch.dtype,
        file: Path | None = None,
        place: str = "cpu",
        device: str = "cpu",
    ):
        self.shapes, self.device = shapes, device
        sizes = [shape.numel() for shape in shapes]
        if file is None:
            pinned = place == "cpu" and device != "cpu"
            flat = torch.empty(sum(sizes), dtype=dtype, device=place, pin_memory=pinned)
        else:
            self.lock = only_user(file)
            reserve(file, sum(sizes) * dtype.itemsize)
            flat = torch.from_file(str(file), shared=True, size=sum(sizes), dtype=dtype)
        self.flat = flat
        self.parts = list(flat.split(sizes))

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Tensor:
        return self.parts[index].view(self.shapes[index]).to(self.device, non_blocking=True)

    def __setitem__(self, index: int, value: Tensor) -> None:
        self.parts[index].view(self.shapes[index]).copy_(value)

    def tokens(self, rows: Tensor) -> Tensor:
        """Some tokens of all micro-batches, counted through: [len(rows), d] on the device."""
        every = self.flat.view(-1, self.shapes[0][-1])
        return every[rows.to(every.device)].to(self.device)
