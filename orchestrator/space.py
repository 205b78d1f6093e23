"""What a sweep searches: settings and their values, some of them only where others were chosen.

A suggestion maps the names of dimensions to plain values; it becomes a layer of settings by the
same way as ``--set``. Nothing here imports Optuna or Ray.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any, Protocol, Self

import yaml
from pydantic import Field, model_validator

from codetr.config import ConfigError, Strict, nearest, parse
from orchestrator.experiment import Layer
from orchestrator.settings import full_key, parse_settings

Scalar = str | int | float | bool | None
Suggestion = dict[str, Scalar]
"""A list stands in it as YAML text: Optuna takes no lists, and tables and tags want text anyway."""

SIGNIFICANT_DIGITS = 3
"""Of a number drawn from a range; more are noise that nobody types again."""

_RANGE = re.compile(r"^\s*([^,\[\]]+?)\.\.([^,\[\]]+?)(:log)?\s*$")


class Draws(Protocol):
    """What a space needs of an Optuna trial."""

    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool) -> int: ...


class Dimension(Strict):
    """One thing to choose: a list of values, or the range of a number."""

    name: Annotated[str, Field(pattern=r"^[^/]+$")]
    setting: str | None
    """The setting that gets the value, by default that of the dimension's name; null: none, the
    choice only decides which other dimensions there are."""
    values: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False
    integer: bool = False
    when: dict[str, tuple[Scalar, ...]] = Field(default_factory=dict)
    """Names of earlier dimensions, each with the values for which this one is there."""

    @model_validator(mode="before")
    @classmethod
    def _named_after_its_setting(cls, data: Any) -> Any:
        return {"setting": data.get("name"), **data} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _values_or_range(self) -> Self:
        bounds = (self.low, self.high)
        if (self.values is None) == (bounds == (None, None)) or (bounds.count(None) == 1):
            raise ValueError(f"{self.name}: give either values, or low and high")
        if self.low is not None and self.high is not None:
            if self.low >= self.high:
                raise ValueError(f"{self.name}: low={self.low:g} is not below high={self.high:g}")
            if self.log and self.low <= 0:
                raise ValueError(f"{self.name}: log needs low > 0, not {self.low:g}")
        if self.setting is not None:
            try:
                full_key(self.setting)
            except ConfigError as error:
                raise ValueError(str(error).removeprefix("--set ")) from None
        return self

    @property
    def choices(self) -> list[Scalar]:
        """The values as a suggestion holds them; of a range its ends."""
        if self.values is not None:
            return [_scalar(value) for value in self.values]
        return [self.number(bound) for bound in (self.low, self.high) if bound is not None]

    def number(self, value: float) -> Scalar:
        return round(value) if self.integer else float(f"{value:.{SIGNIFICANT_DIGITS}g}")

    def is_there(self, chosen: Suggestion) -> bool:
        return all(
            name in chosen and chosen[name] in [_scalar(v) for v in values]
            for name, values in self.when.items()
        )

    def draw(self, draws: Draws) -> Scalar:
        if self.low is None or self.high is None:
            value: Scalar = draws.suggest_categorical(self.name, self.choices)
            return value
        if self.integer:
            return draws.suggest_int(self.name, round(self.low), round(self.high), log=self.log)
        return self.number(draws.suggest_float(self.name, self.low, self.high, log=self.log))

    def __str__(self) -> str:
        if self.values is not None:
            text = ", ".join(str(choice) for choice in self.choices)
        else:
            kind = " integer" * self.integer + " logarithmic" * self.log
            text = f"{self.low:g} to {self.high:g}{kind}"
        only = [f"{name} is {' or '.join(map(str, v))}" for name, v in self.when.items()]
        return text + (f" (only where {' and '.join(only)})" if only else "")


class Space(Strict):
    """Dimensions in the order in which they are chosen."""

    dimensions: Annotated[tuple[Dimension, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _conditions_can_be_met(self) -> Self:
        before: dict[str, Dimension] = {}
        for dimension in self.dimensions:
            if dimension.name in before:
                raise ValueError(f"two dimensions are named '{dimension.name}'")
            for name, values in dimension.when.items():
                _require_condition(dimension.name, before, name, values)
            before[dimension.name] = dimension
        return self

    def __call__(self, draws: Draws) -> Suggestion:
        """Choose one after the other, as Optuna's define-by-run wants it."""
        chosen: Suggestion = {}
        for dimension in self.dimensions:
            if dimension.is_there(chosen):
                chosen[dimension.name] = dimension.draw(draws)
        return chosen

    @property
    def is_finite(self) -> bool:
        return all(dimension.values is not None for dimension in self.dimensions)

    def grid(self) -> list[Suggestion]:
        """Every combination.

        Raises:
            ConfigError: a dimension is a range.
        """
        for dimension in self.dimensions:
            if dimension.values is None:
                raise ConfigError(
                    f"a grid needs values, {dimension.name} is a range: list its values, or take "
                    "another --searcher"
                )
        return list(self._combinations({}, self.dimensions))

    def corners(self, most: int = 64) -> list[Suggestion]:
        """Combinations of values and ends of ranges, to see that they are valid."""
        return list(islice(self._combinations({}, self.dimensions), most))

    def _combinations(
        self, chosen: Suggestion, dimensions: tuple[Dimension, ...]
    ) -> Iterator[Suggestion]:
        if not dimensions:
            yield chosen
            return
        first, *rest = dimensions
        if not first.is_there(chosen):
            yield from self._combinations(chosen, tuple(rest))
            return
        for choice in first.choices:
            yield from self._combinations({**chosen, first.name: choice}, tuple(rest))

    def assignments(self, suggestion: Suggestion) -> list[str]:
        """``["heads=[atss]", "lambda_1=0.5"]``: the settings, as ``--set`` takes them.

        Raises:
            ConfigError: two dimensions give the same setting.
        """
        by_key: dict[str, str] = {}
        for dimension in self.dimensions:
            if dimension.name not in suggestion or dimension.setting is None:
                continue
            key = full_key(dimension.setting)
            if key in by_key:
                raise ConfigError(f"space: {dimension.name} and another both give {key}")
            by_key[key] = f"{dimension.setting}={_text(suggestion[dimension.name])}"
        return list(by_key.values())

    def by_setting(self, suggestion: Suggestion) -> dict[str, Scalar]:
        """The suggestion's values by the full names of their settings."""
        given = [d for d in self.dimensions if d.name in suggestion and d.setting is not None]
        return {full_key(str(d.setting)): suggestion[d.name] for d in given}

    def layer(self, suggestion: Suggestion) -> Layer:
        return parse_settings(self.assignments(suggestion))

    @property
    def settings(self) -> set[str]:
        """The settings that the sweep decides, by their full names."""
        return {full_key(d.setting) for d in self.dimensions if d.setting is not None}


def _require_condition(
    name: str, before: dict[str, Dimension], other: str, values: tuple[Scalar, ...]
) -> None:
    if other not in before:
        hint = nearest(other, [*before]) if before else "it is the first"
        raise ValueError(f"{name}: when: no dimension '{other}' before it; {hint}")
    known = before[other]
    for value in values:
        if known.values is not None and _scalar(value) not in known.choices:
            valid = ", ".join(map(str, known.choices))
            raise ValueError(f"{name}: when: {other} is never {value}; it is one of {valid}")


def parse_over(options: list[str]) -> Space:
    """The space of ``--over`` options: lists as ``heads=[atss],[]``, ranges as ``lambda_2=0.5..4``
    or ``learning_rate=1e-4..1e-3:log``.

    Raises:
        ConfigError: not ``key=values``, an unknown key, or values that are not YAML.
    """
    dimensions = [_parse_dimension(option) for option in options]
    return parse(Space, {"dimensions": dimensions}, "--over")


def _parse_dimension(option: str) -> Dimension:
    key, equals, text = option.partition("=")
    if not equals or not key.strip() or not text.strip():
        raise ConfigError(f"--over {option}: write key=values, for example lambda_1=0.25,0.5,1")
    try:
        if match := _RANGE.match(text):
            low, high = float(match[1]), float(match[2])
            given: dict[str, Any] = {"low": low, "high": high, "log": match[3] is not None}
            given["integer"] = not given["log"] and "." not in match[1] + match[2]
            given["integer"] &= low.is_integer() and high.is_integer()
        else:
            given = {"values": tuple(map(_number_if_any, yaml.safe_load(f"[{text}]")))}
        return Dimension.model_validate({"name": key.strip(), **given})
    except yaml.YAMLError:
        raise ConfigError(f"--over {option}: '{text}' is not a list of YAML values") from None
    except ValueError as error:
        raise ConfigError(f"--over {option}: {_first_line(error)}") from None


def _first_line(error: ValueError) -> str:
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    return str(error)


def _number_if_any(value: Any) -> Any:
    """YAML reads ``1e-4`` as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _scalar(value: Any) -> Scalar:
    return value if value is None or isinstance(value, str | int | float) else _text(value)


def _text(value: Any) -> str:
    """On one line, as YAML: ``[atss, faster_rcnn]``."""
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
