"""Counts over all ranks. Without an initialised process group there is one rank, and nothing here
communicates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
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
    """Largest ``value`` of all ranks, and of all parts of a batch (see :class:`PartCounts`);
    ``device`` must suit the process group's backend."""
    if (counts := _part_counts.get()) is not None:
        return int(counts.count(torch.full((), value, device=device), torch.maximum))
    return value if world_size() == 1 else int(_over_ranks(value, device, torch.maximum))


def normaliser(
    count: Tensor | float, device: torch.device | str | None = None, least: Tensor | float = 1
) -> Tensor:
    """What a rank divides its summed loss by: ``max(world's count, least) / world size``.

    DDP averages gradients over the ranks. Divided by this, the average is the gradient of the
    summed loss over the world's count: what one process computes on the whole batch, also where a
    batch is computed in parts (see :class:`PartCounts`).

    Args:
        count: this rank's count of what the loss is a mean over; a tensor of several counts is
            treated elementwise, with a single communication.
        device: where the result lives; default: that of ``count``.
        least: a floor, against division by zero where nothing is counted; like ``count``, it may
            be several.
    """
    if not isinstance(count, Tensor):  # a tensor made of it would be copied, which a GPU waits for
        count = torch.full((), count, dtype=torch.float32, device=device)
    count = count.to(device=device, dtype=torch.float32)
    counts = _part_counts.get()
    total = world_sum(count) if counts is None else counts.count(count, torch.add)
    return total.clamp(min=least) / world_size()


Combine = Callable[[Tensor, Tensor], Tensor]
"""``torch.add`` or ``torch.maximum``."""


def _over_ranks(value: Tensor | int, device: torch.device | str, combine: Combine) -> Tensor:
    values = torch.as_tensor(value, device=device).detach().clone()
    if world_size() > 1:
        operation = distributed.ReduceOp.SUM if combine is torch.add else distributed.ReduceOp.MAX
        distributed.all_reduce(values, operation)
    return values


class PartCounts:
    """The counts of a batch whose parts are computed one after the other, as if it were whole.

    Losses are divided by counts over the whole global batch, which no part knows. Therefore every
    part is computed twice. The first time, within :meth:`measure` and without gradients, its counts
    are noted in the order in which they are asked for. The second time, within :meth:`use`, the
    answers are the counts of all parts and ranks.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[Tensor, Combine]] = []
        self._next = 0
        self._complete = False

    def measure(self) -> AbstractContextManager[None]:
        """Compute a part for the first time."""
        assert not self._complete, "measure every part before one is used"
        return self._counting()

    def use(self) -> AbstractContextManager[None]:
        """Compute a part for the second time; all ranks must come here."""
        if not self._complete:
            self._noted = [
                (_over_ranks(value, value.device, combine), combine)
                for value, combine in self._noted
            ]
            self._complete = True
        return self._counting()

    @contextmanager
    def _counting(self) -> Iterator[None]:
        self._next = 0
        token = _part_counts.set(self)
        try:
            yield
        finally:
            _part_counts.reset(token)

    def count(self, value: Tensor, combine: Combine) -> Tensor:
        """The next count: this part's own when measuring, else the whole batch's."""
        position, self._next = self._next, self._next + 1
        if self._complete:
            return self._noted[position][0]
        value = value.detach()
        if position == len(self._noted):
            self._noted.append((value, combine))
        else:
            self._noted[position] = (combine(self._noted[position][0], value), combine)
        return value


_part_counts: ContextVar[PartCounts | None] = ContextVar("part_counts", default=None)
"""Of the part that is being computed."""


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
