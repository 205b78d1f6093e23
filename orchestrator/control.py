"""Looks at what runs and has run below an output folder, stops it, goes on with it, compares it.

All of it reads the disk alone (:mod:`orchestrator.records`).
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from codetr.config import ConfigError, nearest
from orchestrator.records import (
    Invocation,
    Record,
    at_work,
    experiment_folders,
    flat_configuration,
    read_invocation,
    read_records,
)
from orchestrator.trial_log import LOG
from orchestrator.wording import MASK
from orchestrator.worker import STOP

Rows = list[list[str]]
EMPTY = "–"


# -------------------------------------------------------------------------------------- by its name


def find_experiment(output: Path, name: str) -> Path:
    """The folder of an experiment.

    Raises:
        ConfigError: nothing of that name was run here; names the nearest.
    """
    folders = _experiments(output)
    if name not in folders:
        raise ConfigError(f"no experiment '{name}' in {output}; {nearest(name, [*folders])}")
    return folders[name]


def find_trial(output: Path, text: str) -> Record:
    """A trial by its id, a beginning of it, its folder's name, or ``NAME/`` and one of these.

    Raises:
        ConfigError: there is none, or several; names the nearest, or all of them.
    """
    experiment, _, wanted = text.rpartition("/")
    folders = [find_experiment(output, experiment)] if experiment else _experiments(output).values()
    records = [record for folder in folders for record in read_records(folder)]
    exact = [r for r in records if wanted in (r.id, r.name)]
    found = exact or [r for r in records if wanted and r.id.startswith(wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        all_found = ", ".join(f"{r.experiment}/{r.name}" for r in found)
        raise ConfigError(f"trial '{text}' in {output}: which one: {all_found}?")
    if not records:
        raise ConfigError(f"no trial '{text}': there are no trials in {output}")
    names = [word for r in records for word in (r.id, r.name)]
    raise ConfigError(f"no trial '{text}' in {output}; {nearest(wanted, names)}")


def _experiments(output: Path) -> dict[str, Path]:
    folders = experiment_folders(output)
    if not folders:
        raise ConfigError(f"{output}: nothing was run there: see --output")
    return folders


# ------------------------------------------------------------------------------------------ status


def status(output: Path, name: str | None) -> dict[Path, list[Record]]:
    """Every trial of one experiment, or of all, by their folders."""
    folders = [find_experiment(output, name)] if name else [*_experiments(output).values()]
    return {folder: read_records(folder) for folder in folders}


def log_file(output: Path, trial: str) -> Path:
    """The log that the trial's workers write.

    Raises:
        ConfigError: no such trial, or it has not begun.
    """
    record = find_trial(output, trial)
    path = record.folder / LOG
    if not path.exists():
        raise ConfigError(f"{record.experiment}/{record.name} is {record.state}: no log yet")
    return path


# ------------------------------------------------------------------------------------ stop, resume


def stop(output: Path, target: str) -> str:
    """Have an invocation end in order, or one trial save and stop; says which.

    Raises:
        ConfigError: nothing of that name is at work.
    """
    folders = _experiments(output)
    if target in folders:
        return _stop_invocation(folders[target])
    record = find_trial(output, target)
    label = f"{record.experiment}/{record.name}"
    begins = record.state not in ("running", "finished", "failed")
    if record.state != "running" and not (begins and at_work(record.folder.parents[1])):
        raise ConfigError(f"{label} is {record.state}: nothing to stop")
    record.folder.mkdir(parents=True, exist_ok=True)
    (record.folder / STOP).touch()
    return f"{label}: {'will not begin' if begins else 'saves and stops'}"


def _stop_invocation(folder: Path) -> str:
    lease = at_work(folder)
    if lease is None:
        raise ConfigError(f"{folder.name} is not running: nothing to stop")
    if lease.owner.is_local:
        os.kill(lease.owner.pid, signal.SIGTERM)
    else:
        (folder / STOP).touch()
    return f"{folder.name}: asked {lease.owner} to end"


def invocation_to_resume(
    output: Path, name: str, tracking_uri: str | None = None, storage: str | None = None
) -> Invocation:
    """What was asked for last under that name, a run or a sweep, to be run again.

    Args:
        tracking_uri, storage: in the place of those it was given; with the secrets, which were not
            kept.

    Raises:
        ConfigError: nothing was, or one of the addresses lacks its secret.
    """
    invocation = read_invocation(find_experiment(output, name))
    kept = invocation.options
    uri, storage = tracking_uri or kept.tracking_uri, storage or kept.storage
    for option, address in {"--tracking-uri": uri, "--storage": storage}.items():
        if address is not None and MASK in address:
            raise ConfigError(f"{name}: the secret in {address} was not kept: give {option}")
    # The folder may have moved since; what was to be trained again once is not to be every time.
    options = replace(
        kept, name=name, output=output, tracking_uri=uri, storage=storage, rerun="failed"
    )
    return replace(invocation, options=options)


# ----------------------------------------------------------------------------------------- compare


def compare(output: Path, first: str, second: str) -> tuple[Rows, Rows]:
    """Differences of configuration, then metrics, of two experiments or of two trials; each with a
    head. A setting that takes several values in an experiment shows them all.

    Raises:
        ConfigError: one of them does not exist, or one is a trial and the other an experiment.
    """
    folders = _experiments(output)
    if (first in folders) != (second in folders):
        raise ConfigError(f"compare two experiments or two trials: {first} and {second} are not")
    if first in folders:
        sides = [read_records(folders[name]) for name in (first, second)]
        metrics = _metrics_by_arm(sides)
    else:
        sides = [[find_trial(output, name)] for name in (first, second)]
        metrics = _metrics_of_trials(sides[0][0], sides[1][0])
    head = ["", first, second]
    return [head, *_differences(sides)], [[*head, "difference"], *metrics]


def _differences(sides: list[list[Record]]) -> Rows:
    settings = [[flat_configuration(record.folder) for record in side] for side in sides]
    keys = dict.fromkeys(key for side in settings for trial in side for key in trial)
    rows = []
    for key in keys:
        values = [dict.fromkeys(trial.get(key, EMPTY) for trial in side if trial)
                  for side in settings]  # fmt: skip
        if set(values[0]) != set(values[1]):
            rows.append([key, *(", ".join(of_side) or EMPTY for of_side in values)])
    return rows


def _metrics_by_arm(sides: list[list[Record]]) -> Rows:
    """AP and core-hours of every arm, as means over its finished seeds."""
    arms = dict.fromkeys(record.arm for side in sides for record in side)
    rows = []
    for arm in arms:
        for name, form in (("AP", ".2f"), ("core_hours", ".3f")):
            values = [
                _mean([v for r in side if r.arm == arm and (v := r.metric(name)) is not None])
                for side in sides
            ]
            rows.append([f"{arm}: {name}", *_cells(values, form)])
    return rows


def _metrics_of_trials(first: Record, second: Record) -> Rows:
    names = dict.fromkeys([*first.metrics, *second.metrics])
    values = [(name, [first.metric(name), second.metric(name)]) for name in names]
    rows = [["state", first.state, second.state, ""]]
    rows += [["epochs", str(len(first.history)), str(len(second.history)), ""]]
    return rows + [[name, *_cells(pair, ".4g")] for name, pair in values]


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None


def _cells(values: list[float | None], form: str) -> list[str]:
    first, second = values
    texts = [EMPTY if value is None else format(value, form) for value in values]
    return [
        *texts,
        EMPTY if first is None or second is None else format(second - first, f"+{form}"),
    ]
