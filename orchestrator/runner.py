"""Runs a plan: every trial its own Ray Train job, several at a time, recorded while they run."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from codetr.config import ConfigError
from orchestrator.analyses import Analyses
from orchestrator.board import Progress
from orchestrator.cluster import Cluster
from orchestrator.console import View, label
from orchestrator.files import as_far_as_possible, is_left, not_writable
from orchestrator.interrupt import Interrupted, Interrupts
from orchestrator.jobs import (
    ForemanLost,
    Loop,
    failure_text,
    foreman_needed,
    let_save,
    result_on_disk,
    start_foreman,
)
from orchestrator.lease import LAPSE_SECONDS, Lease, Leases
from orchestrator.plan import Plan, Rerun, Trial
from orchestrator.recorder import Recorder
from orchestrator.records import (
    finished_elsewhere,
    keep_history,
    note,
    noted,
    occupied,
    set_aside,
    sign_in,
    take_over,
)
from orchestrator.report import write_tables, write_trial_files
from orchestrator.results import State, TrialResult
from orchestrator.tracking import Status
from orchestrator.wording import one_line
from orchestrator.worker import STOP, STOPPED, train

_POLL_SECONDS = 0.25
_LEASE_POLL_SECONDS = 2.0
"""So often is a trial asked for that another invocation trains."""

_STATUS: dict[State, Status] = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
    "not started": "KILLED",
}


@dataclass
class Outcome:
    """What a run leaves behind.

    Attributes:
        results: one for each trial of the plan, in its order.
        files: tables and pictures.
        interrupted: the exit code for the signal that ended it.
        logs: Ray's, where a trial has failed, or the foreman.
    """

    results: list[TrialResult]
    files: list[Path] = field(default_factory=list)
    interrupted: int | None = None
    logs: Path | None = None

    @property
    def exit_code(self) -> int:
        if self.interrupted is not None:
            return self.interrupted
        return int(any(result.state != "finished" for result in self.results))

    @property
    def status(self) -> Status:
        if self.interrupted is not None:
            return "KILLED"
        return "FAILED" if self.exit_code else "FINISHED"


def run_plan(plan: Plan, view: View, loop: Loop = train) -> Outcome:
    """Train what of the plan is not yet trained, and report on all of it.

    Args:
        plan: every trial has its own folder, so the same plan goes on where it stopped.
        view: shows it.
        loop: what each worker of a trial does.

    Raises:
        ConfigError, DataError: it cannot run; nothing has been written.
        Interrupted: before anything was started.
    """
    with Interrupts() as interrupts:
        prepare_data(plan, view)
        prepare_storage(plan, view)
        leases = Leases(plan.output, plan.name, on_loss=interrupts.ask)
        with only_one(plan.folder), leases:
            return _Run(plan, view, loop, interrupts, leases).outcome()


def prepare_data(plan: Plan, view: View) -> None:
    """Make the embedded images if need be, and open every data set as the workers will.

    Raises:
        ConfigError, DataError: it cannot be used.
    """
    from codetr.data import open_dataset
    from codetr.data.digits import cached_digits

    wanted = {
        (trial.data.model_dump_json(), trial.detector.needs_masks): trial.data
        for trial in plan.trials
    }
    for (_, masks), data in wanted.items():
        if data.dataset != "coco":
            cached_digits(
                lvis=data.dataset == "digits-lvis",
                progress=lambda done, total: view.stage("making the images", f"{done}/{total}"),
            )
        view.stage("opening the data")
        train_set = open_dataset(data, "train", masks=masks)
        val_set = open_dataset(data, "val")
        train_set.classes.require_same(
            val_set.classes, str(train_set.annotations), str(val_set.annotations)
        )
        for dataset in (train_set, val_set):
            if dataset.skipped:
                view.say(f"{dataset.annotations}: left out {dataset.skipped} broken image(s)")


def prepare_storage(plan: Plan, view: View) -> None:
    """Try the place for checkpoints out, if it is not simply below the output folder.

    Raises:
        ConfigError: it cannot be used.
    """
    if plan.storage is None:
        return
    from orchestrator.storage import Storage

    view.stage("opening the storage")
    Storage.of(plan).require_writable(plan)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder against a second invocation.

    Raises:
        ConfigError: another one is at work there, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise occupied(folder) from None
    except OSError as error:
        raise not_writable(folder, error) from None
    try:
        with lock:
            yield
    finally:
        if [path.name for path in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
            for empty in (folder, folder.parent):
                with suppress(OSError):
                    empty.rmdir()


def tell_lost(lost: dict[str, Lease], view: View) -> None:
    """Say why nobody's signal has ended the run."""
    for trial, lease in lost.items():
        view.say(
            f"{trial}: '{lease.name}' trains it now ({lease.owner}), for {LAPSE_SECONDS:.0f} s had "
            "passed without a sign of life from here: to go on would train it twice"
        )


def known_result(plan: Plan, trial: Trial) -> TrialResult:
    """What became of a trial until now, with the reason if it failed."""
    result = result_on_disk(plan, trial)
    record = noted(plan.store / trial.name)
    if result.state == "interrupted" and record.get("state") == "failed":
        return replace(result, state="failed", reason=record.get("reason"))
    return result


class _Elsewhere:
    """Trials that other invocations are training, to be asked for again now and then."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []
        self._told: set[str] = set()
        self._asked = 0.0

    def add(self, trial: Trial, against: Lease, view: View) -> None:
        self.trials.append(trial)
        self._asked = time.monotonic()
        if trial.id not in self._told:
            view.say(f"{label(trial)}: '{against.name}' trains it ({against.owner}): waiting")
        self._told.add(trial.id)

    def due(self) -> list[Trial]:
        """All of them, if it is time to ask again."""
        if not self.trials or time.monotonic() - self._asked < _LEASE_POLL_SECONDS:
            return []
        trials, self.trials = self.trials, []
        return trials


class _Run:
    """One invocation, from the start of Ray and MLflow to the last table."""

    def __init__(
        self, plan: Plan, view: View, loop: Loop, interrupts: Interrupts, leases: Leases
    ) -> None:
        self.plan, self.view, self.loop, self.interrupts = plan, view, loop, interrupts
        self.leases, self.since = leases, time.time()
        self.cluster = Cluster(plan)
        self.recorder: Recorder | None = None
        self.results: dict[str, TrialResult] = {}
        self.begun: set[str] = set()
        self.slots = 0
        self._is_cut_off = False
        self._analyses = Analyses(plan, view, interrupts, self.results)

    def outcome(self) -> Outcome:
        interrupted = None
        try:
            done = self._done_before()
            waiting = [trial for trial in self.plan.trials if trial.id not in done]
            try:
                looks = self._analyses.missing(done.values())
                self._start(with_ray=bool(waiting or looks))
                self._take_over(done)
                self._train(waiting)
                self._analyses.look(self._tell, self.slots)
            except ForemanLost as lost:
                self.view.say(str(lost))
                self._is_cut_off = True
            except Interrupted as asked:
                interrupted = asked.exit_code
                tell_lost(self.leases.lost, self.view)
            with self.interrupts.shield():
                return self._finish(interrupted)
        except BaseException as error:
            self.cluster.stop(keep_logs=not isinstance(error, ConfigError))
            if self.recorder is not None:
                self.recorder.close("FAILED", [], patience=10)
            raise

    # -------------------------------------------------------------------------------- beginning

    def _done_before(self) -> dict[str, TrialResult]:
        """Results of the trials that are only reported: finished, or as ``--rerun`` has it."""
        done: dict[Rerun, tuple[State, ...]] = {
            "failed": ("finished",),
            "all": (),
            "none": ("finished", "failed", "interrupted"),
        }
        results = (known_result(self.plan, trial) for trial in self.plan.trials)
        return {r.trial.id: r for r in results if r.state in done[self.plan.options.rerun]}

    def _start(self, *, with_ray: bool) -> None:
        """Start Ray, then open MLflow: nothing is written before it is sure that the plan runs."""
        self.view.stage("starting Ray and MLflow" if with_ray else "opening MLflow")
        # Meanwhile, because this import takes as long as Ray's start.
        threading.Thread(target=import_module, args=("mlflow",), daemon=True).start()
        # Torn apart, Ray would leave processes behind and MLflow a run.
        with self.interrupts.shield():
            try:
                if with_ray:
                    self.cluster.start()
                    self.slots = self.cluster.slots()
            finally:
                self.interrupts.install()  # Ray puts its own handlers in the place of ours
            sign_in(self.plan, self.leases)
            self.recorder = Recorder.open(self.plan, self.view.say)

    def _stop_file(self, trial: Trial) -> Path:
        return self.plan.store / trial.name / STOP

    def _take_over(self, done: dict[str, TrialResult]) -> None:
        for result in done.values():
            self._tell.adopt(result.trial)
            self._end(result)

    # --------------------------------------------------------------------------------- training

    def _train(self, trials: list[Trial]) -> None:
        """Train these trials until the last one has ended."""
        if not trials:
            return

        slots = min(self.slots, len(trials))
        with self.interrupts.shield():  # Ray's calls cannot bear an exception in their middle
            foreman = start_foreman(self.plan, self.loop, slots)
        plural = "s" * (len(trials) > 1)
        self.view.stage(f"training {len(trials)} trial{plural}, {slots} at a time")
        # The longest first, or it would end up alone: heads cost time.
        waiting = deque(sorted(trials, key=lambda trial: -trial.detector.k))
        running: dict[Any, Trial] = {}
        try:
            self._work_off(waiting, running, foreman, slots)
        except Interrupted:
            with self.interrupts.shield(), suppress(ForemanLost):
                let_save(foreman, self.plan.options.grace, self.view)
                self._look(foreman)
            raise

    def _work_off(
        self, waiting: deque[Trial], running: dict[Any, Trial], foreman: Any, slots: int
    ) -> None:
        elsewhere = _Elsewhere()
        while waiting or running or elsewhere.trials:
            with self.interrupts.shield():
                waiting += elsewhere.due()
                while waiting and len(running) < slots:
                    trial = waiting.popleft()
                    if self._begin(trial, elsewhere):
                        running[foreman.train.remote(trial)] = trial
                if is_left(self.plan.folder / STOP):  # asked on another machine
                    signal.raise_signal(signal.SIGTERM)
                ended = self._wait(running)
                self._look(foreman)
                for reference in ended:
                    self._ended(running.pop(reference), reference)

    @staticmethod
    def _wait(running: dict[Any, Trial]) -> list[Any]:
        """Those that have ended within a moment."""
        import ray

        if not running:
            time.sleep(_POLL_SECONDS)
            return []
        ended: list[Any] = ray.wait([*running], timeout=_POLL_SECONDS)[0]
        return ended

    def _is_done_meanwhile(self, trial: Trial) -> bool:
        """Whether it need not be begun: another experiment of this output has finished it, or
        someone has asked to leave it out."""
        since = self.since if self.plan.options.rerun == "all" else 0
        source = finished_elsewhere(self.plan, trial, since)
        if source is None and not self._stop_file(trial).exists():
            return False
        if source is not None:
            self.view.say(f"{label(trial)}: copied from {source}")
            take_over(self.plan, trial, source)
        self._tell.adopt(trial)
        self._end(known_result(self.plan, trial))
        return True

    def _look(self, foreman: Any) -> None:
        """Fetch and show what the trials have said."""
        import ray

        with foreman_needed():
            progress, reports = ray.get(foreman.fetch.remote())
        by_id = {trial.id: trial for trial in self.plan.trials}
        for identity, latest in progress.items():
            self.view.progress(by_id[identity], latest)
        for identity, history in reports.items():
            self.view.epoch(by_id[identity], history[-1])
            self._write(keep_history, by_id[identity], history)
            self._tell.record(by_id[identity], history)

    def _ended(self, trial: Trial, reference: Any) -> None:
        import ray

        try:
            reason = ray.get(reference)
        except ray.exceptions.RayError as error:  # Ray itself: one trial's, not the others'
            reason = failure_text(error)
        result = result_on_disk(self.plan, trial)
        stopped = reason == STOPPED
        if not stopped and (reason is not None or result.state != "finished"):
            reason = reason or result.reason or f"ended after {len(result.history)} epochs"
            result = replace(result, state="failed", reason=reason)
        self._end(result)

    def _begin(self, trial: Trial, elsewhere: _Elsewhere) -> bool:
        """Make ready to train a trial; False if there is no need to, or if it cannot be."""
        try:
            against = self.leases.acquire(trial.id)
            if against is not None:
                elsewhere.add(trial, against, self.view)
                return False
            if self._is_done_meanwhile(trial):
                return False
            self._write_beginning(trial)
        except Exception as error:  # a full disk or a storage's own: this trial's, not the others'
            self._tell.adopt(trial)
            result = known_result(self.plan, trial)
            self._end(replace(result, state="failed", reason=f"cannot begin: {one_line(error)}"))
            return False
        return True

    def _write_beginning(self, trial: Trial) -> None:
        self.begun.add(trial.id)
        self.view.progress(trial, Progress("starting"))
        if self.plan.options.rerun == "all":
            set_aside(self.plan, trial)
            self._tell.discard(trial)
        note(self.plan, trial, "running")
        self._tell.begin(trial)

    def _end(self, result: TrialResult) -> None:
        self.results[result.trial.id] = result
        self._tell.record(result.trial, result.history)
        self._tell.attach(result.trial, self._write(write_trial_files, result))
        self._tell.end(result.trial, _STATUS[result.state], result.reason)
        if result.trial.id in self.begun:
            self._write(note, result.trial, result.state, result.reason)
        self.leases.release(result.trial.id)
        self.view.ended(result)  # the last: whoever reads it may ask for the trial at once

    @property
    def _tell(self) -> Recorder:
        """MLflow, once it is open."""
        assert self.recorder is not None
        return self.recorder

    def _write(self, write: Callable[..., list[Path]], *arguments: Any) -> list[Path]:
        return as_far_as_possible(self.view.say, write, self.plan, *arguments)

    # ----------------------------------------------------------------------------------- ending

    def _finish(self, interrupted: int | None) -> Outcome:
        """End Ray, write tables and pictures, end the runs."""
        plan = self.plan
        if self.cluster.started:
            self.view.stage("ending Ray")
        failed = self._is_cut_off or any(r.state == "failed" for r in self.results.values())
        self.cluster.stop(keep_logs=failed)
        for trial in plan.trials:
            if trial.id not in self.results:
                self._abandon(trial)
        results = [self.results[trial.id] for trial in plan.trials]
        logs = self.cluster.logs if failed else None
        outcome = Outcome(results, interrupted=interrupted, logs=logs)
        self.view.stage("writing tables and pictures")
        outcome.files = self._write(write_tables, results)
        if interrupted is None:
            from orchestrator.pictures import draw_all

            outcome.files += self._write(draw_all, results)
            outcome.files += self._write(self._analyses.write, results)
        if self.recorder is not None:
            patience = 10 if interrupted else 60
            self.recorder.close(outcome.status, outcome.files, patience)
        return outcome

    def _abandon(self, trial: Trial) -> None:
        """A signal came before the trial's end, or its foreman's end."""
        result = known_result(self.plan, trial)
        if trial.id in self.begun:
            self._end(result)
        else:
            self.results[trial.id] = result
