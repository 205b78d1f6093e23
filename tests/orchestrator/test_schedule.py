"""Settings that change in the middle of training: read, checked, part of a trial's identity."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from codetr.config import HEAD_TYPES, ConfigError, DetectorConfig, TrainingConfig
from orchestrator.console import show_plan
from orchestrator.experiment import Change, load_experiment
from orchestrator.plan import Options, Trial, make_plan
from orchestrator.schedule import CHANGEABLE, changeable_key, in_epoch, resolved, schedule_text
from orchestrator.settings import setting_keys
from orchestrator.tracking import configuration, flatten

MINIMAL = """
question: Does a change help?
training: {epochs: 6}
arms:
  a: {detector: {heads: [atss]}}
profiles:
  laptop: {about: small, data: {dataset: digits}}
"""
DETECTOR = DetectorConfig.model_validate({"heads": list(HEAD_TYPES)})
TRAINING = TrainingConfig(epochs=6)


def trials(folder: Path, schedule: object, text: str = MINIMAL, **options) -> tuple[Trial, ...]:
    content = yaml.safe_load(text)
    if schedule is not None:
        content["schedule"] = schedule
    (folder / "own.yaml").write_text(yaml.safe_dump(content))
    return make_plan(
        load_experiment(str(folder / "own.yaml")), Options(workers=1, **options)
    ).trials


def change(epoch: int, **settings) -> dict:
    return {"after_epoch": epoch, "settings": settings}


def of(*changes: dict) -> tuple[Change, ...]:
    return tuple(Change.model_validate(c) for c in changes)


def test_every_setting_that_may_change_is_one_and_weighs_a_loss_or_a_step():
    assert set(CHANGEABLE) <= set(setting_keys())
    weights = set(DETECTOR.loss_weights())
    for key in CHANGEABLE:
        if key.startswith("training."):
            continue
        before, after = DETECTOR, in_epoch(2, of(change(1, **{key: 7.0})), DETECTOR, TRAINING)[0]
        assert before.loss_weights() != after.loss_weights(), key
        assert set(after.loss_weights()) == weights


def test_what_holds_in_each_epoch(tmp_path):
    schedule = [change(2, learning_rate=5e-4, lambda_1=0.5), change(4, **{"lambda_1": 2})]
    (trial,) = trials(tmp_path, schedule)
    rates = [trial.settings_in(e)[1].learning_rate for e in range(1, 7)]
    assert rates == [2e-4, 2e-4, 5e-4, 5e-4, 5e-4, 5e-4]
    assert [trial.settings_in(e)[0].lambda_1 for e in range(1, 7)] == [1, 1, 0.5, 0.5, 2, 2]
    assert trial.settings_in(1) == (trial.detector, trial.training)
    assert schedule_text(trial.schedule) == (
        "after epoch 2: learning_rate 0.0005, lambda_1 0.5; after epoch 4: lambda_1 2"
    )


def test_a_weight_of_a_head_changes_for_every_head_of_its_kind():
    heads = {"heads": [{"type": "atss"}, {"type": "atss", "giou_weight": 3}, "faster_rcnn"]}
    detector = DetectorConfig.model_validate(heads)
    weights = {"heads.atss.giou_weight": 5, "faster_rcnn.rpn.cls_weight": 4}
    schedule = resolved(of(change(1, **weights)), detector, TRAINING, "")
    after, _ = in_epoch(2, schedule, detector, TRAINING)
    assert [head.giou_weight for head in after.heads[:2]] == [5, 5]
    assert after.heads[2].rpn.cls_weight == 4
    same = after.model_dump()
    same["heads"][0]["giou_weight"], same["heads"][1]["giou_weight"] = 2, 3
    same["heads"][2]["rpn"]["cls_weight"] = 1
    assert same == detector.model_dump()


def test_the_identity_covers_the_schedule_and_nothing_that_changes_nothing(tmp_path):
    def identity(*changes):
        return trials(tmp_path, [*changes])[0].id

    plain = trials(tmp_path, None)[0].id
    assert identity() == plain
    one = identity(change(2, lambda_1=2))
    assert one not in (plain, identity(change(3, lambda_1=2)), identity(change(2, lambda_1=3)))
    # The same in other words: an end of the name, a whole number, what holds anyway.
    assert identity(change(2, **{"detector.lambda_1": 2.0})) == one
    assert identity(change(2, lambda_1=2, learning_rate=2e-4)) == one
    assert identity(change(1, lambda_1=1), change(2, lambda_1=2), change(4, lambda_1=2)) == one
    assert identity(change(2, lambda_1=2), change(4, lambda_1=1)) != one
    absent = {"faster_rcnn.rcnn.cls_weight": 3}
    assert identity(change(1, **absent)) == plain


def test_a_trial_survives_the_way_to_its_workers(tmp_path):
    (trial,) = trials(tmp_path, [change(2, lambda_1=2)])
    again = Trial.model_validate(json.loads(trial.model_dump_json()))
    assert (again, again.id) == (trial, trial.id)
    assert again.settings_in(3) == trial.settings_in(3)


@given(st.dictionaries(st.integers(1, 5), st.sampled_from([0.5, 1.0, 2.0]), max_size=5))
def test_two_schedules_are_one_trial_exactly_if_the_same_holds_in_every_epoch(values):
    changes = [change(epoch, lambda_1=values[epoch]) for epoch in sorted(values)]
    schedule = resolved(of(*changes), DETECTOR, TRAINING, "")
    naive, now = [], 1.0
    for epoch in range(1, 7):
        now = values.get(epoch - 1, now)
        naive.append(now)
    held = [in_epoch(e, schedule, DETECTOR, TRAINING)[0].lambda_1 for e in range(1, 7)]
    assert held == naive
    assert len(schedule) == sum(a != b for a, b in pairwise(naive))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([change(1, epochs=3)], "epochs cannot change in the middle of a training; valid: "),
        ([change(1, learning_rat=1)], "did you mean 'training.learning_rate'"),
        ([change(1, cls_weight=1)], "which one: heads.atss.cls_weight"),
        ([change(1, learning_rate=-1)], "after epoch 1: training: learning_rate: .*greater than 0"),
        ([change(6, lambda_1=2)], "before the last of 6 epochs"),
        ([change(3, lambda_1=2), change(3, lambda_1=1)], "ascending"),
        ([change(1, **{"lambda_1": 2, "detector.lambda_1": 1})], "two names"),
        ([{"after_epoch": 0, "settings": {"lambda_1": 1}}], "after_epoch"),
        ([{"after": 1, "settings": {"lambda_1": 1}}], "did you mean 'after_epoch'"),
        ([{"after_epoch": 1, "settings": {}}], "settings"),
    ],
)
def test_mistakes_name_the_file_and_what_would_be_right(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        trials(tmp_path, changes)
    assert "own.yaml" in str(error.value)


def test_a_key_may_be_short_if_it_is_clear():
    assert changeable_key("query_loss.l1") == "detector.query_loss.l1"
    assert changeable_key("weight_decay") == "training.weight_decay"


def test_an_arm_replaces_the_schedule_of_its_profile_and_that_the_experiments(tmp_path):
    content = yaml.safe_load(MINIMAL)
    content["profiles"]["laptop"]["schedule"] = [change(3, lambda_1=3)]
    content["arms"]["b"] = {"schedule": [change(4, lambda_1=4)]}
    content["arms"]["c"] = {"schedule": []}
    found = trials(tmp_path, [change(2, lambda_1=2)], yaml.safe_dump(content))
    by_arm = {trial.arm: [c.after_epoch for c in trial.schedule] for trial in found}
    assert by_arm == {"a": [3], "b": [4], "c": []}


def test_the_plan_and_mlflow_tell_what_changes(tmp_path):
    trials(tmp_path, [change(2, lambda_1=0.5)])
    plan = make_plan(load_experiment(str(tmp_path / "own.yaml")), Options(workers=1))
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    show_plan(console, plan)
    assert "after epoch 2: lambda_1 0.5" in console.export_text()
    params = flatten(configuration(plan.trials[0]))
    assert params["schedule.1.settings.detector.lambda_1"] == "0.5"
    assert "schedule" not in configuration(trials(tmp_path, None)[0])


def test_the_documented_schedule_can_be_planned(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text()
    documented = next(b for b in text.split("```yaml\n") if b.startswith("schedule:"))
    schedule = yaml.safe_load(documented.partition("```")[0])["schedule"]
    content = MINIMAL.replace("epochs: 6", "epochs: 12")
    assert len(trials(tmp_path, schedule, content)[0].schedule) == 2
