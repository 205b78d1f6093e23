"""Eight invocations that write into one PostgreSQL at once, beginning with its tables."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from laboratory import PATIENCE, free_port

pytestmark = pytest.mark.faults

WRITERS, EPOCHS = 8, 40
WRITER = f"""
import sys
from pathlib import Path
from trial_samples import sample_epoch, sample_plan
from dataclasses import replace
from orchestrator.recorder import Recorder

uri, output, name = sys.argv[1:]
plan = sample_plan(Path(output), tracking_uri=uri, name=name)
said = []
recorder = Recorder.open(plan, said.append)
for trial in plan.trials:
    recorder.begin(trial)
for number in range(1, {EPOCHS} + 1):
    for trial in plan.trials:
        history = [replace(sample_epoch(n, n / 100), time=1000.0 + n) for n in range(1, number + 1)]
        recorder.record(trial, history)
for trial in plan.trials:
    recorder.end(trial, "FINISHED")
recorder.close("FINISHED", [], patience=240)
assert not said, said
"""


def programs() -> Path | None:
    """The folder of PostgreSQL's own programs."""
    found = [shutil.which("initdb"), *map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    return next((Path(path).resolve().parent for path in found if path), None)


def as_somebody(command: list[str]) -> list[str]:
    """PostgreSQL refuses to be run by root."""
    if os.getuid() != 0:
        return command
    nobody = pwd.getpwnam("nobody")
    ids = [f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
    return ["setpriv", *ids, *command]


def run(command: list[str], folder: Path) -> None:
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)


@pytest.fixture
def database():
    """An empty database on 127.0.0.1; its address."""
    bin_folder = programs()
    if bin_folder is None:
        pytest.skip("no PostgreSQL on this machine")
    # Not below pytest's own folders, which are closed to others.
    folder = Path(
        subprocess.check_output(["mktemp", "-d", "/tmp/postgres.XXXXXX"], text=True).strip()
    )
    if os.getuid() == 0:
        shutil.chown(folder, "nobody")
    port, data = free_port(), folder / "data"
    initialise = [str(bin_folder / "initdb"), "-D", str(data), "-U", "codetr", "-A", "trust"]
    run(as_somebody(initialise), folder)
    control = [str(bin_folder / "pg_ctl"), "-D", str(data), "-w", "-l", str(folder / "log")]
    options = f"-p {port} -h 127.0.0.1 -k {folder}"
    run(as_somebody([*control, "-o", options, "start"]), folder)
    yield f"postgresql://codetr@127.0.0.1:{port}/postgres"
    run(as_somebody([*control, "-m", "immediate", "stop"]), folder)
    shutil.rmtree(folder)


@pytest.mark.timeout(900)
def test_every_point_of_eight_writers_arrives_once(database, tmp_path):
    from mlflow import MlflowClient

    samples = str(Path(__file__).parents[1] / "orchestrator")
    path = os.pathsep.join(filter(None, [samples, os.environ.get("PYTHONPATH")]))
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, database, str(tmp_path / f"w{number}"), f"w{number}"],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(WRITERS)
    ]  # fmt: skip
    for writer in writers:
        out, _ = writer.communicate(timeout=2 * PATIENCE)
        assert writer.returncode == 0, out
    client = MlflowClient(database)
    for number in range(WRITERS):
        experiment = client.get_experiment_by_name(f"w{number}")
        runs = client.search_runs([experiment.experiment_id])
        trials = [run for run in runs if "trial_id" in run.data.tags]
        assert (len(runs), len(trials)) == (4, 3)
        for run in trials:
            for metric in ("epoch", "val/AP", "train/total"):
                points = client.get_metric_history(run.info.run_id, metric)
                assert [p.step for p in points] == [*range(1, EPOCHS + 1)]
                assert [p.timestamp for p in points] == [
                    1_001_000 + 1000 * n for n in range(EPOCHS)
                ]
