"""A checkpoint that is damaged while nobody looks."""

from __future__ import annotations

import re
import signal

import pytest
from fault_laboratory import EPOCHS
from laboratory import finish, read_until

from codetr.checkpoint import FILE_NAME, load_checkpoint

pytestmark = pytest.mark.faults


def test_terminated_and_damaged_it_goes_on_from_the_checkpoint_before(laboratory, undisturbed):
    """SIGTERM without a grace period; then the last checkpoint is cut off."""
    process = laboratory.start("--grace", "0")
    read_until(process, r"K=1, seed 0: epoch 3/")
    process.send_signal(signal.SIGTERM)
    code, out = finish(process)
    assert code == 128 + signal.SIGTERM, out
    assert "K=1, seed 0: interrupted" in out
    last = laboratory.last_checkpoint("k-1")
    damaged = load_checkpoint(last).epoch
    assert damaged >= 3, "what was reported must be kept"
    with (last / FILE_NAME).open("r+b") as file:
        file.truncate(5000)

    code, out = laboratory.run()
    assert code == 0, out
    assert laboratory.outcome() == undisturbed
    laboratory.require_each_epoch_once()
    trained = [int(n) for n in re.findall(rf"epoch (\d+)/{EPOCHS}, step", laboratory.log("K=1"))]
    again = min(n for n in trained if trained.count(n) > 1)
    assert again == damaged, "it goes on from the one before the damaged one"
    table = (laboratory.output / "tiny" / "results.md").read_text()
    (run,) = (run for run in laboratory.runs()[1] if run.data.tags["arm"] == "K=1")
    for text in (out, table, run.data.tags["notes"]):
        assert "is truncated" in text
        assert "the work between them was lost and done again" in text
