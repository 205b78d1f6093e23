"""Counts over all ranks. Without an initialised process group there is one rank, and nothing here
communicates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


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


def gather(value: T) -> list[T]:
    """Every rank's ``value``, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def gather_on_rank_zero(value: T) -> list[T]:
    """Every rank's ``value`` on rank 0, and nothing on the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    distributed.gather_object(value, values)
    return values or []


def from_rank_zero(function: Callable[[], T]) -> T:
    """What ``function`` returns, or raises, on rank 0: on every rank, so that none waits for it."""
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
