"""Times of GPU work, by the GPU's clock: single calls, and replays of CUDA graphs, which launch nothing from the processor."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

COPY_BYTES = 2**30  # of the tensor that the bandwidth is measured with, memory allowing


def captured(run: Callable[[], Any], device: torch.device) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `run`, run once before, so that everything is compiled and tuned."""
    run()
    torch.cuda.synchronize(device)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with torch.cuda.stream(stream):  # not torch.cuda.graph: it empties the allocator's cache every time
        graph.capture_begin()
        try:
            run()
        finally:
            graph.capture_end()
    torch.cuda.synchronize(device)
    return graph


def replay_seconds(graph: torch.cuda.CUDAGraph, replays: int, device: torch.device, warm: bool = True) -> list[float]:
    """Seconds of each of some replays, by the GPU's clock; warm: after one that is not counted."""
    if warm:
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:], strict=False)]


def seconds_of_one(call: Callable[[Tensor], Tensor], x: Tensor, device: torch.device) -> float:
    """Seconds of one call that is launched alone, after one that compiles and tunes."""
    call(x)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call(x)
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second when a large tensor is copied."""
    free, _ = torch.cuda.mem_get_info(device)
    source = torch.zeros(min(COPY_BYTES, free // 8), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    graph = captured(lambda: target.copy_(source), device)
    return 2 * source.numel() / median(replay_seconds(graph, 15, device))
