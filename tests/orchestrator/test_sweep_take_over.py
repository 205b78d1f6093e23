"""What earlier invocations of a sweep have finished, taken over by the next."""

from types import SimpleNamespace

from orchestrator.search import Entry
from orchestrator.sweep_run import _SweepRun


def test_each_trial_is_taken_over_once_by_its_first_suggestion():
    """Without a look at the disk for each of them."""
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
    assert ended == ["a", "e"]
