"""One Ray Train job for each trial: running it, and reading what it has left on disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from orchestrator.board import Epoch
from orchestrator.plan import Plan, Trial
from orchestrator.results import State, TrialResult

Loop = Callable[[dict[str, Any]], str | None]
"""A Ray Train loop: takes and returns what :func:`orchestrator.worker.train` does."""

WORKER_FAILURES, CONTROLLER_FAILURES = 2, 3
"""So often does Ray Train start a trial's workers again, or place them again."""

KEPT_CHECKPOINTS = 2
"""The best ones; the last is always kept beside them."""


def fit(plan: Plan, trial: Trial, board: Any, loop: Loop) -> str | None:
    """Train a trial on the running cluster, from its last checkpoint; blocks until it ends.

    Any thread may call it: Ray Train's controller is an actor of its own.

    Returns:
        Why it failed; None if it did not.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    from orchestrator.callback import ReportToBoard

    resources = plan.resources
    per_worker: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    job = {
        "trial": trial.model_dump(mode="json"),
        "board": board,
        "cpus": resources.cpus_per_worker,
    }
    trainer = TorchTrainer(
        loop,
        train_loop_config=job,
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=per_worker,
        ),
        run_config=ray.train.RunConfig(
            name=trial.name,
            storage_path=str(plan.store),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=KEPT_CHECKPOINTS, checkpoint_score_attribute="AP"
            ),
            failure_config=ray.train.FailureConfig(
                max_failures=WORKER_FAILURES, controller_failure_limit=CONTROLLER_FAILURES
            ),
            callbacks=[ReportToBoard(board, trial.id)],
        ),
    )
    try:
        reason: str | None = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        return _failure_text(error)
    return reason


def _failure_text(error: Any) -> str:
    """The first worker's error in a line, without Ray's traceback of every process."""
    failures = getattr(error, "worker_failures", None) or {}
    cause = next(iter(failures.values()), error)
    cause = getattr(cause, "cause", None) or cause.__cause__ or cause
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1].strip() if lines else 'no message'}"


def result_on_disk(plan: Plan, trial: Trial) -> TrialResult:
    """What a trial has left in its folder: its history and checkpoints, finished or not."""
    folder = plan.store / trial.name
    if not folder.is_dir():
        return TrialResult(trial, "not started", [])
    import ray.train

    try:
        stored = ray.train.Result.from_path(str(folder))
    except RuntimeError:  # no epoch was reported
        return TrialResult(trial, "interrupted", [])
    history = [Epoch.read(row) for row in (stored.metrics or {}).get("history", [])]
    scored = [(m["AP"], c) for c, m in stored.best_checkpoints or [] if m.get("AP") is not None]
    best = max(scored, key=lambda pair: pair[0])[1] if scored else stored.checkpoint
    finished = len(history) >= trial.training.epochs
    state: State = "finished" if finished else "interrupted"
    return TrialResult(trial, state, history, last=_path(stored.checkpoint), best=_path(best))


def _path(checkpoint: Any) -> Path | None:
    return None if checkpoint is None else Path(checkpoint.path)


@dataclass(frozen=True)
class Event:
    """A trial was taken up, or has ended: then with the reason if it failed."""

    trial: Trial
    ended: bool
    reason: str | None = None


class Jobs:
    """Works off trials in a few threads, each of which waits for one Ray Train job at a time."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self._waiting = deque(trials)
        self._events: SimpleQueue[Event] = SimpleQueue()

    def start(self, slots: int, run: Callable[[Trial], str | None]) -> None:
        """Begin with the first ``slots`` trials; ``run`` returns why a trial failed, or None."""
        for number in range(slots):
            # Daemons: after Ctrl-C nobody waits for them.
            threading.Thread(
                target=self._work, args=(run,), name=f"slot-{number}", daemon=True
            ).start()

    def _work(self, run: Callable[[Trial], str | None]) -> None:
        while True:
            try:
                trial = self._waiting.popleft()
            except IndexError:
                return
            self._events.put(Event(trial, ended=False))
            try:
                reason = run(trial)
            except Exception as error:  # one trial's trouble must not take the slot away
                reason = f"{type(error).__name__}: {error}"
            self._events.put(Event(trial, ended=True, reason=reason))

    def events(self) -> Iterator[Event]:
        """What has happened since the last call."""
        while True:
            try:
                yield self._events.get_nowait()
            except Empty:
                return

    def cancel(self) -> None:
        """Take up no further trial."""
        self._waiting.clear()
