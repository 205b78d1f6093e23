"""kill -9 of ``codetr`` itself."""

from __future__ import annotations

import psutil
import pytest
from laboratory import PATIENCE, descendants, finish, read_until

pytestmark = pytest.mark.faults


def test_a_killed_driver_is_gone_on_with(laboratory, undisturbed):
    process = laboratory.start()
    before = read_until(process, r"K=1, seed 0: epoch 2/")
    started = descendants(process)
    process.kill()
    finish(process)
    _, left = psutil.wait_procs(started, timeout=PATIENCE)
    assert not left, "Ray's processes end by themselves"
    assert {run.info.status for run in laboratory.runs()[1]} == {"RUNNING"}, "nobody could end them"

    code, out = laboratory.run()
    assert code == 0, out
    assert laboratory.outcome() == undisturbed
    laboratory.require_each_epoch_once()
    laboratory.require_gone_on(before)
    client = laboratory.client()
    experiment = client.get_experiment_by_name("tiny")
    parents = {
        run.info.status
        for run in client.search_runs([experiment.experiment_id])
        if "trial_id" not in run.data.tags
    }
    assert parents == {"KILLED", "FINISHED"}
    assert not [*(laboratory.output / ".leases").glob("[0-9a-f]*")]
