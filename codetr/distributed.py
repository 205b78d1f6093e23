"""Counts over all ranks. Without an initialised process group there is one rank, and nothing here
communicates."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def world_sum(values: Tensor) -> Tensor:
    """Elementwise sum over the ranks, detached; every rank must call it with the same shape."""
    values = values.detach().clone()
    if world_size() > 1:
        distributed.all_reduce(values)
    return values


def world_max(value: int, device: torch.device | str = "cpu") -> int:
    """Largest ``value`` of all ranks; ``device`` must suit the process group's backend."""
    if world_size() == 1:
        return value
    values = torch.tensor(value, device=device)
    distributed.all_reduce(values, distributed.ReduceOp.MAX)
    return int(values)


def normaliser(count: Tensor | float, device: torch.device | str | None = None) -> Tensor:
    """What a rank divides its summed loss by: ``max(world's count, 1) / world size``.

    DDP averages gradients over the ranks. Divided by this, the average is the gradient of the
    summed loss over the world's count: what one process computes on the whole batch.

    Args:
        count: this rank's count of what the loss is a mean over; a tensor of several counts is
            treated elementwise, with a single communication.
        device: where the result lives; default: that of ``count``.
    """
    total = world_sum(torch.as_tensor(count, dtype=torch.float32, device=device))
    return total.clamp(min=1) / world_size()
