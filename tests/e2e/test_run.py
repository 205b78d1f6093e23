"""``codetr run`` as its users run it: real Ray, real MLflow, real training on a few images."""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request

import psutil
import pytest
from laboratory import CODETR, PATIENCE, Laboratory, descendants, read_until

from codetr.checkpoint import load_checkpoint
from codetr.data.digits import make_digits

pytestmark = pytest.mark.e2e

EXPERIMENT = """
question: Does everything work together?
paper: {table: table7_number_of_heads, row: {detector: deformable-detr++}}
detector:
  backbone: {name: tiny, pretrained: false, frozen_stages: -1, frozen_norm: false}
  transformer: {embed_dim: 32, ffn_dim: 32, attention_heads: 4, sampling_points: 2,
                encoder_layers: 1, decoder_layers: 2, levels: 3, group_norm_groups: 8}
  queries: {count: 20, two_stage: false, box_refinement: false}
  positive_queries: {max: 20}
heads:
  faster_rcnn:
    rpn: {samples: 32, train_nms_pre: 50, test_nms_pre: 50, keep: 20}
    rcnn: {samples: 16, fc_dim: 16, finest_scale: 24}
training: {epochs: 3, batch_size: 4, learning_rate: 1.0e-3, drop_epochs: [2],
           evaluate_branches: true}
data: {short_sides: [], crop: false}
arms:
  "K=0": {detector: {heads: []}, paper: {heads: []}}
  "K=2": {detector: {heads: [atss, faster_rcnn]}, paper: {heads: [atss, faster_rcnn]}}
profiles:
  laptop: {about: as small as can be}
"""


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("laboratory")
    laboratory = Laboratory(folder, folder / "runs").prepare(EXPERIMENT)
    yield laboratory
    laboratory.clean()


def listening(processes: list[psutil.Process]) -> set[str]:
    addresses = set()
    for process in processes:
        try:
            connections = process.net_connections(kind="inet")
        except psutil.Error:
            continue
        addresses |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return addresses


def interrupt(process: subprocess.Popen) -> tuple[str, list[psutil.Process]]:
    """Ctrl-C: what it prints then, and which of its processes survive it."""
    ours = descendants(process)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE)
    psutil.wait_procs(ours, timeout=5)
    return out, [p for p in ours if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_interrupted_resumed_finished_and_not_trained_again(laboratory):
    """Two arms, two workers each; Ctrl-C in the middle, then the same command again, twice."""
    process = laboratory.start("--workers", "2", "--grace", "0")
    read_until(process, r"K=2, seed 0: epoch 1/3")
    ours = descendants(process)
    assert any("RayTrainWorker" in p.name() or "RayTrain" in " ".join(p.cmdline()) for p in ours)
    assert {a.removeprefix("::ffff:") for a in listening(ours)} == {"127.0.0.1"}
    out, survivors = interrupt(process)
    assert process.returncode == 130, out
    assert not survivors
    parents, children = laboratory.runs()
    assert {run.info.status for run in parents + children} == {"KILLED"}
    by_arm = {row["arm"]: row for row in laboratory.rows()}
    assert by_arm["K=2"]["status"] == "interrupted"
    assert by_arm["K=0"]["status"] == "not started"
    (folder,) = (laboratory.output / "tiny" / "trials").iterdir()
    saved = sorted(folder.glob("epoch-*"))[-1]
    assert load_checkpoint(saved).epoch >= 1
    interrupted_at = int(by_arm["K=2"]["epochs"])

    process = laboratory.start("--workers", "2")
    lines = read_until(process, "MLflow: ")
    assert process.wait(PATIENCE) == 0, lines
    trained = [line for line in lines if re.match(r"K=2, seed 0: epoch", line)]
    assert len(trained) == 3 - interrupted_at
    for row in laboratory.rows():
        assert (row["status"], row["epochs"]) == ("finished", "3")
        assert float(row["AP"]) >= 0
        assert float(row["core_hours"]) > 0
        assert int(row["parameters_inference"]) <= int(row["parameters_training"])
    k0, k2 = laboratory.rows()
    assert k0["parameters_inference"] == k2["parameters_inference"]
    assert (k0["paper_AP"], k2["paper_AP"]) == ("47.1", "49.5")
    check_tracking(laboratory)
    for name in ("results.md", "ap_by_epoch.png", "ap_by_arm.png", "detections.png"):
        assert (laboratory.output / "tiny" / name).stat().st_size > 100

    code, out = laboratory.run("--workers", "2")
    assert code == 0
    assert "epoch 1/3" not in out
    assert "starting Ray" not in out
    parents, children = laboratory.runs()
    assert len(parents) == 3
    assert len(children) == 2
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}


def check_tracking(laboratory: Laboratory) -> None:
    """Parents FINISHED and KILLED; each trial one run, with every epoch once."""
    client = laboratory.client()
    parents, children = laboratory.runs()
    assert [run.info.status for run in parents] == ["FINISHED", "KILLED"]
    assert sorted(run.data.tags["k"] for run in children) == ["0", "2"]
    for run in children:
        run_id = run.info.run_id
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        for metric in ("train/total", "val/AP", "cost/seconds_per_step"):
            assert [m.step for m in client.get_metric_history(run_id, metric)] == [1, 2, 3]
        branches = {key.split("/")[1] for key in run.data.metrics if key.startswith("branch/")}
        assert branches == ({"atss", "faster_rcnn"} if run.data.tags["k"] == "2" else set())
        for branch in branches:
            history = client.get_metric_history(run_id, f"branch/{branch}/AP")
            assert [m.step for m in history] == [3]
        artifacts = {file.path for file in client.list_artifacts(run_id)}
        assert artifacts == {"config.yaml", "curves.png", "per_class_AP.csv", "predictions.json"}
    artifacts = {file.path for file in client.list_artifacts(parents[0].info.run_id)}
    assert {"results.csv", "results.md", "ap_by_arm.png", "detections.png"} <= artifacts


def test_eval_and_predict_use_what_was_trained(laboratory):
    (folder,) = (laboratory.output / "tiny" / "trials").glob("k-2*")
    checkpoint = sorted(folder.glob("epoch-*"))[-1]
    image = next((laboratory.folder / "digits" / "val").iterdir())

    def call(*arguments: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*CODETR, *map(str, arguments)],
            cwd=laboratory.folder, check=False, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip

    done = call("eval", checkpoint, "--data", "digits", "--json", "metrics.json")
    assert "APl" not in done.stdout
    assert "AP_small" in done.stdout, done.stderr
    (k2,) = (row for row in laboratory.rows() if row["arm"] == "K=2")
    for branch in ("atss", "faster_rcnn"):  # as two workers have measured them together
        where = ("--data", laboratory.folder / "digits", "--branch", branch)
        done = call("eval", checkpoint, *where, "--json", "branch.json")
        summary = json.loads((laboratory.folder / "branch.json").read_text())["summary"]
        assert 100 * summary["AP"] == pytest.approx(float(k2[f"{branch}_AP"]), abs=0.01)
    done = call("predict", checkpoint, image, image, "--output", "found")
    assert done.returncode == 0, done.stderr
    written = sorted(path.name for path in (laboratory.folder / "found").iterdir())
    assert written == sorted([f"{image.stem}.png", f"{image.stem}-2.png", "predictions.json"])

    from pycocotools.coco import COCO

    coco = COCO(laboratory.folder / "found" / "predictions.json")
    assert len(coco.getImgIds()) == 2
    assert len(coco.getCatIds()) == 10

    make_digits(laboratory.folder / "other", lvis=True, train_images=4, val_images=2, size=64)
    done = call("eval", checkpoint, "--data", "other")
    assert done.returncode == 2
    assert "has 30" in done.stderr
    assert "has 10" in done.stderr


def test_a_trial_that_fails_is_told_and_does_not_stop_the_others(laboratory):
    broken = '"K=2": {training: {learning_rate: 1.0e+30}, '
    text = EXPERIMENT.replace('"K=2": {', broken).replace("epochs: 3", "epochs: 1")
    (laboratory.folder / "failing.yaml").write_text(text)
    process = laboratory.start(experiment="failing.yaml")
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, out
    by_arm = {row["arm"]: row["status"] for row in laboratory.rows("failing")}
    assert by_arm == {"K=0": "finished", "K=2": "failed"}
    reason = next(line for line in out.splitlines() if line.startswith("K=2, seed 0: failed"))
    assert "not finite" in reason
    assert "images" in reason
    _, children = laboratory.runs("failing")
    status = {run.data.tags["arm"]: run.info.status for run in children}
    assert status == {"K=0": "FINISHED", "K=2": "FAILED"}


def test_ctrl_c_while_starting_leaves_nothing_behind(laboratory):
    process = laboratory.start("--name", "starting")
    read_until(process, "starting Ray")
    time.sleep(3)
    out, survivors = interrupt(process)
    assert process.returncode == 130, out
    assert not survivors
    parents, _ = laboratory.runs("starting")
    assert {run.info.status for run in parents} == {"KILLED"}


def test_the_ui_listens_on_loopback_alone(laboratory):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*CODETR, "ui", "--output", str(laboratory.output), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    laboratory.started.append(process)
    read_until(process, f"running on http://127.0.0.1:{port}")
    url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=10"
    assert b'"tiny"' in urllib.request.urlopen(url).read()
    everyone = [psutil.Process(process.pid), *descendants(process)]
    assert listening(everyone) == {"127.0.0.1"}
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


def test_ctrl_c_twice_ends_at_once(laboratory):
    process = laboratory.start("--name", "forced")
    read_until(process, "training 2 trials")
    time.sleep(2)
    ours = descendants(process)
    os.killpg(process.pid, signal.SIGINT)
    read_until(process, "once more to force")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    psutil.wait_procs(ours, timeout=10)
    assert not [p for p in ours if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
