"""Settings that change in the middle of a training: from a given epoch on others hold.

Such a schedule is part of what a trial is. It names what a population (``--scheduler pbt``) has
found in a way that ``codetr run`` can train again from the beginning.
"""

from __future__ import annotations

from typing import Any

from codetr.config import ConfigError, DetectorConfig, TrainingConfig, nearest, parse
from orchestrator.experiment import Change, Schedule
from orchestrator.settings import setting_keys

_TRAINING = ("learning_rate", "weight_decay", "clip_norm")
_DETECTOR = ("lambda_1", "lambda_2", "query_loss.cls", "query_loss.l1", "query_loss.giou")

CHANGEABLE = (
    *(f"training.{name}" for name in _TRAINING),
    *(f"detector.{name}" for name in _DETECTOR),
    *(key for key in setting_keys() if key.startswith("heads.") and key.endswith("_weight")),
)
"""What may change: how steps are taken and losses weighed. Everything else decides what is trained:
parts of the detector, the order of the images, the length of the training."""


def changeable_key(key: str) -> str:
    """``lambda_1`` -> ``detector.lambda_1``.

    Raises:
        ConfigError: nothing that may change ends so, or several settings do.
    """
    fits = [full for full in CHANGEABLE if full == key or full.endswith(f".{key}")]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise ConfigError(f"{key}: which one: {', '.join(fits)}?")
    hint = nearest(key, [*CHANGEABLE])
    if hint.startswith("valid:"):
        by_end = {full.partition(".")[2]: full for full in CHANGEABLE}
        hint = nearest(key, [*by_end])
    raise ConfigError(f"{key} cannot change in the middle of a training; {hint}")


def resolved(
    schedule: Schedule, detector: DetectorConfig, training: TrainingConfig, source: str
) -> Schedule:
    """The schedule with full keys, of what it really changes: two schedules that train the same
    are the same.

    Args:
        detector, training: of the first epoch.
        source: for error messages.

    Raises:
        ConfigError: a setting or a value is wrong, or an epoch.
    """
    changes: list[Change] = []
    last = 0
    for given in schedule:
        where = f"{source}: schedule, after epoch {given.after_epoch}"
        if not last < given.after_epoch < training.epochs:
            raise ConfigError(
                f"{where}: give ascending epochs before the last of {training.epochs} epochs"
            )
        last = given.after_epoch
        try:
            settings = {changeable_key(key): value for key, value in given.settings.items()}
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        if len(settings) < len(given.settings):
            raise ConfigError(f"{where}: one setting has two names")
        before = _values(detector, training)
        detector, training = _changed(detector, training, settings, where)
        after = _values(detector, training)
        # As the configuration has the value: 1 and 1.0 are one trial.
        new = {key: after[key] for key in CHANGEABLE if after.get(key) != before.get(key)}
        if new:
            changes.append(Change(after_epoch=given.after_epoch, settings=new))
    return tuple(changes)


def in_epoch(
    epoch: int, schedule: Schedule, detector: DetectorConfig, training: TrainingConfig
) -> tuple[DetectorConfig, TrainingConfig]:
    """The settings that hold in that epoch, counted from 1.

    Args:
        schedule: resolved.
        detector, training: of the first epoch.
    """
    for change in schedule:
        if change.after_epoch < epoch:
            detector, training = _changed(detector, training, change.settings, "schedule")
    return detector, training


def schedule_text(schedule: Schedule) -> str:
    """``after epoch 4: learning_rate 0.0005, lambda_1 0.5``."""
    return "; ".join(
        f"after epoch {change.after_epoch}: "
        + ", ".join(f"{key.partition('.')[2]} {value:g}" for key, value in change.settings.items())
        for change in schedule
    )


def _changed(
    detector: DetectorConfig, training: TrainingConfig, settings: dict[str, Any], source: str
) -> tuple[DetectorConfig, TrainingConfig]:
    values: dict[str, Any] = {
        "detector": detector.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
    }
    for key, value in settings.items():
        root, *path = key.split(".")
        if root == "heads":
            kind, *path = path
            places = [head for head in values["detector"]["heads"] if head["type"] == kind]
        else:
            places = [values[root]]
        for place in places:
            _put(place, path, value)
    return (
        parse(DetectorConfig, values["detector"], f"{source}: detector"),
        parse(TrainingConfig, values["training"], f"{source}: training"),
    )


def _put(place: dict[str, Any], path: list[str], value: Any) -> None:
    *folders, leaf = path
    for folder in folders:
        place = place[folder]
    place[leaf] = value


def _values(detector: DetectorConfig, training: TrainingConfig) -> dict[str, Any]:
    """Every changeable setting that this detector has; of heads of one kind all alike, or a list
    of what each has."""
    values = {"detector": detector.model_dump(), "training": training.model_dump()}
    found: dict[str, Any] = {}
    for key in CHANGEABLE:
        root, *path = key.split(".")
        if root != "heads":
            found[key] = _get(values[root], path)
        elif of_heads := [
            _get(head, path[1:]) for head in values["detector"]["heads"] if head["type"] == path[0]
        ]:
            alike = all(value == of_heads[0] for value in of_heads)
            found[key] = of_heads[0] if alike else of_heads
    return found


def _get(place: Any, path: list[str]) -> Any:
    for name in path:
        place = place[name]
    return place
