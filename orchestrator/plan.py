"""What is going to run: every trial with its configuration, costs nothing and can be printed.

Nothing here imports torch, Ray or MLflow, so a plan is there within a second.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt

from codetr.analysis import CATALOGUE, require_known
from codetr.config import (
    ConfigError,
    DataConfig,
    DetectorConfig,
    Strict,
    TrainingConfig,
    nearest,
    parse,
)
from codetr.layers import Settings, merge, with_heads
from codetr.zoo.catalogue import entry
from orchestrator import machine
from orchestrator.experiment import (
    Experiment,
    Layer,
    Profile,
    ProfileName,
    Resources,
    Schedule,
    paper_ap,
    paper_branch_aps,
)
from orchestrator.facts import DataFacts, data_facts, require_masks
from orchestrator.schedule import in_epoch, resolved
from orchestrator.settings import parse_settings
from orchestrator.starting import with_start

IDENTITY_VERSION = 1
"""Part of every trial's identity; to be raised when the same configuration trains differently, as
``tests/orchestrator/test_identity_version.py`` tells."""

_WITHOUT_EFFECT = {
    "training": {"loader_workers", "accumulate", "evaluate_branches", "start_from"},
    "data": {"path", "engine"},
}
"""Settings that do not change what is learned; data set and weights to start from are known by
their fingerprints."""

_LATER = {
    "detector": (
        "query_loss.federated",
        "one_to_many.average",
        "queries.patterns",
        "backbone.dilated",
    ),
    "training": ("ema", "ema_warmup"),
    "data": ("jitter", "copy_paste", "repeat_threshold"),
}
"""Settings that came later: at their defaults, and where a section of the data is not ``enabled``,
they change nothing, and trials keep their names."""


class Trial(Strict):
    """One arm with one seed: what one Ray Train job trains."""

    arm: str
    seed: NonNegativeInt
    detector: DetectorConfig
    training: TrainingConfig
    data: DataConfig
    facts: DataFacts
    schedule: Schedule = ()
    """What changes in the middle of training; ``detector`` and ``training`` are the beginning."""
    start: str | None = None
    """Fingerprint of ``training.start_from``."""
    paper_ap: float | None = None
    """In percent, what the paper reports for this arm."""
    paper_branch_aps: dict[str, float] = Field(default_factory=dict)
    """In percent, what it reports for auxiliary heads of this arm on their own, by their names."""
    is_reference: bool = False
    """Whether other arms' gains are told over this one, as the experiment's ``reference``."""

    @cached_property
    def id(self) -> str:
        """Hash of everything that decides what is learned, and of whether its heads are measured:
        the trial's identity in all runs."""
        identity: dict[str, Any] = {
            "version": IDENTITY_VERSION,
            "seed": self.seed,
            "fingerprint": self.facts.fingerprint,
            "detector": _identity("detector", self.detector),
            "training": _identity("training", self.training),
            "data": _identity("data", self.data),
        }
        if self.measures_branches:
            identity["branches"] = True
        if self.schedule:
            identity["schedule"] = [change.model_dump(mode="json") for change in self.schedule]
        if self.start is not None:
            identity["start"] = self.start
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def measures_branches(self) -> bool:
        """Whether there are numbers of each auxiliary head on its own in the end."""
        return self.training.evaluate_branches and self.detector.k > 0

    @property
    def name(self) -> str:
        """Readable, unique, fit for a file name: ``k-1-atss.seed0.3f2a91c07b``."""
        return f"{slug(self.arm)}.seed{self.seed}.{self.id}"

    def settings_in(self, epoch: int) -> tuple[DetectorConfig, TrainingConfig]:
        """What holds in that epoch, counted from 1."""
        return in_epoch(epoch, self.schedule, self.detector, self.training)

    @property
    def steps_per_epoch(self) -> int:
        """The last, incomplete batch is left out."""
        return self.facts.train_images // self.training.batch_size

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.training.epochs


def _identity(section: str, config: Strict) -> dict[str, Any]:
    """The values that tell a trial from others."""
    values = config.model_dump(mode="json", exclude=_WITHOUT_EFFECT.get(section))
    for key in _LATER.get(section, ()):
        *outer, name = key.split(".")
        holder, inner = config, values
        for part in outer:
            holder, inner = getattr(holder, part), inner[part]
        if name not in inner:  # a backbone that cannot have it
            continue
        value = getattr(holder, name)
        # Checkpoints hold their detector to every value, used or not: there it must be the default.
        unused = section == "data" and not getattr(value, "enabled", True)
        if unused or value == type(holder).model_fields[name].default:
            del inner[name]
    return values


Rerun = Literal["failed", "all", "none"]
"""Which trials that were started before are trained again."""


@dataclass(frozen=True)
class Options:
    """What the command line adds to an experiment; None leaves the decision to the experiment.

    Attributes:
        rerun: failed: go on with what failed or was interrupted; none: only report what was ever
            started; all: train everything again, in fresh folders.
    """

    profile: ProfileName | None = None
    data: str | None = None
    seeds: tuple[int, ...] | None = None
    workers: int | str | None = None
    gpus_per_worker: float | None = None
    concurrency: int | None = None
    settings: tuple[str, ...] = ()
    skip_bad: bool = False
    name: str | None = None
    output: Path = Path("runs")
    tracking_uri: str | None = None
    address: str | None = None
    storage: str | None = None
    """Where checkpoints lie, as any URL of fsspec; None: below ``output``."""
    rerun: Rerun = "failed"
    grace: float = 30.0
    """Seconds that trials under way have to save when the run is asked to end."""
    analyze: str | None = None
    """As :attr:`Experiment.analyze`; None: as the experiment has it."""


@dataclass(frozen=True)
class Plan:
    """Every trial of one invocation, and where and with what it runs.

    Attributes:
        name: names the folder below ``output`` and the MLflow experiment.
        why: one line that says which profile was chosen and how to choose another.
        output: absolute.
        address: of the Ray cluster; None: one is started on this machine.
        analyses: with which the trained detectors are looked at in the end, by name.
    """

    name: str
    experiment: Experiment
    profile: ProfileName
    why: str
    resources: Resources
    trials: tuple[Trial, ...]
    output: Path
    tracking_uri: str
    address: str | None = None
    options: Options = field(default_factory=Options)
    analyses: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where this experiment's tables, pictures and trials lie."""
        return self.output / self.name

    @property
    def store(self) -> Path:
        """What is known of the trials, a folder for each; and their checkpoints, if they have no
        storage elsewhere."""
        return self.folder / "trials"

    @property
    def storage(self) -> str | None:
        """Where the checkpoints lie instead: a URL."""
        return self.options.storage

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(trial.arm for trial in self.trials))

    @property
    def cpus_per_trial(self) -> int:
        return self.resources.workers * self.resources.cpus_per_worker

    @property
    def gpus_per_trial(self) -> float:
        return self.resources.workers * self.resources.gpus_per_worker


def make_plan(experiment: Experiment, options: Options) -> Plan:
    """Everything that ``options`` make of ``experiment``, validated; nothing is written.

    Raises:
        ConfigError: a setting is wrong, or the machine cannot run the plan.
        DataError: the data set cannot be read.
    """
    profile_name, why = choose_profile(experiment, options)
    profile = experiment.profiles[profile_name]
    settings = parse_settings(list(options.settings))
    trials = tuple(
        trial
        for arm in profile.arms or tuple(experiment.arms)
        for trial in _trials(experiment, profile_name, arm, settings, options)
    )
    _require_different(trials)
    resources = _resources(profile, options, trials)
    output = options.output.expanduser().absolute()
    return Plan(
        name=_name(options.name or experiment.name),
        experiment=experiment,
        profile=profile_name,
        why=why,
        resources=resources,
        trials=trials,
        output=output,
        tracking_uri=options.tracking_uri or f"sqlite:///{output / 'mlflow.db'}",
        address=options.address,
        options=options,
        analyses=_analyses(experiment, options),
    )


def choose_profile(experiment: Experiment, options: Options) -> tuple[ProfileName, str]:
    """The profile, and one line that says why and how to choose another."""
    gpus = machine.local_gpus()
    found = "no GPU found" if not gpus else f"{gpus} GPU{'s' * (gpus > 1)} found"
    if options.profile is not None:
        name, reason = options.profile, "as asked"
    elif len(experiment.profiles) == 1:
        name, reason = next(iter(experiment.profiles)), "the only one of this experiment"
    elif gpus and options.data is not None:
        name, reason = "paper", f"{found}, --data given"
    else:
        name, reason = "laptop", f"{found}{', no --data' if gpus else ''}"
    if name not in experiment.profiles:
        raise ConfigError(
            f"{experiment.name} has no profile '{name}'; {nearest(name, [*experiment.profiles])}"
        )
    others = [other for other in experiment.profiles if other != name]
    choose = f"; choose with --profile {'|'.join(others)}" if others else ""
    return name, f"Profile {name} ({reason}): {experiment.profiles[name].about}{choose}"


def _trials(
    experiment: Experiment, profile_name: ProfileName, arm: str, settings: Layer, options: Options
) -> list[Trial]:
    profile = experiment.profiles[profile_name]
    source, layers = f"{experiment.file} ({profile_name}, {arm})", (experiment, profile)
    detector, training, data = _configure(
        (source, (*layers, experiment.arms[arm])),
        ("--data", (Layer(data=_data_option(options)),)),
        ("--set", (settings,)),
    )
    if data.dataset == "coco" and data.path is None:
        raise ConfigError(f"profile {profile_name} needs a data set: give --data DIR (COCO layout)")
    facts = data_facts(data)
    if detector.needs_masks or data.copy_paste.needs_masks:
        require_masks(data)
    detector = _with_classes(detector, facts)
    if facts.train_images < training.batch_size:
        raise ConfigError(
            f"{facts.train_images} training images do not fill one batch: set "
            f"training.batch_size to at most that (now {training.batch_size})"
        )
    training, start = with_start(detector, training)
    schedules = [layer.schedule for layer in (*layers, experiment.arms[arm])]
    given = next((schedule for schedule in reversed(schedules) if schedule is not None), ())
    schedule = resolved(given, detector, training, source)
    _require_k(experiment, arm, detector)
    seeds = options.seeds or profile.seeds or experiment.seeds
    if min(seeds) < 0:
        raise ConfigError(f"--seeds {','.join(map(str, seeds))}: seeds start at 0")
    return [
        Trial(
            arm=arm,
            seed=seed,
            detector=detector,
            training=training,
            data=data,
            facts=facts,
            schedule=schedule,
            start=start,
            paper_ap=paper_ap(experiment, arm),
            paper_branch_aps=paper_branch_aps(experiment, arm, detector.head_names),
            is_reference=arm == experiment.reference,
        )
        for seed in seeds
    ]


def _require_k(experiment: Experiment, arm: str, detector: DetectorConfig) -> None:
    """See that the paper's row that is to stand beside the arm is of as many heads."""
    k = (experiment.arms[arm].paper or {}).get("k", detector.k)
    if k != detector.k:
        raise ConfigError(
            f"{experiment.file}: arms.{arm}: paper.k={k} disagrees with its detector.heads, of "
            f"which there are {detector.k}"
        )


def _configure(
    *sources: tuple[str, tuple[Layer, ...]],
) -> tuple[DetectorConfig, TrainingConfig, DataConfig]:
    """Lay all layers over one another; an error names the source that brought it."""
    given: list[Layer] = []
    for source, layers in sources:
        given += layers
        merged = _lay(given, source)
        whole = with_heads(merged["detector"], merged["heads"], source)
        detector = parse(DetectorConfig, whole, f"{source}: detector")
        training = parse(TrainingConfig, merged["training"], f"{source}: training")
        data = parse(DataConfig, merged["data"], f"{source}: data")
    training.require_fitting(detector)
    return detector, training, data


def _lay(layers: Sequence[Layer], source: str) -> dict[str, Settings]:
    """The layers over one another, and beneath them the detector of the zoo that they name.

    What they say is then about that detector; where they choose another backbone, or heads, the
    settings of its own stay behind.
    """
    merged = Layer().settings
    for layer in layers:
        merged = merge(merged, layer.settings)
    name = merged["detector"].pop("name", None)
    if name is None:
        return merged
    try:
        named = entry(str(name)).layer
    except ConfigError as error:
        raise ConfigError(f"{source}: detector: {error}") from None
    beneath = {key: named[key] for key in ("detector", "heads")}
    backbone = merged["detector"].get("backbone")
    chosen = backbone.get("name") if isinstance(backbone, dict) else backbone
    own = beneath["detector"].get("backbone", {})
    if chosen not in (None, own.get("name", "resnet50")):
        beneath["detector"] = {k: v for k, v in beneath["detector"].items() if k != "backbone"}
    return merge(beneath, merged)


def _with_classes(detector: DetectorConfig, facts: DataFacts) -> DetectorConfig:
    """The number of classes comes from the data, never from two places."""
    if "num_classes" in detector.model_fields_set and detector.num_classes != facts.classes:
        raise ConfigError(
            f"detector.num_classes={detector.num_classes}, but the data has {facts.classes} "
            "classes: leave num_classes out, it is taken from the data"
        )
    return detector.model_copy(update={"num_classes": facts.classes})


def _data_option(options: Options) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    if options.data in ("digits", "digits-lvis"):
        chosen = {"dataset": options.data, "path": None}
    elif options.data is not None:
        chosen = {"dataset": "coco", "path": Path(options.data).expanduser().absolute()}
    return {**chosen, "skip_bad": True} if options.skip_bad else chosen


def _resources(profile: Profile, options: Options, trials: tuple[Trial, ...]) -> Resources:
    given = {
        "workers": options.workers,
        "gpus_per_worker": options.gpus_per_worker,
        "concurrency": options.concurrency,
    }
    changed = {key: value for key, value in given.items() if value is not None}
    before = profile.resources.model_dump()
    if options.workers is not None:
        del before["least_workers"]  # a range of the profile's
    resources = parse(Resources, {**before, **changed}, "resources (--workers, …)")
    batch_sizes = {trial.training.batch_size for trial in trials}
    if options.address is None:
        if options.workers is None:
            resources = machine.fitted(resources, batch_sizes)
        machine.require_room(resources)
    machine.require_even_shares(resources, batch_sizes)
    return resources


def _analyses(experiment: Experiment, options: Options) -> tuple[str, ...]:
    """The names that ``--analyze``, or else the experiment, asks for."""
    given = experiment.analyze if options.analyze is None else options.analyze
    source = f"{experiment.file}: analyze" if options.analyze is None else "--analyze"
    if given in ("all", "none"):
        return tuple(CATALOGUE) if given == "all" else ()
    names = [name.strip() for name in given.split(",")]
    for name in names:
        require_known(name, source)
    return tuple(dict.fromkeys(names))


def _require_different(trials: tuple[Trial, ...]) -> None:
    first: dict[str, Trial] = {}
    for trial in trials:
        twin = first.setdefault(trial.id, trial)
        if twin is not trial:
            raise ConfigError(
                f"arms '{twin.arm}' and '{trial.arm}' (seeds {twin.seed} and {trial.seed}) are the "
                "same trial: a --set overrides what tells them apart, or a seed is given twice"
            )


def _name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"--name {name}: use letters, digits, '.', '_' and '-' only")
    return name


def slug(text: str) -> str:
    """``K = 1 (ATSS)`` -> ``k-1-atss``."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
