"""Delivery to a store that comes and goes, whose answers get lost, from processes that die."""

from __future__ import annotations

import threading
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trial_samples import sample_epoch, sample_plan

from orchestrator import recorder as module
from orchestrator.outbox import Outbox
from orchestrator.recorder import Begin, Recorder, outbox_path
from orchestrator.tracking import Tracker, TrackingError


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(module, "_LONGEST_PAUSE", 0.02)


class Process:
    """Where a recorder lives: killed, its thread does nothing more, whatever it was about to do."""

    def __init__(self):
        self.lock, self.dead = threading.Lock(), False

    def kill(self):
        with self.lock:
            self.dead = True

    def do(self, work):
        with self.lock:
            if not self.dead:
                return work()
        return threading.Event().wait()


class Queue(Outbox):
    """The queue of such a process."""

    def __init__(self, path, say, process):
        super().__init__(path, say)
        self.process = process

    def pop(self):
        self.process.do(super().pop)


class Store:
    """Keeps metric points as MLflow does: a point that is there already is not there twice.

    Attributes:
        troubles: what befalls the next calls: ``away``, ``lost`` (done, but the answer is lost).
    """

    def __init__(self, troubles=(), code=None):
        self.troubles, self.code = [*troubles], code
        self.points, self.calls = {}, []

    def call(self, name, work):
        trouble = self.troubles.pop(0) if self.troubles else None
        if trouble != "away":
            self.calls.append(name)
            work()
        if trouble:
            error = ConnectionError(trouble)
            error.error_code = self.code
            raise error


class Writer:
    """A tracker beneath a parent run."""

    def __init__(self, store, parent, process):
        self.store, self.parent, self.process = store, parent, process

    def beneath(self, parent):
        return Writer(self.store, parent, self.process)

    def record(self, _trial, epochs, _at, _notes):
        def work():
            known = max((epoch for _, epoch in self.store.points), default=0)
            for epoch in epochs:
                if epoch.epoch > known:
                    self.store.points.setdefault((epoch.time, epoch.epoch), self.parent)

        self.process.do(lambda: self.store.call("record", work))

    def __getattr__(self, name):
        return lambda *_, **__: self.process.do(lambda: self.store.call(name, lambda: None))


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return sample_plan(tmp_path_factory.mktemp("runs"))


def history(upto):
    return [
        type(e)(**{**asdict(e), "time": 1000.0 + e.epoch})
        for e in (sample_epoch(number, 0.1) for number in range(1, upto + 1))
    ]


def open_recorder(store, path, said, parent="this"):
    process = Process()
    queue = Queue(path, said.append, process)
    return Recorder(Writer(store, parent, process), queue, said.append)


def test_in_order_once_the_store_is_back(plan, tmp_path):
    store, said = Store(["away", "away"]), []
    recorder = open_recorder(store, tmp_path / "box", said)
    trial = plan.trials[0]
    recorder.begin(trial)
    recorder.record(trial, history(1))
    recorder.record(trial, history(2))
    recorder.record(trial, history(2))
    recorder.end(trial, "FINISHED")
    recorder.close("FINISHED", [], patience=20)
    assert store.calls == ["begin", "record", "record", "end", "close"]
    assert [epoch for _, epoch in store.points] == [1, 2]
    assert said == ["MLflow: away; trying again"]


def test_it_does_not_insist_on_what_can_never_be(plan, tmp_path):
    store, said = Store(["away"], code="INVALID_PARAMETER_VALUE"), []
    recorder = open_recorder(store, tmp_path / "box", said)
    recorder.begin(plan.trials[0])
    recorder.end(plan.trials[0], "FINISHED")
    recorder.close("FINISHED", [], patience=20)
    assert store.calls == ["end", "close"]
    assert said == ["MLflow: away"]


def test_a_proxy_that_forbids_for_a_while_costs_nothing(plan, tmp_path):
    store, said = Store(["away", "away"], code="PERMISSION_DENIED"), []
    recorder = open_recorder(store, tmp_path / "box", said)
    recorder.begin(plan.trials[0])
    recorder.record(plan.trials[0], history(1))
    recorder.close("FINISHED", [], patience=20)
    assert store.calls == ["begin", "record", "close"]


def test_what_a_dead_store_has_not_taken_waits_for_the_next_run(plan, tmp_path):
    away = threading.Event()
    dead = SimpleNamespace(parent="first", beneath=lambda _: away.wait() or dead)
    said: list[str] = []
    path = tmp_path / "box" / "a.jsonl"
    recorder = Recorder(dead, Outbox(path, said.append), said.append)
    trial = plan.trials[0]
    recorder.begin(trial)
    recorder.record(trial, history(2))
    recorder.close("FINISHED", [], patience=0.1)
    assert said == [
        f"MLflow has not taken 3 operation(s), which wait in {path}: the same command run again "
        "delivers what it lacks"
    ]

    store, said = Store(), []
    second = open_recorder(store, path, said, "second")
    second.adopt(trial)
    second.record(trial, history(3))
    second.close("FINISHED", [], patience=20)
    assert store.calls == ["begin", "record", "close", "adopt", "record", "close"]
    assert store.points == {(1001.0, 1): "first", (1002.0, 2): "first", (1003.0, 3): "second"}
    assert said == ["MLflow: 3 operation(s) of an earlier run wait: delivering them"]
    assert not path.exists()


def test_a_line_that_makes_no_sense_is_left_out(plan, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"do": "__class__", "parent": "a", "at": 0}\n')
    store, said = Store(), []
    recorder = open_recorder(store, path, said)
    recorder.begin(plan.trials[0])
    recorder.close("FINISHED", [], patience=20)
    assert store.calls == ["begin", "close"]
    assert "left out what makes no sense" in said[1]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(["away", "lost", None]), max_size=12),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_every_point_arrives_once_in_order(plan, tmp_path_factory, troubles, runs):
    """Several invocations, each of which trains some epochs more and dies without a word."""
    path = tmp_path_factory.mktemp("box") / "a.jsonl"
    store, reached, trial = Store(troubles), 0, plan.trials[0]
    for more in runs:
        recorder = open_recorder(store, path, [])
        recorder.begin(trial)
        for epoch in range(reached + 1, reached + more + 1):
            recorder.record(trial, history(epoch))
        reached += more
        recorder.outbox.process.kill()
    last = open_recorder(store, path, [])
    last.close("FINISHED", [], patience=20)
    assert [*store.points] == [(1000.0 + e, e) for e in range(1, reached + 1)]


def test_the_journal_names_no_password(tmp_path):
    plan = sample_plan(tmp_path, tracking_uri="http://me:hunter2@127.0.0.1:9")
    assert "hunter2" not in str(outbox_path(plan))


def test_a_store_that_was_there_once_may_be_away_at_the_start(tmp_path, monkeypatch):
    """Two invocations begin without it, the first is killed; what both did arrives once."""
    plan, said = sample_plan(tmp_path), []
    trial = plan.trials[0]
    first = Recorder.open(plan, said.append)
    first.begin(trial)
    first.close("KILLED", [], patience=60)

    def refuse(_):
        raise ConnectionError("away")

    there = Tracker._open
    monkeypatch.setattr(Tracker, "_open", refuse)
    killed = Recorder.open(plan, said.append)
    killed.begin(trial)
    killed.record(trial, history(1))
    killed._given_up.set()
    killed._thread.join()
    assert "cannot be used: away; going on" in said[0]
    second = Recorder.open(plan, said.append)
    second.begin(trial)
    second.record(trial, history(2))
    monkeypatch.setattr(Tracker, "_open", there)
    second.end(trial, "FINISHED")
    second.close("FINISHED", [], patience=60)

    client, where = second.tracker.client, [second.tracker.experiment_id]
    (run,) = client.search_runs(where, f"tags.trial_id = '{trial.id}'")
    points = client.get_metric_history(run.info.run_id, "val/AP")
    assert [point.step for point in points] == [1, 2]
    parents = [r for r in client.search_runs(where) if "trial_id" not in r.data.tags]
    assert len(parents) == 3
    assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
    assert parents[0].info.status == "FINISHED"
    assert not outbox_path(plan).exists()


def test_a_store_that_was_never_there_is_refused(tmp_path):
    plan = sample_plan(tmp_path, tracking_uri="http://127.0.0.1:9/")
    with pytest.raises(TrackingError, match="--tracking-uri"):
        Recorder.open(plan, [].append)


def test_an_experiment_that_was_deleted_is_refused_before_it_trains(tmp_path):
    """It is not away: nothing would ever be recorded. Restored, it gets what has waited."""
    plan, said = sample_plan(tmp_path), []
    trial = plan.trials[0]
    first = Recorder.open(plan, said.append)
    first.close("FINISHED", [], patience=60)
    client, where = first.tracker.client, first.tracker.experiment_id
    client.delete_experiment(where)
    left = Begin(parent=first.tracker.parent, at=1000.0, trial=trial)
    Outbox(outbox_path(plan), said.append).put(left.model_dump_json())
    with pytest.raises(
        TrackingError, match=rf"was deleted there: restore it .* -x {where}'\).*--name"
    ):
        Recorder.open(plan, said.append)
    assert len(Outbox(outbox_path(plan), said.append)) == 1
    client.restore_experiment(where)
    again = Recorder.open(plan, said.append)
    again.close("FINISHED", [], patience=60)
    assert len(client.search_runs([where], f"tags.trial_id = '{trial.id}'")) == 1


def test_what_keeps_it_from_connecting_costs_no_operation(tmp_path, monkeypatch):
    """Though the store says that it will never be: that is said of something else."""
    plan, said = sample_plan(tmp_path), []
    trial = plan.trials[0]
    Recorder.open(plan, said.append).close("FINISHED", [], patience=60)
    troubles = [ConnectionError("away"), ConnectionError("no such run"), ConnectionError("again")]
    troubles[1].error_code = "RESOURCE_DOES_NOT_EXIST"

    def refuse(_client):
        if troubles:
            raise troubles.pop(0)

    monkeypatch.setattr(Tracker, "_close_stale_runs", staticmethod(refuse))
    recorder = Recorder.open(plan, said.append)
    recorder.begin(trial)
    recorder.end(trial, "FINISHED")
    recorder.close("FINISHED", [], patience=60)
    client, where = recorder.tracker.client, [recorder.tracker.experiment_id]
    (run,) = client.search_runs(where, f"tags.trial_id = '{trial.id}'")
    assert run.data.tags["mlflow.parentRunId"] in {r.info.run_id for r in client.search_runs(where)}
    assert run.info.status == "FINISHED"
    assert troubles == []
    assert "MLflow: no such run; trying again" in said
    assert len(client.search_runs(where)) == 3


def test_a_real_store_gets_the_times_of_the_epochs(tmp_path):
    plan = sample_plan(tmp_path)
    trial, said = plan.trials[0], []
    recorder = Recorder.open(plan, said.append)
    recorder.begin(trial)
    recorder.record(trial, history(2))
    recorder.end(trial, "FINISHED")
    recorder.close("FINISHED", [], patience=60)
    assert said == []
    client = recorder.tracker.client
    (run,) = client.search_runs([recorder.tracker.experiment_id], f"tags.trial_id = '{trial.id}'")
    points = client.get_metric_history(run.info.run_id, "val/AP")
    assert [(p.step, p.timestamp) for p in points] == [(1, 1001000), (2, 1002000)]
    assert not outbox_path(plan).exists()

    # The same, delivered again by one who does not know that it was delivered:
    again = Tracker(plan)
    again.record(trial, history(2), at=0.0)
    assert len(client.get_metric_history(run.info.run_id, "val/AP")) == 2
