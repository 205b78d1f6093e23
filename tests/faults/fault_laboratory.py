"""Runs ``codetr run`` as a process, waits for a moment, and reads what it leaves behind."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from codetr.checkpoint import load_checkpoint

EPOCHS = 5
EXPERIMENT = f"""
question: What does a fault change?
detector:
  backbone: {{name: tiny, pretrained: false, frozen_stages: -1, frozen_norm: true}}
  transformer: {{embed_dim: 32, ffn_dim: 32, attention_heads: 4, sampling_points: 2,
                encoder_layers: 1, decoder_layers: 2, levels: 3, group_norm_groups: 8}}
  queries: {{count: 20, two_stage: false, box_refinement: false}}
  positive_queries: {{max: 20}}
training: {{epochs: {EPOCHS}, batch_size: 4, learning_rate: 1.0e-3, drop_epochs: [4]}}
data: {{short_sides: [], crop: false}}
arms:
  "K=0": {{detector: {{heads: []}}}}
  "K=1": {{detector: {{heads: [atss]}}}}
profiles:
  laptop: {{about: as small as can be}}
"""
"""Both arms train at the same time, each with one worker."""

PATIENCE = 300
CODETR = (sys.executable, "-c", "from orchestrator.cli import main; main()")
SAME = ("arm", "seed", "AP", "AP50", "AP75", "epochs", "status", "trial_id")
"""Columns of the table that a fault must not change; seconds are another matter."""


@dataclass(frozen=True)
class Outcome:
    """What must come out the same: the table, and each arm's final weights."""

    table: list[dict[str, str]]
    weights: dict[str, str]


@dataclass
class Laboratory:
    """An experiment with its data, and a place for what it writes."""

    folder: Path
    output: Path
    started: list[subprocess.Popen] = field(default_factory=list)

    def start(
        self, *arguments: str, code: tuple[str, ...] = CODETR, experiment: str = "tiny.yaml"
    ) -> subprocess.Popen:
        data = ("--data", str(self.folder / "digits"), "--output", str(self.output))
        process = subprocess.Popen(
            [*code, "run", experiment, *data, *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
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
                for one in [*descendants(process), psutil.Process(process.pid)]:
                    one.kill()

    def rows(self, name: str = "tiny") -> list[dict[str, str]]:
        with (self.output / name / "results.csv").open() as file:
            return list(csv.DictReader(file))

    def checkpoints(self, arm: str, name: str = "tiny") -> list[Path]:
        """Folders of an arm's checkpoints, the last one last."""
        return sorted((self.output / name / "trials").glob(f"{arm}.*/epoch-*"))

    def last_checkpoint(self, arm: str) -> Path:
        """The last one that the arm's trial has reported; the disk may have a newer one that was
        cut off on its way."""
        import ray.train

        (folder,) = (self.output / "tiny" / "trials").glob(f"{arm}.*")
        return Path(ray.train.Result.from_path(str(folder)).checkpoint.path)

    def outcome(self, name: str = "tiny") -> Outcome:
        table = [{column: row[column] for column in SAME} for row in self.rows(name)]
        arms = {path.name.split(".")[0] for path in (self.output / name / "trials").iterdir()}
        return Outcome(table, {arm: fingerprint(self.checkpoints(arm, name)[-1]) for arm in arms})

    def runs(self, uri: str | None = None, name: str = "tiny") -> list:
        """The MLflow runs of the trials."""
        runs = self.client(uri).search_runs(
            [self.client(uri).get_experiment_by_name(name).experiment_id]
        )
        return [run for run in runs if "trial_id" in run.data.tags]

    def client(self, uri: str | None = None):
        from mlflow import MlflowClient

        return MlflowClient(uri or f"sqlite:///{self.output / 'mlflow.db'}")

    def require_each_epoch_once(self, uri: str | None = None) -> None:
        """Two runs, finished, with every epoch once and in order."""
        client, runs = self.client(uri), self.runs(uri)
        assert sorted(run.data.tags["arm"] for run in runs) == ["K=0", "K=1"]
        assert {run.info.status for run in runs} == {"FINISHED"}
        for run in runs:
            for metric in ("train/total", "val/AP"):
                points = client.get_metric_history(run.info.run_id, metric)
                assert [point.step for point in points] == [*range(1, EPOCHS + 1)]


def fingerprint(folder: Path) -> str:
    """A hash of every bit of a checkpoint's weights."""
    digest = hashlib.sha256()
    for name, value in load_checkpoint(folder).model.items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


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


def actors(process: subprocess.Popen, kind: str) -> list[psutil.Process]:
    """Ray's processes of the command that are actors of this kind."""
    found = []
    for one in descendants(process):
        try:
            if kind in " ".join(one.cmdline()):
                found.append(one)
        except psutil.Error:  # gone meanwhile
            continue
    return found
