"""kill -9 of the processes that train."""

from __future__ import annotations

import pytest
from fault_laboratory import actors
from laboratory import descendants, finish, read_until

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("kind", ["RayTrainWorker", "TrainController"])
def test_a_killed_actor_changes_nothing(laboratory, undisturbed, kind):
    process = laboratory.start()
    before = read_until(process, r"epoch 1/")
    victims = actors(process, kind)
    assert victims, [p.cmdline() for p in descendants(process)]
    for victim in victims:
        victim.kill()
    code, out = finish(process)
    assert code == 0, out
    assert laboratory.outcome() == undisturbed
    laboratory.require_each_epoch_once()
    laboratory.require_gone_on(before)


def test_a_killed_foreman_ends_the_run_in_order_and_it_is_gone_on_with(laboratory, undisturbed):
    """It drives all trials: there is nothing to wait for."""
    process = laboratory.start()
    before = read_until(process, r"K=1, seed 0: epoch 2/")
    (foreman,) = actors(process, "ray::Foreman")
    foreman.kill()
    code, out = finish(process)
    assert code == 1, out
    assert "Traceback" not in out
    assert "the process that drives the trials has died" in " ".join(out.split())
    assert {row["status"] for row in laboratory.rows()} <= {"interrupted", "finished"}
    assert {run.info.status for run in laboratory.runs()[1]} <= {"KILLED", "FINISHED"}
    assert not [*(laboratory.output / ".leases").glob("[0-9a-f]*")]

    code, out = laboratory.run()
    assert code == 0, out
    assert laboratory.outcome() == undisturbed
    laboratory.require_each_epoch_once()
    laboratory.require_gone_on(before)
