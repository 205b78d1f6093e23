"""One Ray Train job for each trial: running it, and reading what it has left on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.board import Board, Epoch
from orchestrator.plan import Plan, Trial
from orchestrator.results import State, TrialResult

Loop = Callable[[dict[str, Any]], str | None]
"""A Ray Train loop: takes and returns what :func:`orchestrator.worker.train` does."""

WORKER_FAILURES, CONTROLLER_FAILURES = 2, 3
"""So often are a trial's workers started again, or what drives them."""

KEPT_CHECKPOINTS = 2
"""The best ones; the last is always kept beside them."""


class Foreman(Board):
    """As a Ray actor it drives the jobs, each in a thread, and is the board that they report to.

    An actor, not the process that the user has started: that one must be able to leave Ray at any
    moment, and Ray ends a process in which a thread waits for it then.
    """

    def __init__(self, plan: Plan, loop: Loop) -> None:
        super().__init__()
        self.plan, self.loop = plan, loop

    def train(self, trial: Trial) -> str | None:
        """Train a trial to its end; returns why it failed, or None."""
        import ray

        return fit(self.plan, trial, ray.get_runtime_context().current_actor, self.loop)


def start_foreman(plan: Plan, loop: Loop, slots: int) -> Any:
    """The plan's foreman as an actor beside this process, for ``slots`` trials at a time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0)(Foreman)
    # A few threads more, for those who look at the board.
    return actor.options(scheduling_strategy=here, max_concurrency=slots + 4).remote(plan, loop)


def fit(
    plan: Plan, trial: Trial, board: Any, loop: Loop, callbacks: Sequence[Any] = ()
) -> str | None:
    """Train a trial on the running cluster, from its last checkpoint; blocks until it ends.

    Ray Train starts lost workers again; its controller, which does so, is started again here.

    Args:
        callbacks: Ray Train's, beside the one that reports to the board.

    Returns:
        Why it failed; None if it did not.
    """
    import ray.train

    attempts = CONTROLLER_FAILURES + 1
    while True:
        attempts -= 1
        try:
            reason: str | None = _trainer(plan, trial, board, loop, callbacks).fit().return_value
        except ray.train.TrainingFailedError as error:
            return failure_text(error)
        except ray.exceptions.RayActorError as error:  # Ray Train's controller is gone
            free_group(ray.get(board.group.remote(trial.id)))
            if not attempts:
                return failure_text(error)
        else:
            return reason


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


def _trainer(plan: Plan, trial: Trial, board: Any, loop: Loop, callbacks: Sequence[Any]) -> Any:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from orchestrator.callback import ReportToBoard
    from orchestrator.loopback import LoopbackConfig

    resources = plan.resources
    per_worker: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    job = {
        "trial": trial.model_dump(mode="json"),
        "folder": str(plan.store / trial.name),
        "board": board,
        "cpus": resources.cpus_per_worker,
    }
    return TorchTrainer(
        _placed(loop, trial.id),
        train_loop_config=job,
        torch_config=LoopbackConfig() if plan.address is None else TorchConfig(),
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
            callbacks=[ReportToBoard(board, trial.id), *callbacks],
        ),
    )


def failure_text(error: Any) -> str:
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
