"""Who goes on from whom, with what; and the trials that come of it."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_sweep import sample_sweep

from codetr.config import ConfigError
from orchestrator.population import (
    Member,
    Turn,
    default_interval,
    exchange,
    exchanges,
    found,
)
from orchestrator.search import Entry, Ledger, is_complete, read_ledger, trial_of
from orchestrator.space import parse_over

RANGES = parse_over(["learning_rate=1e-4..1e-2:log", "lambda_2=0.5,1,2,4"])
scores = st.lists(st.none() | st.floats(0, 1), min_size=2, max_size=12)


def scored(values, space=RANGES, seed=0):
    members = found(space, len(values), seed)
    return list(zip(members, values, strict=True))


@given(st.integers(2, 12), st.integers(0, 99))
def test_a_population_begins_with_different_members_that_the_seed_decides(size, seed):
    members = found(RANGES, size, seed)
    assert members == found(RANGES, size, seed)
    assert [member.number for member in members] == [*range(1, size + 1)]
    assert len({json.dumps(member.suggestion) for member in members}) == size
    for member in members:
        assert 1e-4 <= member.suggestion["learning_rate"] <= 1e-2
        assert member.suggestion["lambda_2"] in (0.5, 1, 2, 4)


def test_a_finite_space_is_used_to_its_last_point():
    space = parse_over(["lambda_1=1,2", "lambda_2=1,2,3"])
    assert len(found(space, 6, 0)) == 6
    with pytest.raises(ConfigError, match="no 7 different members to begin with, only 6"):
        found(space, 7, 0)


@given(scores, st.integers(0, 99))
def test_the_worst_quarter_goes_on_from_the_best_with_other_values(values, seed):
    before = scored(values)
    after = {member.number: member for member in exchange(RANGES, seed, 2, before)}
    alive = sorted((s, -m.number) for m, s in before if s is not None)
    count = min(-(-len(alive) // 4), len(alive) // 2)
    worst = {-number for _, number in alive[:count]}
    best = {-number for _, number in alive[len(alive) - count :]} if count else {
        -number for _, number in alive
    }  # fmt: skip
    for member, score in before:
        if not alive:
            assert member.number not in after
        elif score is None or member.number in worst:
            new = after[member.number]
            donor = before[new.donor - 1][0]
            assert new.donor in best
            assert new.suggestion == donor.suggestion
            assert new.turns[:-1] == donor.turns
            assert new.turns[-1].after_epoch == 2
            assert new.latest != donor.latest
        else:
            assert after[member.number] == member
    told = [(json.dumps(m.suggestion), str(m.turns)) for m in after.values()]
    assert len(set(told)) == len(told)


@given(scores)
def test_what_comes_next_follows_from_seed_and_scores_alone(values):
    before = scored(values)
    assert exchange(RANGES, 1, 4, before) == exchange(RANGES, 1, 4, before)


@given(st.integers(0, 999))
def test_steps_stay_within_the_space(seed):
    best = Member(1, {"learning_rate": 0.0099, "lambda_2": 4})
    worst = Member(2, {"learning_rate": 1e-4, "lambda_2": 1})
    _, new = exchange(RANGES, seed, 3, [(best, 0.9), (worst, 0.1)])
    assert 1e-4 <= new.latest["learning_rate"] <= 1e-2
    assert new.latest["lambda_2"] in (0.5, 1, 2, 4)
    assert new.latest["learning_rate"] == float(f"{new.latest['learning_rate']:.3g}")


def test_both_ways_of_exploring_are_used():
    best = Member(1, {"learning_rate": 1e-3, "lambda_2": 1})
    worst = Member(2, {"learning_rate": 1e-4, "lambda_2": 4})
    rates = [
        exchange(RANGES, seed, 3, [(best, 0.9), (worst, 0.1)])[1].latest["learning_rate"]
        for seed in range(400)
    ]
    stepped = sum(rate in (0.8e-3, 1.2e-3) for rate in rates)
    assert 0.65 < stepped / len(rates) < 0.85


def test_where_nothing_is_left_to_explore_a_member_goes_on_as_it_is():
    space = parse_over(["lambda_1=1,2"])
    one, two = found(space, 2, 0)
    # Both could only turn to the one value that the other has turned to.
    population = [
        (replace(one, number=1), 0.9), (replace(two, number=2), None), (Member(3, {}), None),
    ]  # fmt: skip
    after = exchange(space, 0, 1, population)
    assert [member.number for member in after] == [1, 2]
    alive = [(one, 0.9), (two, 0.1), (Member(3, two.suggestion, (Turn(1, {}),)), 0.2)]
    assert len(exchange(space, 0, 1, alive)) == 3


def test_when_they_exchange():
    assert exchanges(8, 2) == [2, 4, 6]
    assert exchanges(7, 3) == [3, 6]
    assert exchanges(4, 4) == []
    assert [default_interval(e, every) for e, every in ((12, 1), (2, 1), (12, 2), (36, 4))] == [
        3,
        1,
        4,
        12,
    ]


def population_sweep(output, **given):
    over = given.pop("over", ("learning_rate=1e-4..1e-2:log", "lambda_2=0.5,1,2,4"))
    usual = {"scheduler": "pbt", "samples": 4, "settings": ("epochs=8",)}
    return sample_sweep(output, over=over, **{**usual, **given})


def test_a_member_is_its_donors_trial_up_to_the_turn(tmp_path):
    sweep = population_sweep(tmp_path)
    assert (sweep.count, sweep.interval, sweep.search.searcher) == (4, 2, "random")
    members = found(sweep.search.space, 4, 0)
    once = exchange(sweep.search.space, 0, 2, [(m, m.number / 10) for m in members])
    twice = exchange(sweep.search.space, 0, 4, [(m, -m.number / 10) for m in once])
    (new,) = [m for m in twice if m not in once]
    assert len(new.turns) == 2 or not once[new.donor - 1].turns
    donor = once[new.donor - 1]
    ours, theirs = (
        sweep.trial(new.suggestion, new.turns),
        sweep.trial(donor.suggestion, donor.turns),
    )
    for epoch in range(1, 9):
        assert (ours.settings_in(epoch) == theirs.settings_in(epoch)) == (epoch <= 4)
    assert ours.id != theirs.id
    assert ours.settings_in(8)[1].learning_rate == new.latest["learning_rate"]
    assert ours.arm.endswith("after epoch 4")
    ids = {sweep.trial(m.suggestion, m.turns).id for m in (*members, *once, *twice)}
    assert len(ids) == 4 + 1 + 1


def test_a_member_in_the_ledger_and_in_the_file_of_the_best(tmp_path):
    from orchestrator.experiment import load_experiment
    from orchestrator.plan import Options, make_plan
    from orchestrator.results import TrialResult
    from orchestrator.sweep_report import Row, best_yaml

    sweep = population_sweep(tmp_path)
    turns = (Turn(2, {"learning_rate": 2e-3, "lambda_2": 4}),)
    start = {"learning_rate": 1e-3, "lambda_2": 2}
    trial = sweep.trial(start, turns)
    ledger = Ledger(tmp_path)
    ledger.claim("x", start, trial.id, member=3, turns=turns, origin="#1 after epoch 2")
    (entry,) = read_ledger(tmp_path)
    assert (entry.turns, entry.latest) == (turns, turns[0].suggestion)
    assert trial_of(sweep, entry) == trial
    row = Row(entry, TrialResult(trial, "finished", []), metric=12.3)
    (tmp_path / "best.yaml").write_text(best_yaml(sweep, row))
    best = load_experiment(str(tmp_path / "best.yaml"))
    (again,) = make_plan(best, Options(workers=1)).trials
    assert (again.id, again.schedule) == (trial.id, trial.schedule)


def test_a_population_is_complete_when_every_place_has_finished(tmp_path):
    sweep = population_sweep(tmp_path, samples=2)

    def entry(number, member, state):
        return Entry(number, str(number), {}, str(number), state, member=member)

    entries = [entry(1, 1, "finished"), entry(2, 2, "failed"), entry(3, 2, "finished")]
    assert is_complete(sweep, entries)
    assert not is_complete(sweep, entries[:2])
    assert not is_complete(sweep, entries[:1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"over": ("heads=[],[atss]",)}, "heads cannot change in the middle of a training"),
        ({"over": ("flip=0.4,0.8",)}, "flip cannot change in the middle of a training"),
        ({"over": ("learning_rat=1,2",)}, "learning_rat"),
        ({"over": ("lambda_1=1",)}, "no 4 different members to begin with, only 1"),
        ({"searcher": "optuna"}, "pbt draws its first population blindly"),
        ({"samples": 1}, "a population has 2 members at least"),
        ({"interval": 8}, "no exchange every 8 epochs within 8"),
        ({"interval": 3, "settings": ("epochs=8", "evaluate_every=2")}, "evaluate_every=2"),
        (
            {"over": ("heads.atss.giou_weight=1..4",), "settings": ("epochs=8", "heads=[]")},
            "changes nothing: the detector has no head 'atss'",
        ),
        ({"scheduler": "asha", "interval": 2}, "--interval 2 is for --scheduler pbt alone"),
    ],
)
def test_mistakes(tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        population_sweep(tmp_path, **given)
