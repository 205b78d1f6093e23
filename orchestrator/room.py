"""Room on the cluster for trials whose number of workers is a range."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from orchestrator.cluster import bundle, free_workers
from orchestrator.experiment import Resources

_SETTLE_SECONDS = 10.0
"""So long after a trial's workers have ended may their places still look taken."""


@dataclass
class _Probe:
    """Workers' places that are asked for and not used.

    While it waits an autoscaler sees the demand; once it is placed, nobody else takes the room.
    """

    trial: str
    workers: int
    group: Any

    @classmethod
    def of(cls, trial: str, resources: Resources, workers: int) -> _Probe:
        import ray

        return cls(trial, workers, ray.util.placement_group([bundle(resources)] * workers))

    @property
    def is_placed(self) -> bool:
        import ray

        table: dict[str, Any] = ray.util.placement_group_table(self.group)
        return table["state"] == "CREATED"

    def remove(self) -> None:
        import ray

        ray.util.remove_placement_group(self.group)


@dataclass
class Room:
    """Who gets how many workers, for the trials of one plan.

    A trial starts with as many as have room now, at least the fewest it may have. One trial at a
    time then waits for room to grow; if several did, each could take what another one's restart
    has just set free.
    """

    resources: Resources
    _promised: dict[str, int] = field(default_factory=dict)
    _at_work: dict[str, int] = field(default_factory=dict)
    _due: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Workers that a trial starting again may soon have, and until when it waits for them."""
    _probe: _Probe | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, trial: str, batch_size: int) -> int | None:
        """How many workers the trial may start now; None: not even the fewest have room."""
        with self._lock:
            self._promised.pop(trial, None)
            free = free_workers(self.resources) - sum(self._promised.values())
            grown = self._probe.workers if self._probe and self._is_placed_for(trial) else 0
            if (before := self._at_work.pop(trial, None)) is not None:
                self._due[trial] = (before + grown, time.monotonic() + _SETTLE_SECONDS)
            possible = self.resources.worker_counts(batch_size)
            counts = [n for n in possible if n <= free + grown]
            due, until = self._due.get(trial, (0, 0.0))
            if counts and (counts[-1] >= due or time.monotonic() > until):
                if self._probe and (grown or not self._probe.is_placed):
                    self._forget_probe()  # it would take what is promised now
                self._due.pop(trial, None)
                self._promised[trial] = counts[-1]
                return counts[-1]
            if not counts:
                self._ask_for(trial, possible[0])
            return None

    def placed(self, trial: str) -> None:
        """The trial's workers have taken their places: these are no longer free, nor promised."""
        with self._lock:
            if trial in self._promised:
                self._at_work[trial] = self._promised.pop(trial)

    def can_grow(self, trial: str, batch_size: int) -> bool:
        """Whether the trial, at work, could have more workers now."""
        with self._lock:
            now = self._at_work.get(trial)
            if now is None:
                return False
            more = [n for n in self.resources.worker_counts(batch_size) if n > now]
            if not more:
                return False
            self._ask_for(trial, more[0] - now)
            return self._is_placed_for(trial)

    def leave(self, trial: str) -> None:
        """The trial has ended."""
        with self._lock:
            for of_trials in (self._promised, self._at_work, self._due):
                of_trials.pop(trial, None)
            if self._probe is not None and self._probe.trial == trial:
                self._forget_probe()

    def _is_placed_for(self, trial: str) -> bool:
        return self._probe is not None and self._probe.trial == trial and self._probe.is_placed

    def _ask_for(self, trial: str, workers: int) -> None:
        if self._probe is None and not self._promised:
            self._probe = _Probe.of(trial, self.resources, workers)

    def _forget_probe(self) -> None:
        assert self._probe is not None
        self._probe.remove()
        self._probe = None
