"""Runs a plan: every trial its own Ray Train job, several at a time, recorded while they run."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.analyses import Analyses
from orchestrator.board import Progress
from orchestrator.console import View, label
from orchestrator.interrupt import Interrupts
from orchestrator.invocation import POLL_SECONDS, Invocation, Outcome, prepared
from orchestrator.jobs import Loop, failure_text, foreman_needed, result_on_disk, start_foreman
from orchestrator.lease import Lease, Leases
from orchestrator.plan import Plan, Rerun, Trial
from orchestrator.records import (
    finished_elsewhere,
    keep_history,
    note,
    noted,
    set_aside,
    sign_in,
    take_over,
)
from orchestrator.report import write_tables
from orchestrator.results import State, TrialResult
from orchestrator.tracking import Status
from orchestrator.wording import one_line
from orchestrator.worker import STOP, STOPPED, train

_LEASE_POLL_SECONDS = 2.0
"""So often is a trial asked for that another invocation trains."""

_STATUS: dict[State, Status] = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
    "not started": "KILLED",
}


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
    with prepared(plan, view) as (interrupts, leases):
        return _Run(plan, view, loop, interrupts, leases).outcome()


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


class _Run(Invocation):
    """Every trial of a plan that is not yet trained."""

    def __init__(
        self, plan: Plan, view: View, loop: Loop, interrupts: Interrupts, leases: Leases
    ) -> None:
        super().__init__(plan, view, loop, interrupts, leases)
        self.since = time.time()
        self.done: dict[str, TrialResult] = {}
        self.results: dict[str, TrialResult] = {}
        self.begun: set[str] = set()
        self._analyses = Analyses(plan, view, interrupts, self.results)

    def work(self) -> None:
        waiting = [trial for trial in self.plan.trials if trial.id not in self.done]
        looks = self._analyses.missing(self.done.values())
        self.start(with_ray=bool(waiting or looks))
        for result in self.done.values():
            self.tell.adopt(result.trial)
            self._end(result)
        self._train(waiting)
        self._analyses.look(self.tell, self.slots)

    # -------------------------------------------------------------------------------- beginning

    def take_stock(self) -> None:
        """Read what is only reported: finished trials, or as ``--rerun`` has it."""
        done: dict[Rerun, tuple[State, ...]] = {
            "failed": ("finished",),
            "all": (),
            "none": ("finished", "failed", "interrupted"),
        }
        results = (known_result(self.plan, trial) for trial in self.plan.trials)
        told = done[self.plan.options.rerun]
        self.done = {result.trial.id: result for result in results if result.state in told}

    def sign_in(self) -> None:
        sign_in(self.plan, self.leases)

    def _stop_file(self, trial: Trial) -> Path:
        return self.plan.store / trial.name / STOP

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
        with self.driven_by(foreman):
            self._work_off(waiting, running, foreman, slots)

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
                self.heed_stop_file()
                ended = self._wait(running)
                self.look(foreman)
                for reference in ended:
                    self._ended(running.pop(reference), reference)

    @staticmethod
    def _wait(running: dict[Any, Trial]) -> list[Any]:
        """Those that have ended within a moment."""
        import ray

        if not running:
            time.sleep(POLL_SECONDS)
            return []
        ended: list[Any] = ray.wait([*running], timeout=POLL_SECONDS)[0]
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
        self.tell.adopt(trial)
        self._end(known_result(self.plan, trial))
        return True

    def lost(self, foreman: Any) -> dict[str, Lease]:  # noqa: ARG002 - they are held here
        return self.leases.lost

    def look(self, foreman: Any) -> None:
        import ray

        with foreman_needed():
            progress, reports = ray.get(foreman.fetch.remote())
        by_id = {trial.id: trial for trial in self.plan.trials}
        for identity, latest in progress.items():
            self.view.progress(by_id[identity], latest)
        for identity, history in reports.items():
            self.view.epoch(by_id[identity], history[-1])
            self.write(keep_history, by_id[identity], history)
            self.tell.record(by_id[identity], history)

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
            self.tell.adopt(trial)
            result = known_result(self.plan, trial)
            self._end(replace(result, state="failed", reason=f"cannot begin: {one_line(error)}"))
            return False
        return True

    def _write_beginning(self, trial: Trial) -> None:
        self.begun.add(trial.id)
        self.view.progress(trial, Progress("starting"))
        if self.plan.options.rerun == "all":
            set_aside(self.plan, trial)
            self.tell.discard(trial)
        note(self.plan, trial, "running")
        self.tell.begin(trial)

    def _end(self, result: TrialResult) -> None:
        self.results[result.trial.id] = result
        self.tell.record(result.trial, result.history)
        self.tell.attach(result.trial, self.write_trial(result))
        self.tell.end(result.trial, _STATUS[result.state], result.reason)
        if result.trial.id in self.begun:
            self.write(note, result.trial, result.state, result.reason)
        self.leases.release(result.trial.id)
        self.view.ended(result)  # the last: whoever reads it may ask for the trial at once

    # ----------------------------------------------------------------------------------- ending

    def finish(self, interrupted: int | None) -> Outcome:
        plan = self.plan
        failed = self.is_cut_off or any(r.state == "failed" for r in self.results.values())
        logs = self.end_ray(failed=failed)
        for trial in plan.trials:
            if trial.id not in self.results:
                self._abandon(trial)
        results = [self.results[trial.id] for trial in plan.trials]
        outcome = Outcome(results, interrupted=interrupted, logs=logs)
        self.view.stage("writing tables and pictures")
        outcome.files = self.write(write_tables, results)
        if interrupted is None:
            from orchestrator.pictures import draw_all, draw_detections

            outcome.files += self.write(draw_all, results)
            outcome.files += self.write(draw_detections, results)
            outcome.files += self.write(self._analyses.write, results)
        return self.close(outcome)

    def _abandon(self, trial: Trial) -> None:
        """A signal came before the trial's end, or its foreman's end."""
        result = known_result(self.plan, trial)
        if trial.id in self.begun:
            self._end(result)
        else:
            self.results[trial.id] = result
