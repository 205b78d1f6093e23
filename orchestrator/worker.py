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
from pathlib import Path
from typing import Any

from orchestrator.board import Epoch, History, Progress
from orchestrator.plan import Trial

HISTORY, PREDICTIONS, PER_CLASS = "history.json", "predictions.json", "per_class.json"
"""Beside the detector's own file in each checkpoint."""

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
        job: ``trial`` as plain values, ``board`` as actor handle, ``cpus`` of each worker.

    Returns:
        Why the trial ended without success, where trying again would end the same; else None.
    """
    import ray.train

    from codetr.training import NonFiniteLoss

    trial = Trial.model_validate(job["trial"])
    rank = ray.train.get_context().get_world_rank()
    tell = Messenger(job["board"] if rank == 0 else None, trial.id)
    try:
        _train(trial, int(job["cpus"]), tell)
    except NonFiniteLoss as error:
        # Raised on all ranks alike. Not raised further: Ray would try again, to the same end.
        return str(error)
    return None


def _train(trial: Trial, cpus: int, tell: Messenger) -> None:
    import ray.train
    from ray.train.torch import get_device

    from codetr.checkpoint import load_checkpoint
    from codetr.cost import ParameterCount
    from codetr.data import build_loader, open_dataset
    from codetr.training import TrainingState, evaluate, limit_threads, train_epoch

    tell(Progress("opening the data"))
    limit_threads(cores=cpus)
    context = ray.train.get_context()
    ranks = {"rank": context.get_world_rank(), "world_size": context.get_world_size()}
    config = trial.training
    train_set = open_dataset(trial.data, "train", seed=trial.seed)
    val_set = open_dataset(trial.data, "val", seed=trial.seed)
    batch = {"batch_size": config.batch_size, "workers": config.loader_workers, **ranks}
    val_loader = build_loader(val_set, training=False, **batch)

    tell(Progress("building the detector"))
    state = TrainingState.start(
        trial.detector,
        config,
        trial.data,
        train_set.classes,
        seed=trial.seed,
        steps_per_epoch=len(train_set) // config.batch_size,
        device=get_device(),
    )
    history: History = []
    saved = ray.train.get_checkpoint()
    if saved is not None:
        with saved.as_directory() as folder:
            state.restore(load_checkpoint(Path(folder)))
            history = read_history(Path(folder))
    parameters = ParameterCount.of(state.model)

    while state.epoch < config.epochs:
        epoch = state.epoch + 1
        loader = build_loader(train_set, training=True, seed=trial.seed, epoch=epoch, **batch)
        report = train_epoch(
            state, loader, on_step=lambda step: tell(_training(step), always=False)
        )
        values = _training_values(report)
        evaluation = None
        if epoch % config.evaluate_every == 0 or epoch == config.epochs:
            tell(Progress("evaluating", epoch, len(loader)))
            evaluation = evaluate(state.model, val_loader, val_set, trial.data.engine)
            state.metrics = evaluation.metrics.summary
            state.cost = state.cost + evaluation.cost
            values |= _measured({f"val/{name}": v for name, v in state.metrics.items()})
        values |= _cost_values(state.cost, parameters)
        history.append(Epoch(epoch, state.step, values))
        _report(state, history, evaluation, val_set, context.get_world_rank())


def _training(step: Any) -> Progress:
    return Progress(
        "training",
        epoch=step.epoch,
        step=step.step,
        images_per_second=step.images_per_second,
        loss=step.loss,
        seconds_left=step.seconds_left,
    )


def _training_values(report: Any) -> dict[str, float]:
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


def _cost_values(cost: Any, parameters: Any) -> dict[str, float]:
    """What the trial has cost so far, its evaluations included."""
    return {
        "cost/hours": cost.seconds / 3600,
        "cost/core_hours": cost.core_seconds / 3600,
        "cost/gpu_hours": cost.gpu_seconds / 3600,
        "cost/peak_memory_mb": cost.peak_memory / 2**20,
        "cost/parameters_training": parameters.training,
        "cost/parameters_inference": parameters.inference,
    }


def _report(state: Any, history: History, evaluation: Any, val_set: Any, rank: int) -> None:
    """Give Ray Train the epoch's metrics, and from rank 0 the checkpoint; all ranks must come."""
    import ray.train

    metrics: dict[str, Any] = {"epoch": state.epoch, "history": [asdict(e) for e in history]}
    if "val/AP" in history[-1].values:
        metrics["AP"] = history[-1].values["val/AP"]  # ranks the checkpoints
    if rank != 0:
        ray.train.report(metrics, checkpoint=None)
        return
    from codetr.checkpoint import FILE_NAME, save_checkpoint

    folder = Path(tempfile.mkdtemp(prefix="codetr-checkpoint-"))  # removed when it is uploaded
    save_checkpoint(state.checkpoint(), folder / FILE_NAME)
    (folder / HISTORY).write_text(json.dumps(metrics["history"]))
    if evaluation is not None:
        _write_evaluation(folder, evaluation, val_set)
    ray.train.report(
        metrics,
        checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
        checkpoint_dir_name=f"epoch-{state.epoch:04d}-{folder.name[-8:]}",
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
    )


def _write_evaluation(folder: Path, evaluation: Any, val_set: Any) -> None:
    from codetr.metrics import to_coco_results

    results = to_coco_results(evaluation.detections, val_set.classes)
    (folder / PREDICTIONS).write_text(json.dumps(results))
    (folder / PER_CLASS).write_text(json.dumps(evaluation.metrics.per_class))


def read_history(folder: Path) -> History:
    """The history that lies in a checkpoint's folder."""
    return [Epoch.read(row) for row in json.loads((folder / HISTORY).read_text())]
