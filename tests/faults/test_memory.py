"""A memory that is too small for a whole batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from fault_laboratory import EPOCHS

pytestmark = pytest.mark.faults

HUNGRY = (
    sys.executable,
    "-c",
    """
import sys

def hungry(job):
    '''The worker's loop, in which each image of a training step costs 2 GiB of the 6 there are.'''
    import resource
    import psutil
    import torch
    from codetr.detector import CoDETR
    from orchestrator.worker import train

    address_space = psutil.Process().memory_info().vms + 6 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))

    def eat(module, inputs):
        if isinstance(module, CoDETR) and module.training:
            torch.empty(2 * 2**30 * len(inputs[0]), dtype=torch.uint8)

    torch.nn.modules.module.register_module_forward_pre_hook(eat)
    return train(job)

import orchestrator.runner
orchestrator.runner.run_plan.__defaults__ = (hungry,)
from orchestrator.cli import main
main()
""",
)


def test_out_of_memory_is_met_by_parts_of_the_same_batch(laboratory, undisturbed):
    """Batches of four images do not fit, halves of them do."""
    code, out = laboratory.run(code=HUNGRY)
    assert code == 0, out
    assert out.count("out of memory: from epoch 1") == 2
    rows = laboratory.rows()
    assert [row["trial_id"] for row in rows] == [row["trial_id"] for row in undisturbed.table]
    assert [row["status"] for row in rows] == ["finished"] * 2
    laboratory.require_each_epoch_once()
    client = laboratory.client()
    before = laboratory.folder / "undisturbed" / "mlflow.db"
    expected = {run.data.tags["arm"]: run for run in laboratory.runs(uri=f"sqlite:///{before}")[1]}
    for run in laboratory.runs()[1]:
        assert "(accumulate=2)" in run.data.tags["notes"]
        twin = expected[run.data.tags["arm"]]
        assert run.data.metrics["step"] == twin.data.metrics["step"]
        losses = client.get_metric_history(run.info.run_id, "train/total")
        assert len(losses) == EPOCHS
        # The first epoch; later ones differ more and more by the order of sums.
        first = laboratory.client(f"sqlite:///{before}").get_metric_history(
            twin.info.run_id, "train/total"
        )[0]
        assert losses[0].value == pytest.approx(first.value, rel=1e-3)
    assert "accumulate=2" in Path(laboratory.output / "tiny" / "results.md").read_text()
