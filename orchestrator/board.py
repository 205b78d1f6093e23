"""Where trials say how far they are: between Ray's processes and the one that shows and records.

A :class:`Board` becomes a Ray actor. Progress is for the eye and may be lost. Reports are not: each
carries the trial's whole history, so the next one replaces any that was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Where a trial is; the numbers count from 1.

    Attributes:
        stage: what it is doing, in a word.
        loss: total of equation 6 in the last step.
        seconds_left: of training, by the pace of the last steps.
    """

    stage: str
    epoch: int = 0
    step: int = 0
    images_per_second: float | None = None
    loss: float | None = None
    seconds_left: float | None = None


@dataclass(frozen=True)
class Epoch:
    """An epoch that a trial has finished and saved.

    Attributes:
        epoch: from 1.
        step: optimiser steps since the beginning.
        values: every measured number by its readable path: ``train/loss``, ``val/AP``, ...
    """

    epoch: int
    step: int
    values: dict[str, float]

    @classmethod
    def read(cls, row: dict[str, Any]) -> Epoch:
        return cls(epoch=row["epoch"], step=row["step"], values=dict(row["values"]))


History = list[Epoch]


@dataclass
class Board:
    """The latest progress of every trial, and the reports not yet fetched."""

    progress: dict[str, Progress] = field(default_factory=dict)
    reports: dict[str, History] = field(default_factory=dict)

    def show(self, trial: str, progress: Progress) -> None:
        self.progress[trial] = progress

    def report(self, trial: str, history: History) -> None:
        self.reports[trial] = history

    def fetch(self) -> tuple[dict[str, Progress], dict[str, History]]:
        """Everything new since the last call."""
        news = self.progress, self.reports
        self.progress, self.reports = {}, {}
        return news
