"""``--set key=value``: one setting by its dotted name, or by any unambiguous end of it."""

from __future__ import annotations

from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from codetr.config import (
    HEAD_CONFIGS,
    ConfigError,
    DataConfig,
    DetectorConfig,
    TrainingConfig,
    nearest,
)
from orchestrator.experiment import Layer

DETECTOR = "detector"
"""The one setting that stands for many: ``--set detector=NAME``, a detector of the zoo."""

_ROOTS: dict[str, type[BaseModel]] = {
    "detector": DetectorConfig,
    **{f"heads.{kind}": head for kind, head in HEAD_CONFIGS.items()},
    "training": TrainingConfig,
    "data": DataConfig,
}


@cache
def setting_keys() -> tuple[str, ...]:
    """Every key that ``--set`` knows: ``detector.lambda_1``, ``training.epochs``, ..."""
    keys = (key for root, model in _ROOTS.items() for key in _keys(model, root))
    return (DETECTOR, *keys)


def _keys(model: type[BaseModel], prefix: str) -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        if name == "type":
            continue  # chosen by detector.heads
        inner = _models(field.annotation)
        for one in inner:
            keys += _keys(one, f"{prefix}.{name}")
        if not inner:
            keys.append(f"{prefix}.{name}")
    return [*dict.fromkeys(keys)]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field may hold: one, or those of a union such as the backbones."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, UnionType) or get_origin(annotation) in (Union, Annotated):
        return [model for one in get_args(annotation) for model in _models(one)]
    return []


def full_key(key: str) -> str:
    """``lambda_1`` -> ``detector.lambda_1``; ``detector`` is the name of one in the zoo.

    Raises:
        ConfigError: no setting ends so, or several do.
    """
    keys = setting_keys()
    fits = [k for k in keys if k == key or k.endswith(f".{key}")]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise ConfigError(f"--set {key}: which one: {', '.join(fits)}?")
    if _leaf(key).lower() == "k":
        raise ConfigError(f"--set {key}: K is the number of heads: set heads, as heads=[atss]")
    leaves = [k for k in keys if _leaf(k) == _leaf(key)]
    hint = f"did you mean {' or '.join(leaves)}?" if leaves else nearest(key, [*keys])
    if hint.startswith("valid:"):
        hint = "docs/experiments.md lists the settings"
    raise ConfigError(f"--set {key}: no such setting; {hint}")


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def parse_settings(assignments: list[str]) -> Layer:
    """The layer of settings that ``--set`` options give; values are YAML: ``1e-4``, ``[atss]``.

    Raises:
        ConfigError: not ``key=value``, an unknown or ambiguous key, or a value that is not YAML.
    """
    layer: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {assignment}: write key=value, for example lambda_1=0.5")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {assignment}: '{text}' is not a YAML value") from None
        *folders, leaf = full_key(key.strip()).split(".")
        if full_key(key.strip()) == DETECTOR:
            folders, leaf = [DETECTOR], "name"
        place = layer
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = value
    return Layer.model_validate(layer)
