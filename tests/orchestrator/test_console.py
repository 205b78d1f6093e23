import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from trial_samples import sample_epoch, sample_plan, sample_results

from codetr.config import AtssConfig, DetectorConfig
from orchestrator.board import Progress
from orchestrator.console import (
    LiveView,
    PlainView,
    duration,
    grouped_weights,
    show_plan,
    show_results,
    view_for,
)


def console(**options) -> Console:
    return Console(file=io.StringIO(), width=160, **options)


def printed(target: Console) -> str:
    return target.file.getvalue()


def test_the_plan_shows_everything_that_runs(tmp_path):
    plan = sample_plan(tmp_path, seeds=(0, 7), settings=("lambda_2=3",))
    target = console()
    show_plan(target, plan)
    text = printed(target)
    for trial in plan.trials:
        assert f"{trial.seed}: {trial.id}" in text
    assert "positive/faster_rcnn/0..1/giou" in text
    assert "2000 training and 200 validation images, 10 classes" in text
    assert "4 epochs × 250 steps = 1000 steps" in text
    assert str(plan.folder) in text
    line = next(line for line in text.splitlines() if "rcnn_giou" in line)
    assert line.split()[-1] == "60"  # 10 · 2 layers · λ2 = 3


def test_passwords_are_not_printed(tmp_path):
    plan = sample_plan(tmp_path, tracking_uri="postgresql://me:hunter2@host/db")
    target = console()
    show_plan(target, plan)
    assert "hunter2" not in printed(target)
    assert "postgresql://me:***@host/db" in printed(target)


@given(st.integers(1, 6), st.booleans(), st.sampled_from([(), ("atss",), ("atss", "faster_rcnn")]))
def test_grouped_weights_lose_nothing(layers, two_stage, heads):
    detector = DetectorConfig.model_validate(
        {
            "heads": heads,
            "transformer": {"decoder_layers": layers},
            "queries": {"two_stage": two_stage},
        }
    )
    weights = detector.loss_weights()
    expanded = {}
    for name, weight in grouped_weights(weights):
        *group, span, term = name.split("/") if ".." in name else (*name.split("/"), "", "")
        if ".." in span:
            first, last = map(int, span.split(".."))
            for layer in range(first, last + 1):
                expanded["/".join([*group, str(layer), term])] = weight
        else:
            expanded[name] = weight
    assert expanded == weights


def test_two_heads_of_one_kind_stay_apart():
    detector = DetectorConfig(heads=(AtssConfig(), AtssConfig(giou_weight=1)))
    weights = dict(grouped_weights(detector.loss_weights()))
    assert weights["atss/giou"] == 2 * weights["atss_2/giou"]


def test_without_a_terminal_there_is_a_line_for_each_epoch(tmp_path):
    plan = sample_plan(tmp_path)
    target = console()
    with view_for(target) as view:
        assert isinstance(view, PlainView)
        trial = plan.trials[1]
        view.progress(trial, Progress("training", 2, 250, 40.0, 12.0, 75.0))
        view.epoch(trial, sample_epoch(2, 0.125))
        view.ended(sample_results(plan)[1])
    lines = printed(target).splitlines()
    expected = "K=1 ATSS, seed 0: epoch 2/4, loss 15.00, AP 12.5, 40.0 images/s, 1:15 left"
    assert lines[0] == expected
    assert lines[1] == "K=1 ATSS, seed 0: finished, 4/4 epochs, AP 20.0"


def test_without_a_terminal_a_stage_is_one_line(tmp_path):
    target = console()
    view = PlainView(target)
    for done in range(100):
        view.stage("making the images", f"{done}/100")
    view.stage("training")
    assert printed(target) == "making the images\ntraining\n"


def test_on_a_terminal_each_running_trial_has_a_live_line(tmp_path):
    plan = sample_plan(tmp_path)
    target = console(force_terminal=True)
    with view_for(target) as view:
        assert isinstance(view, LiveView)
        first, second, _ = plan.trials
        view.progress(first, Progress("training", 2, 125, 40.0, 12.0, 75.0))
        view.progress(second, Progress("starting"))
        view.epoch(first, sample_epoch(1, 0.125))
        shown = console()
        shown.print(view._render())
    line = next(row for row in printed(shown).splitlines() if "K=0" in row)
    assert line.split() == [
        "K=0,", "seed", "0", "training", "2/4", "125/250", "40.0", "12.00", "12.5", "1:15",
    ]  # fmt: skip
    assert "starting" in printed(shown)


def test_results_table(tmp_path):
    plan = sample_plan(tmp_path, seeds=(0, 1))
    target = console()
    show_results(target, sample_results(plan))
    assert "20.5 (20.0–21.0)" in printed(target)


@pytest.mark.parametrize(
    ("seconds", "expected"), [(-3, "0:00"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05")]
)
def test_durations(seconds, expected):
    assert duration(seconds) == expected
