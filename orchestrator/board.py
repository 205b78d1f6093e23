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
        notes: what befell the trial since the epoch before, in sentences.
        time: seconds since 1970 at its end.
    """

    epoch: int
    step: int
    values: dict[str, float]
    notes: tuple[str, ...] = ()
    time: float = 0.0

    @classmethod
    def read(cls, row: dict[str, Any]) -> Epoch:
        return cls(
            epoch=row["epoch"],
            step=row["step"],
            values=dict(row["values"]),
            notes=tuple(row.get("notes", ())),
            time=row.get("time", 0.0),
        )


History = list[Epoch]


@dataclass
class Board:
    """The latest progress of every trial, the reports not yet fetched, the last step that is in
    safety, in how many parts each trial computes its batches, and the placement group that its
    workers occupy."""

    progress: dict[str, Progress] = field(default_factory=dict)
    reports: dict[str, History] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)
    accumulation: dict[str, int] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)

    def show(self, trial: str, progress: Progress) -> None:
        self.progress[trial] = progress

    def report(self, trial: str, news: History, step: int) -> None:
        """A checkpoint after this step is in safety, and if there is news, an epoch has ended."""
        self.saved[trial] = step
        if news:
            self.reports[trial] = news

    def step(self, trial: str) -> int:
        """The step of the trial's last checkpoint that was reported here."""
        return self.saved.get(trial, 0)

    def fetch(self) -> tuple[dict[str, Progress], dict[str, History]]:
        """Everything new since the last call."""
        news = self.progress, self.reports
        self.progress, self.reports = {}, {}
        return news

    def parts(self, trial: str, least: int) -> int:
        """In how many parts the trial's workers compute their batches: ``least``, or more since
        they ran out of memory."""
        self.accumulation[trial] = max(least, self.accumulation.get(trial, 1))
        return self.accumulation[trial]

    def out_of_memory(self, trial: str) -> None:
        """Have the workers that are started next compute in twice as many parts."""
        self.accumulation[trial] = 2 * self.accumulation.get(trial, 1)

    def occupy(self, trial: str, group: Any) -> None:
        self.groups[trial] = group

    def group(self, trial: str) -> Any:
        return self.groups.get(trial)
