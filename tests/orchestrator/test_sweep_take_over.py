"""What earlier invocations of a sweep have finished, taken over by the next."""

import csv
import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from test_runner import Deaf, Watching
from test_sweep import sample_sweep
from trial_samples import sample_epoch

from orchestrator.interrupt import Interrupts
from orchestrator.lease import Leases
from orchestrator.records import STATE, keep_history, note
from orchestrator.search import LEDGER, Entry, Ledger
from orchestrator.storage import Patience, Storage
from orchestrator.sweep_run import _SweepRun


def test_each_trial_is_taken_over_once_by_its_first_suggestion():
    """Without a look at the disk for each of them. Of y the first is left open after two kills, and
    will find that the second has trained it."""
    states = [("a", "x", "finished"), ("b", "x", "finished"), ("c", "y", "open"),
              ("d", "y", "finished"), ("e", "z", "stopped")]  # fmt: skip
    entries = [Entry(n, t, {}, trial, state) for n, (t, trial, state) in enumerate(states, 1)]
    ended: list[str] = []
    run = SimpleNamespace(
        tell=SimpleNamespace(adopt=lambda _: None),
        _trial=lambda entry: entry.trial,
        _end=lambda entry, _: ended.append(entry.tune_id),
    )
    _SweepRun._take_over(run, entries)
    assert ended == ["a", "d", "e"]


def test_it_is_the_suggestion_that_the_ledger_names(tmp_path):
    entries = [Entry(1, "c", {}, "y", "open"), Entry(2, "d", {}, "y", "finished")]
    (tmp_path / LEDGER).write_text(json.dumps([asdict(entry) for entry in entries]))
    assert Ledger(tmp_path).claim("c", {}, "y").tune_id == "d"


class Away:
    """Storages that have not answered since they were asked for so many trials."""

    def __init__(self, answers=0):
        self.asked, self.left = [], answers

    def __call__(self, trial):
        self.asked.append(trial)
        if self.left:
            self.left -= 1
            return
        raise ConnectionResetError("away")


def test_after_the_first_that_does_not_answer_nobody_is_waited_for(monkeypatch):
    monkeypatch.setattr("orchestrator.storage.RETRY_PAUSES", (0.0, 0.0))
    patience, away = Patience(), Away(answers=1)
    patience(lambda: away("one"))
    for trial in ("two", "three"):
        with pytest.raises(ConnectionResetError):
            patience(lambda trial=trial: away(trial))
    assert away.asked == ["one", "two", "two", "two", "three"]


@pytest.fixture
def run(tmp_path):
    """A sweep of three suggestions for two trials, all finished, with a storage elsewhere."""
    sweep = sample_sweep(tmp_path, over=("lambda_1=1,2",), settings=("epochs=1",))
    plan = replace(sweep.plan, options=replace(sweep.plan.options, storage="memory://lab"))
    sweep = replace(sweep, plan=plan)
    ledger = Ledger(sweep.folder)
    sweep.folder.mkdir(parents=True)
    for tune_id, value in (("a", 1), ("b", 2), ("c", 1.0)):
        trial = sweep.trial({"lambda_1": value})
        ledger.claim(tune_id, {"lambda_1": value}, trial.id)
        ledger.end(tune_id, "finished")
        if tune_id != "c":
            note(plan, trial, "finished")
            keep_history(plan, trial, [sample_epoch(1, value / 10)])
    run = _SweepRun(sweep, Watching(), None, Interrupts(), Leases(tmp_path, plan.name))
    run.recorder = Deaf()
    return run


def test_a_storage_away_at_the_end_costs_no_finished_trial_its_record(run, monkeypatch):
    away = Away()
    monkeypatch.setattr("orchestrator.storage.RETRY_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(Storage, "result", lambda _, trial: away(trial))
    run.take_stock()
    run._take_over(run.before)
    run.finish(None)
    one, two, _ = (run._trial(entry).name for entry in run.before)
    # Once more at the end, but not for the twin of the first.
    assert away.asked == 2 * [one, one, one, two]
    states = [json.loads(file.read_text()) for file in run.plan.store.glob(f"*/{STATE}")]
    assert [state["state"] for state in states] == ["finished", "finished"]
    assert [(r.state, r.reason) for r in run.view.results] == 2 * [
        ("failed", "what it has left cannot be read: ConnectionResetError: away")
    ]
    with (run.sweep.folder / "results.csv").open() as file:
        rows = [(row["suggestion"], row["AP"], row["status"]) for row in csv.DictReader(file)]
    assert rows == [
        ("2", "20.0", "finished"), ("1", "10.0", "finished"), ("3", "10.0", "finished (same trial)")
    ]  # fmt: skip
