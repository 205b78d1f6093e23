"""What an epoch of training measures: step by step, and as a whole."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Self

import torch
from torch import Tensor

from codetr.checkpoint import PartialEpoch
from codetr.cost import Cost
from codetr.distributed import world_size, world_sum
from codetr.structures import LossOutput


@dataclass(frozen=True)
class StepReport:
    """A step just taken; epochs and steps count from 1.

    Attributes:
        loss: the total of equation 6, mean over the ranks.
        images_per_second: of all ranks, smoothed over the last steps.
        seconds_left: of the training, without its evaluations.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    learning_rate: float
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class EpochReport:
    """An epoch of training; means are over its steps and all ranks.

    Attributes:
        losses: mean of each unweighted loss term.
        statistics: mean of each of the detector's statistics.
        total: mean of equation 6.
        gradient_norm: mean before clipping.
        learning_rate: of the last step, without multiplier.
    """

    epoch: int
    steps: int
    images: int
    losses: dict[str, float]
    statistics: dict[str, float]
    total: float
    gradient_norm: float
    learning_rate: float
    cost: Cost

    @property
    def seconds_per_step(self) -> float:
        return self.cost.seconds / self.steps

    @property
    def images_per_second(self) -> float:
        return self.images / self.cost.seconds


@dataclass(frozen=True)
class StepValues:
    """A step's numbers, means over the ranks; ``images`` is their sum."""

    total: float
    gradient_norm: float
    images: int
    losses: dict[str, float]
    statistics: dict[str, float]

    @classmethod
    def over_ranks(cls, output: LossOutput, norm: Tensor, images: int) -> Self:
        named = output.losses | output.statistics
        scalars = [output.total, norm, norm.new_full((), images), *named.values()]
        stacked = torch.stack([scalar.detach().float() for scalar in scalars])
        total, norm_, images_, *rest = (world_sum(stacked) / world_size()).tolist()
        values = dict(zip(named, rest, strict=True))
        return cls(
            total=total,
            gradient_norm=norm_,
            images=round(images_ * world_size()),
            losses={name: values[name] for name in output.losses},
            statistics={name: values[name] for name in output.statistics},
        )

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.total, self.gradient_norm, *self.losses.values())))


class Progress:
    """Keeps an epoch's numbers and makes its reports.

    Args:
        steps: of the whole epoch.
        before: what was done of it before this process, if anything.
    """

    def __init__(
        self, epoch: int, epochs: int, steps: int, before: PartialEpoch | None = None
    ) -> None:
        self.epoch, self.epochs, self.steps = epoch, epochs, steps
        self.taken = [StepValues(**values) for values in before.taken] if before else []
        self.learning_rate = before.learning_rate if before else 0.0
        self._before = before.cost if before else Cost()
        self._last, self._pace = time.perf_counter(), 0.0

    @property
    def step(self) -> int:
        return len(self.taken)

    def advance(self, values: StepValues, learning_rate: float) -> StepReport:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        # Smoothed over about ten steps.
        self._pace = 0.9 * self._pace + 0.1 * seconds if self._pace else seconds
        self.taken.append(values)
        self.learning_rate = learning_rate
        steps_left = (self.epochs - self.epoch + 1) * self.steps - self.step
        return StepReport(
            epoch=self.epoch,
            epochs=self.epochs,
            step=self.step,
            steps=self.steps,
            loss=values.total,
            learning_rate=learning_rate,
            images_per_second=values.images / self._pace,
            seconds_left=steps_left * self._pace,
        )

    def partial(self, cost: Cost, generators: list[dict[str, Any]]) -> PartialEpoch:
        """What another process needs to go on."""
        return PartialEpoch(
            taken=[asdict(values) for values in self.taken],
            learning_rate=self.learning_rate,
            cost=self._before + cost,
            generators=generators,
        )

    def summary(self, cost: Cost) -> EpochReport:
        """The epoch as a whole, of which this process has cost so much."""
        return EpochReport(
            epoch=self.epoch,
            steps=self.step,
            images=sum(values.images for values in self.taken),
            losses=_means([values.losses for values in self.taken]),
            statistics=_means([values.statistics for values in self.taken]),
            total=fmean(values.total for values in self.taken),
            gradient_norm=fmean(values.gradient_norm for values in self.taken),
            learning_rate=self.learning_rate,
            cost=self._before + cost,
        )


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(row[name] for row in rows) for name in rows[0]}
