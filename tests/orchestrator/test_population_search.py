"""An exchange in the searcher, on what members have left on disk; the real thing is in e2e."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from test_lease import take_away, wait_until
from test_population import population_sweep
from trial_samples import sample_epoch

from codetr.checkpoint import FILE_NAME
from codetr.config import ConfigError
from orchestrator.files import write_whole
from orchestrator.jobs import Fault, Halted
from orchestrator.population_search import POPULATION, PopulationSearcher, read_population
from orchestrator.search import read_ledger
from orchestrator.storage import checkpoint_name
from orchestrator.sweep_run import stop_reason, suggestion_tags
from orchestrator.worker import STOP, STOPPED

EPOCH = 2


class Searching(PopulationSearcher):
    """Four members after the second epoch, the third of them the best."""

    def enter(self, aps=(0.1, 0.3, 0.4, 0.2)):
        members = self._found()
        for member, ap in zip(members, aps, strict=True):
            trial = self._trial(member)
            self._enter(member)
            name = checkpoint_name(EPOCH, EPOCH * trial.steps_per_epoch, "abcdefgh")
            folder = self.sweep.plan.store / trial.name / name
            folder.mkdir(parents=True, exist_ok=True)
            history = [asdict(sample_epoch(epoch, ap)) for epoch in (1, EPOCH)]
            (folder / "history.json").write_text(json.dumps(history))
            (folder / FILE_NAME).write_text(f"weights of {member.number}")
        return members


@pytest.fixture
def sweep(tmp_path):
    sweep = population_sweep(tmp_path)
    sweep.folder.mkdir(parents=True)
    return sweep


def searching(sweep):
    return Searching(sweep, loop=None, slots=2)


def handed_over(searcher, member):
    (folder,) = (searcher.sweep.plan.store / searcher._trial(member).name).glob("epoch-*")
    return (folder / FILE_NAME).read_text()


def test_what_cannot_be_read_exchanges_nobody(sweep, monkeypatch):
    """Or the population would be another one than without the fault."""
    searcher = searching(sweep)
    members = searcher.enter()
    monkeypatch.setattr("orchestrator.storage.RETRY_PAUSES", ())
    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.storage.Storage.checkpoints", timeout)
        with pytest.raises(RuntimeError, match="TimeoutError: away"):
            searcher._exchange(members, EPOCH)
    assert read_population(sweep.folder) is None
    assert searcher._exchange(members, EPOCH)[1:] == members[1:]


def test_who_loses_a_lease_asks_for_an_orderly_end(sweep):
    """A signal would end the actor, and all trials with it."""
    searcher = searching(sweep)
    searcher.leases._heartbeat = 0.05
    with searcher.leases:
        take_away(searcher.leases, "trial")
        wait_until(searcher.lost)
    assert (sweep.folder / STOP).exists()


def timeout(*_):
    raise TimeoutError("away")


def test_the_worst_is_replaced_and_all_of_it_written_down(sweep):
    searcher = searching(sweep)
    members = searcher.enter()
    after = searcher._exchange(members, EPOCH)
    assert after[1:] == members[1:]
    assert handed_over(searcher, after[0]) == "weights of 3"
    assert read_population(sweep.folder) == (EPOCH, after)
    entries = read_ledger(sweep.folder)
    assert [entry.state for entry in entries] == ["stopped", "open", "open", "open", "open"]
    replaced, new = entries[0], entries[-1]
    assert stop_reason(replaced) == "replaced by #5, from #3, after epoch 2"
    assert (new.member, new.origin, new.turns) == (1, "#3 after epoch 2", after[0].turns)
    tags = suggestion_tags(new)
    assert (tags["suggestion"], tags["member"], tags["origin"]) == ("5", "1", "#3 after epoch 2")
    assert tags["suggestion.lambda_2"] == str(after[0].latest["lambda_2"])
    # In this order others hear of it: begun, begun, begun, begun; the new one, the end of the old.
    assert [entry.number for entry in searcher.fetch_entries()] == [1, 2, 3, 4, 5, 1]


def test_killed_before_it_was_written_down_the_same_comes_of_it(sweep):
    once = searching(sweep)
    after = once._exchange(once.enter(), EPOCH)
    before = read_ledger(sweep.folder)
    (sweep.folder / POPULATION).unlink()
    again = searching(sweep)
    assert again._exchange(again.enter(), EPOCH) == after
    again.ledger.close()
    assert sorted(read_ledger(sweep.folder), key=lambda e: e.number) == before


def test_replaced_in_an_exchange_that_does_not_count_it_is_trained_on(sweep):
    """It was asked to stop, and killed just when another had come into its place."""
    once = searching(sweep)
    members = once.enter()
    once._end(once._entry(members[0]), "interrupted")
    once._exchange(members, EPOCH)
    (sweep.folder / POPULATION).unlink()
    again = searching(sweep)
    assert again._enter(members[0]).state == "open"
    assert [entry.number for entry in again.fetch_entries()] == [1]
    assert again.plan.trials == (again._trial(members[0]),)


def test_what_has_failed_is_replaced_and_stays_failed(sweep):
    searcher = searching(sweep)
    members = searcher.enter()
    searcher._end(searcher._entry(members[1]), "failed", "loss not finite")
    after = searcher._exchange(members, EPOCH)
    assert [member.donor for member in after] == [3, 3, None, None]
    failed = read_ledger(sweep.folder)[1]
    assert (failed.state, failed.reason) == ("failed", "loss not finite")


def test_who_was_asked_to_stop_is_interrupted_and_replaced(sweep):
    """Until the exchange it would be gone on with; then another is in its place."""
    searcher = searching(sweep)
    members = searcher.enter()
    searcher._end(searcher._entry(members[1]), "interrupted")
    (history,) = (sweep.plan.store / searcher._trial(members[1]).name).glob("epoch-*/history.json")
    history.write_text(json.dumps(json.loads(history.read_text())[:1]))  # it came no further
    assert searching(sweep)._enter(members[1]).state == "open", "after a new start"
    after = searcher._exchange(members, EPOCH)
    assert [member.donor for member in after] == [3, 3, None, None]
    entry = read_ledger(sweep.folder)[1]
    assert (entry.state, entry.reason) == ("stopped", "replaced by #6, from #3, after epoch 2")


@pytest.mark.parametrize(("state", "reason"), [("failed", "loss not finite"), ("interrupted", "")])
def test_if_nobody_has_come_the_search_ends_there_and_goes_on_with_all(sweep, state, reason):
    """An empty population would be trained to its end at once, for ever."""
    searcher = searching(sweep)
    members = searcher.enter()
    for member in members:
        searcher._end(searcher._entry(member), state, reason)
    told = rf"nobody has come to the exchange after epoch 2 \(#1: {reason or STOPPED}\): the same"
    with pytest.raises(Halted, match=told):
        searcher._exchange(members, EPOCH)
    assert read_population(sweep.folder) is None
    again = searching(sweep)
    assert {again._enter(member).state for member in again._found()} == {"open"}
    assert again._exchange(members, EPOCH)[1:] == members[1:]


def test_a_damaged_population_says_what_to_do_and_that_is_done(sweep):
    searcher = searching(sweep)
    after = searcher._exchange(searcher.enter(), EPOCH)
    (sweep.folder / POPULATION).write_text('{"after')
    told = r"population\.json: damaged \(.*\): remove it: the exchanges are made again"
    with pytest.raises(ConfigError, match=told):
        read_population(sweep.folder)
    (sweep.folder / POPULATION).unlink()
    again = searching(sweep)
    assert again._exchange(again.enter(), EPOCH) == after


def test_a_population_that_an_older_version_has_emptied_begins_again(sweep):
    write_whole(sweep.folder / POPULATION, '{"after_epoch": 2, "members": []}')
    assert read_population(sweep.folder) is None


@pytest.mark.parametrize("fault", ["the storage", "its workers"])
def test_whom_a_fault_has_kept_is_not_the_worst(sweep, monkeypatch, fault):
    """Or the population would be another one than without the fault."""
    searcher = searching(sweep)
    members = searcher.enter()
    monkeypatch.setattr("orchestrator.storage.RETRY_PAUSES", ())
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(current_actor=None))
    with monkeypatch.context() as patch:
        reason = Fault("TimeoutError: away") if fault == "its workers" else None
        patch.setattr("orchestrator.population_search.train_leased", lambda *_, **_more: reason)
        patch.setattr("orchestrator.storage.Storage.checkpoints", timeout)
        searcher.train_member(members[1], EPOCH)
    assert searcher._entry(members[1]).state == "failed"
    with pytest.raises(Halted, match=r"#2 has not come to the exchange after epoch 2: .*away"):
        searcher._exchange(members, EPOCH)
    assert read_population(sweep.folder) is None
    again = searching(sweep)
    assert {again._enter(member).state for member in again._found()} == {"open"}
    assert again._exchange(members, EPOCH)[1:] == members[1:]


def test_a_donor_without_its_checkpoint_is_told(sweep):
    searcher = searching(sweep)
    members = searcher.enter()
    (folder,) = (sweep.plan.store / searcher._trial(members[2]).name).glob("epoch-*")
    folder.rename(folder.with_name(checkpoint_name(EPOCH, 9999, "abcdefgh")))  # within the third
    searcher._exchange(members, EPOCH)
    origin = read_ledger(sweep.folder)[-1].origin
    assert origin == ("#3 after epoch 2, trained again from the beginning: its checkpoint is gone")
