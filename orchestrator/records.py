"""What invocations leave on disk, so that others can see what became of each trial.

``NAME/invocation.yaml`` keeps what was asked for, ``trials/TRIAL/state.json`` where a trial is, and
``config.yaml`` beside it what it is. Reading them needs neither torch nor Ray nor MLflow.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from codetr.config import ConfigError, parse, read_yaml
from orchestrator.board import Epoch, History
from orchestrator.experiment import Experiment
from orchestrator.files import not_writable, write_whole
from orchestrator.lease import Lease, Leases, holder
from orchestrator.owner import Owner
from orchestrator.plan import Options, Plan, Trial
from orchestrator.results import RunningState
from orchestrator.tracking import configuration, flatten
from orchestrator.wording import without_secrets
from orchestrator.worker import HISTORY, STOP

if TYPE_CHECKING:
    from orchestrator.storage import Storage

INVOCATION, STATE, CONFIG, TRIALS = "invocation.yaml", "state.json", "config.yaml", "trials"
EARLIER = "earlier"
"""Folder beside ``trials`` for what ``--rerun all`` has set aside."""


# --------------------------------------------------------------------------------------- one trial


@dataclass(frozen=True)
class Record:
    """A trial as it lies on disk.

    Attributes:
        name: its folder's: ``ARM.seedS.ID``.
        epochs: that it is to be trained; None: unknown.
        since: seconds since 1970 at which it got into this state; None: unknown.
        where: who trains it, or trained it last.
        history: of the epochs up to its last checkpoint.
    """

    experiment: str
    folder: Path
    arm: str
    seed: int
    state: RunningState
    epochs: int | None = None
    since: float | None = None
    where: str = ""
    reason: str | None = None
    history: tuple[Epoch, ...] = ()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def id(self) -> str:
        return trial_id(self.folder)

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last evaluation, in percent, and what it has cost so far."""
        values = {key: v for epoch in self.history for key, v in epoch.values.items()}
        measured = {k: 100 * v for k, v in values.items() if k.startswith(("val/", "branch/"))}
        percent = {k.removeprefix("val/"): v for k, v in measured.items()}
        costs = {k.removeprefix("cost/"): v for k, v in values.items() if k[:5] == "cost/"}
        return {**percent, **costs}

    def metric(self, name: str) -> float | None:
        return self.metrics.get(name)


def trial_id(folder: Path) -> str:
    return folder.name.rpartition(".")[2]


def note(plan: Plan, trial: Trial, state: RunningState, reason: str | None = None) -> list[Path]:
    """Write down that the trial is in this state from now on, and what it is; returns the files."""
    folder = plan.store / trial.name
    folder.mkdir(parents=True, exist_ok=True)
    owner = Owner.this()
    where = str(owner) if plan.address is None else f"{owner}, cluster {plan.address}"
    state_text = {"state": state, "since": time.time(), "where": where, "reason": reason}
    return [write_configuration(folder, trial), write_whole(folder / STATE, json.dumps(state_text))]


def write_configuration(folder: Path, trial: Trial) -> Path:
    """Write what the trial is into its folder."""
    text = yaml.safe_dump(configuration(trial), sort_keys=False)
    return write_whole(folder / CONFIG, text)


def keep_history(plan: Plan, trial: Trial, history: History) -> list[Path]:
    """Write down what a trial has reported, if its checkpoints lie where nobody looks for it."""
    if plan.storage is None:
        return []
    rows = [asdict(epoch) for epoch in history]
    return [write_whole(plan.store / trial.name / HISTORY, json.dumps(rows))]


def noted(folder: Path) -> dict[str, Any]:
    """What was written down last about the trial in that folder."""
    try:
        values: dict[str, Any] = json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        return {}
    return values


def read_record(folder: Path) -> Record:
    """Everything that the trial's folder tells; who trains it now is known by its lease."""
    output = folder.parents[2]
    config = _config(folder)
    values, history = noted(folder), last_history(folder)
    epochs = config.get("training", {}).get("epochs")
    arm, seed = _arm_and_seed(folder.name)
    finished = epochs is not None and len(history) >= epochs
    record = Record(
        experiment=folder.parents[1].name,
        folder=folder,
        arm=config.get("arm", arm),
        seed=config.get("seed", seed),
        state="finished" if finished else "interrupted",
        epochs=epochs,
        since=values.get("since"),
        where=values.get("where", ""),
        history=tuple(history),
    )
    lease = holder(output, record.id)
    if lease is not None and lease.name == record.experiment:
        return replace(record, state="running", since=lease.since, where=str(lease.owner))
    if values.get("state") != record.state:
        # Its invocation was killed: it has been so since its last sign of life.
        record = replace(record, since=_last_change(folder))
    if not finished and values.get("state") == "failed":
        return replace(
            record, state="failed", reason=values.get("reason"), since=values.get("since")
        )
    return record


def _last_change(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.glob("epoch-*")))


def last_history(folder: Path) -> History:
    """Every epoch up to the trial's newest checkpoint that can be read; of one that is stored
    elsewhere, as it was reported."""
    reported = [path for path in [folder / HISTORY] if path.exists()]
    for path in reported or sorted(folder.glob(f"epoch-*/{HISTORY}"), reverse=True):
        try:
            return [Epoch.read(row) for row in json.loads(path.read_text())]
        except (OSError, ValueError, KeyError):
            continue  # its writer was killed, or has just removed it
    return []


def flat_configuration(folder: Path) -> dict[str, str]:
    """The trial's settings by their dotted names; empty if it has not begun."""
    return flatten(config) if (config := _config(folder)) else {}


def _config(folder: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load((folder / CONFIG).read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _arm_and_seed(name: str) -> tuple[str, int]:
    found = re.fullmatch(r"(.*)\.seed(\d+)\..*", name)
    return (found[1], int(found[2])) if found else (name, 0)


def set_aside(plan: Plan, trial: Trial) -> None:
    """Move what the trial has left out of the way, so that it starts afresh."""
    folder = plan.store / trial.name
    if not folder.exists():
        return
    earlier = plan.folder / EARLIER
    earlier.mkdir(exist_ok=True)
    name = f"{trial.name}.{1 + len([*earlier.glob(f'{trial.name}.*')])}"
    if plan.storage is not None:
        _storage(plan).move(trial.name, f"{EARLIER}/{name}")
    folder.rename(earlier / name)


def finished_elsewhere(plan: Plan, trial: Trial, since: float) -> Path | None:
    """The folder in which another experiment of this output has finished the trial after then."""
    for folder in plan.output.glob(f"*/{TRIALS}/*.{trial.id}"):
        values = noted(folder)
        if folder.parents[1] == plan.folder or values.get("state") != "finished":
            continue
        if values.get("since", 0) > since and _storage_of(plan, folder).checkpoints(folder.name):
            return folder
    return None


def take_over(plan: Plan, trial: Trial, source: Path) -> None:
    """Copy what another experiment has trained in place of what this one may have; killed
    meanwhile, or where the disk is full, nothing of it is there, and it is done again."""
    set_aside(plan, trial)
    if plan.storage is not None:
        _storage(plan).copy_trial(_storage_of(plan, source), source.name, trial.name)
    draft = plan.folder / f".{trial.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        shutil.copytree(source, draft)
        plan.store.mkdir(exist_ok=True)
        draft.rename(plan.store / trial.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _storage(plan: Plan) -> Storage:
    from orchestrator.storage import Storage  # not for those who only look at what there is

    return Storage.of(plan)


def _storage_of(plan: Plan, folder: Path) -> Storage:
    """Where the trial in that folder has its checkpoints, if its experiment was given the same
    ``--storage``."""
    return _storage(plan).of_experiment(folder.parents[1].name)


# ---------------------------------------------------------------------------------- one experiment


def sign_in(plan: Plan, leases: Leases, search: dict[str, Any] | None = None) -> None:
    """Let others see what is at work in the plan's folder, and forget what was asked of the one
    before.

    Args:
        search: of a sweep, as plain values.

    Raises:
        ConfigError: someone else is at work there, or the folder cannot be written.
    """
    if leases.acquire(run_lease(plan.name)) is not None:
        raise occupied(plan.folder)
    leases.clear(trial.id for trial in plan.trials)
    for file in (plan.folder / STOP, *plan.store.glob(f"*/{STOP}")):
        file.unlink(missing_ok=True)
    keep_invocation(plan, search)


def occupied(folder: Path) -> ConfigError:
    """Another invocation is at work in that folder."""
    return ConfigError(f"{folder}: another 'codetr' is at work there: wait for it, or give --name")


def keep_invocation(plan: Plan, search: dict[str, Any] | None = None) -> None:
    """Write down what was asked for, so that it can be resumed without its options.

    Secrets in the addresses of the tracking store and of the checkpoints are not kept.

    Args:
        search: of a sweep, as plain values.

    Raises:
        ConfigError: the plan's folder cannot be written.
    """
    options = asdict(plan.options)
    for key in ("tracking_uri", "storage"):
        options[key] = options[key] and without_secrets(options[key])
    options["output"] = str(plan.output)
    if plan.options.data is not None and plan.trials[0].data.path is not None:
        options["data"] = str(plan.trials[0].data.path)
    content = {
        "owner": asdict(Owner.this()),
        "since": time.time(),
        "options": {key: value for key, value in options.items() if value is not None},
        "trials": {
            trial.name: {"arm": trial.arm, "seed": trial.seed, "epochs": trial.training.epochs}
            for trial in (plan.trials if search is None else ())  # a sweep's come as it goes
        },
        "search": search,
        "experiment": plan.experiment.model_dump(mode="json", exclude_defaults=True),
    }
    plain = json.loads(json.dumps(content))  # tuples are lists in YAML
    try:
        write_whole(plan.folder / INVOCATION, yaml.safe_dump(plain, sort_keys=False))
    except OSError as error:
        raise not_writable(plan.folder, error) from None


@dataclass(frozen=True)
class Invocation:
    """The last one of an experiment.

    Attributes:
        trials: by the name of their folders: arm, seed and epochs.
        search: of a sweep, as plain values.
    """

    folder: Path
    owner: Owner
    since: float
    options: Options
    experiment: Experiment
    trials: dict[str, dict[str, Any]]
    search: dict[str, Any] | None = None


def read_invocation(folder: Path) -> Invocation:
    """The last invocation of the experiment in that folder.

    Raises:
        ConfigError: there is none, or its file is not as it was written.
    """
    path = folder / INVOCATION
    content = read_yaml(path)
    try:
        given = {**content["options"], "output": Path(content["options"]["output"])}
        lists = {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
        return Invocation(
            folder=folder,
            owner=Owner(**content["owner"]),
            since=content["since"],
            options=Options(**{**given, **lists}),
            experiment=parse(Experiment, content["experiment"], str(path)),
            trials=content["trials"],
            search=content.get("search"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not as 'codetr' writes it ({error})") from None


def read_records(folder: Path) -> list[Record]:
    """Every trial of the experiment in that folder: the last invocation's in its order, then those
    of earlier ones."""
    on_disk = {path.name: path for path in sorted((folder / TRIALS).glob("*.seed*.*"))}
    planned = read_invocation(folder).trials if (folder / INVOCATION).exists() else {}
    records = [
        read_record(on_disk[name])
        if name in on_disk
        else Record(
            experiment=folder.name, folder=folder / TRIALS / name, state="not started", **values
        )
        for name, values in planned.items()
    ]
    return records + [read_record(path) for name, path in on_disk.items() if name not in planned]


def run_lease(name: str) -> str:
    """The name of the lease that an invocation holds for the whole of its experiment."""
    return f"run.{name}"


def at_work(folder: Path) -> Lease | None:
    """Who runs the experiment in that folder just now."""
    return holder(folder.parent, run_lease(folder.name))


# ---------------------------------------------------------------------------------- finding things


def experiment_folders(output: Path) -> dict[str, Path]:
    """Every experiment below ``output`` that has been run, by name."""
    found = [*output.glob(f"*/{INVOCATION}"), *output.glob(f"*/{TRIALS}")]
    return {path.parent.name: path.parent for path in sorted(found)}
