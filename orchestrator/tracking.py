"""MLflow, the record of what was run; the only file that imports it.

One experiment for each name, one parent run for each invocation, one child run for each trial. A
child run belongs to its trial for ever: it is found by the trial's id, goes on where it stopped,
and moves beneath the newest invocation that includes the trial. Every operation may be repeated
without doing harm, also after its answer was lost: what could not be delivered is delivered later
(:mod:`orchestrator.recorder`).
"""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from filelock import FileLock

import codetr
from codetr.config import ConfigError
from orchestrator.board import Epoch
from orchestrator.owner import Owner
from orchestrator.plan import Plan, Trial
from orchestrator.wording import one_line, without_secrets

Status = Literal["FINISHED", "FAILED", "KILLED"]

PARAM_LENGTH = 500
"""MLflow's servers have refused longer values; nobody reads them either."""

METRICS_AT_ONCE = 1000
"""More are refused by MLflow's servers."""

_PERMANENT = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}
"""MLflow's codes of errors that trying again cannot mend. A permission that is denied is none: a
proxy says so, too, and an administrator may mend it."""

_COMPLETE = "codetr.complete"
"""Tag of a run whose parameters, inputs and configuration are all there."""

_INVOCATION = "codetr.invocation"
"""Tag of an invocation's run: its own name for itself."""

_LATER = "invocation-"
"""So begin names of invocations; the ids of MLflow's runs do not."""

_OPENING_SECONDS, _OPENING_PAUSE = 45.0, 2.0
"""Machines that make a database's tables at the same time fail each other; for so long, and after
pauses of about so many seconds, is it tried again."""


class TrackingError(ConfigError):
    """The tracking store cannot be used; the text names it without its secrets."""


class Tracker:
    """Writes one invocation into an MLflow store."""

    def __init__(self, plan: Plan, *, may_wait: bool = False) -> None:
        """Open the store and make it ready, before any trial starts: several processes that open a
        new SQLite file at once crash in its migrations.

        Args:
            may_wait: a store that does not answer now is tried again whenever something is to be
                written; :attr:`away` says why it did not.

        Raises:
            TrackingError: it cannot be reached, its address makes no sense, or waiting would not
                help, as where the experiment was deleted.
        """
        # Repeating is the Recorder's business: MLflow's client would create a run once more where
        # the answer to its request is lost.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        # It prints the addresses of runs, with the password that the store's address has.
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        import mlflow  # noqa: F401 - it sets the level of its own logging

        for library in ("mlflow", "alembic"):
            logging.getLogger(library).setLevel(logging.WARNING)
        # It logs each failure of a database with its traceback, which the Recorder tells in a line.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        self.plan = plan
        self._runs: dict[str, str] = {}
        self.client: Any = None
        self.parent = f"{_LATER}{uuid4().hex}"
        self.away: str | None = None
        try:
            self.parent = self.start(self.parent, self.invocation_tags, time.time())
        except TrackingError:
            raise
        except Exception as error:  # whatever the store's own library raises
            self.away = f"{self._named}: cannot be used: {one_line(error, plan.tracking_uri)}"
            if not may_wait or is_permanent(error):
                raise TrackingError(self.away) from None

    @property
    def _named(self) -> str:
        """The store, as the user has given it."""
        return f"--tracking-uri {without_secrets(self.plan.tracking_uri)}"

    @property
    def is_connected(self) -> bool:
        """Whether the store has answered, and the experiment is there to be written."""
        return self.client is not None

    def _connect(self) -> None:
        if self.client is None:
            client, experiment = self._open()
            if experiment.lifecycle_stage == "deleted":
                number = experiment.experiment_id
                raise TrackingError(
                    f"{self._named}: the experiment '{self.plan.name}' was deleted there: restore "
                    f"it ('mlflow experiments restore -x {number}'), or give another --name"
                )
            self.experiment_id = str(experiment.experiment_id)
            self._close_stale_runs(client)
            self.client = client

    def _open(self) -> tuple[Any, Any]:
        """A client of the store, which is made ready, and the experiment, which may be deleted."""
        if self._is_server:
            return self._client_and_experiment()
        from sqlalchemy import create_engine

        with create_engine(self.plan.tracking_uri).connect():
            pass  # else nothing would help
        self.plan.output.mkdir(parents=True, exist_ok=True)
        with FileLock(self.plan.output / ".mlflow.lock"):  # for those of this output
            give_up_at = time.monotonic() + _OPENING_SECONDS
            while time.monotonic() < give_up_at:
                with suppress(Exception):  # another machine makes the tables just now
                    return self._client_and_experiment()
                time.sleep(_OPENING_PAUSE * random.uniform(0.5, 1.5))
            return self._client_and_experiment()

    @property
    def _is_server(self) -> bool:
        return self.plan.tracking_uri.startswith(("http://", "https://"))

    def _client_and_experiment(self) -> tuple[Any, Any]:
        from mlflow import MlflowClient

        client = MlflowClient(self.plan.tracking_uri)
        found = client.get_experiment_by_name(self.plan.name)
        if found is not None:
            return client, found
        # A server has its own place for artifacts; beside a database they lie with the runs.
        place = self.plan.output / "artifacts" / self.plan.name
        artifacts = None if self._is_server else place.as_uri()
        made = client.create_experiment(self.plan.name, artifact_location=artifacts)
        return client, client.get_experiment(made)

    @staticmethod
    def _close_stale_runs(client: Any) -> None:
        """End what a killed invocation on this machine has left as running."""
        everywhere = [e.experiment_id for e in client.search_experiments()]
        for run in client.search_runs(everywhere, "attributes.status = 'RUNNING'"):
            owner = run.data.tags.get("codetr.owner")
            if owner is not None and Owner.of_tag(owner).is_gone:
                client.set_terminated(run.info.run_id, "KILLED")

    @property
    def invocation_tags(self) -> dict[str, str]:
        """Of the invocation's run."""
        plan = self.plan
        return {
            "mlflow.note.content": plan.experiment.question,
            "codetr.owner": Owner.this().tag,
            "experiment": plan.experiment.name,
            "profile": plan.profile,
            "git_revision": git_revision(),
            "dataset_fingerprint": plan.trials[0].facts.fingerprint,
            "trials": str(len(plan.trials)),
        }

    def start(self, invocation: str, tags: dict[str, str], at: float) -> str:
        """Create the run of an invocation, unless it is there; returns its id.

        Args:
            invocation: a name that no other invocation has.
            at: when it began, in seconds since 1970.
        """
        self._connect()
        if (known := self._parent_of(invocation)) is not None:
            return known
        run = self.client.create_run(
            self.experiment_id,
            run_name=f"{self.plan.experiment.name} ({self.plan.profile})",
            start_time=int(1000 * at),
            tags={**tags, _INVOCATION: invocation},
        )
        run_id = str(run.info.run_id)
        self._runs[invocation] = run_id
        if Owner.of_tag(tags["codetr.owner"]).is_gone:  # before it could tell of its beginning
            self.client.set_terminated(run_id, "KILLED", end_time=int(1000 * at))
        return run_id

    def _parent_of(self, invocation: str) -> str | None:
        if invocation not in self._runs:
            only_this = f"tags.`{_INVOCATION}` = '{invocation}'"
            found = self.client.search_runs([self.experiment_id], only_this)
            if not found:
                return None
            self._runs[invocation] = str(found[0].info.run_id)
        return self._runs[invocation]

    def beneath(self, parent: str) -> Tracker:
        """The same for another invocation's run, by its id, or by the invocation's name where there
        was no run yet."""
        self._connect()
        other = copy(self)
        other.parent = parent
        if parent.startswith(_LATER):
            known = self._parent_of(parent)  # the tags ask git
            other.parent = known or self.start(parent, self.invocation_tags, time.time())
        return other

    # ------------------------------------------------------------------------------------- a trial

    def begin(self, trial: Trial) -> None:
        """Create the trial's run or go on with it, as RUNNING."""
        self.adopt(trial)
        self.client.update_run(self._runs[trial.id], status="RUNNING")

    def discard(self, trial: Trial, before: float) -> None:
        """Put the trial's run into MLflow's bin: metrics cannot be taken out of a run, and the
        trial is trained anew.

        Args:
            before: seconds since 1970; a run that began later is the new one.
        """
        for run in self._found(trial):
            if run.info.start_time < 1000 * before:
                self.client.delete_run(run.info.run_id)
        self._runs.pop(trial.id, None)

    def adopt(self, trial: Trial) -> None:
        """Put the trial's run beneath this invocation, in whatever state it is."""
        run_id = self._run(trial)
        for key, value in {
            "mlflow.parentRunId": self.parent,
            "codetr.owner": Owner.this().tag,
        }.items():
            self.client.set_tag(run_id, key, value)

    def _found(self, trial: Trial) -> list[Any]:
        only_this = f"tags.trial_id = '{trial.id}'"
        return list(self.client.search_runs([self.experiment_id], only_this))

    def _run(self, trial: Trial) -> str:
        """The id of the trial's run, which is made if there is none."""
        if trial.id not in self._runs:
            found = self._found(trial)
            run = found[0] if found else self._create(trial)
            if _COMPLETE not in run.data.tags:
                self._describe_fully(run.info.run_id, trial)
            self._runs[trial.id] = str(run.info.run_id)
        return self._runs[trial.id]

    def _create(self, trial: Trial) -> Any:
        name = f"{trial.arm}, seed {trial.seed}"
        return self.client.create_run(self.experiment_id, run_name=name, tags=self._tags(trial))

    def _describe_fully(self, run_id: str, trial: Trial) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        params = flatten(configuration(trial))
        self.client.log_batch(
            run_id, params=[Param(key, value[:PARAM_LENGTH]) for key, value in params.items()]
        )
        dataset = Dataset(
            name=trial.data.dataset,
            digest=trial.facts.fingerprint[:36],
            source_type="local",
            source=json.dumps({"path": str(trial.data.path or trial.data.dataset)}),
            profile=trial.facts.model_dump_json(),
        )
        contexts = [InputTag("mlflow.data.context", context) for context in ("training", "eval")]
        self.client.log_inputs(run_id, [DatasetInput(dataset, [context]) for context in contexts])
        self.client.log_dict(run_id, configuration(trial), "config.yaml")
        self.client.set_tag(run_id, _COMPLETE, "yes")

    def _tags(self, trial: Trial) -> dict[str, str]:
        detector = trial.detector
        return {
            "mlflow.parentRunId": self.parent,
            "trial_id": trial.id,
            "arm": trial.arm,
            "k": str(detector.k),
            "heads": ", ".join(detector.head_names) or "none",
            "lambda_1": str(detector.lambda_1),
            "lambda_2": str(detector.lambda_2),
            "seed": str(trial.seed),
            "profile": self.plan.profile,
            "git_revision": git_revision(),
            "dataset_fingerprint": trial.facts.fingerprint,
        }

    def record(
        self, trial: Trial, epochs: Iterable[Epoch], at: float, notes: Sequence[str] = ()
    ) -> None:
        """Log the epochs that the run does not have yet.

        Args:
            at: when it was told, in seconds since 1970: the time of an epoch that does not say its
                own, as those of earlier versions do not.
            notes: all of the trial so far.
        """
        from mlflow.entities import Metric

        run_id = self._run(trial)
        # One by one: where something went wrong, an earlier one may be missing before a later one.
        known = {point.step for point in self.client.get_metric_history(run_id, "epoch")}
        for epoch in epochs:
            if epoch.epoch not in known:
                values = {"epoch": float(epoch.epoch), "step": float(epoch.step), **epoch.values}
                millis = int(1000 * (epoch.time or at))
                points = [Metric(key, value, millis, epoch.epoch) for key, value in values.items()]
                # In one batch: an epoch is there as a whole or not at all.
                self.client.log_batch(run_id, metrics=points)
        if notes:
            self.client.set_tag(run_id, "notes", "\n".join(notes))

    def measure(self, trial: Trial, values: dict[str, float], step: int, at: float) -> None:
        """Log what was found in the trial's detector, as far as the run does not have it yet.

        Args:
            values: by name.
            step: the epoch of the detector.
            at: when it was found, in seconds since 1970.
        """
        from mlflow.entities import Metric

        run_id = self._run(trial)
        known = self.client.get_run(run_id).data.metrics
        points = [
            Metric(key, value, int(1000 * at), step)
            for key, value in values.items()
            if known.get(key) != value
        ]
        for start in range(0, len(points), METRICS_AT_ONCE):
            self.client.log_batch(run_id, metrics=points[start : start + METRICS_AT_ONCE])

    def describe(self, trial: Trial | None, tags: dict[str, str]) -> None:
        """Tag the trial's run, or the invocation's."""
        run_id = self.parent if trial is None else self._run(trial)
        for key, value in tags.items():
            self.client.set_tag(run_id, key, value[:PARAM_LENGTH])

    def attach(self, trial: Trial, files: Iterable[Path]) -> None:
        """Add files to the trial's artifacts, as far as they are still there."""
        self._log_files(self._run(trial), files)

    def end(self, trial: Trial, status: Status, reason: str | None, at: float) -> None:
        """Give the trial's run its last state, unless it has it already.

        Args:
            at: when it ended, in seconds since 1970.
        """
        run_id = self._run(trial)
        self.client.set_tag(run_id, "reason", (reason or "")[:PARAM_LENGTH])
        if self.client.get_run(run_id).info.status != status:
            self.client.set_terminated(run_id, status, end_time=int(1000 * at))

    def close(self, status: Status, files: Iterable[Path], at: float) -> None:
        """End the invocation's run, with the tables and pictures of the whole."""
        self._log_files(self.parent, files)
        self.client.set_terminated(self.parent, status, end_time=int(1000 * at))

    def _log_files(self, run_id: str, files: Iterable[Path]) -> None:
        for file in files:
            if file.exists():
                self.client.log_artifact(run_id, str(file))


def is_permanent(error: Exception) -> bool:
    """Whether trying again cannot mend it, in MLflow's own words."""
    return getattr(error, "error_code", None) in _PERMANENT


# --------------------------------------------------------------------------------------- its terms


def configuration(trial: Trial) -> dict[str, Any]:
    """What a trial is, as plain values for YAML."""
    parts = {"arm", "seed", "detector", "training", "data"}
    if trial.schedule:
        parts.add("schedule")
    return trial.model_dump(mode="json", include=parts)


def flatten(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested values by dotted keys; a list of mappings (the heads) is numbered from 1."""
    if isinstance(values, list) and values and isinstance(values[0], dict):
        values = {str(number): value for number, value in enumerate(values, start=1)}
    if isinstance(values, dict) and values:
        inner = [flatten(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in values.items()]
        return {key: value for part in inner for key, value in part.items()}
    return {prefix: values if isinstance(values, str) else json.dumps(values)}


REVISION = "CODETR_REVISION"
"""In the environment of a job: the commit of the tree that was uploaded without its history."""


def git_revision() -> str:
    """The commit of this checkout, ``+`` if it is changed; of an uploaded one as it was told; in an
    installed wheel its version."""
    root = Path(codetr.__file__).parents[1]
    return revision_of(root) or os.environ.get(REVISION) or f"codetr {codetr.__version__}"


def revision_of(root: Path) -> str | None:
    """The commit of a checkout of codetr, ``+`` if it is changed; None if it is not one."""
    if not (root / ".git").exists() or not (root / "codetr" / "__init__.py").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
