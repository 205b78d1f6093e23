"""MLflow, the record of what was run; the only file that imports it.

One experiment for each name, one parent run for each invocation, one child run for each trial. A
child run belongs to its trial for ever: it is found by the trial's id, goes on where it stopped,
and moves beneath the newest invocation that includes the trial. Every operation may be repeated
without doing harm, so what could not be delivered is simply delivered later.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import psutil

import codetr
from codetr.config import ConfigError
from orchestrator.board import History
from orchestrator.plan import Plan, Trial

Status = Literal["FINISHED", "FAILED", "KILLED"]

PARAM_LENGTH = 500
"""MLflow's servers have refused longer values; nobody reads them either."""

_PERMANENT = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"}
"""MLflow's codes of errors that trying again cannot mend."""


class TrackingError(ConfigError):
    """The tracking store cannot be used; the text names it without its password."""


class Tracker:
    """Writes one invocation into an MLflow store."""

    def __init__(self, plan: Plan) -> None:
        """Open the store and make it ready, before any trial starts: several processes that open a
        new SQLite file at once crash in its migrations.

        Raises:
            TrackingError: it cannot be reached, or its address makes no sense.
        """
        # A server that is gone should cost seconds; repeating is the Recorder's business.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        # It prints the addresses of runs, with the password that the store's address has.
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        from mlflow import MlflowClient

        for library in ("mlflow", "alembic"):
            logging.getLogger(library).setLevel(logging.WARNING)
        self.plan = plan
        self._runs: dict[str, str] = {}
        try:
            self.client = MlflowClient(plan.tracking_uri)
            self.experiment_id = self._experiment()
            self._close_stale_runs()
            self.parent = self._start_parent()
        except Exception as error:  # whatever the store's own library raises
            reason = " ".join(str(error).split())[:200]
            raise TrackingError(
                f"--tracking-uri {without_password(plan.tracking_uri)}: cannot be used: "
                f"{without_password(reason)}"
            ) from error

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.plan.name)
        if found is not None:
            return str(found.experiment_id)
        # A server has its own place for artifacts; beside a database they lie with the runs.
        is_server = self.plan.tracking_uri.startswith(("http://", "https://"))
        artifacts = (
            None if is_server else (self.plan.output / "artifacts" / self.plan.name).as_uri()
        )
        return str(self.client.create_experiment(self.plan.name, artifact_location=artifacts))

    def _close_stale_runs(self) -> None:
        """End what a killed invocation on this machine has left as running."""
        everywhere = [e.experiment_id for e in self.client.search_experiments()]
        for run in self.client.search_runs(everywhere, "attributes.status = 'RUNNING'"):
            owner = run.data.tags.get("codetr.owner")
            if owner is not None and _is_dead(owner):
                self.client.set_terminated(run.info.run_id, "KILLED")

    def _start_parent(self) -> str:
        plan = self.plan
        trial = plan.trials[0]
        run = self.client.create_run(
            self.experiment_id,
            run_name=f"{plan.experiment.name} ({plan.profile})",
            tags={
                "mlflow.note.content": plan.experiment.question,
                "codetr.owner": _owner(),
                "experiment": plan.experiment.name,
                "profile": plan.profile,
                "git_revision": git_revision(),
                "dataset_fingerprint": trial.facts.fingerprint,
                "trials": str(len(plan.trials)),
            },
        )
        return str(run.info.run_id)

    # ------------------------------------------------------------------------------------- a trial

    def begin(self, trial: Trial) -> None:
        """Create the trial's run or go on with it, as RUNNING."""
        self.adopt(trial)
        self.client.update_run(self._runs[trial.id], status="RUNNING")

    def discard(self, trial: Trial) -> None:
        """Put the trial's run into MLflow's bin: metrics cannot be taken out of a run, and the
        trial is trained anew."""
        for run in self.client.search_runs([self.experiment_id], f"tags.trial_id = '{trial.id}'"):
            self.client.delete_run(run.info.run_id)
        self._runs.pop(trial.id, None)

    def adopt(self, trial: Trial) -> None:
        """Put the trial's run beneath this invocation, in whatever state it is."""
        found = self.client.search_runs(
            [self.experiment_id], f"tags.trial_id = '{trial.id}'", max_results=1
        )
        run_id = found[0].info.run_id if found else self._create(trial)
        for key, value in {"mlflow.parentRunId": self.parent, "codetr.owner": _owner()}.items():
            self.client.set_tag(run_id, key, value)
        self._runs[trial.id] = run_id

    def _create(self, trial: Trial) -> str:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        run = self.client.create_run(
            self.experiment_id, run_name=f"{trial.arm}, seed {trial.seed}", tags=self._tags(trial)
        )
        run_id = str(run.info.run_id)
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
        return run_id

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

    def record(self, trial: Trial, history: History) -> None:
        """Log the epochs that the run does not have yet."""
        from mlflow.entities import Metric

        run_id = self._runs[trial.id]
        known = self.client.get_run(run_id).data.metrics.get("epoch", 0)
        now = int(time.time() * 1000)
        for epoch in history:
            if epoch.epoch > known:
                values = {"epoch": float(epoch.epoch), "step": float(epoch.step), **epoch.values}
                # In one batch: an epoch is there as a whole or not at all.
                self.client.log_batch(
                    run_id,
                    metrics=[Metric(key, value, now, epoch.epoch) for key, value in values.items()],
                )
        if notes := [f"epoch {epoch.epoch}: {note}" for epoch in history for note in epoch.notes]:
            self.client.set_tag(run_id, "notes", "\n".join(notes))

    def describe(self, trial: Trial | None, tags: dict[str, str]) -> None:
        """Tag the trial's run, or the invocation's."""
        run_id = self.parent if trial is None else self._runs[trial.id]
        for key, value in tags.items():
            self.client.set_tag(run_id, key, value[:PARAM_LENGTH])

    def attach(self, trial: Trial, files: list[Path]) -> None:
        """Add files to the trial's artifacts."""
        for file in files:
            self.client.log_artifact(self._runs[trial.id], str(file))

    def end(self, trial: Trial, status: Status, reason: str | None = None) -> None:
        """Give the trial's run its last state, unless it has it already."""
        run_id = self._runs[trial.id]
        self.client.set_tag(run_id, "reason", (reason or "")[:PARAM_LENGTH])
        if self.client.get_run(run_id).info.status != status:
            self.client.set_terminated(run_id, status)

    def close(self, status: Status, files: list[Path]) -> None:
        """End the invocation's run, with the tables and pictures of the whole."""
        for file in files:
            self.client.log_artifact(self.parent, str(file))
        self.client.set_terminated(self.parent, status)


class Recorder:
    """Delivers to a :class:`Tracker` in order, in a thread of its own: nobody waits for MLflow.

    What fails because the store is away is tried again; the operations behind it wait.
    """

    def __init__(self, tracker: Tracker, warn: Callable[[str], None]) -> None:
        self.tracker = tracker
        self._warn = warn
        self._operations: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._give_up_at: float | None = None
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._thread.start()

    def __call__(self, operation: Callable[..., None], *args: Any) -> None:
        """Have ``operation(*args)``, a method of the tracker, done after all before it."""
        self._operations.put(lambda: operation(*args))

    def close(self, patience: float) -> None:
        """Wait until everything is delivered, for at most ``patience`` seconds."""
        self._give_up_at = time.monotonic() + patience
        self._operations.put(None)
        self._thread.join(patience)
        if self._thread.is_alive():
            self._warn(
                "MLflow did not take everything in time; the same command run again delivers "
                "the rest"
            )

    def _deliver(self) -> None:
        while (operation := self._operations.get()) is not None:
            pause = 1.0
            while not self._attempt(operation, pause):
                time.sleep(pause)
                pause = min(2 * pause, 10.0)

    def _attempt(self, operation: Callable[[], None], pause: float) -> bool:
        """True if done, or if it never can be."""
        try:
            operation()
        except Exception as error:  # a store's failure must never be the training's
            text = without_password(" ".join(str(error).split()))[:200]
            permanent = getattr(error, "error_code", None) in _PERMANENT
            if permanent or pause == 1.0:
                self._warn(f"MLflow: {text}" + ("" if permanent else "; trying again"))
            return permanent
        return True


# --------------------------------------------------------------------------------------- its terms


def configuration(trial: Trial) -> dict[str, Any]:
    """What a trial is, as plain values for YAML."""
    return trial.model_dump(mode="json", include={"arm", "seed", "detector", "training", "data"})


def flatten(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested values by dotted keys; a list of mappings (the heads) is numbered from 1."""
    if isinstance(values, list) and values and isinstance(values[0], dict):
        values = {str(number): value for number, value in enumerate(values, start=1)}
    if isinstance(values, dict) and values:
        inner = [flatten(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in values.items()]
        return {key: value for part in inner for key, value in part.items()}
    return {prefix: values if isinstance(values, str) else json.dumps(values)}


def without_password(text: str) -> str:
    """``postgresql://me:secret@host`` -> ``postgresql://me:***@host``."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)


def git_revision() -> str:
    """The commit of this checkout, ``+`` if it is changed; in an installed wheel its version."""
    root = Path(codetr.__file__).parents[1]
    if not (root / ".git").exists():
        return f"codetr {codetr.__version__}"
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return f"codetr {codetr.__version__}"
    return done.stdout.strip()


def _owner() -> str:
    """Which process a run belongs to: host, number and starting time, for numbers come again."""
    process = psutil.Process()
    return f"{socket.gethostname()} {process.pid} {process.create_time():.0f}"


def _is_dead(owner: str) -> bool:
    """Whether that process ran on this machine and is gone."""
    host, pid, started = owner.rsplit(" ", 2)
    if host != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(started)) > 2
    except psutil.NoSuchProcess:
        return True
