"""One invocation that trains, be it a run or a sweep: what comes before, around and after it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from codetr.config import ConfigError
from orchestrator.cluster import Cluster
from orchestrator.console import View
from orchestrator.files import as_far_as_possible, is_left, not_writable
from orchestrator.interrupt import Interrupted, Interrupts
from orchestrator.jobs import ForemanLost, Loop, let_save
from orchestrator.lease import LAPSE_SECONDS, Lease, Leases
from orchestrator.plan import Plan
from orchestrator.recorder import Recorder
from orchestrator.records import occupied
from orchestrator.report import write_class_table, write_trial_files
from orchestrator.results import TrialResult
from orchestrator.tracking import Status
from orchestrator.worker import STOP

POLL_SECONDS = 0.25


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


# ------------------------------------------------------------------------------------------- before


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


@contextmanager
def prepared(plan: Plan, view: View) -> Iterator[tuple[Interrupts, Leases]]:
    """Be the only one at work in the plan's folder, with signals and leases in hand, once data and
    storage have been seen to be usable.

    Raises:
        ConfigError, DataError: it cannot run; nothing has been written.
        Interrupted: before anything was started.
    """
    with Interrupts() as interrupts:
        prepare_data(plan, view)
        prepare_storage(plan, view)
        leases = Leases(plan.output, plan.name, on_loss=interrupts.ask)
        with only_one(plan.folder), leases:
            yield interrupts, leases


# ------------------------------------------------------------------------------------------- around


class Invocation(ABC):
    """From the start of Ray and MLflow to the last table, whatever ends it before.

    Attributes:
        slots: how many trials Ray has room for at a time; 0 before it is started.
        is_cut_off: whether the foreman has died, and the trials with it.
    """

    def __init__(
        self, plan: Plan, view: View, loop: Loop, interrupts: Interrupts, leases: Leases
    ) -> None:
        self.plan, self.view, self.loop, self.interrupts = plan, view, loop, interrupts
        self.leases = leases
        self.cluster = Cluster(plan)
        self.recorder: Recorder | None = None
        self.slots = 0
        self.is_cut_off = False

    # What is a run's or a sweep's own.

    @abstractmethod
    def take_stock(self) -> None:
        """See what invocations before this one have left; writes nothing."""

    @abstractmethod
    def sign_in(self) -> None:
        """Write down who is at work, now that it is sure to be."""

    @abstractmethod
    def work(self) -> None:
        """Train what is missing."""

    @abstractmethod
    def look(self, foreman: Any) -> None:
        """Fetch, show and record what the trials have said."""

    @abstractmethod
    def lost(self, foreman: Any) -> dict[str, Lease]:
        """Trials of ours that another invocation trains now."""

    @abstractmethod
    def finish(self, interrupted: int | None) -> Outcome:
        """End Ray, write tables and pictures, end the runs."""

    # What they have in common.

    def outcome(self) -> Outcome:
        """Do it all, and report on whatever came of it."""
        interrupted = None
        try:
            self.take_stock()
            try:
                self.work()
            except ForemanLost as lost:
                self.view.say(str(lost))
                self.is_cut_off = True
            except Interrupted as asked:
                interrupted = asked.exit_code
            with self.interrupts.shield():
                return self.finish(interrupted)
        except BaseException as error:
            self.cluster.stop(keep_logs=not isinstance(error, ConfigError))
            if self.recorder is not None:
                self.recorder.close("FAILED", [], patience=10)
            raise

    def start(self, *, with_ray: bool) -> None:
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
            self.sign_in()
            self.recorder = Recorder.open(self.plan, self.view.say)

    @property
    def tell(self) -> Recorder:
        """MLflow, once it is open."""
        assert self.recorder is not None
        return self.recorder

    def write(self, write: Callable[..., list[Path]], *arguments: Any) -> list[Path]:
        return as_far_as_possible(self.view.say, write, self.plan, *arguments)

    def write_trial(self, result: TrialResult) -> list[Path]:
        """A trial's own files, each as far as it can be written."""
        return self.write(write_trial_files, result) + self.write(write_class_table, result)

    @contextmanager
    def driven_by(self, foreman: Any) -> Iterator[None]:
        """While trials train: who interrupts it lets them save first."""
        try:
            yield
        except Interrupted:
            with self.interrupts.shield():
                with suppress(ForemanLost):
                    let_save(foreman, self.plan.options.grace, self.view)
                    self.look(foreman)
                with suppress(ForemanLost):
                    tell_lost(self.lost(foreman), self.view)
            raise

    def heed_stop_file(self) -> None:
        """Be interrupted by ``codetr stop`` on another machine, as by a signal on this one."""
        if is_left(self.plan.folder / STOP):
            self.interrupts.ask()

    def end_ray(self, *, failed: bool) -> Path | None:
        """Returns where its logs are, which are kept where something has failed."""
        if self.cluster.started:
            self.view.stage("ending Ray")
        self.cluster.stop(keep_logs=failed)
        return self.cluster.logs if failed else None

    def close(self, outcome: Outcome) -> Outcome:
        """End the runs in MLflow, the files with them."""
        if self.recorder is not None:
            patience = 10 if outcome.interrupted else 60
            self.recorder.close(outcome.status, outcome.files, patience)
        return outcome


def tell_lost(lost: dict[str, Lease], view: View) -> None:
    """Say why nobody's signal has ended the run."""
    for trial, lease in lost.items():
        view.say(
            f"{trial}: '{lease.name}' trains it now ({lease.owner}), for {LAPSE_SECONDS:.0f} s had "
            "passed without a sign of life from here: to go on would train it twice"
        )
