"""Runs a sweep: shows and records what the searcher's trials do, and reports on all of them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from codetr.config import ConfigError
from orchestrator.board import Progress
from orchestrator.cluster import Cluster
from orchestrator.console import View
from orchestrator.files import as_far_as_possible, is_left
from orchestrator.interrupt import Interrupted, Interrupts
from orchestrator.jobs import ForemanLost, Loop, foreman_needed, let_save
from orchestrator.lease import Leases
from orchestrator.plan import Trial
from orchestrator.population_search import PopulationSearcher
from orchestrator.recorder import Recorder
from orchestrator.records import keep_history, note, sign_in
from orchestrator.report import write_trial_files
from orchestrator.runner import Outcome, only_one, prepare_data, prepare_storage, tell_lost
from orchestrator.search import (
    Entry,
    Searcher,
    is_complete,
    is_done,
    read_ledger,
    start_searcher,
    sweep_result,
    trial_of,
)
from orchestrator.sweep import Sweep, require_same_sweep
from orchestrator.sweep_report import Row, ranked, write_report
from orchestrator.tracking import Status
from orchestrator.worker import STOP, train

_POLL_SECONDS = 0.25
_LAST_WORDS_SECONDS = 20.0
_STATUS: dict[str, Status] = {
    "finished": "FINISHED",
    "stopped": "FINISHED",  # the scheduler's decision, not a failure
    "failed": "FAILED",
    "open": "KILLED",
    "interrupted": "KILLED",
}


@dataclass
class SweepOutcome(Outcome):
    """What a sweep leaves behind, its results by rank.

    Attributes:
        complete: see :func:`orchestrator.search.is_complete`.
    """

    complete: bool = True

    @property
    def exit_code(self) -> int:
        return int(not self.complete) if self.interrupted is None else self.interrupted


def run_sweep(sweep: Sweep, view: View, loop: Loop = train) -> Outcome:
    """Search to the end, from where an earlier invocation was, and report on all of it.

    Raises:
        ConfigError, DataError: it cannot run; nothing has been written.
        Interrupted: before anything was started.
    """
    with Interrupts() as interrupts:
        prepare_data(sweep.plan, view)
        prepare_storage(sweep.plan, view)
        leases = Leases(sweep.plan.output, sweep.plan.name, on_loss=interrupts.ask)
        with only_one(sweep.folder), leases:
            require_same_sweep(sweep)
            sign_in(sweep.plan, leases, sweep.search.model_dump(mode="json"))
            return _SweepRun(sweep, view, loop, interrupts).outcome()


class _SweepRun:
    """One invocation, from the start of Ray and MLflow to the last picture."""

    def __init__(self, sweep: Sweep, view: View, loop: Loop, interrupts: Interrupts) -> None:
        self.sweep, self.view, self.loop, self.interrupts = sweep, view, loop, interrupts
        self.cluster = Cluster(sweep.plan)
        self.recorder: Recorder | None = None
        self.trials: dict[str, Trial] = {}
        self.ended: set[str] = set()
        self.slots = 0
        self._is_cut_off = False

    def outcome(self) -> Outcome:
        interrupted = None
        try:
            before = read_ledger(self.sweep.folder)
            try:
                self._start(with_ray=not is_complete(self.sweep, before))
                self._take_over(before)
                if self.cluster.started:
                    self._search()
            except ForemanLost as lost:
                self.view.say(str(lost))
                self._is_cut_off = True
            except Interrupted as asked:
                interrupted = asked.exit_code
            with self.interrupts.shield():
                return self._finish(interrupted)
        except BaseException as error:
            self.cluster.stop(keep_logs=not isinstance(error, ConfigError))
            if self.recorder is not None:
                self.recorder.close("FAILED", [], patience=10)
            raise

    def _start(self, *, with_ray: bool) -> None:
        self.view.stage("starting Ray and MLflow" if with_ray else "opening MLflow")
        threading.Thread(target=import_module, args=("mlflow",), daemon=True).start()
        with self.interrupts.shield():
            try:
                if with_ray:
                    self.cluster.start()
                    self.slots = min(self.cluster.slots(), self.sweep.count)
            finally:
                self.interrupts.install()  # Ray puts its own handlers in the place of ours
            self.recorder = Recorder.open(self.sweep.plan, self.view.say)
        search = self.sweep.search
        tags = {"trials": str(self.sweep.count), "searcher": search.searcher}
        self._tell.describe(None, {**tags, "scheduler": search.scheduler})

    @property
    def _tell(self) -> Recorder:
        """MLflow, once it is open."""
        assert self.recorder is not None
        return self.recorder

    def _write(self, write: Callable[..., list[Path]], *arguments: Any) -> list[Path]:
        return as_far_as_possible(self.view.say, write, self.sweep.plan, *arguments)

    def _take_over(self, before: list[Entry]) -> None:
        # Other suggestions that stand for the same trial have no run of their own.
        first = {entry.trial: entry.tune_id for entry in reversed(before)}
        for entry in before:
            if is_done(entry) and first[entry.trial] == entry.tune_id:
                self._tell.adopt(self._trial(entry))
                self._end(entry)

    def _trial(self, entry: Entry) -> Trial:
        if entry.trial not in self.trials:
            self.trials[entry.trial] = trial_of(self.sweep, entry)
        return self.trials[entry.trial]

    # -------------------------------------------------------------------------------- searching

    def _search(self) -> None:
        import ray

        with self.interrupts.shield():  # Ray's calls cannot bear an exception in their middle
            kind = PopulationSearcher if self.sweep.is_population else Searcher
            searcher = start_searcher(kind, self.sweep, self.loop, self.slots)
            search = searcher.search.remote()
        search_text = f"{self.sweep.search.searcher}, {self.sweep.search.scheduler}"
        count = self.sweep.count
        what = f"a population of {count}" if self.sweep.is_population else f"{count} suggestions"
        self.view.stage(f"searching {what} ({search_text}), {self.slots} at a time")
        over = False
        try:
            while not over:
                with self.interrupts.shield():
                    over = bool(ray.wait([search], timeout=_POLL_SECONDS)[0])
                    if is_left(self.sweep.folder / STOP):  # asked on another machine
                        signal.raise_signal(signal.SIGTERM)
                    self._look(searcher)
        except Interrupted:
            with self.interrupts.shield(), suppress(ForemanLost):
                let_save(searcher, self.sweep.plan.options.grace, self.view)
                self._look(searcher)
                with foreman_needed():
                    tell_lost(ray.get(searcher.lost.remote()), self.view)
            raise
        with foreman_needed():
            ray.get(search)  # raises what Tune itself has raised
        # Tune's last words on its trials are on their way to the searcher when it returns.
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while self._open_entries() and time.monotonic() < deadline:
            with self.interrupts.shield():
                self._look(searcher)
            time.sleep(_POLL_SECONDS)
        with self.interrupts.shield():
            self._look(searcher)

    def _open_entries(self) -> bool:
        return any(entry.state == "open" for entry in read_ledger(self.sweep.folder))

    def _look(self, searcher: Any) -> None:
        """Fetch, show and record what the trials have said."""
        import ray

        with foreman_needed():
            entries: list[Entry] = ray.get(searcher.fetch_entries.remote())
            progress, reports = ray.get(searcher.fetch.remote())
        for entry in entries:
            if entry.state == "open":
                self._begin(entry)
        for identity, latest in progress.items():
            if identity not in self.ended:
                self.view.progress(self.trials[identity], latest)
        for identity, history in reports.items():
            if identity not in self.ended:
                self.view.epoch(self.trials[identity], history[-1])
                self._write(keep_history, self.trials[identity], history)
                self._tell.record(self.trials[identity], history)
        for entry in entries:
            if entry.state != "open":
                self._end(entry)

    def _begin(self, entry: Entry) -> None:
        trial = self._trial(entry)
        self.ended.discard(trial.id)  # Tune was killed before it had written down that it had
        self._write(note, trial, "running")
        self.view.progress(trial, Progress("starting"))
        self._tell.begin(trial)
        self._tell.describe(trial, suggestion_tags(entry))

    def _end(self, entry: Entry) -> None:
        trial = self._trial(entry)
        if trial.id in self.ended:
            return
        self.ended.add(trial.id)
        result = sweep_result(self.sweep, entry)
        self._write(note, trial, result.state, result.reason)
        self._tell.record(trial, result.history)
        self._tell.attach(trial, self._write(write_trial_files, result))
        reason = entry.reason if entry.state == "failed" else None
        self._tell.end(trial, _STATUS[entry.state], reason)
        self._tell.describe(trial, {"stop_reason": stop_reason(entry)})
        self.view.ended(result)

    # ----------------------------------------------------------------------------------- ending

    def _finish(self, interrupted: int | None) -> Outcome:
        """End Ray, write tables and pictures, end the runs."""
        if self.cluster.started:
            self.view.stage("ending Ray")
        entries = read_ledger(self.sweep.folder)
        failed = self._is_cut_off or any(entry.state == "failed" for entry in entries)
        self.cluster.stop(keep_logs=failed)
        for entry in entries:
            # Cut off, or ended after the last look at the searcher.
            if entry.trial in self.trials:
                self._end(entry)
        self.view.stage("writing tables and pictures")
        rows = ranked(self.sweep, entries)
        files = as_far_as_possible(self.view.say, write_report, self.sweep, rows)
        outcome = SweepOutcome(
            [row.result for row in rows],
            files,
            interrupted,
            self.cluster.logs if failed else None,
            complete=is_complete(self.sweep, entries),
        )
        if self.recorder is not None:
            self._rank(rows)
            patience = 10 if interrupted else 60
            self.recorder.close(outcome.status, outcome.files, patience)
        return outcome

    def _rank(self, rows: list[Row]) -> None:
        for row in rows:
            if row.rank is not None and row.entry.trial in self.trials and row.is_first:
                self._tell.describe(self._trial(row.entry), {"rank": str(row.rank)})


def suggestion_tags(entry: Entry) -> dict[str, str]:
    values = {f"suggestion.{name}": str(value) for name, value in entry.latest.items()}
    values |= {"member": str(entry.member)} if entry.member else {}
    values |= {"origin": entry.origin} if entry.origin else {}
    return {**values, "suggestion": str(entry.number)}


def stop_reason(entry: Entry) -> str:
    """Why its training ended: in a word, or as the scheduler or the failure has it."""
    words = {"finished": "all epochs", "open": "interrupted"}
    return entry.reason or words.get(entry.state, entry.state)
