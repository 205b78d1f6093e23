"""SIGTERM with a grace period, as before a spot machine is taken away, far from an epoch's end."""

from __future__ import annotations

import re
import signal

import pytest
from fault_laboratory import EXPERIMENT, FaultLaboratory
from laboratory import finish, read_until

from codetr.checkpoint import load_checkpoint
from codetr.data.digits import make_digits

pytestmark = pytest.mark.faults

STEPS = 100
LONG = re.sub(r"epochs: \d+", "epochs: 2", EXPERIMENT).replace("epochs: [9]", "epochs: [1]")
"""Epochs that take many times as long as to leave one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preemption")
    (folder / "long.yaml").write_text(LONG)
    make_digits(folder / "digits", train_images=4 * STEPS, val_images=6, size=64)
    return folder


def test_what_is_terminated_saves_within_its_epoch_and_goes_on_there(folder):
    undisturbed, laboratory = (FaultLaboratory(folder, folder / name) for name in ("whole", "left"))
    try:
        code, out = undisturbed.run(experiment="long.yaml")
        assert code == 0, out

        process = laboratory.start(experiment="long.yaml")
        read_until(process, r"epoch 1/2")
        process.send_signal(signal.SIGTERM)
        code, out = finish(process)
        assert code == 128 + signal.SIGTERM, out
        assert "Traceback" not in out
        left = [load_checkpoint(laboratory.last_checkpoint(arm, "long")) for arm in ("k-0", "k-1")]
        assert any(0 < len(c.partial.taken) < STEPS for c in left if c.partial), left

        code, out = laboratory.run(experiment="long.yaml")
        assert code == 0, out
        assert laboratory.outcome("long") == undisturbed.outcome("long")
        client = laboratory.client()
        for run in laboratory.runs(name="long")[1]:
            points = client.get_metric_history(run.info.run_id, "train/total")
            assert [point.step for point in points] == [1, 2]
    finally:
        undisturbed.clean()
        laboratory.clean()
