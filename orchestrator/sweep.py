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

from pydantic import PositiveInt, model_validator

from codetr.config import ConfigError, Strict, nearest, parse
from orchestrator.experiment import (
    Arm,
    Experiment,
    experiment_files,
    load_experiment,
    read_extended,
)
from orchestrator.files import not_writable, read_json, write_whole
from orchestrator.plan import Options, Plan, Trial, make_plan
from orchestrator.population import (
    Turn,
    default_interval,
    exchanges,
    found,
    require_population,
)
from orchestrator.results import LVIS_METRICS, METRICS
from orchestrator.schedule import changeable_key
from orchestrator.settings import full_key
from orchestrator.share import share
from orchestrator.space import Space, Suggestion, parse_over

Searcher = Literal["optuna", "grid", "random"]
Scheduler = Literal["asha", "none", "pbt"]

_OWN_KEYS = ("space", "searcher", "scheduler", "samples", "metric", "interval")
_BASE = "ablation-k"
"""Whose sizes a sweep has that names no experiment."""

_ADVICE = (
    "to go on with the very same command, remove it and results.csv, which are written again; or "
    "give --name"
)


class Search(Strict):
    """How a space is searched.

    ``optuna`` is its TPE sampler; ``random`` draws the same space blindly; ``grid`` takes every
    combination once, whatever ``samples`` says. The scheduler ``pbt`` has a population of
    ``samples``, whose beginning is drawn blindly.
    """

    space: Space
    searcher: Searcher = "optuna"
    scheduler: Scheduler = "asha"
    samples: PositiveInt = 20
    metric: str = "AP"
    """Of the validation images, to be maximised."""
    interval: PositiveInt | None = None
    """Of pbt: epochs between two exchanges of its population; None: a quarter of all."""
    seed: int = 0
    """Of every trial, and of what is drawn."""

    @model_validator(mode="before")
    @classmethod
    def _population_is_drawn(cls, data: Any) -> Any:
        is_population = isinstance(data, dict) and data.get("scheduler") == "pbt"
        return {"searcher": "random", **data} if is_population else data


@dataclass(frozen=True)
class SweepOptions:
    """What the command line adds; None leaves the decision to the sweep."""

    over: tuple[str, ...] = ()
    samples: int | None = None
    searcher: str | None = None
    scheduler: str | None = None
    metric: str | None = None
    interval: int | None = None
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

    def trial(self, suggestion: Suggestion, turns: tuple[Turn, ...] = ()) -> Trial:
        """The trial that a suggestion stands for.

        Args:
            turns: of a member of a population, after that beginning.

        Raises:
            ConfigError: its settings are not valid together.
        """
        plan = _plan_of(self.experiment, self.search, self.options, suggestion, turns)
        return plan.trials[0]

    @property
    def is_population(self) -> bool:
        return self.search.scheduler == "pbt"

    @property
    def epochs(self) -> int:
        """Of each of a population's members."""
        return self.plan.trials[0].training.epochs

    @property
    def interval(self) -> int:
        """Epochs between two exchanges of the population."""
        training = self.plan.trials[0].training
        return self.search.interval or default_interval(self.epochs, training.evaluate_every)

    @cached_property
    def count(self) -> int:
        """The number of suggestions; the size of a population."""
        if self.search.searcher == "grid":
            return len(self.search.space.grid())
        return self.search.samples

    @property
    def folder(self) -> Path:
        return self.plan.folder

    def definition(self) -> dict[str, Any]:
        """What must be the same for a sweep to go on in its folder."""
        trial, search = self.plan.trials[0], self.search.model_dump(mode="json")
        if not self.is_population:
            del search["interval"]
        return {
            "search": search,
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
    _require_own_settings(experiment, search)
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
    if options.data is not None and (path := plan.trials[0].data.path) is not None:
        # Absolute: later suggestions are planned by processes that are elsewhere.
        options = replace(options, data=str(path))
    sweep = Sweep(search, experiment, options, plan)
    if sweep.is_population:
        _require_exchanges(sweep)
    return sweep


def _require_exchanges(sweep: Sweep) -> None:
    found(sweep.search.space, sweep.count, sweep.search.seed)  # that there are as many
    trial = sweep.plan.trials[0]
    for key in sweep.search.space.settings:
        root, *path = key.split(".")
        if root == "heads" and path[0] not in [head.type for head in trial.detector.heads]:
            raise ConfigError(f"pbt: {key} changes nothing: the detector has no head '{path[0]}'")
    every = trial.training.evaluate_every
    if sweep.interval % every:
        raise ConfigError(
            f"--interval {sweep.interval}: members are compared when they are evaluated: give a "
            f"multiple of training.evaluate_every={every}"
        )
    if not exchanges(sweep.epochs, sweep.interval):
        raise ConfigError(
            f"pbt: no exchange every {sweep.interval} epochs within {sweep.epochs}: give a smaller "
            "--interval, or more epochs"
        )


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
    if search.scheduler == "pbt":
        require_population(search.space)
        if search.searcher != "random":
            raise ConfigError("pbt draws its first population blindly: give --searcher random")
        if search.samples < 2:
            raise ConfigError(f"--samples {search.samples}: a population has 2 members at least")
    elif search.interval is not None:
        raise ConfigError(f"--interval {search.interval} is for --scheduler pbt alone")
    if search.scheduler == "asha" and "training.epochs" in search.space.settings:
        raise ConfigError(
            "asha compares trials after equal epochs of equal schedules: do not sweep epochs, or "
            "take --scheduler none"
        )


def _require_own_settings(experiment: Experiment, search: Search) -> None:
    """See that no schedule of the experiment changes what the sweep decides."""
    layers = [experiment, *experiment.profiles.values()]
    changes = [change for layer in layers for change in layer.schedule or ()]
    if changes and search.scheduler == "pbt":
        raise ConfigError(f"{experiment.file}: pbt finds a schedule: take the file's out")
    for key in (changeable_key(key) for change in changes for key in change.settings):
        if key in search.space.settings:
            raise ConfigError(f"{experiment.file}: schedule: the sweep itself decides {key}")


def _plan_of(
    experiment: Experiment,
    search: Search,
    options: Options,
    suggestion: Suggestion,
    turns: tuple[Turn, ...] = (),
) -> Plan:
    """The plan of the one arm that a suggestion is."""
    layer, name = search.space.layer(suggestion), suggestion_text(suggestion)
    schedule = None
    if turns:
        # Short whatever the number of turns, for it names a folder; the id tells the rest.
        name = f"{suggestion_text(turns[-1].suggestion)} after epoch {turns[-1].after_epoch}"
        schedule = [
            {"after_epoch": turn.after_epoch, "settings": search.space.by_setting(turn.suggestion)}
            for turn in turns
        ]
    arm = Arm.model_validate({**layer.settings, "schedule": schedule})
    plan = make_plan(experiment.model_copy(update={"arms": {name: arm}}), options)
    _require_k(suggestion, plan.trials[0].detector.k)
    return plan


def _require_k(suggestion: Suggestion, k: int) -> None:
    """See that a dimension of the name K, which can only choose among others, chose as many heads.

    Raises:
        ConfigError: it says something else than the list of heads.
    """
    for name in ("K", "k"):
        if suggestion.get(name, k) != k:
            raise ConfigError(
                f"space: {suggestion_text(suggestion)}: {name}={suggestion[name]} disagrees with "
                f"the heads, of which there are {k}"
            )


def suggestion_text(suggestion: Suggestion) -> str:
    """``K=1 head=[atss] lambda_1=0.5``: the arm's name."""
    return " ".join(f"{name}={value}" for name, value in suggestion.items())


def require_same_sweep(sweep: Sweep) -> None:
    """Note what the sweep is in its folder, or see that it is the one that is there.

    Raises:
        ConfigError: another sweep, or a run, lies there; the note is damaged, or cannot be written.
    """
    file = sweep.folder / "sweep.json"
    definition = json.loads(json.dumps(sweep.definition()))
    if not file.exists():
        if (sweep.folder / "results.csv").exists():
            raise ConfigError(f"{sweep.folder} holds something else than a sweep: give --name")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(definition, indent=1))
        except OSError as error:
            raise not_writable(sweep.folder, error) from None
        return
    before = read_json(file, _ADVICE)
    if not isinstance(before, dict) or not isinstance(before.get("search"), dict):
        raise ConfigError(f"{file}: not as 'codetr sweep' writes it: {_ADVICE}")
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
