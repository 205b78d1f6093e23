import csv

import pytest
from test_sweep import sample_sweep
from trial_samples import sample_epoch

from orchestrator.experiment import load_experiment
from orchestrator.plan import Options, make_plan
from orchestrator.results import TrialResult
from orchestrator.search import Entry
from orchestrator.sweep_report import importance, pareto_front, ranked, write_report

POINTS = [
    # K, heads, lambda_1, AP after each epoch, state
    (0, "[]", None, (0.05, 0.10), "finished"),
    (1, "[atss]", 0.5, (0.10, 0.20), "finished"),
    (1, "[faster_rcnn]", 2.0, (0.12, 0.23), "finished"),
    (2, "[atss, faster_rcnn]", 1.0, (0.15, 0.30), "finished"),
    (2, "[atss, atss]", 4.0, (0.14,), "stopped"),
    (0, "[]", None, (), "finished"),  # the first trial again
    (1, "[atss]", 3.0, (), "failed"),
    (1, "[faster_rcnn]", 0.3, (0.11, 0.21), "finished"),
]
NAMES = {0: "no heads", 1: "head", 2: "two heads"}


@pytest.fixture
def sweep(tmp_path):
    return sample_sweep(tmp_path, "k-heads-lambda", settings=("epochs=2",))


@pytest.fixture
def rows(sweep):
    entries, results = [], {}
    for number, (k, heads, weight, aps, state) in enumerate(POINTS, start=1):
        suggestion = {"K": k, NAMES[k]: heads}
        if weight is not None:
            suggestion |= {"lambda_1": weight, "lambda_2": 2.0}
        trial = sweep.trial(suggestion)
        reason = {"stopped": "asha, after epoch 1", "failed": "loss not finite"}.get(state, "")
        entries.append(Entry(number, f"t{number}", suggestion, trial.id, state, reason))
        history = [sample_epoch(epoch, ap) for epoch, ap in enumerate(aps, start=1)]
        for epoch in history:
            epoch.values["cost/core_hours"] *= 1 + trial.detector.k
        ended = "finished" if len(history) == 2 else "interrupted"
        results.setdefault(trial.id, TrialResult(trial, ended, history))
    return ranked(sweep, entries, lambda entry: results[entry.trial])


def test_the_finished_come_before_the_stopped_and_those_before_the_failed(rows):
    assert [row.entry.number for row in rows] == [4, 3, 8, 2, 1, 6, 5, 7]
    assert [row.rank for row in rows] == [1, 2, 3, 4, 5, 5, 6, None]
    assert [row.is_first for row in rows] == [True] * 5 + [False, True, True]


def test_what_is_done_counts_also_behind_what_two_kills_left_open(sweep):
    suggestion = {"K": 0, "no heads": "[]"}
    trial = sweep.trial(suggestion)
    states = ("open", "finished")
    entries = [Entry(n, f"t{n}", suggestion, trial.id, s) for n, s in enumerate(states, start=1)]
    result = TrialResult(trial, "finished", [sample_epoch(1, 0.1), sample_epoch(2, 0.2)])
    rows = {row.entry.number: row for row in ranked(sweep, entries, lambda _: result)}
    assert [(rows[n].rank, rows[n].entry.state, rows[n].is_first) for n in (1, 2)] == [
        (1, "finished", False),
        (1, "finished", True),
    ]


def test_the_front(rows):
    assert [row.entry.number for row in pareto_front(rows)] == [1, 3, 4]
    assert {row.entry.number for row in rows if row.on_front} == {1, 3, 4, 6}


def test_importance_is_the_variance_explained_alone(sweep, rows):
    shares = importance(sweep, rows)
    assert shares["K"] == pytest.approx(0.951, abs=0.02)
    assert "no heads" not in shares  # a single value is no choice
    # Equal wherever it is there; that it is not there for K = 0 is K's merit.
    assert shares["lambda_2"] == 0.0
    assert all(0 <= share <= 1 for share in shares.values())
    assert set(importance(sweep, rows[:1]).values()) == {0.0}


def test_tables_pictures_and_the_best_that_can_be_run(sweep, rows):
    sweep.folder.mkdir(parents=True)
    files = {file.name: file for file in write_report(sweep, rows)}
    assert set(files) == {
        "results.csv",
        "results.md",
        "best.yaml",
        "parallel_coordinates.png",
        "importance.png",
        "front.png",
    }
    with files["results.csv"].open() as file:
        lines = list(csv.DictReader(file))
    assert lines[0]["rank"] == "1"
    assert lines[0]["two heads"] == "[atss, faster_rcnn]"
    assert lines[0]["AP"] == "30.0"
    assert [line["status"] for line in lines[4:]] == [
        "finished",
        "finished (same trial)",
        "stopped",
        "failed",
    ]
    assert "asha, after epoch 1" in files["results.md"].read_text()
    best = load_experiment(str(files["best.yaml"]))
    planned = make_plan(best, Options(workers=1))
    assert [trial.id for trial in planned.trials] == [rows[0].entry.trial]


def test_nothing_measured_is_a_table_all_the_same(sweep, rows):
    sweep.folder.mkdir(parents=True)
    names = [file.name for file in write_report(sweep, rows[-1:])]
    assert names == ["results.csv", "results.md"]
