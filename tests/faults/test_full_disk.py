"""A disk that is full when a checkpoint is to be saved."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress

import pytest
from fault_laboratory import FaultLaboratory
from laboratory import finish, read_until

from codetr.checkpoint import load_checkpoint

pytestmark = pytest.mark.faults


@pytest.fixture
def small_disk(tmp_path):
    """A folder with a file system of its own of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a file system of one's own: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path):
    """Leave no byte."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(os.urandom(2**16))
    with path.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x")


def test_a_full_disk_fails_the_trials_and_the_last_good_checkpoints_stand(
    folder, small_disk, undisturbed
):
    laboratory = FaultLaboratory(folder, small_disk / "runs")
    try:
        process = laboratory.start()
        for _ in range(2):  # of both arms
            read_until(process, r"seed 0: epoch 1/")
        fill(small_disk / "filler")
        code, out = finish(process)
        assert code == 1, out
        assert "Traceback" not in out
        assert out.count("No space left on device") >= 2, out
        for arm in ("K=0", "K=1"):
            assert f"{arm}, seed 0: failed" in out
        assert load_checkpoint(laboratory.last_checkpoint("k-0")).epoch >= 1
        assert load_checkpoint(laboratory.last_checkpoint("k-1")).epoch >= 1

        (small_disk / "filler").unlink()
        code, out = laboratory.run()
        assert code == 0, out
        assert laboratory.outcome() == undisturbed
        laboratory.require_each_epoch_once()
    finally:
        laboratory.clean()
