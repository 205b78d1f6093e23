"""An experiment is data: a YAML file with a question, arms and profiles, read into typed models.

A setting is looked up in four layers, the later ones winning: the experiment's own, its profile's,
the arm's, and ``--set``. What differs between the arms is what the experiment asks about.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from codetr.config import ConfigError, Strict, nearest, parse, read_yaml
from codetr.layers import Settings, merge
from orchestrator.share import share

ProfileName = Literal["laptop", "paper"]
Seeds = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]


class Change(Strict):
    """From the epoch after ``after_epoch`` on these settings hold."""

    after_epoch: PositiveInt
    settings: Annotated[Settings, Field(min_length=1)]
    """By their dotted names, or unambiguous ends of them; see :mod:`orchestrator.schedule`."""


Schedule = tuple[Change, ...]


class Layer(Strict):
    """Some settings of detector, training and data; what is absent comes from the layer below."""

    detector: Settings = Field(default_factory=dict)
    """``name`` is a detector of the zoo, and lies beneath all layers; ``detector: NAME`` is short
    for ``detector: {name: NAME}``."""
    heads: dict[str, Settings] = Field(default_factory=dict)
    """Settings of auxiliary heads by their kind, for arms that only name them."""
    training: Settings = Field(default_factory=dict)
    data: Settings = Field(default_factory=dict)
    schedule: Schedule | None = None
    """Settings that change in the middle of training; replaces the layer's below as a whole."""

    @field_validator("detector", mode="before")
    @classmethod
    def _detector_by_name(cls, detector: Any) -> Any:
        return {"name": detector} if isinstance(detector, str) else detector

    @property
    def settings(self) -> dict[str, Settings]:
        return {name: getattr(self, name) for name in ("detector", "heads", "training", "data")}


class Resources(Strict):
    """What one trial takes, and how many run at a time."""

    workers: PositiveInt = 1
    """Ray Train workers of one trial; they share its global batch. ``2-8``: as many of these as
    there is room for, also while it trains."""
    least_workers: PositiveInt | None = None
    """The lower end of such a range; None: exactly ``workers``."""
    cpus_per_worker: PositiveInt = 1
    """Also the worker's number of threads."""
    gpus_per_worker: NonNegativeFloat = 0
    concurrency: PositiveInt | None = None
    """Trials at a time; None: as many as fit."""

    @model_validator(mode="before")
    @classmethod
    def _read_range(cls, values: Any) -> Any:
        workers = values.get("workers") if isinstance(values, dict) else None
        if not isinstance(workers, str):
            return values
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", workers.strip())
        if not found or int(found[1]) < 1 or (found[2] and int(found[2]) < int(found[1])):
            raise ValueError(f"workers: '{workers}' is neither a number, as 2, nor a range, as 2-8")
        least, most = int(found[1]), int(found[2] or found[1])
        return {**values, "workers": most, "least_workers": least if least < most else None}

    @model_validator(mode="after")
    def _least_is_least(self) -> Self:
        if self.least > self.workers:
            raise ValueError(f"least_workers={self.least} is more than workers={self.workers}")
        return self

    @property
    def least(self) -> int:
        """Workers without which a trial does not start."""
        return self.least_workers or self.workers

    @property
    def is_elastic(self) -> bool:
        return self.least < self.workers

    def worker_counts(self, batch_size: int) -> list[int]:
        """The numbers of workers that the range allows and that share a batch evenly, ascending."""
        counts = range(self.least, self.workers + 1)
        return [count for count in counts if batch_size % count == 0]


class PaperRows(Strict):
    """Where the paper's numbers for this experiment stand in ``orchestrator/paper.yaml``."""

    table: str
    column: str = "ap"
    """Column with the AP, or with a list that starts with it; see :func:`paper_rows`."""
    row: Settings = Field(default_factory=dict)
    """What every row of this experiment has in common. Where it says ``branch``, the table has rows
    for the other branches of the same detector, too."""


class Arm(Layer):
    """One of the things compared."""

    paper: Settings | None = None
    """Tells the paper's row for this arm from the others, and with ``column`` its own column, if
    the experiment has several; absent: the paper has none."""


class Profile(Layer):
    """One size of the experiment."""

    about: str
    resources: Resources = Resources()
    seeds: Seeds | None = None
    arms: tuple[str, ...] | None = None
    """The arms that run in this profile; None: all."""


class Experiment(Layer):
    """What can be run by name.

    A file may say ``extends: NAME``: it then has that experiment's sizes, and overrides some.
    """

    name: str
    file: Path
    """Where it was read; named by error messages."""
    question: str
    paper: PaperRows | None = None
    analyze: str = "none"
    """Analyses of the trained detectors: ``all``, ``none``, or names, as ``conflicts,queries``."""
    reference: str | None = None
    """The arm over which gains are told; None: the first. Every profile must have it."""
    seeds: Seeds = (0,)
    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    profiles: Annotated[dict[ProfileName, Profile], Field(min_length=1)]

    @model_validator(mode="after")
    def _arms_exist(self) -> Self:
        for profile_name, profile in self.profiles.items():
            for arm in profile.arms or ():
                if arm not in self.arms:
                    hint = nearest(arm, [*self.arms])
                    raise ValueError(f"profiles.{profile_name}.arms: no arm '{arm}'; {hint}")
            names = [*(profile.arms or self.arms)]
            if self.reference is not None and self.reference not in names:
                hint = nearest(self.reference, names)
                raise ValueError(
                    f"reference: no arm '{self.reference}' in profile {profile_name}; {hint}"
                )
        for arm_name, settings in self.arms.items():
            if settings.paper is not None and self.paper is None:
                raise ValueError(f"arms.{arm_name}.paper needs the experiment's 'paper: table: …'")
        return self


# ------------------------------------------------------------------------------------ finding them


def experiment_files() -> dict[str, Path]:
    """Every experiment by name: the user's ``./experiments/*.yaml`` hide the shipped ones."""
    folders = (share("experiments"), Path("experiments"))
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def load_experiment(name: str) -> Experiment:
    """The experiment of that name, or in that YAML file.

    Raises:
        ConfigError: no such experiment (the text names the nearest), or a file that is not valid.
    """
    path = _find(name, "")
    return parse(Experiment, {"name": path.stem, **read_extended(path), "file": path}, str(path))


def _find(name: str, source: str) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    files = experiment_files()
    if name not in files:
        raise ConfigError(f"{source}no experiment '{name}'; {nearest(name, [*files])}")
    return files[name]


def read_extended(path: Path, heirs: tuple[Path, ...] = ()) -> Settings:
    """The file's content, laid over that of the experiment that it ``extends``."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: an experiment is a mapping with 'question', 'arms', 'profiles'")
    _spell_out_names(content)
    parent = content.pop("extends", None)
    if parent is None:
        return content
    if path in heirs:
        raise ConfigError(f"{path}: extends itself")
    inherited = read_extended(_find(str(parent), f"{path}: extends: "), (*heirs, path))
    # The sizes are inherited; what is asked and compared is not.
    own = ("name", "question", "paper", "reference", "arms")
    return merge({key: value for key, value in inherited.items() if key not in own}, content)


def _spell_out_names(content: Settings) -> None:
    """``detector: NAME`` as a mapping, so that an heir adds to it and does not replace it."""
    layers = [content]
    for group in (content.get("profiles"), content.get("arms")):
        layers += group.values() if isinstance(group, dict) else []
    for layer in layers:
        if isinstance(layer, dict) and isinstance(layer.get("detector"), str):
            layer["detector"] = {"name": layer["detector"]}


# --------------------------------------------------------------------------------------- the paper


@cache
def paper_tables() -> dict[str, Any]:
    """Every number of the paper, by table."""
    tables: dict[str, Any] = read_yaml(Path(__file__).with_name("paper.yaml"))
    return tables


def paper_ap(experiment: Experiment, arm: str) -> float | None:
    """AP in percent that the paper reports for ``arm``; None where it has no such row.

    Raises:
        ConfigError: the experiment names a table, row or column which the paper does not have.
    """
    where, row = experiment.paper, experiment.arms[arm].paper
    if where is None or row is None:
        return None
    source = f"{experiment.file}: arms.{arm}.paper"
    tables = paper_tables()
    if where.table not in tables:
        raise ConfigError(f"{source}: no table '{where.table}'; {nearest(where.table, [*tables])}")
    wanted = {**where.row, **row}
    column = str(wanted.pop("column", where.column))
    rows = [r for r in paper_rows(where.table, column) if wanted.items() <= r.items()]
    if len(rows) != 1:
        raise ConfigError(f"{source}: {len(rows)} rows of {where.table} have {wanted}, not one")
    if column not in rows[0]:
        hint = nearest(column, [*rows[0]])
        raise ConfigError(f"{source}: {where.table} has no column '{column}'; {hint}")
    value = rows[0][column]
    if value is None:
        raise ConfigError(f"{source}: {where.table} has no number where {wanted}")
    return float(value[0] if isinstance(value, list) else value)


def paper_branch_aps(experiment: Experiment, arm: str, heads: Sequence[str]) -> dict[str, float]:
    """AP in percent that the paper reports for auxiliary heads of ``arm`` on their own.

    Args:
        heads: their names, as ``atss``; those of which it has no number are left out.
    """
    where, row = experiment.paper, experiment.arms[arm].paper
    if where is None or row is None or "branch" not in where.row:
        return {}
    rows = paper_rows(where.table, where.column)
    found: dict[str, float] = {}
    for head in heads:
        wanted = {**where.row, **row, "branch": head}
        cells = [r[where.column] for r in rows if wanted.items() <= r.items()]
        if cells and cells[0] is not None:
            found[head] = float(cells[0])
    return found


def paper_rows(table: str, column: str) -> list[Settings]:
    """A table's rows, in whichever way it is written down.

    A list has them as they are, but a cell ``{k0: …, k1: …}`` of the column becomes a row for each
    ``k``. A mapping has columns (table 12), or rows by name (table 8), which is then their ``row``.
    """
    content = paper_tables()[table]
    if isinstance(content, dict):
        if column not in content:
            return [{"row": name, column: cell} for name, cell in content.items()]
        cells = zip(*content.values(), strict=True)
        return [dict(zip(content, row, strict=True)) for row in cells]
    rows: list[Settings] = []
    for row in content:
        by_k = row.get(column)
        if isinstance(by_k, dict):
            rows += [{**row, "k": int(k[1:]), column: cell} for k, cell in by_k.items()]
        else:
            rows.append(row)
    return rows
