"""One Ray Train job for each trial: running it, and reading what it has left on disk."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from codetr.config import ConfigError
from orchestrator.board import Board, Epoch, History, Progress
from orchestrator.cluster import bundle
from orchestrator.console import View
from orchestrator.files import is_left
from orchestrator.plan import Plan, Trial
from orchestrator.results import State, TrialResult
from orchestrator.room import Room
from orchestrator.wording import without_secrets
from orchestrator.worker import RESIZED, STOP, STOPPED, WORTH, damage, read_history

if TYPE_CHECKING:
    from orchestrator.storage import Patience, Storage

Loop = Callable[[dict[str, Any]], str | None]
"""A Ray Train loop: takes and returns what :func:`orchestrator.worker.train` does."""

ATTEMPTS = 3
"""So often is a trial started in a row without getting further than the time before."""

_ROOM_POLL_SECONDS, _SAVE_POLL_SECONDS = 1.0, 0.25

KEPT_CHECKPOINTS = 3
"""The best one, the last, and the one before it, which is used where the last is damaged: see
:func:`orchestrator.worker.worth`."""


class Foreman(Board):
    """As a Ray actor it drives the jobs, each in a thread, and is the board that they report to.

    An actor, not the process that the user has started: that one must be able to leave Ray at any
    moment, and Ray ends a process in which a thread waits for it then.
    """

    def __init__(self, plan: Plan, loop: Loop) -> None:
        super().__init__()
        self.plan, self.loop = plan, loop
        self.room = Room(plan.resources)
        self._listening: set[str] = set()
        self.leaving = False

    def train(self, trial: Trial) -> str | None:
        """Train a trial to its end; returns why it failed, or None."""
        import ray

        return fit(self.plan, trial, ray.get_runtime_context().current_actor, self.loop)

    def asked(self, trial: str) -> str:
        """What the trial's workers, who ask now and then, are to leave their epoch for, if for
        anything."""
        self._listening.add(trial)
        planned = next(t for t in self.plan.trials if t.id == trial)
        if self.leaving or is_left(self.plan.store / planned.name / STOP):
            return STOPPED
        grows = self.room.can_grow(trial, planned.training.batch_size)
        return RESIZED if grows else ""

    def leave(self) -> int:
        """Have every trial save and stop where it is; returns how many are still about to: those
        that have not begun to train have nothing to save."""
        self.leaving = True
        return len(self._listening)

    def occupy(self, trial: str, group: Any) -> None:
        super().occupy(trial, group)
        self.room.placed(trial)

    def take_room(self, trial: str, batch_size: int) -> int | None:
        """How many workers the trial may start now; None: it has to wait."""
        return self.room.take(trial, batch_size)

    def leave_room(self, trial: str) -> None:
        """The trial has ended."""
        self._listening.discard(trial)
        self.room.leave(trial)


def start_foreman(plan: Plan, loop: Loop, slots: int) -> Any:
    """The plan's foreman as an actor beside this process, for ``slots`` trials at a time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0)(Foreman)
    # A few threads more, for those who look at the board.
    return actor.options(scheduling_strategy=here, max_concurrency=slots + 4).remote(plan, loop)


class Fault(str):
    """Why a trial has failed, where its training has not said so itself: a dead worker, a full disk
    or a storage that is away say nothing of the trial's settings."""


class Halted(RuntimeError):  # noqa: N818 - of the run's making, like Interrupted
    """What drives the trials has ended in order; the text says why, and what to do."""


class ForemanLost(Exception):  # noqa: N818 - of the run's making, like Interrupted
    """What drives the trials has ended before they have; the text says why, and what to do."""


@contextmanager
def foreman_needed() -> Iterator[None]:
    """Asking the foreman, of whom there is one: without it nothing is driven on.

    Raises:
        ForemanLost: it has died, or what it drives as a whole has failed.
    """
    import ray

    go_on = "every trial stops where it was saved last; the same command goes on there"
    try:
        yield
    except ray.exceptions.RayActorError as error:
        raise ForemanLost(f"the process that drives the trials has died: {go_on}") from error
    except ray.exceptions.RayTaskError as error:
        cause = _cause(error)
        if isinstance(cause, Halted | ConfigError):  # which say themselves what to do
            raise ForemanLost(without_secrets(str(cause))) from error
        raise ForemanLost(f"what drives the trials: {failure_text(error)}: {go_on}") from error


def let_save(foreman: Any, grace: float, view: View) -> None:
    """Have the trials that are at their training save where they are, and wait until they have, for
    at most ``grace`` seconds.

    Raises:
        ForemanLost: there is nobody who could have them save.
    """
    import ray

    deadline = time.monotonic() + grace
    with foreman_needed():
        while (
            grace and ray.get(foreman.leave.remote()) and (left := deadline - time.monotonic()) > 0
        ):
            view.stage("saving", f"{left:.0f} s at most")
            time.sleep(_SAVE_POLL_SECONDS)


def fit(
    plan: Plan,
    trial: Trial,
    board: Any,
    loop: Loop,
    *,
    callbacks: Sequence[Any] = (),
    until: int | None = None,
) -> str | None:
    """Train a trial on the running cluster, from its last checkpoint; blocks until it ends.

    What is lost on the way, workers, nodes or Ray Train's controller, is started again, with as
    many workers as there is room for then.

    Args:
        callbacks: Ray Train's, beside the one that reports to the board.
        until: the epoch after which it ends; default the trial's last.

    Returns:
        Why it failed, as a :class:`Fault` if not by its training's own word; None if it did not.
    """
    import ray

    try:
        until = until or trial.training.epochs
        return _fit(plan, trial, board, loop, callbacks=callbacks, until=until)
    finally:
        ray.get(board.leave_room.remote(trial.id))


def _fit(
    plan: Plan, trial: Trial, board: Any, loop: Loop, *, callbacks: Sequence[Any], until: int
) -> str | None:
    import ray.train

    from orchestrator.storage import Storage, patiently

    storage = Storage.of(plan)
    attempts, reached = ATTEMPTS, 0
    while True:
        workers = _wait_for_room(plan, trial, board)
        patiently(partial(storage.make_ready, trial.name))
        try:
            trainer = _trainer(
                plan, trial, board, loop, callbacks=callbacks, workers=workers, until=until
            )
            reason: str | None = trainer.fit().return_value
        except ray.train.TrainingFailedError as error:
            failure: Exception = error
        except ray.exceptions.RayActorError as error:  # Ray Train's controller is gone
            free_group(ray.get(board.group.remote(trial.id)))
            failure = error
        else:
            if reason != RESIZED:
                return reason
            continue
        if _found_no_room(failure):
            continue
        before, reached = reached, ray.get(board.step.remote(trial.id))
        attempts = ATTEMPTS - 1 if reached > before else attempts - 1
        if not attempts or _is_final(failure):
            return Fault(failure_text(failure))


def _wait_for_room(plan: Plan, trial: Trial, board: Any) -> int:
    """The number of workers to start with, once as many have room."""
    import ray

    if not plan.resources.is_elastic:
        return plan.resources.workers  # Ray waits for their places itself
    batch_size = trial.training.batch_size
    while (workers := ray.get(board.take_room.remote(trial.id, batch_size))) is None:
        board.show.remote(trial.id, Progress("waiting for room"))
        time.sleep(_ROOM_POLL_SECONDS)
    return int(workers)


def _is_final(failure: Exception) -> bool:
    """Whether it would be the same the next time: what our own checks refuse, and a full disk."""
    from codetr.checkpoint import CheckpointError
    from codetr.data import DataError

    cause = _cause(failure)
    if isinstance(cause, OSError):
        return cause.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(cause, ConfigError | DataError | CheckpointError)


def _found_no_room(failure: Exception) -> bool:
    """Whether Ray has given up waiting for a place for every worker."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(getattr(failure, "controller_failure", None), WorkerGroupStartupTimeoutError)


def _placed(loop: Loop, trial: str) -> Loop:
    """The loop, after it has told the board which placement group its workers occupy."""

    def work(job: dict[str, Any]) -> str | None:
        import ray.train

        if ray.train.get_context().get_world_rank() == 0:
            job["board"].occupy.remote(trial, ray.util.get_current_placement_group())
        return loop(job)

    return work


def free_group(group: Any) -> None:
    """Give back what the workers of a dead controller occupied, and end them: Ray Train's own
    cleaner cannot, where there is no dashboard to ask whether the controller lives."""
    import ray

    if group is not None:
        ray.util.remove_placement_group(group)


def _trainer(
    plan: Plan,
    trial: Trial,
    board: Any,
    loop: Loop,
    *,
    callbacks: Sequence[Any],
    workers: int,
    until: int,
) -> Any:
    import ray.train
    from ray.train.torch import TorchConfig

    from orchestrator.callback import ReportToBoard
    from orchestrator.loopback import LoopbackConfig
    from orchestrator.storage import Storage
    from orchestrator.trainer import LeanTrainer

    resources, storage = plan.resources, Storage.of(plan)
    job = {
        "trial": trial.model_dump(mode="json"),
        "folder": str(plan.store / trial.name),
        "storage": storage,
        "board": board,
        "cpus": resources.cpus_per_worker,
        "full_strength": resources.workers,
        "until": until,
    }
    return LeanTrainer(
        _placed(loop, trial.id),
        has_dashboard=plan.address is not None,
        train_loop_config=job,
        torch_config=LoopbackConfig() if plan.address is None else TorchConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=bundle(resources),
        ),
        run_config=ray.train.RunConfig(
            name=trial.name,
            storage_path=storage.root,
            storage_filesystem=storage.for_ray,
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=KEPT_CHECKPOINTS, checkpoint_score_attribute=WORTH
            ),
            # None of them is Ray's to mend: see fit.
            failure_config=ray.train.FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
            callbacks=[ReportToBoard(board, trial.id), *callbacks],
        ),
    )


def failure_text(error: Any) -> str:
    """The first worker's error in a line, without Ray's traceback of every process."""
    cause = _cause(error)
    lines = [line for line in str(cause).splitlines() if line.strip()]
    last = without_secrets(lines[-1].strip()) if lines else "no message"
    return f"{type(cause).__name__}: {last}"


def _cause(error: Any) -> Any:
    """What the first worker that failed has raised."""
    failures = getattr(error, "worker_failures", None) or {}
    cause = next(iter(failures.values()), error)
    return getattr(cause, "cause", None) or cause.__cause__ or cause


def result_on_disk(plan: Plan, trial: Trial, patience: Patience | None = None) -> TrialResult:
    """What a trial has left in its storage: its history and checkpoints, finished or not. Where it
    cannot be reached that is this trial's failure, and not the others'.

    Args:
        patience: in common with other trials; default its own.
    """
    from orchestrator.storage import Patience

    try:
        return (patience or Patience())(partial(_result_on_disk, plan, trial))
    except Exception as error:  # each file system raises its own
        reason = f"what it has left cannot be read: {failure_text(error)}"
        return TrialResult(trial, "failed", [], reason, unread=True)


def _result_on_disk(plan: Plan, trial: Trial) -> TrialResult:
    if not (plan.store / trial.name).is_dir():
        return TrialResult(trial, "not started", [])
    from orchestrator.storage import Storage

    storage = Storage.of(plan)
    stored = storage.result(trial.name)
    if stored is None:
        return _without_ledger(plan, trial, storage)
    history = [Epoch.read(row) for row in (stored.metrics or {}).get("history", [])]
    scored = [
        (metrics["AP"], checkpoint)
        for checkpoint, metrics in stored.best_checkpoints or []
        if metrics.get("AP") is not None and _is_of(history, metrics)
    ]
    # Of equal ones the last, which was kept for it.
    best = max(reversed(scored), key=lambda pair: pair[0])[1] if scored else stored.checkpoint
    return _result(plan, trial, storage, history, best and best.path)


def _is_of(history: History, metrics: dict[str, Any]) -> bool:
    """Whether a checkpoint's last epoch is the one in the trial's history: one that was damaged
    stays in Ray's ledger, beside those of the same epochs trained again."""
    own = [Epoch.read(row) for row in metrics.get("history", [])]
    then = history[: len(own)]
    return not own or (len(then) == len(own) and then[-1].time == own[-1].time)


def _without_ledger(plan: Plan, trial: Trial, storage: Storage) -> TrialResult:
    """As the newest of the trial's checkpoints tells, where Ray's ledger of them is lost or was not
    yet written. What it says is finished, nobody will look at again: that one must be sound."""
    for place in reversed(storage.checkpoints(trial.name)):
        try:
            history = read_history(storage.notes(place, plan.store / trial.name))
        except (FileNotFoundError, ValueError):  # its writer was killed, or it is damaged
            continue
        result = _result(plan, trial, storage, history, place)
        with TemporaryDirectory() as folder:
            if result.state != "finished" or damage(storage, place, Path(folder)) is None:
                return result
    return TrialResult(trial, "interrupted", [])


def _result(
    plan: Plan, trial: Trial, storage: Storage, history: History, best: str | None
) -> TrialResult:
    state: State = "finished" if len(history) >= trial.training.epochs else "interrupted"
    if best is None:
        return TrialResult(trial, state, history)
    notes = storage.notes(best, plan.store / trial.name)
    return TrialResult(trial, state, history, best=notes, weights=storage.address(best))
