"""SIGTERM with a grace period, as before a spot machine is taken away, far from an epoch's end."""

from __future__ import annotations

import signal

import pytest
from fault_laboratory import LONG_STEPS, FaultLaboratory
from laboratory import finish, read_until

from codetr.checkpoint import load_checkpoint

pytestmark = pytest.mark.faults


def test_what_is_terminated_saves_within_its_epoch_and_goes_on_there(
    long_folder, undisturbed_long, tmp_path
):
    laboratory = FaultLaboratory(long_folder, tmp_path / "runs")
    try:
        process = laboratory.start(experiment="long.yaml")
        read_until(process, r"epoch 1/2")
        process.send_signal(signal.SIGTERM)
        code, out = finish(process)
        assert code == 128 + signal.SIGTERM, out
        assert "Traceback" not in out
        left = [load_checkpoint(laboratory.last_checkpoint(arm, "long")) for arm in ("k-0", "k-1")]
        assert any(0 < len(c.partial.taken) < LONG_STEPS for c in left if c.partial), left

        code, out = laboratory.run(experiment="long.yaml")
        assert code == 0, out
        assert laboratory.outcome("long") == undisturbed_long
        client = laboratory.client()
        for run in laboratory.runs(name="long")[1]:
            points = client.get_metric_history(run.info.run_id, "train/total")
            assert [point.step for point in points] == [1, 2]
    finally:
        laboratory.clean()
