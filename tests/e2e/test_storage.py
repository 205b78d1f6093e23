"""Checkpoints in an object store: a real run with S3 of our own, reached through fsspec alone."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest
from laboratory import CODETR, PATIENCE, Laboratory, finish, free_port, read_until
from test_run import EXPERIMENT

pytestmark = pytest.mark.e2e


@pytest.fixture
def s3(monkeypatch):
    """An S3 on 127.0.0.1 with a bucket ``lab``; named and unlocked by the environment, as a real
    one is."""
    port = free_port()
    serve = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    process = subprocess.Popen(
        [sys.executable, "-c", serve], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    from s3fs import S3FileSystem

    filesystem = S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            filesystem.mkdir("lab")
            break
        except Exception:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
    yield filesystem
    process.kill()
    process.wait()


@pytest.fixture
def laboratory(tmp_path):
    laboratory = Laboratory(tmp_path, tmp_path / "runs").prepare(EXPERIMENT, train_images=160)
    yield laboratory
    laboratory.clean()


@pytest.mark.timeout(900)
def test_a_run_lives_in_an_object_store(laboratory, s3):
    """Interrupted, gone on with, looked at and used, without one checkpoint on this machine."""
    where = ("--storage", "s3://lab/somewhere", "--set", "epochs=4")
    process = laboratory.start(*where)
    read_until(process, r"K=2, seed 0: epoch 1/4")
    process.terminate()
    code, out = finish(process)
    assert code == 143, out
    shown = subprocess.run(
        [*CODETR, "status", "tiny", "--output", str(laboratory.output)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert re.search(r"K=2.*interrupted.*\d/4", shown), shown

    code, out = laboratory.run(*where)
    assert code == 0, out
    assert [row["status"] for row in laboratory.rows()] == ["finished"] * 2
    assert "epoch 1/4" not in out, "it goes on where it stopped"
    assert not [*laboratory.output.rglob("checkpoint.pt")]
    assert len(s3.glob("lab/somewhere/tiny/trials/k-2.*/epoch-*/checkpoint.pt")) >= 1
    _, children = laboratory.runs()
    client = laboratory.client()
    for run in children:
        points = client.get_metric_history(run.info.run_id, "val/AP")
        assert [point.step for point in points] == [*range(1, 5)]
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"predictions.json", "per_class_AP.csv"} <= files

    best = re.search(r"(s3://lab/somewhere/tiny/trials/k-2\S+)  ", out)[1]
    digits = str(laboratory.folder / "digits")
    code, shown = finish(laboratory.command("eval", best, "--data", digits))
    assert (code, "AP" in shown) == (0, True), shown


def test_a_place_that_cannot_be_used_is_one_line(laboratory):
    for url, reason in (
        ("nonsense://lab", "cannot be used: Protocol not known: nonsense"),
        ("file:///proc/nowhere", "cannot be written"),
    ):
        code, out = laboratory.run("--storage", url)
        assert code == 2, out
        assert f"--storage {url}: {reason}" in " ".join(out.split())
        assert "Traceback" not in out
    code, out = finish(laboratory.command("eval", "nonsense://lab", "--data", "digits"))
    assert (code, "Protocol not known: nonsense" in out) == (2, True), out
    assert not (laboratory.output / "tiny" / "trials").exists()
