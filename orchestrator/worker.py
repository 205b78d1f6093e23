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
    from codetr.analysis.stability import Matches
    from codetr.cost import Cost, ParameterCount
    from codetr.progress import EpochReport, StepReport
    from codetr.training import Evaluation, TrainingState
    from orchestrator.storage import Storage

HISTORY, NOTES = "history.json", "notes.json"
PREDICTIONS, PER_CLASS = "predictions.json", "per_class.json"
MATCHES = "matches.json"
"""Beside the detector's own file in each checkpoint; the notes are those of no epoch yet."""

STOP, STOPPED, RESIZED = "stop", "stopped as asked", "resized"
"""File in a trial's folder that asks it to stop; what a trial returns that has stopped, or that
shall go on with another number of workers."""

WORTH = "worth"
"""The metric by which Ray Train ranks a trial's checkpoints."""

_SAVE = "save"
_WISHES = ("", _SAVE, RESIZED, STOPPED)
"""What may be asked of a trial, the strongest last."""

_ASK_SECONDS, _AGREE_STEPS = 1.0, 5
"""So often rank 0 asks what is wanted of the trial; after so many steps the ranks agree on it."""

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


class Wishes:
    """What is asked of this trial: rank 0 asks the board now and then, and waits for no answer."""

    def __init__(self, board: Any, trial: str) -> None:
        self.board, self.trial = board, trial
        self._asked = 0.0
        self._answer: Any = None
        self._notice: Any = None

    def latest(self) -> str:
        """What this rank knows, one of ``_WISHES``."""
        return max(self._of_board(), self._of_node(), key=_WISHES.index)

    def _of_board(self) -> str:
        import ray

        if self.board is None:
            return ""
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            answer, self._answer = ray.get(self._answer), None
            if answer:
                return str(answer)
        if self._answer is None and time.monotonic() - self._asked > _ASK_SECONDS:
            self._asked = time.monotonic()
            self._answer = self.board.asked.remote(self.trial)
        return ""

    def _of_node(self) -> str:
        """Ray has been told that one of the workers' nodes is going to be taken away."""
        import ray.train

        notice = ray.train.get_preemption_info()
        if notice == self._notice:
            return ""
        self._notice = notice
        return _SAVE


def train(job: dict[str, Any]) -> str | None:
    """Ray Train's training loop: train ``job["trial"]`` from its last checkpoint.

    Args:
        job: ``trial`` as plain values, ``folder`` of its files, ``storage`` of its checkpoints,
            ``board`` as actor handle, ``cpus`` of each worker, ``full_strength``: the number of
            workers that there are at most, ``until``: the epoch after which to end.

    Returns:
        Why the trial ended without success, where trying again would end the same; STOPPED or
        RESIZED if it was asked to; else None.
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
        training = _Training(trial, rank, world_size, tell, job)
        try:
            while training.state.epoch < job["until"]:
                wish = training.epoch()
                if wish in (RESIZED, STOPPED):
                    log.info("%s, before %s", wish, training.place)
                    return wish
        except NonFiniteLoss as error:
            # Raised on all ranks alike. Not raised further: Ray would try again, to the same end.
            log.error("%s", error)
            return str(error)
    return None


class _Training:
    """A trial on one rank: its data, its state, and its history."""

    def __init__(
        self, trial: Trial, rank: int, world_size: int, tell: Messenger, job: dict[str, Any]
    ) -> None:
        from codetr.cost import ParameterCount
        from codetr.data import build_loader, open_dataset

        self.trial, self.rank, self.world_size, self.tell = trial, rank, world_size, tell
        self.wishes = Wishes(job["board"] if rank == 0 else None, trial.id)
        self.wish = ""
        tell(Progress("opening data"))
        masks = trial.detector.needs_masks
        self.train_set = open_dataset(trial.data, "train", seed=trial.seed, masks=masks)
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
        self.matches: Matches = {}
        self.state = self._start_or_resume(job["storage"])
        self._share_out(job["board"], job["full_strength"])
        self.parameters = ParameterCount.of(self.state.model)
        self.evaluation_seconds = 0.0

    def _start_or_resume(self, storage: Storage) -> TrainingState:
        import ray.train
        from ray.train.torch import get_device

        from codetr.checkpoint import load_checkpoint, without_download
        from codetr.distributed import from_rank_zero
        from codetr.training import TrainingState
        from orchestrator.storage import patiently

        trial, reported = self.trial, ray.train.get_checkpoint()
        # Chosen by one rank, so that all agree also where a disk fails some of them.
        chosen, problem = from_rank_zero(
            lambda: newest_sound(storage, trial.name, reported and reported.path)
        )
        saved = chosen and patiently(partial(storage.fetch, chosen, into=Path.cwd()))
        self.notes += [problem] if problem else []
        checkpoint = load_checkpoint(saved) if saved else None
        detector, training = trial.settings_in(checkpoint.last_begun if checkpoint else 1)
        # What a checkpoint brings along need not be at hand any more.
        begun = {"start_from": None} if saved else {}
        state = TrainingState.start(
            without_download(detector) if saved else detector,
            training.model_copy(update=begun),
            trial.data,
            self.train_set.classes,
            seed=trial.seed,
            steps_per_epoch=len(self.train_set) // trial.training.batch_size,
            device=get_device(),
            class_images=self.train_set.table.class_images().tolist(),
        )
        if saved and checkpoint:
            state.restore(checkpoint)
            parts = max(training.accumulate, checkpoint.training.accumulate)
            state.training = training.model_copy(update={"accumulate": parts})
            self.history = read_history(saved)
            self.notes += read_notes(saved)
            self.matches = read_matches(saved)
        elif state.started is not None:
            log.info("%s", state.started)
            self.notes += [str(state.started)] if state.started.new else []
        return state

    def _share_out(self, board: Any, full_strength: int) -> None:
        """Compute in more parts after memory was too small, and where there are fewer workers than
        there may be: each then computes as many images at a time as at full strength."""
        import ray

        state = self.state
        before = state.training.accumulate
        parts = ray.get(board.parts.remote(self.trial.id, before))
        if parts > before:
            self.notes.append(
                f"out of memory: from {self.place} on each worker computes its share of a batch "
                f"in {parts} parts (accumulate={parts}); the global batch is the same"
            )
        state.training = state.training.model_copy(update={"accumulate": parts})
        state.parts = math.ceil(parts * full_strength / self.world_size)
        if self.world_size < full_strength:
            self.notes.append(
                f"from {self.place} on {self.world_size} of {full_strength} workers, in "
                f"{state.parts} part(s) of their shares; the global batch is the same"
            )

    @property
    def place(self) -> str:
        """Where the training is, for a note."""
        state = self.state
        within = f", step {state.taken + 1}," if state.taken else ""
        return f"epoch {state.epoch + 1}{within}"

    def epoch(self) -> str:
        """Train for an epoch, or for the rest of one, evaluate if it is time to, and report; or
        leave it where that is wanted, and save.

        Returns:
            What is wanted of the trial now, one of ``_WISHES``.
        """
        from codetr.training import train_epoch

        state = self.state
        self._hold_settings(state.epoch + 1)
        loader = self.build_loader(
            self.train_set, training=True, epoch=state.epoch + 1, taken=state.taken
        )
        report = train_epoch(state, loader, on_step=self._show_step, leave=self._leave)
        if report is None:
            log.info("saved before %s", self.place)
            self._report(None)
            return self.wish
        self._report(self._evaluate_and_note(report))
        return self._agree() if state.epoch < self.trial.training.epochs else ""

    def _hold_settings(self, epoch: int) -> None:
        """Have the settings of the trial's schedule hold in that epoch."""
        if not self.trial.schedule:
            return
        detector, training = self.trial.settings_in(epoch)
        accumulate = {"accumulate": self.state.training.accumulate}
        self.state.hold(detector, training.model_copy(update=accumulate))

    def _leave(self, step: int) -> bool:
        return step % _AGREE_STEPS == 0 and self._agree() != ""

    def _agree(self) -> str:
        """The strongest wish that any rank knows of; all ranks must ask."""
        from codetr.distributed import world_max

        strongest = world_max(_WISHES.index(self.wishes.latest()), self.state.device)
        self.wish = _WISHES[strongest]
        return self.wish

    def _evaluate_and_note(self, report: EpochReport) -> Evaluation | None:
        """Evaluate the epoch just trained if it is time to, and note what was measured."""
        from codetr.training import evaluate

        state, config, epoch = self.state, self.trial.training, report.epoch
        values = _training_values(report)
        evaluation = None
        if epoch % config.evaluate_every == 0 or epoch == config.epochs:
            self.tell(Progress("evaluating", epoch, report.steps))
            val_loader = self.build_loader(self.val_set, training=False)
            evaluation = evaluate(
                state.evaluated,
                val_loader,
                self.val_set,
                self.trial.data.engine,
                record_matches=True,
            )
            state.metrics = evaluation.metrics.summary
            state.cost = state.cost + evaluation.cost
            self.evaluation_seconds = evaluation.cost.seconds
            values |= _measured({f"val/{name}": v for name, v in state.metrics.items()})
            values |= _changes(self.matches, evaluation.matches)
            self.matches = evaluation.matches
        if epoch == config.epochs and self.trial.measures_branches:
            values |= self._branch_values(report)
        values |= _cost_values(state.cost, self.parameters)
        self.history.append(Epoch(epoch, state.step, values, tuple(self.notes), time.time()))
        log.info("%s", _log_line(self.history[-1], config.epochs))
        self.notes = []
        return evaluation

    def _branch_values(self, report: EpochReport) -> dict[str, float]:
        """Every number of each auxiliary head on its own; all ranks must ask. One pass over the
        images for each, so that no more detections are held than at any evaluation."""
        from codetr.training import evaluate

        state = self.state
        values: dict[str, float] = {}
        for branch in self.trial.detector.head_names:
            self.tell(Progress(f"evaluating {branch}", report.epoch, report.steps))
            loader = self.build_loader(self.val_set, training=False)
            evaluation = evaluate(
                state.evaluated, loader, self.val_set, self.trial.data.engine, branch=branch
            )
            state.cost = state.cost + evaluation.cost
            summary = evaluation.metrics.summary
            values |= {f"branch/{branch}/{name}": value for name, value in summary.items()}
        return _measured(values)

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

    def _report(self, evaluation: Evaluation | None) -> None:
        """Give Ray Train what was measured, and from rank 0 the checkpoint; all ranks must."""
        import ray.train

        from orchestrator.storage import checkpoint_name

        state = self.state
        metrics: dict[str, Any] = {"epoch": state.epoch, "step": state.step}
        metrics["within_epoch"] = state.taken > 0
        done = state.step / (1 + self.trial.training.epochs * self.trial.steps_per_epoch)
        metrics[WORTH] = worth(self.history, done, within_epoch=state.taken > 0)
        metrics["history"] = [asdict(epoch) for epoch in self.history]
        if evaluation is not None and "val/AP" in self.history[-1].values:
            metrics["AP"] = state.metrics["AP"]
        if self.rank != 0:
            ray.train.report(metrics)
            return
        self.tell(Progress("saving", state.epoch, self.trial.steps_per_epoch))
        # In the worker's own folder, which ends with Ray's session if Ray cannot remove it before.
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=Path.cwd()))
        self._save(folder, evaluation)
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=checkpoint_name(state.epoch, state.step, folder.name[-8:]),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        )

    def _save(self, folder: Path, evaluation: Evaluation | None) -> None:
        from codetr.checkpoint import FILE_NAME, save_checkpoint
        from codetr.metrics import to_coco_results

        save_checkpoint(self.state.checkpoint(), folder / FILE_NAME)
        (folder / HISTORY).write_text(json.dumps([asdict(epoch) for epoch in self.history]))
        (folder / NOTES).write_text(json.dumps(self.notes))
        (folder / MATCHES).write_text(json.dumps(self.matches))
        if evaluation is not None:
            results = to_coco_results(evaluation.detections, self.val_set.classes)
            (folder / PREDICTIONS).write_text(json.dumps(results))
            (folder / PER_CLASS).write_text(json.dumps(evaluation.metrics.per_class))


def worth(history: History, done: float, *, within_epoch: bool) -> float:
    """How much a checkpoint is worth to be kept, of which Ray Train keeps the three of the greatest
    worth. Ray asks once, so what it is worth later must follow from what comes later.

    The n-th best AP of a trial is worth n. What comes after it is worth less, and the more the
    later, but more than the best AP before it: so the three are the best one, the last, and the one
    before it; where two of these are the same, one more.

    Args:
        done: share of the trial's steps, below 1.
        within_epoch: it was saved after the last epoch of the history, and not at its end.
    """
    best, bests, is_best = -math.inf, 0, False
    for epoch in history:
        ap = epoch.values.get("val/AP")
        is_best = ap is not None and ap >= best
        if ap is not None and is_best:
            best, bests = ap, bests + 1
    return float(bests) if is_best and not within_epoch else bests - 1 + done


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


def _changes(before: Matches, after: Matches) -> dict[str, float]:
    """How the matching of queries differs from the evaluation before; nothing at the first."""
    from codetr.analysis.stability import instability

    change = instability(before, after)
    return {} if change is None else {f"matching/{k}": v for k, v in asdict(change).items()}


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


def newest_sound(
    storage: Storage, trial: str, reported: str | None
) -> tuple[str | None, str | None]:
    """The last checkpoint, or, if it is damaged, the newest before it that is not.

    Args:
        reported: the last one that was reported to Ray Train; None where its ledger knows none: any
            that there is will do then.

    Returns:
        Its place in the storage, None where there is none; and what was lost, in a sentence, or
        None.

    Raises:
        Exception: the storage cannot be reached, or the checkpoint is of another version: to start
            afresh would throw away what may be sound.
    """
    from orchestrator.storage import patiently, place_of

    places = patiently(partial(storage.checkpoints, trial))
    places = sorted(places, key=place_of, reverse=True)
    if reported is not None:
        places = [reported, *(p for p in places if place_of(p) < place_of(reported))]
    found, problems = None, []
    for place in places:
        problem = patiently(partial(damage, storage, place, Path.cwd()))
        if problem is None:
            found = place
            break
        problems.append(problem)
    if not problems:
        return found, None
    (epoch, step), (lost_epoch, lost_step) = place_of(found), place_of(places[0])
    return found, (
        f"{'; '.join(problems)}. Went on after epoch {epoch}, step {step} instead of epoch "
        f"{lost_epoch}, step {lost_step}: the work between them was lost and done again"
    )


def damage(storage: Storage, place: str, into: Path) -> str | None:
    """What a checkpoint lacks of what was written, in a sentence; None if it is sound.

    Args:
        into: folder for a copy of what is stored elsewhere.

    Raises:
        Exception: it cannot be reached, or is of another version.
    """
    from codetr.checkpoint import CheckpointError, DamagedCheckpointError, load_checkpoint

    try:
        folder = storage.fetch(place, into=into)
        load_checkpoint(folder)
    except (DamagedCheckpointError, FileNotFoundError) as error:
        return str(error)
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None  # not final, as what is wrong with a checkpoint is
        raise
    try:
        read_history(folder)
        read_notes(folder)
        read_matches(folder)
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{folder}: {error}"
    return None


def read_history(folder: Path) -> History:
    """The history that lies in a checkpoint's folder."""
    return [Epoch.read(row) for row in json.loads((folder / HISTORY).read_text())]


def read_notes(folder: Path) -> list[str]:
    """What befell the trial in the epoch that the checkpoint is within."""
    notes: list[str] = json.loads((folder / NOTES).read_text())
    return notes


def read_matches(folder: Path) -> Matches:
    """The matching of the last evaluation; empty where the checkpoint has none."""
    if not (file := folder / MATCHES).exists():
        return {}
    return {int(image): queries for image, queries in json.loads(file.read_text()).items()}
