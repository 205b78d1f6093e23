import pytest

from codetr.config import ConfigError
from orchestrator.settings import full_key, parse_settings, setting_keys


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("lambda_1=0.5", {"detector": {"lambda_1": 0.5}}),
        ("detector.lambda_1=0.5", {"detector": {"lambda_1": 0.5}}),
        ("epochs=3", {"training": {"epochs": 3}}),
        ("heads=[atss, faster_rcnn]", {"detector": {"heads": ["atss", "faster_rcnn"]}}),
        ("queries.count=7", {"detector": {"queries": {"count": 7}}}),
        ("faster_rcnn.rcnn.samples=9", {"heads": {"faster_rcnn": {"rcnn": {"samples": 9}}}}),
        ("backbone.name=swin_large", {"detector": {"backbone": {"name": "swin_large"}}}),
        ("frozen_norm=false", {"detector": {"backbone": {"frozen_norm": False}}}),
        ("global_every=3", {"detector": {"backbone": {"global_every": 3}}}),
        ("path=a=b", {"data": {"path": "a=b"}}),
    ],
)
def test_keys_find_their_place(assignment, expected):
    settings = parse_settings([assignment]).settings
    assert {name: value for name, value in settings.items() if value} == expected


def test_the_last_of_two_wins_and_others_stay():
    layer = parse_settings(["epochs=1", "batch_size=4", "epochs=2"])
    assert layer.training == {"epochs": 2, "batch_size": 4}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epochs", "write key=value"),
        ("=1", "write key=value"),
        ("epoch=1", "did you mean 'training.epochs'"),
        ("cls=1", "which one: detector.query_loss.cls, detector.matching_cost.cls"),
        ("training.lambda_1=1", "did you mean detector.lambda_1"),
        ("xyzzy=1", "docs/experiments.md"),
        ("epochs=[", "not a YAML value"),
    ],
)
def test_bad_settings(assignment, message):
    with pytest.raises(ConfigError, match=r"^--set") as caught:
        parse_settings([assignment])
    assert message in str(caught.value)


def test_every_key_is_found_by_its_full_name():
    for key in setting_keys():
        assert full_key(key) == key
