"""What a call takes on a device, and how fast its memory is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from frame import Sample, timed

FLUSH_BYTES = 256 * 2**20
"""More than any GPU's cache: what a call reads comes from memory, as in a training step."""


def clock(call: Callable[[], Any], device: str, *, whole: bool = False) -> Callable[[], Sample]:
    """``call`` as something to measure: by CUDA's events, or by this CPU's clock.

    Args:
        call: to be measured.
        device: that it computes on.
        whole: on a GPU, count the memory that was allocated before, too, and leave the cache as it
            is; else the memory is what the call adds, and the cache is cold.
    """
    if torch.device(device).type != "cuda":
        return timed(call)
    flush = None if whole else torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def measure() -> Sample:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        before = 0 if whole else torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        if flush is not None:
            flush.zero_()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return {"seconds": begin.elapsed_time(end) / 1e3, "peak_mib": peak / 2**20}

    return measure


def bytes_per_second(device: str, megabytes: int = 1024, repeats: int = 10) -> float:
    """Of a copy on the device, read and written bytes together: what its memory can do."""
    source = torch.empty(megabytes * 2**20, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    seconds = min(clock(lambda: target.copy_(source), device)()["seconds"] for _ in range(repeats))
    return 2 * source.numel() / seconds


def empty_cache(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
