"""``codetr sweep`` on real Ray Tune, Ray Train and MLflow."""

import csv
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from test_run import CODETR, EXPERIMENT

from codetr.data.digits import make_digits
from orchestrator.experiment import load_experiment
from orchestrator.plan import Options, make_plan

pytestmark = pytest.mark.e2e

PATIENCE = 400

FAKE_TRAINING = '''
"""A sweep whose trials are real Ray Train jobs that only pretend to train."""
import sys
from pathlib import Path
from rich.console import Console
from orchestrator.console import PlainView
from orchestrator.plan import Options
from orchestrator.sweep import SweepOptions, make_sweep
from orchestrator.sweep_run import run_sweep

def loop(job):
    import json, os, tempfile, time
    from pathlib import Path
    import ray.train
    trial, history = job["trial"], []
    if saved := ray.train.get_checkpoint():
        with saved.as_directory() as folder:
            history = json.loads((Path(folder) / "history.json").read_text())
    epochs = trial["training"]["epochs"]
    for epoch in range(len(history) + 1, epochs + 1):
        time.sleep(1)
        ap = trial["detector"]["lambda_1"] / 10 * epoch / epochs
        values = {"val/AP": ap, "train/total": 1.0, "cost/images_per_second": 1.0,
                  "cost/core_hours": 0.001 * epoch}
        history.append({"epoch": epoch, "step": epoch, "values": values})
        with open(os.environ["EPOCH_LOG"], "a") as log:
            log.write(f"{trial['arm']} {epoch}\\n")
        folder = Path(tempfile.mkdtemp(dir=Path.cwd()))
        (folder / "history.json").write_text(json.dumps(history))
        ray.train.report({"epoch": epoch, "AP": ap, "history": history},
                         checkpoint=ray.train.Checkpoint.from_directory(str(folder)))

if __name__ == "__main__":
    common = Options(output=Path("runs"), data=sys.argv[1], workers=1, settings=("epochs=4",))
    sweep = make_sweep("tiny.yaml", SweepOptions(
        over=("lambda_1=4,2,1,0.5,0.25", "heads=[atss]"), searcher="grid", common=common))
    outcome = run_sweep(sweep, PlainView(Console()), loop)
    sys.exit(outcome.exit_code)
'''


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "tiny.yaml").write_text(EXPERIMENT)
    make_digits(tmp_path / "digits", train_images=24, val_images=6, size=64)
    return tmp_path


def start(folder: Path, *command: str) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "EPOCH_LOG": str(folder / "epochs.log")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "runs" / "tiny" / "results.csv").open() as file:
        return list(csv.DictReader(file))


def runs(folder: Path) -> tuple[list, list]:
    """Parents and children of the MLflow experiment."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    children = [run for run in found if "trial_id" in run.data.tags]
    return [run for run in found if run not in children], children


def test_a_grid_of_real_trainings_and_the_best_of_it(folder):
    """One of the three suggestions is the same configuration as another: trained once."""
    over = ("--over", "heads=[]", "--over", "positive_queries.max=10,20,10.0")
    options = ("--searcher", "grid", "--scheduler", "none", "--set", "epochs=1")
    command = (*CODETR, "sweep", "tiny.yaml", "--data", str(folder / "digits"), *over, *options)
    process = start(folder, *command)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    found = rows(folder)
    assert Counter(row["status"] for row in found) == {"finished": 2, "finished (same trial)": 1}
    assert len(list((folder / "runs" / "tiny" / "trials").iterdir())) == 2
    (parent,), children = runs(folder)
    assert parent.info.status == "FINISHED"
    assert len(children) == 2
    for run in children:
        tags = run.data.tags
        assert tags["mlflow.parentRunId"] == parent.info.run_id
        assert tags["suggestion.heads"] == "[]"
        assert tags["suggestion.positive_queries.max"] in ("10", "20", "10.0")
        assert tags["stop_reason"] == "all epochs"
        assert tags["rank"] in ("1", "2")
    best = load_experiment(str(folder / "runs" / "tiny" / "best.yaml"))
    assert [t.id for t in make_plan(best, Options(workers=1)).trials] == [found[0]["trial_id"]]
    # Again: there is nothing left to train, so Ray is not even started.
    out, _ = start(folder, *command).communicate(timeout=PATIENCE)
    assert "starting Ray" not in out
    assert rows(folder) == found


@pytest.mark.faults
def test_asha_frees_its_workers_and_a_killed_sweep_goes_on(folder):
    """Five trials in two places, the driver killed in the middle; nothing is trained twice."""
    (folder / "fake.py").write_text(FAKE_TRAINING)
    command = (sys.executable, "fake.py", str(folder / "digits"))
    process = start(folder, *command)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if ": asha, after" in line:
            break
    assert process.poll() is None, "".join(lines)
    time.sleep(6)  # Tune writes down its state every five seconds
    ours = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(ours, timeout=60)
    # Two agents of Ray's may outlive their raylet for a while; nothing that trains may.
    assert {p.name() for p in alive} <= {"ray::RuntimeEnvAgent", "ray::DashboardAgent"}
    for agent in alive:
        agent.kill()

    process = start(folder, *command)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    found = rows(folder)
    assert len(found) == 5
    assert (found[0]["lambda_1"], found[0]["status"], found[0]["AP"]) == ("4", "finished", "40.0")
    stopped = [row for row in found if row["status"] == "stopped"]
    assert stopped
    assert all(row["stop_reason"].startswith("asha, after epoch") for row in stopped)
    assert {row["status"] for row in found} == {"finished", "stopped"}
    # At most the epoch that was cut off by the kill is trained again, in each of two places.
    trained = Counter((folder / "epochs.log").read_text().splitlines())
    assert sum(trained.values()) <= len(trained) + 2

    parents, children = runs(folder)
    assert sorted(run.info.status for run in parents) == ["FINISHED", "KILLED"]
    assert len(children) == 5
    newest = next(run for run in parents if run.info.status == "FINISHED")
    for run in children:
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == newest.info.run_id
    assert sorted(run.data.tags["rank"] for run in children) == ["1", "2", "3", "4", "5"]
    assert sum("asha" in run.data.tags["stop_reason"] for run in children) == len(stopped)
