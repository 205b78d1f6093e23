"""Which checkpoints of a trial Ray Train keeps, by what ours are worth."""

import asyncio
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.train import Checkpoint, CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport

from orchestrator.board import Epoch
from orchestrator.jobs import KEPT_CHECKPOINTS
from orchestrator.worker import WORTH, worth


async def kept(aps, folder, *, partial=()):
    """What Ray's own bookkeeping has left after each epoch; None: no evaluation.

    Args:
        partial: epochs that were left once before their end, and saved.
    """
    storage = StorageContext(folder, "trial")
    config = CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS, checkpoint_score_attribute=WORTH)
    manager, history, left = CheckpointManager(config, storage), [], []

    def save(number, step, within_epoch):
        path = f"{storage.experiment_fs_path}/{number}"
        storage.storage_filesystem.create_dir(path)
        value = worth(history, step / (10 * len(aps) + 1), within_epoch=within_epoch)
        checkpoint = Checkpoint(path, storage.storage_filesystem)
        manager.register_checkpoint(_TrainingReport(checkpoint, {WORTH: value}, False))
        left.append({c.checkpoint.path.rpartition("/")[2] for c in manager.best_checkpoint_results})

    for number, ap in enumerate(aps, 1):
        if number in partial:
            save(number - 0.5, 10 * number - 5, within_epoch=True)
        history.append(Epoch(number, 10 * number, {} if ap is None else {"val/AP": ap}))
        save(number, 10 * number, within_epoch=False)
    return left


def test_with_a_falling_ap_the_one_before_the_last_stays(tmp_path):
    aps = [0.1, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05]
    left = asyncio.run(kept(aps, str(tmp_path), partial=(6,)))
    assert left[3:] == [
        {"2", "3", "4"}, {"2", "4", "5"}, {"2", "5", "5.5"}, {"2", "5.5", "6"}, {"2", "6", "7"}
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "trial").iterdir() if path.is_dir()) == [
        "2", "6", "7",
    ]  # fmt: skip


@given(st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.1, 0.2, 0.3])), max_size=8))
def test_the_last_the_one_before_and_the_best_always_stay(aps):
    with TemporaryDirectory() as folder:
        for number, left in enumerate(asyncio.run(kept(aps, folder)), 1):
            assert {str(number), str(max(1, number - 1))} <= left
            evaluated = [(ap, epoch) for epoch, ap in enumerate(aps[:number], 1) if ap is not None]
            assert not evaluated or str(max(evaluated)[1]) in left
            assert len(left) <= KEPT_CHECKPOINTS


def test_in_words():
    def of(*aps, done=0.5, within_epoch=False):
        history = [Epoch(n, n, {"val/AP": ap}) for n, ap in enumerate(aps, 1)]
        return worth(history, done, within_epoch=within_epoch)

    assert (of(0.1), of(0.1, 0.2), of(0.1, 0.2, 0.2)) == (1, 2, 3)
    assert of(0.1, 0.2, 0.1) == pytest.approx(1.5)
    assert of(0.1, 0.2, 0.1, done=0.9) == pytest.approx(1.9)
    assert of(0.1, 0.2, within_epoch=True) == pytest.approx(1.5)
    assert of() == pytest.approx(-0.5)
