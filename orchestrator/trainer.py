"""Ray's trainer with the processes that a trial needs; imports Ray, so import it late."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback


class LeanTrainer(TorchTrainer):  # type: ignore[misc]
    """A trainer of trials that read their images themselves.

    Ray starts a process for each trial that hands out shards of Ray data sets, of which there are
    none, and one that looks in Ray's dashboard whether the controller still lives. Without a
    dashboard that one learns nothing (what it is for, :func:`orchestrator.jobs.free_group` does),
    and each trial would wait at its end for its last question to run into a timeout of 10 s.
    """

    def __init__(self, *arguments: Any, has_dashboard: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._unneeded: tuple[type, ...] = (DatasetsCallback,)
        if not has_dashboard:
            self._unneeded += (PlacementGroupCleanerCallback,)

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [one for one in callbacks if not isinstance(one, self._unneeded)]
