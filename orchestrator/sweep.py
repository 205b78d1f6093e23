"""A sweep is data, too: an experiment without arms, a space, and how to search it.

A suggestion becomes a :class:`~orchestrator.plan.Trial` just as an arm does: it is one. So every
trial of a sweep has the identity that it would have in ``codetr run``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from codetr.config import ConfigError, Strict, nearest, parse
from orchestrator.experiment import (
    Arm,
    Experiment,
    experiment_files,
    load_experiment,
    read_extended,
)
from orchestrator.plan import Options, Plan, Trial, make_plan
from orchestrator.results import LVIS_METRICS, METRICS
from orchestrator.settings import full_key
from orchestrator.share import share
from orchestrator.space import Space, Suggestion, parse_over

Searcher = Literal["optuna", "grid", "random"]
Scheduler = Literal["asha", "none"]

_OWN_KEYS = ("space", "searcher", "scheduler", "samples", "metric")
_BASE = "ablation-k"
"""Whose sizes a sweep has that names no experiment."""


class Search(Strict):
    """How a space is searched.

    ``optuna`` is its TPE sampler; ``random`` draws the same space blindly; ``grid`` takes every
    combination once, whatever ``samples`` says.
    """

    space: Space
    searcher: Searcher = "optuna"
    scheduler: Scheduler = "asha"
    samples: PositiveInt = 20
    metric: str = "AP"
    """Of the validation images, to be maximised."""
    seed: int = 0
    """Of every trial, and of what is drawn."""


@dataclass(frozen=True)
class SweepOptions:
    """What the command line adds; None leaves the decision to the sweep."""

    over: tuple[str, ...] = ()
    samples: int | None = None
    searcher: str | None = None
    scheduler: str | None = None
    metric: str | None = None
    seed: int | None = None
    common: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Sweep:
    """A space to be searched with the trials of a plan.

    Attributes:
        plan: names, places and resources; its trials are the first suggestions, or all of a grid.
        experiment: without arms of its own.
    """

    search: Search
    experiment: Experiment
    options: Options
    plan: Plan

    def trial(self, suggestion: Suggestion) -> Trial:
        """The trial that a suggestion stands for.

        Raises:
            ConfigError: its settings are not valid together.
        """
        return self._plan(suggestion).trials[0]

    def _plan(self, suggestion: Suggestion) -> Plan:
        return _plan_of(self.experiment, self.search, self.options, suggestion)

    @cached_property
    def count(self) -> int:
        """The number of suggestions."""
        if self.search.searcher == "grid":
            return len(self.search.space.grid())
        return self.search.samples

    @property
    def folder(self) -> Path:
        return self.plan.folder

    def definition(self) -> dict[str, Any]:
        """What must be the same for a sweep to go on in its folder."""
        trial = self.plan.trials[0]
        return {
            "search": self.search.model_dump(mode="json"),
            "profile": self.plan.profile,
            "settings": list(self.options.settings),
            # Resolved, so that an edited experiment file is another sweep, too.
            "first_trials": [trial.id for trial in self.plan.trials],
            "fingerprint": trial.facts.fingerprint,
        }


def make_sweep(name: str | None, given: SweepOptions) -> Sweep:
    """The sweep or experiment of that name with what the command line adds, validated.

    Raises:
        ConfigError: no such sweep, a space that makes no sense, a suggestion that is not valid.
        DataError: the data set cannot be read.
    """
    return plan_sweep(*read_sweep(name, given), given.common)


def read_sweep(name: str | None, given: SweepOptions) -> tuple[Experiment, Search]:
    """The same without a look at its data and at the single suggestions."""
    experiment, own = _load(name)
    if given.over:
        own["space"] = parse_over(list(given.over))
    if "space" not in own:
        raise ConfigError(f"{experiment.name} has no space: give --over key=values")
    chosen = {key: getattr(given, key) for key in (*_OWN_KEYS[1:], "seed")}
    search = parse(
        Search,
        {**own, **{key: value for key, value in chosen.items() if value is not None}},
        str(experiment.file),
    )
    _require_sense(search, given.common)
    return experiment, search


def plan_sweep(experiment: Experiment, search: Search, common: Options) -> Sweep:
    """A search of an experiment without arms of its own.

    Raises:
        ConfigError, DataError: as :func:`make_sweep`.
    """
    options = replace(common, seeds=(search.seed,))
    suggestions = search.space.corners()
    if search.searcher == "grid":
        suggestions = search.space.grid()
    plans = [_plan_of(experiment, search, options, suggestion) for suggestion in suggestions]
    first = {trial.id: trial for plan in plans for trial in plan.trials}
    plan = replace(plans[0], experiment=experiment, trials=tuple(first.values()))
    return Sweep(search, experiment, options, plan)


def _load(name: str | None) -> tuple[Experiment, dict[str, Any]]:
    """The experiment behind the name with one empty arm, and the keys of its search."""
    files = sweep_files()
    is_file = name is not None and Path(name).suffix in (".yaml", ".yml")
    if name is None or (name in experiment_files() and name not in files):
        base = load_experiment(name or _BASE)
        return _without_arms(base, name or "sweep"), {}
    if not is_file and name not in files:
        known = [*files, *experiment_files()]
        raise ConfigError(f"no sweep or experiment '{name}'; {nearest(name, known)}")
    path = Path(name) if is_file else files[name]
    content = read_extended(path)
    own = {key: content.pop(key) for key in _OWN_KEYS if key in content}
    if "space" in own:
        own["space"] = {"dimensions": own["space"]}
    if "arms" not in content:
        content["arms"] = {"base": {}}
    experiment = parse(Experiment, {"name": path.stem, **content, "file": path}, str(path))
    return _without_arms(experiment, experiment.name), own


def _without_arms(experiment: Experiment, name: str) -> Experiment:
    profiles = {
        key: profile.model_copy(update={"arms": None})
        for key, profile in experiment.profiles.items()
    }
    return experiment.model_copy(
        update={"name": name, "arms": {"base": Arm()}, "paper": None, "profiles": profiles}
    )


def sweep_files() -> dict[str, Path]:
    """Every sweep by name: the user's ``./experiments/sweeps/*.yaml`` hide the shipped ones."""
    folders = (share("experiments") / "sweeps", Path("experiments") / "sweeps")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def _require_sense(search: Search, options: Options) -> None:
    metrics = [*METRICS, *LVIS_METRICS]
    if search.metric not in metrics:
        raise ConfigError(f"--metric {search.metric}: {nearest(search.metric, metrics)}")
    for assignment in options.settings:
        key = full_key(assignment.partition("=")[0].strip())
        if key in search.space.settings:
            raise ConfigError(f"--set {assignment}: the sweep itself decides {key}")
    if search.scheduler == "asha" and "training.epochs" in search.space.settings:
        raise ConfigError(
            "asha compares trials after equal epochs of equal schedules: do not sweep epochs, or "
            "take --scheduler none"
        )


def _plan_of(
    experiment: Experiment, search: Search, options: Options, suggestion: Suggestion
) -> Plan:
    """The plan of the one arm that a suggestion is."""
    layer = search.space.layer(suggestion)
    name = suggestion_text(suggestion)
    arm = Arm.model_validate(layer.settings)
    return make_plan(experiment.model_copy(update={"arms": {name: arm}}), options)


def suggestion_text(suggestion: Suggestion) -> str:
    """``K=1 head=[atss] lambda_1=0.5``: the arm's name."""
    return " ".join(f"{name}={value}" for name, value in suggestion.items())


def require_same_sweep(sweep: Sweep) -> None:
    """Note what the sweep is in its folder, or see that it is the one that is there.

    Raises:
        ConfigError: another sweep, or a run, lies there.
    """
    file = sweep.folder / "sweep.json"
    definition = json.loads(json.dumps(sweep.definition()))
    if not file.exists():
        if (sweep.folder / "results.csv").exists():
            raise ConfigError(f"{sweep.folder} holds something else than a sweep: give --name")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(definition, indent=1))
        return
    before = json.loads(file.read_text())
    different = [key for key in definition if before.get(key) != definition[key]]
    if "search" in different:
        search = definition["search"]
        different += [k for k in search if before["search"].get(k) != search[k]]
        different.remove("search")
    if different:
        raise ConfigError(
            f"{sweep.folder} holds a sweep with other {', '.join(different)}: repeat its command "
            "to go on with it, or give --name for a new one"
        )
