import csv
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from trial_samples import sample_epoch, sample_plan, sample_results

from orchestrator import tracking
from orchestrator.owner import Owner
from orchestrator.report import write_tables
from orchestrator.tracking import (
    PARAM_LENGTH,
    Tracker,
    TrackingError,
    configuration,
    flatten,
)

NOW = 1_700_000_000.0


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder whose MLflow store exists already: making its tables takes seconds."""
    output = tmp_path_factory.mktemp("runs")
    Tracker(sample_plan(output)).close("FINISHED", [], time.time())
    return output


@pytest.fixture
def plan(store, request):
    return sample_plan(store, name=request.node.name.replace("[", "-").replace("]", ""))


def runs(tracker, filter_string=""):
    return tracker.client.search_runs([tracker.experiment_id], filter_string)


def test_one_parent_with_a_child_for_each_trial(plan):
    tracker = Tracker(plan)
    for trial, result in zip(plan.trials, sample_results(plan), strict=True):
        tracker.begin(trial)
        tracker.record(trial, result.history, NOW)
        tracker.end(trial, "FINISHED", None, time.time())
    tracker.close("FINISHED", write_tables(plan, sample_results(plan)), time.time())

    (parent,) = runs(tracker, "tags.experiment = 'ablation-k'")
    children = runs(tracker, f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert len(children) == 3
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    artifacts = {file.path for file in tracker.client.list_artifacts(parent.info.run_id)}
    assert artifacts == {"results.csv", "results.md"}

    by_k = {run.data.tags["k"]: run for run in children}
    tags = by_k["2"].data.tags
    assert tags["heads"] == "atss, faster_rcnn"
    assert (tags["lambda_1"], tags["lambda_2"], tags["seed"]) == ("1.0", "2.0", "0")
    assert tags["profile"] == "laptop"
    assert tags["git_revision"]
    assert tags["dataset_fingerprint"].startswith("digits")
    assert by_k["2"].data.params["training.epochs"] == "4"
    assert by_k["2"].data.params["detector.heads.2.rcnn.fc_dim"] == "128"
    assert by_k["1"].inputs.dataset_inputs[0].dataset.name == "digits"

    history = tracker.client.get_metric_history(by_k["1"].info.run_id, "val/AP")
    assert [(m.step, m.value) for m in history] == [
        (e, pytest.approx(0.2 * e / 4)) for e in (1, 2, 3, 4)
    ]


def test_a_trial_goes_on_in_its_own_run(plan):
    trial = plan.trials[0]
    first = Tracker(plan)
    first.begin(trial)
    first.record(trial, [sample_epoch(1, 0.1)], NOW)
    first.end(trial, "KILLED", None, time.time())
    first.close("KILLED", [], time.time())

    second = Tracker(plan)
    second.begin(trial)
    history = [sample_epoch(e, 0.1 * e) for e in (1, 2, 3)]
    second.record(trial, history, NOW)
    second.record(trial, history, NOW)
    second.end(trial, "FINISHED", None, time.time())

    (run,) = runs(second, f"tags.trial_id = '{trial.id}'")
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == second.parent != first.parent
    points = second.client.get_metric_history(run.info.run_id, "train/total")
    assert [(m.step, m.timestamp) for m in points] == [(e, int(1000 * NOW)) for e in (1, 2, 3)]


def test_an_epoch_that_is_missing_before_others_is_recorded_once(plan):
    trial = plan.trials[0]
    tracker = Tracker(plan)
    tracker.begin(trial)
    tracker.record(trial, [sample_epoch(1, 0.1), sample_epoch(3, 0.3)], NOW)
    tracker.record(trial, [sample_epoch(e, 0.1 * e) for e in (1, 2, 3)], NOW)
    (run,) = runs(tracker, f"tags.trial_id = '{trial.id}'")
    points = tracker.client.get_metric_history(run.info.run_id, "val/AP")
    assert sorted(point.step for point in points) == [1, 2, 3]


def test_a_trial_trained_anew_has_one_run_still(plan):
    trial = plan.trials[0]
    tracker = Tracker(plan)
    for _ in range(2):
        tracker.discard(trial, before=time.time())
        tracker.begin(trial)
        tracker.record(trial, [sample_epoch(1, 0.1)], NOW)
        tracker.end(trial, "FINISHED", None, time.time())
    (run,) = runs(tracker, f"tags.trial_id = '{trial.id}'")
    assert len(tracker.client.get_metric_history(run.info.run_id, "val/AP")) == 1


def test_a_finished_trial_is_taken_over_as_it_is(plan):
    trial = plan.trials[0]
    first = Tracker(plan)
    first.begin(trial)
    first.end(trial, "FINISHED", None, time.time())
    (before,) = runs(first, f"tags.trial_id = '{trial.id}'")
    second = Tracker(plan)
    second.adopt(trial)
    second.end(trial, "FINISHED", None, time.time())
    (after,) = runs(second, f"tags.trial_id = '{trial.id}'")
    assert after.info.end_time == before.info.end_time
    assert after.data.tags["mlflow.parentRunId"] == second.parent


def test_a_failure_has_its_reason(plan):
    tracker = Tracker(plan)
    tracker.begin(plan.trials[0])
    tracker.end(plan.trials[0], "FAILED", "NaN " * 1000, time.time())
    (run,) = runs(tracker, f"tags.trial_id = '{plan.trials[0].id}'")
    assert run.info.status == "FAILED"
    assert run.data.tags["reason"].startswith("NaN")


def test_runs_of_a_dead_process_are_closed(plan):
    tracker = Tracker(plan)
    for trial in plan.trials[:2]:
        tracker.begin(trial)
    dead = subprocess.run(
        [sys.executable, "-c", "from orchestrator.owner import Owner; print(Owner.this().tag)"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    tracker.client.set_tag(tracker._runs[plan.trials[0].id], "codetr.owner", dead)
    Tracker(plan)
    status = {r.data.tags.get("trial_id"): r.info.status for r in runs(tracker)}
    assert status[plan.trials[0].id] == "KILLED"
    assert status[plan.trials[1].id] == "RUNNING"  # its owner, this process, lives


def test_git_is_asked_once_for_all_that_waits(plan, monkeypatch):
    tracker = Tracker(plan)
    asked = []
    monkeypatch.setattr(tracking, "git_revision", lambda: asked.append(1) or "abc")
    parents = {tracker.beneath("invocation-later").parent for _ in range(3)}
    assert len(parents) == 1
    assert asked == [1]


def test_owners():
    me = Owner.this()
    assert not Owner.of_tag(me.tag).is_gone
    assert replace(me, started=me.started - 1000).is_gone  # its number was given to another
    assert not replace(me, host="elsewhere", started=0).is_gone  # not ours to judge


@pytest.mark.parametrize("uri", ["nonsense://host/db", "http://127.0.0.1:9/"])
def test_a_store_that_cannot_be_used_is_one_line_without_password(tmp_path, uri):
    token = ["hunter2@"] * uri.startswith("http:")  # of other stores it is a user's name
    for secret in ("me:hunter2@", "me:more@hunter2@", *token):
        secretly = uri.replace("://", f"://{secret}") + "?password=hunter2"
        with pytest.raises(TrackingError, match="--tracking-uri") as caught:
            Tracker(sample_plan(tmp_path / "new", tracking_uri=secretly))
        assert "hunter2" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_params_are_flat_text_of_bounded_length(tmp_path):
    for trial in sample_plan(tmp_path).trials:
        flat = flatten(configuration(trial))
        assert all(isinstance(value, str) and len(value) <= PARAM_LENGTH for value in flat.values())
        assert flat["arm"] == trial.arm


def test_long_params_are_cut(plan):
    sides = tuple(range(100, 500))
    data = plan.trials[0].data.model_copy(update={"short_sides": sides})
    trial = plan.trials[0].model_copy(update={"data": data})
    tracker = Tracker(replace(plan, trials=(trial,)))
    tracker.begin(trial)
    (run,) = runs(tracker, f"tags.trial_id = '{trial.id}'")
    assert len(run.data.params["data.short_sides"]) == PARAM_LENGTH


def test_per_class_table(plan, tmp_path):
    from orchestrator.report import write_class_table, write_trial_files

    best = tmp_path / "epoch-0001"
    best.mkdir()
    (best / "per_class.json").write_text('{"cat": 0.25, "dog": 0.5}')
    (best / "predictions.json").write_text("[]")
    result = replace(sample_results(plan)[0], best=best)
    written = write_trial_files(plan, result) + write_class_table(plan, result)
    files = {file.name: file for file in written}
    with files["per_class_AP.csv"].open() as file:
        assert list(csv.reader(file)) == [["class", "AP"], ["cat", "25.0"], ["dog", "50.0"]]
    assert files["predictions.json"].parent == best
