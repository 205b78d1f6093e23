"""What earlier invocations of a sweep have finished, taken over by the next."""

import json
from dataclasses import asdict
from types import SimpleNamespace

from orchestrator.search import LEDGER, Entry, Ledger
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
        _end=lambda entry: ended.append(entry.tune_id),
    )
    _SweepRun._take_over(run, entries)
    assert ended == ["a", "d", "e"]


def test_it_is_the_suggestion_that_the_ledger_names(tmp_path):
    entries = [Entry(1, "c", {}, "y", "open"), Entry(2, "d", {}, "y", "finished")]
    (tmp_path / LEDGER).write_text(json.dumps([asdict(entry) for entry in entries]))
    assert Ledger(tmp_path).claim("c", {}, "y").tune_id == "d"
