"""Names of the zoo in experiments and behind ``--set``."""

from __future__ import annotations

from pathlib import Path

import pytest

from codetr.config import ConfigError, DetectorConfig
from codetr.zoo.catalogue import detector_config
from orchestrator.experiment import load_experiment
from orchestrator.plan import Options, Plan, make_plan

DIGITS = """
    about: x
    data: {dataset: digits}
"""


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.machine.local_cpus", lambda: 2)
    monkeypatch.setattr("orchestrator.machine.local_gpus", lambda: 0)


def plan_of(folder: Path, text: str, *settings: str) -> Plan:
    file = folder / "mine.yaml"
    file.write_text(f"question: which?\n{text}")
    return make_plan(load_experiment(str(file)), Options(settings=settings))


def named(name: str, **changes: object) -> DetectorConfig:
    """The detector of that name for the ten classes of the digits."""
    return detector_config(name).model_copy(update={"num_classes": 10, **changes})


def test_an_experiment_can_compare_names(tmp_path: Path) -> None:
    made = plan_of(
        tmp_path,
        "arms:\n"
        "  a: {detector: co-dino-5scale-r50}\n"
        "  b: {detector: {name: co-deformable-detr-swin-t, lambda_1: 0.5}}\n"
        f"profiles:\n  laptop:{DIGITS}",
    )
    assert [trial.detector for trial in made.trials] == [
        named("co-dino-5scale-r50"),
        named("co-deformable-detr-swin-t", lambda_1=0.5),
    ]


def test_set_gives_the_whole_detector(tmp_path: Path) -> None:
    made = plan_of(
        tmp_path, f"arms: {{a: {{}}}}\nprofiles:\n  laptop:{DIGITS}", "detector=dino-5scale-swin-l"
    )
    assert made.trials[0].detector == named("dino-5scale-swin-l")


def test_arms_ask_of_a_named_detector_what_they_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """K = 0, 1, 2 of DINO; the second stage keeps what DINO's strides need of it."""
    monkeypatch.setattr("orchestrator.machine.local_cpus", lambda: 4)
    settings = ("detector=dino-5scale-r50", "backbone.pretrained=false", "batch_size=8")
    options = Options(profile="paper", data="digits", settings=settings, workers=1,
                      gpus_per_worker=0)  # fmt: skip
    trials = make_plan(load_experiment("ablation-k"), options).trials
    assert [trial.detector.k for trial in trials] == [0, 1, 2]
    assert all(trial.detector.denoising.enabled for trial in trials)
    assert trials[2].detector.heads[1].rcnn.finest_scale == 56  # type: ignore[union-attr]
    assert trials[2].detector.heads[0] == detector_config("co-dino-5scale-r50").heads[1]


def test_a_profile_shrinks_a_named_detector(tmp_path: Path) -> None:
    """Another backbone takes none of the named one's settings over."""
    settings = ("detector=co-dino-5scale-swin-l", "two_stage=true")
    trials = make_plan(load_experiment("ablation-k"), Options(settings=settings)).trials
    assert trials[0].detector.backbone.name == "tiny"
    assert trials[0].detector.backbone.stages == (2, 3, 4)
    assert trials[0].detector.queries.dynamic_anchors
    assert trials[0].detector.queries.count == 40


def test_the_uppermost_name_counts(tmp_path: Path) -> None:
    text = (
        "detector: co-deformable-detr-r50\n"
        "arms: {a: {}, b: {detector: co-dino-5scale-r50}}\n"
        f"profiles:\n  laptop:{DIGITS}"
    )
    names = ["co-deformable-detr-r50", "co-dino-5scale-r50"]
    assert [t.detector for t in plan_of(tmp_path, text).trials] == [named(n) for n in names]
    with pytest.raises(ConfigError, match=r"arms 'a' and 'b' .* are the same trial"):
        plan_of(tmp_path, text, "detector=dino-5scale-r50")


def test_an_heir_adds_to_a_named_detector(tmp_path: Path) -> None:
    """And may name another one, in the place of which it stands."""
    profiles = f"profiles:\n  laptop:{DIGITS}    detector: co-dino-5scale-r50\n"
    (tmp_path / "parent.yaml").write_text(f"question: which?\narms: {{a: {{}}}}\n{profiles}")
    start = f"extends: {tmp_path / 'parent.yaml'}\narms: {{a: {{}}}}\n"
    more = plan_of(tmp_path, f"{start}profiles: {{laptop: {{detector: {{lambda_1: 0.5}}}}}}")
    assert more.trials[0].detector == named("co-dino-5scale-r50", lambda_1=0.5)
    other = plan_of(tmp_path, f"{start}profiles: {{laptop: {{detector: dino-5scale-r50}}}}")
    assert other.trials[0].detector == named("dino-5scale-r50")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("detector=co-dino-5scale-r5", r"--set: detector: no detector .*did you mean 'co-dino-5s"),
        ("detector=adamixer-r50", r"--set: detector: detector 'adamixer-r50' cannot be built"),
        ("detector=3", r"--set: detector: no detector '3'"),
        ("detector={name: x, y: 1}", r"--set: detector: no detector"),
    ],
)
def test_names_that_are_none(setting: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(tmp_path, f"arms: {{a: {{}}}}\nprofiles:\n  laptop:{DIGITS}", setting)


def test_a_wrong_name_in_a_file_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"mine.yaml \(laptop, a\): detector: no detector 'dinno'"
    ):
        plan_of(tmp_path, f"arms: {{a: {{detector: dinno}}}}\nprofiles:\n  laptop:{DIGITS}")


def test_a_setting_that_does_not_fit_names_its_source(tmp_path: Path) -> None:
    text = f"arms: {{a: {{detector: co-dino-5scale-r50}}}}\nprofiles:\n  laptop:{DIGITS}"
    with pytest.raises(ConfigError, match=r"^--set: detector: queries: dynamic_anchors need lea"):
        plan_of(tmp_path, text, "mixed_selection=false")
