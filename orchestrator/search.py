"""Ray Tune over the same trials as ``codetr run``: each of its trials drives one Ray Train job.

Tune itself runs in an actor, the :class:`Searcher`, for the reason that the jobs of a run do: the
process that the user has started must be able to leave Ray at any moment.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from codetr.config import ConfigError
from orchestrator.files import read_json, write_whole
from orchestrator.jobs import Fault, Foreman, Loop, failure_text, fit, free_group, result_on_disk
from orchestrator.lease import Lease, Leases
from orchestrator.plan import Trial
from orchestrator.population import Turn
from orchestrator.records import finished_elsewhere, take_over
from orchestrator.results import TrialResult
from orchestrator.space import Suggestion
from orchestrator.sweep import Sweep
from orchestrator.wording import one_line
from orchestrator.worker import STOP, STOPPED

LEDGER = "suggestions.json"
"""In the sweep's folder: every suggestion that was made, and what came of it."""

_TUNE_FOLDER = "tune"
_ADVICE = (
    f"remove it, and {_TUNE_FOLDER}/ beside it if there is one: the search begins again, and what "
    "is trained is not trained again; or give --name"
)
_EPOCH = "epoch"
_POLL_SECONDS = 0.5
_LEASE_POLL_SECONDS = 2.0

_TRIAL_RESOURCES = {"node:__internal_head__": 0.001}
"""What a Tune trial takes itself: nothing but its place on the head. If it took a CPU, as by
default, as many trials as CPUs would leave none for their workers and wait for ever."""

_ENVIRONMENT = {
    # An epoch without an evaluation has no metric.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Paths in an experiment are seen from where the command was given.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # After a kill at most so much of what was suggested is forgotten.
    "TUNE_GLOBAL_CHECKPOINT_S": "5",
}

Progress = Literal["open", "finished", "stopped", "failed", "interrupted"]
"""``stopped`` by the scheduler, ``interrupted`` by the user: only this one is gone on with."""


@dataclass
class Entry:
    """One suggestion.

    Attributes:
        number: from 1, in the order of the suggestions.
        tune_id: Tune's name for it.
        trial: id of the trial that it stands for; several suggestions may stand for one.
        reason: why it failed, or what stopped it.
        member: of a population: its place there; 0 for others.
        turns: what such a member has changed since it began with the suggestion.
        origin: whose weights it has gone on from, in words.
        named: the first suggestion that stood for the trial: its name is the trial's, and so the
            folder's, whichever of them trains it. None in a ledger of an older version: its own.
    """

    number: int
    tune_id: str
    suggestion: Suggestion
    trial: str
    state: Progress = "open"
    reason: str = ""
    member: int = 0
    turns: tuple[Turn, ...] = ()
    origin: str = ""
    named: Suggestion | None = None

    @classmethod
    def read(cls, row: dict[str, Any]) -> Entry:
        turns = tuple(Turn(**turn) for turn in row.get("turns", ()))
        return cls(**{**row, "turns": turns})

    @property
    def latest(self) -> Suggestion:
        """The values that hold at the end."""
        return self.turns[-1].suggestion if self.turns else self.suggestion


def read_ledger(folder: Path) -> list[Entry]:
    """Every suggestion so far; none if the sweep has not begun.

    Raises:
        ConfigError: the file is damaged.
    """
    file = folder / LEDGER
    return [Entry.read(row) for row in read_json(file, _ADVICE)] if file.exists() else []


class Ledger:
    """The suggestions by their ids, on disk after every change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        before = {entry.tune_id: entry for entry in read_ledger(folder)}
        self.entries = {key: entry for key, entry in before.items() if is_done(entry)}
        # Nobody may wait for these until they are taken up again, each at a time of its own: the
        # last ones Tune may even have forgotten.
        self.unfinished = {key: entry for key, entry in before.items() if not is_done(entry)}
        self._lock = threading.Lock()

    def claim(self, tune_id: str, suggestion: Suggestion, trial: str, **of_member: Any) -> Entry:
        """Note a suggestion; returns the one that is to train its trial, or has done it: of those
        that stand for it, the first that came.

        Args:
            of_member: what else an entry says of a population's member.
        """
        with self._lock:
            if tune_id in self.unfinished:
                self.entries[tune_id] = self.unfinished.pop(tune_id)
            elif tune_id not in self.entries:
                before = sorted(self._all(), key=lambda entry: entry.number)
                number = before[-1].number + 1 if before else 1
                names = (e.named or e.suggestion for e in before if e.trial == trial)
                more = {"named": next(names, suggestion)} | of_member
                self.entries[tune_id] = Entry(number, tune_id, suggestion, trial, **more)
            entry = self.entries[tune_id]
            entry.state, entry.reason = "open", ""  # taken up again after it was interrupted
            self._write()
            return self._first(trial)

    def first(self, trial: str) -> Entry:
        with self._lock:  # others are claimed meanwhile
            return self._first(trial)

    def _first(self, trial: str) -> Entry:
        return next(entry for entry in self.entries.values() if entry.trial == trial)

    def end(self, tune_id: str, state: Progress, reason: str = "") -> None:
        with self._lock:
            self.entries[tune_id].state = state
            self.entries[tune_id].reason = reason
            self._write()

    def close(self, known: Container[str] | None = None) -> None:
        """The search is over: what Tune has forgotten is no suggestion. It has made others instead,
        and there would be more of them than were asked for.

        Args:
            known: Tune's ids; None: all that were claimed or had ended.
        """
        with self._lock:
            kept = {
                key: entry
                for key, entry in self.unfinished.items()
                if (entry.state != "open" if known is None else key in known)
            }
            self.unfinished = kept
            if known is not None:
                self.entries = {key: e for key, e in self.entries.items() if key in known}
            self._write()

    def _all(self) -> list[Entry]:
        return [*self.entries.values(), *self.unfinished.values()]

    def _write(self) -> None:
        rows = [asdict(entry) for entry in self._all()]
        write_whole(self.folder / LEDGER, json.dumps(rows, indent=1))


class Searcher(Foreman):
    """As a Ray actor it runs Tune, and is the foreman of the jobs that Tune's trials drive."""

    def __init__(self, sweep: Sweep, loop: Loop, slots: int) -> None:
        super().__init__(replace(sweep.plan, trials=()), loop)
        os.environ.update(_ENVIRONMENT)
        self.sweep, self.slots = sweep, slots
        self.ledger = Ledger(sweep.folder)
        # Not a signal: it would end this actor, and the trials that nobody has taken with it.
        stop = (sweep.folder / STOP).touch
        self.leases = Leases(sweep.plan.output, sweep.plan.name, on_loss=stop)
        self.news: list[Entry] = []
        self._beginning = threading.Lock()

    def search(self) -> None:
        """Run Tune to its end, from where it was."""
        import ray

        name = ray.get_runtime_context().get_actor_name()
        tuner = _tuner(self.sweep, _trainable(self.sweep, self.loop, name), name, self.slots)
        with self.leases:
            results = tuner.fit()
        # Each has a folder of its id's name: see trial_dirname_creator.
        self.ledger.close({Path(result.path).name for result in results})

    def claim(self, tune_id: str, suggestion: Suggestion) -> Entry:
        """Note a suggestion; returns the one that shall train its trial, if not another did."""
        first = self.ledger.claim(tune_id, suggestion, self.sweep.trial(suggestion).id)
        if first.tune_id == tune_id:
            self.begin(tune_id, trial_of(self.sweep, first))
        return replace(first)

    def begin(self, entry: str, trial: Trial) -> None:
        """The entry's trial is about to be trained."""
        with self._beginning:
            self.plan = replace(self.plan, trials=(*self.plan.trials, trial))
        self.news.append(replace(self.ledger.entries[entry]))

    def is_leaving(self) -> bool:
        return self.leaving

    def acquire(self, trial: str) -> bool:
        """Take the trial's lease; False while another invocation trains it."""
        return self.leases.acquire(trial) is None

    def lost(self) -> dict[str, Lease]:
        """Who trains now what was trained here."""
        return self.leases.lost

    def first(self, trial: str) -> Entry:
        """The suggestion that trains the trial."""
        return replace(self.ledger.first(trial))

    def failed(self, tune_id: str, reason: str) -> None:
        """The trial's own word on why, better than what Tune makes of it."""
        self.ledger.end(tune_id, "failed", reason)

    def interrupted(self, tune_id: str) -> None:
        """Somebody has asked the trial to stop, or the one that another suggestion trains."""
        self.ledger.end(tune_id, "interrupted")

    def ended(self, tune_id: str, epochs: int, *, error: bool) -> None:
        """Tune has ended a trial, or the trial itself has."""
        entry = self.ledger.entries.get(tune_id)
        if entry is None or entry.state in ("failed", "interrupted"):
            pass
        elif error:
            self.ledger.end(tune_id, "failed", "Ray Tune lost the trial's process")
        elif epochs < self._epochs(entry):
            scheduler = self.sweep.search.scheduler
            self.ledger.end(tune_id, "stopped", f"{scheduler}, after epoch {epochs}")
        else:
            self.ledger.end(tune_id, "finished")
        if entry is not None and self.ledger.first(entry.trial) is entry:
            if entry.state != "finished":
                free_group(self.group(entry.trial))  # or the next trial would wait for its place
            self.leases.release(entry.trial)
            self.news.append(replace(entry))

    def _epochs(self, entry: Entry) -> int:
        return trial_of(self.sweep, entry).training.epochs

    def fetch_entries(self) -> list[Entry]:
        """Suggestions whose training has begun or ended since the last call."""
        news, self.news = self.news, []
        return news


def start_searcher(kind: type[Searcher], sweep: Sweep, loop: Loop, slots: int) -> Any:
    """The sweep's searcher as an actor beside this process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0)(kind)
    return actor.options(
        name=f"sweep {sweep.folder}", scheduling_strategy=here, max_concurrency=2 * slots + 4
    ).remote(sweep, loop, slots)


# ----------------------------------------------------------------------------------------- for Tune


def _tuner(sweep: Sweep, trainable: Callable[..., None], name: str, slots: int) -> Any:
    """Tune's own object, new or from what an ended process has left.

    Raises:
        ConfigError: what it has left is damaged.
    """
    from ray import tune

    search, place = sweep.search, sweep.folder / _TUNE_FOLDER
    grid = search.searcher == "grid"
    points = {"suggestion": tune.grid_search(search.space.grid())} if grid else None
    limited = tune.with_resources(trainable, tune.PlacementGroupFactory([_TRIAL_RESOURCES]))
    if tune.Tuner.can_restore(str(place)):
        how = {"resume_unfinished": True, "resume_errored": True, "param_space": points}
        try:
            return tune.Tuner.restore(str(place), limited, **how)
        except Exception as error:  # whatever half of a pickle raises
            raise ConfigError(
                f"{place}: Ray Tune cannot read what it has left there ({one_line(error)}): remove "
                "the folder: the search begins again, and what is trained is not trained again; or "
                "give --name"
            ) from None
    return tune.Tuner(
        limited,
        param_space=points,
        tune_config=tune.TuneConfig(
            metric=search.metric,
            mode="max",
            search_alg=None if grid else _optuna(sweep),
            scheduler=_scheduler(sweep),
            num_samples=1 if grid else search.samples,
            max_concurrent_trials=slots,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=_TUNE_FOLDER,
            storage_path=str(sweep.folder),
            verbose=0,
            callbacks=[_watch(name)],
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )


def _optuna(sweep: Sweep) -> Any:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = {"optuna": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    search = sweep.search
    return OptunaSearch(
        space=search.space,
        metric=search.metric,
        mode="max",
        sampler=samplers[search.searcher](seed=search.seed),
    )


def _scheduler(sweep: Sweep) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if sweep.search.scheduler == "none":
        return FIFOScheduler()
    epochs = sweep.plan.trials[0].training.epochs
    # An epoch more than there are: what reaches the last one has finished, and was not stopped.
    return ASHAScheduler(
        time_attr=_EPOCH, max_t=epochs + 1, grace_period=grace_epochs(epochs), reduction_factor=2
    )


def grace_epochs(epochs: int) -> int:
    """Before so many nothing is stopped: what learns slowly at first is not what ends low."""
    return max(1, epochs // 4)


def _watch(name: str) -> Any:
    """Tells the searcher what Tune ends; by its name, for this is pickled into Tune's folder."""
    from ray import tune

    class Watch(tune.Callback):  # type: ignore[misc]
        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:  # noqa: ARG002
            self._tell(trial, error=False)

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:  # noqa: ARG002
            self._tell(trial, error=True)

        def _tell(self, trial: Any, *, error: bool) -> None:
            import ray

            epochs = int((trial.last_result or {}).get(_EPOCH, 0))
            ray.get_actor(name).ended.remote(trial.trial_id, epochs, error=error)

    return Watch()


def _trainable(sweep: Sweep, loop: Loop, name: str) -> Callable[[dict[str, Any]], None]:
    """What Tune calls for each suggestion."""

    def codetr_trial(config: dict[str, Any]) -> None:
        import ray
        from ray import tune

        searcher = ray.get_actor(name)
        tune_id = tune.get_context().get_trial_id()
        suggestion = config.get("suggestion", config)
        first = ray.get(searcher.claim.remote(tune_id, suggestion))
        trial = trial_of(sweep, first)
        if first.tune_id == tune_id:
            to_tune = _report_to_tune(sweep.search.metric, trial.training.epochs)
            reason = train_leased(sweep, trial, searcher, loop, callbacks=[to_tune])
            if reason == STOPPED:
                if ray.get(searcher.is_leaving.remote()):
                    threading.Event().wait()  # for the end of all: what is reported now would count
                _interrupt(searcher, tune_id)
            if reason is not None:
                _fail(searcher, tune_id, reason)
        else:
            while (first := ray.get(searcher.first.remote(trial.id))).state == "open":
                time.sleep(_POLL_SECONDS)
            if first.state == "interrupted":
                _interrupt(searcher, tune_id)
        reason = _report_last(sweep, trial)
        if reason is not None:
            _fail(searcher, tune_id, reason)

    return codetr_trial


def _fail(searcher: Any, tune_id: str, reason: str) -> NoReturn:
    """End a trial that has failed; the searcher hears why before Tune tells it of some error."""
    import ray

    ray.get(searcher.failed.remote(tune_id, reason))
    raise RuntimeError(reason)


def _interrupt(searcher: Any, tune_id: str) -> NoReturn:
    """End a trial that is to be gone on with: Tune takes up again what has ended with an error."""
    import ray

    ray.get(searcher.interrupted.remote(tune_id))
    raise RuntimeError(STOPPED)


def train_leased(
    sweep: Sweep,
    trial: Trial,
    searcher: Any,
    loop: Loop,
    *,
    callbacks: Sequence[Any] = (),
    until: int | None = None,
) -> str | None:
    """Train the trial unless it is trained, once no other invocation does; returns what
    :func:`orchestrator.jobs.fit` does.

    Args:
        searcher: as actor handle.
        callbacks: Ray Train's.
        until: the epoch after which to end; default the trial's last.
    """
    until = until or trial.training.epochs
    try:
        _wait_for_lease(sweep, trial, searcher)
        if len(result_on_disk(sweep.plan, trial).history) >= until:
            return None
        reason = fit(sweep.plan, trial, searcher, loop, callbacks=callbacks, until=until)
    except Exception as error:  # Ray's or the storage's: one trial's failure, not the sweep's
        return Fault(failure_text(error))
    result = result_on_disk(sweep.plan, trial)
    if reason is None and len(result.history) < until:
        return Fault(result.reason or f"ended after {len(result.history)} epochs")
    return reason


def _wait_for_lease(sweep: Sweep, trial: Trial, searcher: Any) -> None:
    """Until no other invocation trains the trial; what one has finished meanwhile is copied."""
    import ray

    since = time.time()
    waited = False
    while not ray.get(searcher.acquire.remote(trial.id)):
        waited = True
        time.sleep(_LEASE_POLL_SECONDS)
    source = finished_elsewhere(sweep.plan, trial, since) if waited else None
    if source is not None:
        take_over(sweep.plan, trial, source)


def _report_to_tune(metric: str, epochs: int) -> Any:
    """Passes an evaluated epoch on to Tune; the last one is reported when the job has ended, or a
    scheduler might end it before it is written down."""
    from ray.tune.integration.ray_train import TuneReportCallback

    class ReportToTune(TuneReportCallback):  # type: ignore[misc]
        def after_report(
            self,
            run_context: Any,
            metrics: list[dict[str, Any]],
            checkpoint: Any,  # noqa: ARG002 - its path is no concern of Tune's
        ) -> None:
            if metrics[0].get("within_epoch"):
                return
            last = metrics[0]["history"][-1]
            value = last["values"].get(f"val/{metric}")
            if value is not None and last["epoch"] < epochs:
                report = {_EPOCH: last["epoch"], metric: value}
                super().after_report(run_context, [report], None)

    return ReportToTune()


def _report_last(sweep: Sweep, trial: Trial) -> str | None:
    """Tell Tune where the trial has ended, also if another suggestion has trained it; returns why
    that is not known, if it is not."""
    from ray import tune

    metric = sweep.search.metric
    result = result_on_disk(sweep.plan, trial)
    if result.metric(metric) is None:
        return result.reason or f"{metric} was not measured"
    last = result.evaluated[-1]
    tune.report({_EPOCH: last.epoch, metric: last.values[f"val/{metric}"]})
    return None


def trial_of(sweep: Sweep, entry: Entry) -> Trial:
    """The trial that an entry of the ledger stands for."""
    return sweep.trial(entry.named or entry.suggestion, entry.turns)


def is_done(entry: Entry) -> bool:
    return entry.state in ("finished", "stopped")


def firsts(entries: list[Entry]) -> dict[str, Entry]:
    """By trial, of the suggestions that stand for it the one that the :class:`Ledger` goes by: the
    first that is done, also behind one that two kills have left open."""
    ordered = sorted(entries, key=lambda entry: not is_done(entry))
    return {entry.trial: entry for entry in reversed(ordered)}


def is_complete(sweep: Sweep, entries: list[Entry]) -> bool:
    """Whether every suggestion was made, and has finished or was stopped by the scheduler; of a
    population, whether every place has finished, whoever failed there before."""
    if sweep.is_population:
        entries = [*{e.member: e for e in sorted(entries, key=lambda e: e.number)}.values()]
    return len(entries) >= sweep.count and all(map(is_done, entries))


def sweep_result(entry: Entry, result: TrialResult) -> TrialResult:
    """What a suggestion's trial has left, in the state that the ledger knows."""
    if entry.state == "failed":
        return replace(result, state="failed", reason=entry.reason)
    if entry.state == "stopped" and result.state != "finished" and not result.unread:
        return replace(result, reason=entry.reason)
    return result
