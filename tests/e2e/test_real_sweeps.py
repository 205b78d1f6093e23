"""``codetr sweep`` on real Ray Tune, Ray Train and MLflow."""

import signal
import sys
import time
from collections import Counter

import psutil
import pytest
from laboratory import Laboratory, descendants, finish, read_until
from test_run import EXPERIMENT

from orchestrator.experiment import load_experiment
from orchestrator.plan import Options, make_plan
from orchestrator.records import read_records

pytestmark = pytest.mark.e2e

EPOCHS = 40
"""So many that ``codetr stop`` comes before the last of them, however fast the machine is."""

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
def laboratory(tmp_path):
    laboratory = Laboratory(tmp_path, tmp_path / "runs").prepare(EXPERIMENT)
    laboratory.environment = {"EPOCH_LOG": str(tmp_path / "epochs.log")}
    yield laboratory
    laboratory.clean()


def test_a_grid_of_real_trainings_stopped_resumed_and_the_best_of_it(laboratory):
    """One of the three suggestions is the same configuration as another: trained once."""
    output, data = ("--output", str(laboratory.output)), str(laboratory.folder / "digits")
    command = (
        "sweep", "tiny.yaml", "--data", data, *output, "--set", f"epochs={EPOCHS}",
        "--over", "heads=[]", "--over", "positive_queries.max=10,20,10.0",
        "--searcher", "grid", "--scheduler", "none",
    )  # fmt: skip
    process = laboratory.command(*command)
    read_until(process, f"epoch 1/{EPOCHS}")
    assert "asked" in finish(laboratory.command("stop", "tiny", *output))[1]
    code, out = finish(process)
    assert code == 128 + signal.SIGTERM, out

    # One trial alone is asked to stop: what stands for the same waits for it no longer.
    process = laboratory.command("resume", "tiny", *output)
    read_until(process, "epoch [0-9]+/")
    (trial, *_) = [r for r in read_records(laboratory.output / "tiny") if r.state == "running"]
    assert "saves and stops" in finish(laboratory.command("stop", trial.id, *output))[1]
    code, out = finish(process)
    assert code == 1, out
    states = {row["trial_id"]: row["status"].split()[0] for row in laboratory.rows()}
    assert states.pop(trial.id) == "interrupted"
    assert [*states.values()] == ["finished"]
    code, out = finish(laboratory.command("resume", "tiny", *output))
    assert code == 0, out
    assert f"epoch {EPOCHS}/{EPOCHS}" in out

    found = laboratory.rows()
    assert Counter(row["status"] for row in found) == {"finished": 2, "finished (same trial)": 1}
    assert len(list((laboratory.output / "tiny" / "trials").iterdir())) == 2
    parents, children = laboratory.runs()
    assert [run.info.status for run in parents] == ["FINISHED", "FAILED", "KILLED"]
    parent = parents[0]
    assert len(children) == 2
    for run in children:
        tags = run.data.tags
        assert tags["mlflow.parentRunId"] == parent.info.run_id
        assert tags["suggestion.heads"] == "[]"
        assert tags["suggestion.positive_queries.max"] in ("10", "20", "10.0")
        assert tags["stop_reason"] == "all epochs"
        assert tags["rank"] in ("1", "2")
        points = laboratory.client().get_metric_history(run.info.run_id, "val/AP")
        assert [point.step for point in points] == [*range(1, EPOCHS + 1)]
    best = load_experiment(str(laboratory.output / "tiny" / "best.yaml"))
    assert [t.id for t in make_plan(best, Options(workers=1)).trials] == [found[0]["trial_id"]]
    # Again: there is nothing left to train, so Ray is not even started.
    code, out = finish(laboratory.command(*command))
    assert (code, "starting Ray" in out) == (0, False), out
    assert laboratory.rows() == found


@pytest.mark.faults
def test_asha_frees_its_workers_and_a_killed_sweep_goes_on(laboratory):
    """Five trials in two places, the driver killed in the middle; nothing is trained twice."""
    (laboratory.folder / "fake.py").write_text(FAKE_TRAINING)
    fake = (sys.executable, "fake.py", str(laboratory.folder / "digits"))
    process = laboratory.command(code=fake)
    lines = read_until(process, ": asha, after")
    assert process.poll() is None, "".join(lines)
    time.sleep(6)  # Tune writes down its state every five seconds
    ours = descendants(process)
    process.kill()
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(ours, timeout=60)
    # Two agents of Ray's may outlive their raylet for a while; nothing that trains may.
    assert {p.name() for p in alive} <= {"ray::RuntimeEnvAgent", "ray::DashboardAgent"}
    for agent in alive:
        agent.kill()

    code, out = finish(laboratory.command(code=fake))
    assert code == 0, out
    found = laboratory.rows()
    assert len(found) == 5
    assert (found[0]["lambda_1"], found[0]["status"], found[0]["AP"]) == ("4", "finished", "40.0")
    stopped = [row for row in found if row["status"] == "stopped"]
    assert stopped
    assert all(row["stop_reason"].startswith("asha, after epoch") for row in stopped)
    assert {row["status"] for row in found} == {"finished", "stopped"}
    # At most the epoch that was cut off by the kill is trained again, in each of two places.
    trained = Counter((laboratory.folder / "epochs.log").read_text().splitlines())
    assert sum(trained.values()) <= len(trained) + 2

    parents, children = laboratory.runs()
    assert sorted(run.info.status for run in parents) == ["FINISHED", "KILLED"]
    assert len(children) == 5
    newest = next(run for run in parents if run.info.status == "FINISHED")
    for run in children:
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == newest.info.run_id
    assert sorted(run.data.tags["rank"] for run in children) == ["1", "2", "3", "4", "5"]
    assert sum("asha" in run.data.tags["stop_reason"] for run in children) == len(stopped)
