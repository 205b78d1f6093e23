"""``codetr sweep --scheduler pbt`` on real Ray Train and MLflow; what it finds is trained again."""

import hashlib
import re
import signal
from pathlib import Path

import psutil
import pytest
import yaml
from laboratory import Laboratory, descendants, finish, read_until
from test_run import EXPERIMENT

from codetr.checkpoint import load_checkpoint
from orchestrator.experiment import load_experiment
from orchestrator.plan import Options, make_plan

pytestmark = pytest.mark.e2e

SPACE = ("--over", "learning_rate=1e-4..1e-2:log", "--over", "lambda_2=0.5,1,2,4")
KEPT = ("rank", "suggestion", "member", "origin", "schedule", "AP", "epochs", "status",
        "stop_reason", "trial_id", "learning_rate", "lambda_2")  # fmt: skip


@pytest.fixture
def laboratory(tmp_path):
    laboratory = Laboratory(tmp_path, tmp_path / "runs").prepare(EXPERIMENT, train_images=16)
    yield laboratory
    laboratory.clean()


def sweep(laboratory, *more):
    return (
        "sweep", "tiny.yaml", "--data", str(laboratory.folder / "digits"),
        "--output", str(laboratory.output), "--set", "heads=[atss]", "--scheduler", "pbt",
        *SPACE, *more,
    )  # fmt: skip


def weights(laboratory, name, trial):
    """A hash of every bit of the weights after the trial's last epoch."""
    (folder,) = (laboratory.output / name / "trials").glob(f"*.{trial}")
    checkpoint = load_checkpoint(max(folder.glob("epoch-*")))
    assert checkpoint.epoch == checkpoint.training.epochs
    digest = hashlib.sha256()
    for key, value in checkpoint.model.items():
        digest.update(key.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def losses(laboratory, name, trial):
    """Of every epoch, as the run has them that MLflow knows of the trial."""
    (run,) = [r for r in laboratory.runs(name)[1] if r.data.tags["trial_id"] == trial]
    points = laboratory.client().get_metric_history(run.info.run_id, "train/total")
    return [point.value for point in points]


@pytest.mark.faults  # takes minutes: not in a plain run
@pytest.mark.timeout(900)
def test_a_member_that_exploited_and_explored_is_a_trial_that_run_repeats_to_the_bit(laboratory):
    """Two members in one place: nobody may wait for a place that a waiting member holds."""
    more = ("--samples", "2", "--max-concurrent", "1", "--set", "epochs=4", "--interval", "2")
    code, out = finish(laboratory.command(*sweep(laboratory, *more)))
    assert code == 0, out
    rows = laboratory.rows()
    assert sorted(row["status"] for row in rows) == ["finished", "finished", "stopped"]
    (explored,) = [row for row in rows if row["schedule"]]
    (replaced,) = [row for row in rows if row["status"] == "stopped"]
    (kept,) = [row for row in rows if row not in (explored, replaced)]
    assert (replaced["epochs"], explored["epochs"], kept["epochs"]) == ("2", "4", "4")
    assert explored["origin"] == f"#{kept['suggestion']} after epoch 2"
    assert replaced["stop_reason"] == f"replaced by #3, from #{kept['suggestion']}, after epoch 2"
    assert explored["member"] == replaced["member"]

    (parent,), children = laboratory.runs()
    runs = {run.data.tags["trial_id"]: run for run in children}
    assert set(runs) == {row["trial_id"] for row in rows}
    for row in rows:
        run = runs[row["trial_id"]]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["rank"] == row["rank"]
        assert run.data.tags["suggestion.lambda_2"] == row["lambda_2"]
        assert run.data.tags["stop_reason"] == (row["stop_reason"] or "all epochs")
        points = laboratory.client().get_metric_history(run.info.run_id, "val/AP")
        assert [point.step for point in points] == [*range(1, int(row["epochs"]) + 1)]
    assert runs[explored["trial_id"]].data.params["schedule.1.after_epoch"] == "2"

    # The best of them, and the other one beside it, from the beginning.
    file = laboratory.output / "tiny" / "best.yaml"
    (best,) = make_plan(load_experiment(str(file)), Options(workers=1)).trials
    assert best.id == rows[0]["trial_id"]
    (folder,) = (laboratory.output / "tiny" / "trials").glob(f"*.{explored['trial_id']}")
    schedule = yaml.safe_load((folder / "config.yaml").read_text())["schedule"]
    # What it was handed over is gone, now that it has checkpoints of its own.
    assert [path.name[:10] for path in sorted(folder.glob("epoch-*"))] == [
        "epoch-0003",
        "epoch-0004",
    ]
    arms = {"kept": {"schedule": []}, "explored": {"schedule": schedule}}
    again = {**yaml.safe_load(file.read_text()), "arms": arms}
    (laboratory.folder / "again.yaml").write_text(yaml.safe_dump(again))
    code, out = laboratory.run("--concurrency", "2", experiment="again.yaml")
    assert code == 0, out
    assert "after epoch 2: " in out  # the plan says what will change
    trained = {row["arm"]: row for row in laboratory.rows("again")}
    for arm, row in (("kept", kept), ("explored", explored)):
        assert (trained[arm]["trial_id"], trained[arm]["AP"]) == (row["trial_id"], row["AP"])
        for what in (weights, losses):
            ours, theirs = (what(laboratory, name, row["trial_id"]) for name in ("tiny", "again"))
            assert ours == theirs
    assert losses(laboratory, "tiny", kept["trial_id"]) != losses(
        laboratory, "tiny", explored["trial_id"]
    )


@pytest.mark.faults
@pytest.mark.timeout(1500)
def test_a_killed_population_ends_as_one_that_nobody_disturbed(laboratory):
    """Three members in two places; the driver killed before the first exchange, ended in order
    after it, and killed after the second."""
    more = ("--samples", "3", "--set", "epochs=3", "--interval", "1", "--workers", "1")
    code, out = finish(laboratory.command(*sweep(laboratory, *more, "--name", "undisturbed")))
    assert code == 0, out
    for moment, fault in (
        ("epoch 1/3", signal.SIGKILL), ("epoch 2/3", signal.SIGTERM), ("epoch 3/3", signal.SIGKILL),
    ):  # fmt: skip
        process = laboratory.command(*sweep(laboratory, *more))
        read_until(process, moment)
        ours = descendants(process)
        process.send_signal(fault)
        finish(process)
        for left in psutil.wait_procs(ours, timeout=60)[1]:
            left.kill()
    code, out = finish(laboratory.command("resume", "tiny", "--output", str(laboratory.output)))
    assert code == 0, out
    tables = [
        [{column: row[column] for column in KEPT} for row in laboratory.rows(name)]
        for name in ("undisturbed", "tiny")
    ]
    assert tables[0] == tables[1]
    assert len(tables[0]) == 3 + 2  # one is replaced after each epoch but the last
    assert not re.search("from the beginning", str(tables))
    for row in tables[0]:
        if row["status"] == "finished":
            names = ("undisturbed", "tiny")
            one, other = (weights(laboratory, name, row["trial_id"]) for name in names)
            assert one == other
    _, children = laboratory.runs()
    assert {run.info.status for run in children} == {"FINISHED"}
    assert len(children) == len(tables[0])
    assert not [*Path(laboratory.output / ".leases").glob("[0-9a-f]*")]
