"""Runs ``codetr`` as a process, as its users do, and reads what it leaves behind."""

from __future__ import annotations

import csv
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from codetr.data.digits import make_digits

CODETR = (sys.executable, "-c", "from orchestrator.cli import main; main()")
PATIENCE = 300


@dataclass
class Laboratory:
    """An experiment with its data, and a place for what it writes."""

    folder: Path
    output: Path
    environment: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen] = field(default_factory=list)

    def prepare(self, experiment: str, train_images: int = 24) -> Laboratory:
        """Write the experiment, and a few images for it."""
        (self.folder / "tiny.yaml").write_text(experiment)
        make_digits(self.folder / "digits", train_images=train_images, val_images=6, size=64)
        return self

    def start(
        self, *arguments: str, code: tuple[str, ...] = CODETR, experiment: str = "tiny.yaml"
    ) -> subprocess.Popen:
        """``codetr run``, in a session of its own: signals go to the whole of it, as a terminal
        sends them."""
        data = ("--data", str(self.folder / "digits"), "--output", str(self.output))
        return self.command("run", experiment, *data, *arguments, code=code)

    def command(self, *words: str, code: tuple[str, ...] = CODETR) -> subprocess.Popen:
        process = subprocess.Popen(
            [*code, *words],
            cwd=self.folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, **how: object) -> tuple[int, str]:
        """The command from its beginning to its end."""
        return finish(self.start(*arguments, **how))

    def clean(self) -> None:
        """What a failed test has left running."""
        for process in self.started:
            if process.poll() is None:
                for one in [*descendants(process), process]:
                    one.kill()

    def rows(self, name: str = "tiny") -> list[dict[str, str]]:
        with (self.output / name / "results.csv").open() as file:
            return list(csv.DictReader(file))

    def client(self, uri: str | None = None):
        from mlflow import MlflowClient

        return MlflowClient(uri or f"sqlite:///{self.output / 'mlflow.db'}")

    def runs(self, name: str = "tiny", uri: str | None = None) -> tuple[list, list]:
        """Parents and children of an MLflow experiment, the newest first."""
        client = self.client(uri)
        experiment = client.get_experiment_by_name(name)
        runs = client.search_runs([experiment.experiment_id])
        children = [run for run in runs if "trial_id" in run.data.tags]
        return [run for run in runs if run not in children], children


def read_until(process: subprocess.Popen, pattern: str) -> list[str]:
    """The lines up to the first that matches."""
    lines = []
    deadline = time.monotonic() + PATIENCE
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return lines
        assert time.monotonic() < deadline, lines
    raise AssertionError(f"ended without '{pattern}': {''.join(lines)}")


def finish(process: subprocess.Popen) -> tuple[int, str]:
    out, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, out


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


class TrackingServer:
    """An MLflow server on 127.0.0.1 that can be killed and started again in its place."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        folder.mkdir(exist_ok=True)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1",
                "--port", str(self.port), "--workers", "1",
                "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}",
                "--artifacts-destination", str(self.folder / "artifacts"),
            ],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health").close()
                break
            except OSError:
                assert self.process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.5)

    def kill(self) -> None:
        for one in descendants(self.process):
            one.kill()
        self.process.kill()
        self.process.wait()
