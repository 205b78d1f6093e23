import optuna
import pytest

from codetr.config import ConfigError, parse
from orchestrator.space import Space, parse_over

CONDITIONAL = {
    "dimensions": [
        {"name": "K", "setting": None, "values": [0, 1, 2]},
        {"name": "none", "setting": "heads", "when": {"K": [0]}, "values": [[]]},
        {"name": "one", "setting": "heads", "when": {"K": [1]}, "values": [["atss"]]},
        {"name": "two", "setting": "heads", "when": {"K": [2]}, "values": [["atss", "atss"]]},
        {"name": "lambda_1", "when": {"K": [1, 2]}, "low": 0.25, "high": 4, "log": True},
    ]
}


def space(**dimension) -> Space:
    return parse(Space, {"dimensions": [dimension]}, "test")


def test_lists_and_ranges():
    heads, weights, rate, layers = parse_over(
        [
            "heads=[],[atss],[atss, faster_rcnn]",
            "lambda_1=0.25..4",
            "learning_rate=1e-4..1e-3:log",
            "decoder_layers=1..6",
        ]
    ).dimensions
    assert heads.choices == ["[]", "[atss]", "[atss, faster_rcnn]"]
    assert (weights.low, weights.high, weights.log, weights.integer) == (0.25, 4, False, False)
    assert (rate.low, rate.high, rate.log, rate.integer) == (1e-4, 1e-3, True, False)
    assert (layers.low, layers.high, layers.integer) == (1, 6, True)
    (numbers,) = parse_over(["learning_rate=1e-4,3e-4"]).dimensions
    assert numbers.choices == [1e-4, 3e-4]  # YAML alone would read text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("lambda_1", "write key=values"),
        ("lambda_1=", "write key=values"),
        ("lamda_1=1,2", "lambda_1"),
        ("lambda_1=2..1", "not below"),
        ("lambda_1=0..1:log", "log needs"),
        ("lambda_1=a..b", "could not convert"),
        ("heads=[atss", "not a list of YAML"),
    ],
)
def test_mistakes_name_the_option(option, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse_over([option])
    assert f"--over {option}" in str(error.value)


def test_the_same_dimension_twice():
    with pytest.raises(ConfigError, match="two dimensions are named"):
        parse_over(["lambda_1=1,2", "lambda_1=3"])


def test_a_grid_is_every_combination_that_there_is():
    grid = parse_over(["lambda_1=0.5,1", "heads=[atss],[faster_rcnn]"]).grid()
    assert len(grid) == 4
    assert {"lambda_1": 0.5, "heads": "[faster_rcnn]"} in grid
    with pytest.raises(ConfigError, match="lambda_1 is a range"):
        parse(Space, CONDITIONAL, "test").grid()


def test_conditions_hold_in_what_optuna_draws():
    conditional = parse(Space, CONDITIONAL, "test")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(40):
        drawn = conditional(study.ask())
        expected = {0: {"K", "none"}, 1: {"K", "one", "lambda_1"}, 2: {"K", "two", "lambda_1"}}
        assert set(drawn) == expected[drawn["K"]]
        assert float(f"{drawn.get('lambda_1', 1):.3g}") == drawn.get("lambda_1", 1)
        heads = conditional.layer(drawn).detector["heads"]
        assert len(heads) == drawn["K"]
        seen.add(drawn["K"])
    assert seen == {0, 1, 2}


def test_a_suggestion_is_a_layer_of_settings():
    found = space(name="width", setting="faster_rcnn.rcnn.fc_dim", values=[16, 32])
    assert found.layer({"width": 32}).heads == {"faster_rcnn": {"rcnn": {"fc_dim": 32}}}
    both = parse_over(["lambda_1=1,2", "detector.lambda_1=3"])
    with pytest.raises(ConfigError, match=r"both give detector\.lambda_1"):
        both.layer({"lambda_1": 1, "detector.lambda_1": 3})


@pytest.mark.parametrize(
    ("condition", "message"),
    [({"K": [3]}, "K is never 3; it is one of 0, 1, 2"), ({"k": [1]}, "no dimension 'k' before")],
)
def test_conditions_that_cannot_be_met(condition, message):
    dimensions = [
        CONDITIONAL["dimensions"][0],
        {"name": "lambda_1", "values": [1], "when": condition},
    ]
    with pytest.raises(ConfigError, match=message):
        parse(Space, {"dimensions": dimensions}, "test")


def test_neither_or_both_of_values_and_range():
    for dimension in ({}, {"values": [1], "low": 0, "high": 1}, {"low": 0}):
        with pytest.raises(ConfigError, match="either values, or low and high"):
            space(name="lambda_1", **dimension)
