"""kill -9 of the processes that train."""

from __future__ import annotations

import pytest
from fault_laboratory import actors
from laboratory import descendants, finish, read_until

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("kind", ["RayTrainWorker", "TrainController"])
def test_a_killed_actor_changes_nothing(laboratory, undisturbed, kind):
    process = laboratory.start()
    read_until(process, r"epoch 1/")
    victims = actors(process, kind)
    assert victims, [p.cmdline() for p in descendants(process)]
    for victim in victims:
        victim.kill()
    code, out = finish(process)
    assert code == 0, out
    assert laboratory.outcome() == undisturbed
    laboratory.require_each_epoch_once()
