"""What one Ray Train worker does: train and evaluate epoch by epoch, report, save.

The training itself is :mod:`codetr.training`; here it learns from Ray who the other workers are,
where to go on, and whom to tell.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.board import Epoch, History, Progress
from orchestrator.plan import Trial
from orchestrator.trial_log import log, trial_log

if TYPE_CHECKING:
    from codetr.cost import Cost, ParameterCount
    from codetr.training import EpochReport, Evaluation, StepReport, TrainingState

HISTORY, PREDICTIONS, PER_CLASS = "history.json", "predictions.json", "per_class.json"
"""Beside the detector's own file in each checkpoint."""

STOP, STOPPED = "stop", "stopped as asked"
"""File in a trial's folder that asks it to stop after its epoch; what it returns then."""

_QUIET_SECONDS = 0.5
"""At least so long between two messages about progress."""


@dataclass
class Messenger:
    """Tells the board how far this trial is, now and then; only rank 0 has a board."""

    board: Any
    trial: str
    _last: float = field(default=0.0, repr=False)

    def __call__(self, progress: Progress, *, always: bool = True) -> None:
        now = time.monotonic()
        if self.board is None or not (always or now - self._last > _QUIET_SECONDS):
            return
        self._last = now
        self.board.show.remote(self.trial, progress)


def train(job: dict[str, Any]) -> str | None:
    """Ray Train's training loop: train ``job["trial"]`` to its end, from its last checkpoint.

    Args:
        job: ``trial`` as plain values, ``folder`` of its files, ``board`` as actor handle, ``cpus``
            of each worker.

    Returns:
        Why the trial ended without success, where trying again would end the same; else None.
    """
    import ray.train

    from codetr.training import NonFiniteLoss, limit_threads

    limit_threads(cores=int(job["cpus"]))
    trial = Trial.model_validate(job["trial"])
    context = ray.train.get_context()
    rank = context.get_world_rank()
    tell = Messenger(job["board"] if rank == 0 else None, trial.id)
    folder, world_size = Path(job["folder"]), context.get_world_size()
    with trial_log(folder, rank, world_size):
        training = _Training(trial, rank, world_size, tell, job["board"])
        try:
            while training.state.epoch < trial.training.epochs:
                training.report(training.epoch())
                if training.is_asked_to_stop(folder):
                    return STOPPED
        except NonFiniteLoss as error:
            # Raised on all ranks alike. Not raised further: Ray would try again, to the same end.
            log.error("%s", error)
            return str(error)
    return None


class _Training:
    """A trial on one rank: its data, its state, and its history."""

    def __init__(
        self, trial: Trial, rank: int, world_size: int, tell: Messenger, board: Any
    ) -> None:
        from codetr.cost import ParameterCount
        from codetr.data import build_loader, open_dataset

        self.trial, self.rank, self.tell = trial, rank, tell
        tell(Progress("opening data"))
        self.train_set = open_dataset(trial.data, "train", seed=trial.seed)
        self.val_set = open_dataset(trial.data, "val", seed=trial.seed)
        self.build_loader = partial(
            build_loader,
            batch_size=trial.training.batch_size,
            rank=rank,
            world_size=world_size,
            seed=trial.seed,
            workers=trial.training.loader_workers,
        )
        tell(Progress("building"))
        self.history: History = []
        self.notes: list[str] = []
        self.state = self._start_or_resume(board)
        self.parameters = ParameterCount.of(self.state.model)
        self.evaluation_seconds = 0.0

    def _start_or_resume(self, board: Any) -> TrainingState:
        import ray.train
        from ray.train.torch import get_device

        from codetr.checkpoint import load_checkpoint, without_download
        from codetr.distributed import from_rank_zero
        from codetr.training import TrainingState

        trial, reported = self.trial, ray.train.get_checkpoint()
        # On one rank, so that all agree also where a disk fails some of them.
        saved, problem = from_rank_zero(lambda: newest_sound(reported and Path(reported.path)))
        self.notes += [problem] if problem else []
        state = TrainingState.start(
            without_download(trial.detector) if saved else trial.detector,
            trial.training,
            trial.data,
            self.train_set.classes,
            seed=trial.seed,
            steps_per_epoch=len(self.train_set) // trial.training.batch_size,
            device=get_device(),
        )
        before = trial.training.accumulate
        if saved:
            checkpoint = load_checkpoint(saved)
            state.restore(checkpoint)
            self.history = read_history(saved)
            before = max(before, checkpoint.training.accumulate)
        parts = ray.get(board.parts.remote(trial.id, before))
        if parts > before:
            self.notes.append(
                f"out of memory: from epoch {state.epoch + 1} on each worker computes its share of "
                f"a batch in {parts} parts (accumulate={parts}); the global batch is the same"
            )
        state.training = trial.training.model_copy(update={"accumulate": parts})
        return state

    def epoch(self) -> Evaluation | None:
        """Train for an epoch, evaluate if it is time to, and note what was measured."""
        from codetr.training import evaluate, train_epoch

        state, config = self.state, self.trial.training
        epoch = state.epoch + 1
        loader = self.build_loader(self.train_set, training=True, epoch=epoch)
        report = train_epoch(state, loader, on_step=self._show_step)
        values = _training_values(report)
        evaluation = None
        if epoch % config.evaluate_every == 0 or epoch == config.epochs:
            self.tell(Progress("evaluating", epoch, len(loader)))
            val_loader = self.build_loader(self.val_set, training=False)
            evaluation = evaluate(state.model, val_loader, self.val_set, self.trial.data.engine)
            state.metrics = evaluation.metrics.summary
            state.cost = state.cost + evaluation.cost
            self.evaluation_seconds = evaluation.cost.seconds
            values |= _measured({f"val/{name}": v for name, v in state.metrics.items()})
        values |= _cost_values(state.cost, self.parameters)
        self.history.append(Epoch(epoch, state.step, values, tuple(self.notes)))
        log.info("%s", _log_line(self.history[-1], config.epochs))
        self.notes = []
        return evaluation

    def _show_step(self, step: StepReport) -> None:
        config = self.trial.training
        evaluations = config.epochs // config.evaluate_every - step.epoch // config.evaluate_every
        progress = Progress(
            "training",
            epoch=step.epoch,
            step=step.step,
            images_per_second=step.images_per_second,
            loss=step.loss,
            seconds_left=step.seconds_left + evaluations * self.evaluation_seconds,
        )
        self.tell(progress, always=False)

    def report(self, evaluation: Evaluation | None) -> None:
        """Give Ray Train the epoch's metrics, and from rank 0 the checkpoint; all ranks must."""
        import ray.train

        values = self.history[-1].values
        metrics: dict[str, Any] = {"epoch": self.state.epoch}
        metrics["history"] = [asdict(epoch) for epoch in self.history]
        if "val/AP" in values:
            metrics["AP"] = values["val/AP"]  # ranks the checkpoints
        if self.rank != 0:
            ray.train.report(metrics)
            return
        self.tell(Progress("saving", self.state.epoch, self.trial.steps_per_epoch))
        # In the worker's own folder, which ends with Ray's session if Ray cannot remove it before.
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=Path.cwd()))
        self._save(folder, evaluation)
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=f"epoch-{self.state.epoch:04d}-{folder.name[-8:]}",
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        )

    def is_asked_to_stop(self, folder: Path) -> bool:
        """Whether ``codetr stop`` has; all ranks must ask, and get the same answer."""
        from ray.train.torch import get_device

        from codetr.distributed import world_max

        if self.state.epoch == self.trial.training.epochs:
            return False
        return bool(world_max(int((folder / STOP).exists()), get_device()))

    def _save(self, folder: Path, evaluation: Evaluation | None) -> None:
        from codetr.checkpoint import FILE_NAME, save_checkpoint
        from codetr.metrics import to_coco_results

        save_checkpoint(self.state.checkpoint(), folder / FILE_NAME)
        (folder / HISTORY).write_text(json.dumps([asdict(epoch) for epoch in self.history]))
        if evaluation is not None:
            results = to_coco_results(evaluation.detections, self.val_set.classes)
            (folder / PREDICTIONS).write_text(json.dumps(results))
            (folder / PER_CLASS).write_text(json.dumps(evaluation.metrics.per_class))


def _log_line(epoch: Epoch, epochs: int) -> str:
    shown = {
        key.rpartition("/")[2]: value
        for key, value in epoch.values.items()
        if key.startswith(("train/total", "train/gradient_norm", "val/AP", "cost/images_per"))
    }
    numbers = ", ".join(f"{key} {value:.4g}" for key, value in shown.items())
    return f"epoch {epoch.epoch}/{epochs}, step {epoch.step}: {numbers}"


def _training_values(report: EpochReport) -> dict[str, float]:
    return {
        "train/total": report.total,
        **{f"train/loss/{name}": value for name, value in report.losses.items()},
        **{f"train/statistics/{name}": value for name, value in report.statistics.items()},
        "train/gradient_norm": report.gradient_norm,
        "train/learning_rate": report.learning_rate,
        "cost/seconds_per_step": report.seconds_per_step,
        "cost/images_per_second": report.images_per_second,
    }


def _measured(values: dict[str, float]) -> dict[str, float]:
    """Without what is undefined, as the AP of large objects where there are none."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _cost_values(cost: Cost, parameters: ParameterCount) -> dict[str, float]:
    """What the trial has cost so far, its evaluations included."""
    return {
        "cost/hours": cost.seconds / 3600,
        "cost/core_hours": cost.core_seconds / 3600,
        "cost/gpu_hours": cost.gpu_seconds / 3600,
        "cost/peak_memory_mb": cost.peak_memory / 2**20,
        "cost/parameters_training": parameters.training,
        "cost/parameters_inference": parameters.inference,
    }


def newest_sound(reported: Path | None) -> tuple[Path | None, str | None]:
    """The last checkpoint's folder, or, if it is damaged, the newest before it that is not.

    Args:
        reported: the last one that was reported, among the others of its trial.

    Returns:
        None where there is none, and what was lost, in a sentence, or None.
    """
    from codetr.checkpoint import CheckpointError, load_checkpoint

    if reported is None:
        return None, None
    older = [p for p in reported.parent.glob("epoch-*") if _epoch_of(p) < _epoch_of(reported)]
    found, problems = None, []
    for folder in [reported, *sorted(older, key=_epoch_of, reverse=True)]:
        try:
            load_checkpoint(folder)
            read_history(folder)
        except (CheckpointError, OSError, ValueError) as error:
            problems.append(str(error))
            continue
        found = folder
        break
    if not problems:
        return found, None
    epoch = _epoch_of(found) if found else 0
    return found, (
        f"{'; '.join(problems)}. Went on after epoch {epoch}: the work of "
        f"{_epoch_of(reported) - epoch} epoch(s) was lost and done again"
    )


def _epoch_of(folder: Path) -> int:
    """The epoch in the name of a checkpoint's folder."""
    return int(folder.name.split("-")[1])


def read_history(folder: Path) -> History:
    """The history that lies in a checkpoint's folder."""
    return [Epoch.read(row) for row in json.loads((folder / HISTORY).read_text())]
