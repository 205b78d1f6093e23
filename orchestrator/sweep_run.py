"""Runs a sweep: shows and records what the searcher's trials do, and reports on all of them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from orchestrator.board import Progress
from orchestrator.console import View
from orchestrator.files import as_far_as_possible
from orchestrator.interrupt import Interrupts
from orchestrator.invocation import POLL_SECONDS, Invocation, Outcome, prepared
from orchestrator.jobs import Loop, foreman_needed, result_on_disk
from orchestrator.lease import Lease, Leases
from orchestrator.plan import Trial
from orchestrator.population_search import PopulationSearcher
from orchestrator.records import keep_history, last_history, note, sign_in
from orchestrator.results import TrialResult
from orchestrator.search import (
    Entry,
    Searcher,
    firsts,
    is_complete,
    is_done,
    read_ledger,
    start_searcher,
    sweep_result,
    trial_of,
)
from orchestrator.storage import Patience
from orchestrator.sweep import Sweep, require_same_sweep
from orchestrator.sweep_report import Row, ranked, write_report
from orchestrator.tracking import Status
from orchestrator.worker import train

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
    with prepared(sweep.plan, view) as (interrupts, leases):
        require_same_sweep(sweep)
        return _SweepRun(sweep, view, loop, interrupts, leases).outcome()


class _SweepRun(Invocation):
    """Every suggestion of a searcher."""

    def __init__(
        self, sweep: Sweep, view: View, loop: Loop, interrupts: Interrupts, leases: Leases
    ) -> None:
        super().__init__(sweep.plan, view, loop, interrupts, leases)
        self.sweep = sweep
        self.before: list[Entry] = []
        self.trials: dict[str, Trial] = {}
        self.ended: set[str] = set()
        self._results: dict[str, TrialResult] = {}

    def take_stock(self) -> None:
        self.before = read_ledger(self.sweep.folder)

    def sign_in(self) -> None:
        sign_in(self.plan, self.leases, self.sweep.search.model_dump(mode="json"))

    def work(self) -> None:
        search = self.sweep.search
        self.start(with_ray=not is_complete(self.sweep, self.before))
        tags = {"trials": str(self.sweep.count), "searcher": search.searcher}
        self.tell.describe(None, {**tags, "scheduler": search.scheduler})
        self._take_over(self.before)
        if self.cluster.started:
            self._search()

    def _take_over(self, before: list[Entry]) -> None:
        # Other suggestions that stand for the same trial have no run of their own.
        first = firsts(before)
        patience = Patience()
        for entry in before:
            if is_done(entry) and first[entry.trial] is entry:
                self.tell.adopt(self._trial(entry))
                self._end(entry, patience)

    def _trial(self, entry: Entry) -> Trial:
        if entry.trial not in self.trials:
            self.trials[entry.trial] = trial_of(self.sweep, entry)
        return self.trials[entry.trial]

    # -------------------------------------------------------------------------------- searching

    def _search(self) -> None:
        import ray

        slots, count = min(self.slots, self.sweep.count), self.sweep.count
        with self.interrupts.shield():  # Ray's calls cannot bear an exception in their middle
            kind = PopulationSearcher if self.sweep.is_population else Searcher
            searcher = start_searcher(kind, self.sweep, self.loop, slots)
            search = searcher.search.remote()
        search_text = f"{self.sweep.search.searcher}, {self.sweep.search.scheduler}"
        what = f"a population of {count}" if self.sweep.is_population else f"{count} suggestions"
        self.view.stage(f"searching {what} ({search_text}), {slots} at a time")
        over = False
        with self.driven_by(searcher):
            while not over:
                with self.interrupts.shield():
                    over = bool(ray.wait([search], timeout=POLL_SECONDS)[0])
                    self.heed_stop_file()
                    self.look(searcher)
        with foreman_needed():
            ray.get(search)  # raises what Tune itself has raised
        # Tune's last words on its trials are on their way to the searcher when it returns.
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while self._open_entries() and time.monotonic() < deadline:
            with self.interrupts.shield():
                self.look(searcher)
            time.sleep(POLL_SECONDS)
        with self.interrupts.shield():
            self.look(searcher)

    def _open_entries(self) -> bool:
        return any(entry.state == "open" for entry in read_ledger(self.sweep.folder))

    def lost(self, foreman: Any) -> dict[str, Lease]:
        import ray

        with foreman_needed():
            trials: dict[str, Lease] = ray.get(foreman.lost.remote())
        return self.leases.lost | trials

    def look(self, foreman: Any) -> None:
        import ray

        with foreman_needed():
            entries: list[Entry] = ray.get(foreman.fetch_entries.remote())
            progress, reports = ray.get(foreman.fetch.remote())
        for entry in entries:
            if entry.state == "open":
                self._begin(entry)
        for identity, latest in progress.items():
            if identity not in self.ended:
                self.view.progress(self.trials[identity], latest)
        for identity, history in reports.items():
            if identity not in self.ended:
                self.view.epoch(self.trials[identity], history[-1])
                self.write(keep_history, self.trials[identity], history)
                self.tell.record(self.trials[identity], history)
        for entry in entries:
            if entry.state != "open":
                self._end(entry)

    def _begin(self, entry: Entry) -> None:
        trial = self._trial(entry)
        self.ended.discard(trial.id)  # Tune was killed before it had written down that it had
        self._results.pop(trial.id, None)
        self.write(note, trial, "running")
        self.view.progress(trial, Progress("starting"))
        self.tell.begin(trial)
        self.tell.describe(trial, suggestion_tags(entry))

    def _result(self, entry: Entry, patience: Patience | None = None) -> TrialResult:
        """What the entry's trial has come to: asked for once, and again where that was in vain. In
        the end it is told as it was reported, if its checkpoints lie elsewhere."""
        known = self._results.get(entry.trial)
        if known is None or known.unread:
            trial = self.trials.get(entry.trial) or trial_of(self.sweep, entry)
            known = result_on_disk(self.plan, trial, patience)
            if known.unread and self.plan.storage is not None:
                known = replace(known, history=last_history(self.plan.store / trial.name))
            self._results[entry.trial] = known
        return sweep_result(entry, known)

    def _end(self, entry: Entry, patience: Patience | None = None) -> None:
        trial = self._trial(entry)
        if trial.id in self.ended:
            return
        self.ended.add(trial.id)
        result = self._result(entry, patience)
        if not (result.unread and is_done(entry)):  # or it would count as failed from now on
            self.write(note, trial, result.state, result.reason)
        self.tell.record(trial, result.history)
        self.tell.attach(trial, self.write_trial(result))
        reason = entry.reason if entry.state == "failed" else None
        self.tell.end(trial, _STATUS[entry.state], reason)
        self.tell.describe(trial, {"stop_reason": stop_reason(entry)})
        self.view.ended(result)

    # ----------------------------------------------------------------------------------- ending

    def finish(self, interrupted: int | None) -> Outcome:
        entries = read_ledger(self.sweep.folder)
        failed = self.is_cut_off or any(entry.state == "failed" for entry in entries)
        logs = self.end_ray(failed=failed)
        patience = Patience()
        for entry in entries:
            # Cut off, or ended after the last look at the searcher.
            if entry.trial in self.trials:
                self._end(entry, patience)
        self.view.stage("writing tables and pictures")
        rows = ranked(self.sweep, entries, partial(self._result, patience=patience))
        files = as_far_as_possible(self.view.say, write_report, self.sweep, rows)
        complete = is_complete(self.sweep, entries)
        results = [row.result for row in rows]
        outcome = SweepOutcome(results, files, interrupted, logs, complete=complete)
        if self.recorder is not None:
            self._rank(rows)
        return self.close(outcome)

    def _rank(self, rows: list[Row]) -> None:
        for row in rows:
            if row.rank is not None and row.entry.trial in self.trials and row.is_first:
                self.tell.describe(self._trial(row.entry), {"rank": str(row.rank)})


def suggestion_tags(entry: Entry) -> dict[str, str]:
    values = {f"suggestion.{name}": str(value) for name, value in entry.latest.items()}
    values |= {"member": str(entry.member)} if entry.member else {}
    values |= {"origin": entry.origin} if entry.origin else {}
    return {**values, "suggestion": str(entry.number)}


def stop_reason(entry: Entry) -> str:
    """Why its training ended: in a word, or as the scheduler or the failure has it."""
    words = {"finished": "all epochs", "open": "interrupted"}
    return entry.reason or words.get(entry.state, entry.state)
