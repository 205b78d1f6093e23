"""Which checkpoint a trial goes on from, if the disk has not kept the last one."""

import asyncio
import dataclasses
import errno
import json
import shutil
import zipfile

import pytest
from fsspec.implementations.local import LocalFileSystem
from ray.train import Checkpoint, CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport
from trial_samples import sample_epoch, sample_plan

from codetr.checkpoint import FILE_NAME, CheckpointError, save_checkpoint
from codetr.config import DataConfig, DetectorConfig, TrainingConfig
from codetr.data import Classes
from codetr.detector import CoDETR
from codetr.training import TrainingState
from orchestrator.jobs import result_on_disk
from orchestrator.storage import LEDGER, Storage, checkpoint_name
from orchestrator.worker import HISTORY, NOTES, newest_sound

TINY = {
    "num_classes": 2,
    "backbone": {"name": "tiny", "pretrained": False, "frozen_stages": -1},
    "transformer": {
        "embed_dim": 32, "ffn_dim": 32, "attention_heads": 4, "sampling_points": 2,
        "encoder_layers": 1, "decoder_layers": 1, "levels": 3, "group_norm_groups": 8,
    },
    "queries": {"count": 4, "two_stage": False},
}  # fmt: skip


@pytest.fixture
def trial(tmp_path):
    """A trial's folder with checkpoints after the epochs 2 and 3, and within the sixth."""
    import torch

    state = TrainingState.start(
        DetectorConfig.model_validate(TINY), TrainingConfig(), DataConfig(),
        Classes(("a", "b"), (1, 2)), seed=0, steps_per_epoch=1, device=torch.device("cpu"),
    )  # fmt: skip
    assert isinstance(state.model, CoDETR)
    for epoch, step in ((2, 20), (3, 30), (5, 54)):
        folder = tmp_path / "trial" / checkpoint_name(epoch, step, "abcdefgh")
        state.epoch = epoch
        save_checkpoint(state.checkpoint(), folder / FILE_NAME)
        history = [dataclasses.asdict(sample_epoch(e, 0.1)) for e in range(1, epoch + 1)]
        (folder / HISTORY).write_text(json.dumps(history))
        (folder / NOTES).write_text("[]")
    return tmp_path / "trial"


def last(trial):
    return sorted(trial.glob("epoch-*"))[-1]


def chosen(trial, reported):
    storage = Storage(LocalFileSystem(), str(trial.parent))
    return newest_sound(storage, trial.name, reported and str(reported))


def test_the_last_one_if_it_is_sound(trial):
    assert chosen(trial, last(trial)) == (str(last(trial)), None)


def test_none_where_there_is_none(tmp_path):
    assert chosen(tmp_path / "trial", None) == (None, None)


def test_the_newest_where_the_ledger_is_lost(trial):
    assert chosen(trial, None) == (str(last(trial)), None)
    truncate(last(trial))
    found, note = chosen(trial, None)
    assert "/epoch-0003" in found
    assert "Went on after epoch 3, step 30 instead of epoch 5, step 54: the work" in note


def truncate(folder):
    with (folder / FILE_NAME).open("r+b") as file:
        file.truncate(5000)


def change_a_byte(folder):
    """In the middle of the largest tensor; elsewhere there is padding, which nobody reads."""
    path = folder / FILE_NAME
    with zipfile.ZipFile(path) as archive:
        tensor = archive.read(max(archive.infolist(), key=lambda entry: entry.file_size))
    content = bytearray(path.read_bytes())
    content[content.index(tensor) + len(tensor) // 2] ^= 1
    path.write_bytes(content)


def lose_the_file(folder):
    (folder / FILE_NAME).unlink()


def cut_the_history(folder):
    text = (folder / HISTORY).read_text()
    (folder / HISTORY).write_text(text[: len(text) // 2])


@pytest.mark.parametrize("damage", [truncate, change_a_byte, lose_the_file, cut_the_history])
def test_else_the_newest_before_it_and_the_loss_is_told(trial, damage):
    damage(last(trial))
    found, note = chosen(trial, last(trial))
    assert "/epoch-0003" in found
    assert "Went on after epoch 3, step 30 instead of epoch 5, step 54: the work" in note


class Hiccup(LocalFileSystem):
    """An object store that does not answer for so many calls of one kind."""

    cachable = False

    def __init__(self, call, times, error):
        super().__init__()
        self.call, self.left, self.error = call, times, error

    def _answer(self, call):
        if call == self.call and self.left > 0:
            self.left -= 1
            raise self.error

    def ls(self, path, **options):
        self._answer("ls")
        return super().ls(path, **options)

    def info(self, path, **options):
        self._answer("info")
        return super().info(path, **options)

    def get_file(self, source, target, **options):
        self._answer("get_file")
        return super().get_file(source, target, **options)


class Elsewhere(Storage):
    """Not on this machine: its checkpoints have to be fetched."""

    is_local = False


AWAY = [TimeoutError("the read timed out"), OSError(errno.EIO, "Input/output error"), KeyError("x")]


@pytest.fixture
def in_a_hurry(monkeypatch, tmp_path):
    monkeypatch.setattr("orchestrator.storage.RETRY_PAUSES", (0.0, 0.0))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("in_a_hurry")
@pytest.mark.parametrize("call", ["ls", "get_file"])
@pytest.mark.parametrize("error", AWAY, ids=["timeout", "io", "its own"])
def test_a_storage_that_does_not_answer_is_asked_again(trial, call, error):
    storage = Elsewhere(Hiccup(call, 2, error), str(trial.parent))
    assert newest_sound(storage, "trial", str(last(trial))) == (str(last(trial)), None)


@pytest.mark.usefixtures("in_a_hurry")
@pytest.mark.parametrize("call", ["ls", "get_file"])
def test_and_is_no_reason_to_start_afresh(trial, call):
    storage = Elsewhere(Hiccup(call, 99, AWAY[0]), str(trial.parent))
    for reported in (None, str(last(trial))):
        with pytest.raises(TimeoutError, match="the read timed out"):
            newest_sound(storage, "trial", reported)


@pytest.mark.usefixtures("in_a_hurry")
def test_nor_is_a_disk_that_cannot_be_read(trial, monkeypatch):
    def away(*_arguments, **_options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("torch.load", away)
    with pytest.raises(OSError, match="Input/output error") as raised:
        chosen(trial, last(trial))
    assert not isinstance(raised.value, CheckpointError)  # which would be final


@pytest.mark.usefixtures("in_a_hurry")
def test_nor_is_a_sound_one_of_another_version(trial):
    import torch

    content = torch.load(last(trial) / FILE_NAME, weights_only=True)
    for change in ({"format": "codetr checkpoint 9"}, {"data": {"unknown": 1}}):
        torch.save({**content, **change}, last(trial) / FILE_NAME)
        with pytest.raises(ValueError, match=r"this version of codetr|unknown"):
            chosen(trial, last(trial))


@pytest.mark.usefixtures("in_a_hurry")
@pytest.mark.parametrize("call", ["ls", "info"])
def test_what_ray_knows_is_not_forgotten_while_the_storage_is_away(trial, call):
    """Nor is its ledger set aside as if it were damaged."""
    (trial / LEDGER).write_bytes(b"\xff")  # damaged, as it happens
    storage = Storage(Hiccup(call, 1, AWAY[0]), str(trial.parent))
    with pytest.raises(TimeoutError):
        storage.checkpoints("trial") if call == "ls" else storage.make_ready("trial")
    assert (trial / LEDGER).exists()
    assert storage.result("trial") is None
    storage.make_ready("trial")
    assert not (trial / LEDGER).exists()
    assert len(storage.checkpoints("trial")) == 3


@pytest.mark.parametrize("lose", [lose_the_file, truncate, change_a_byte])
def test_without_a_ledger_only_a_sound_checkpoint_is_a_trials_end(trial, tmp_path, lose):
    """Four epochs were wanted, and the last checkpoint's history has five."""
    plan = sample_plan(tmp_path / "runs")
    shutil.copytree(trial, plan.store / plan.trials[0].name)
    result = result_on_disk(plan, plan.trials[0])
    assert (result.state, len(result.history)) == ("finished", 5)
    lose(last(plan.store / plan.trials[0].name))
    result = result_on_disk(plan, plan.trials[0])
    assert (result.state, len(result.history)) == ("interrupted", 3)


async def report(plan, *epochs):
    """Ray's own ledger of checkpoints after these epochs, each (number, AP, time, history before);
    AP None: within the next epoch."""
    place = StorageContext(str(plan.store), plan.trials[0].name)
    manager = CheckpointManager(CheckpointConfig(), place)
    for index, (number, ap, time, before) in enumerate(epochs):
        history = [*before]
        metrics = {}
        if ap is not None:
            history.append(dataclasses.replace(sample_epoch(number, ap), time=time))
            metrics["AP"] = ap
        metrics["history"] = [dataclasses.asdict(epoch) for epoch in history]
        path = f"{place.experiment_fs_path}/{checkpoint_name(number, 9, str(index))}"
        place.storage_filesystem.create_dir(path)
        checkpoint = Checkpoint(path, place.storage_filesystem)
        manager.register_checkpoint(_TrainingReport(checkpoint, metrics, False))


@pytest.mark.parametrize(("again", "best"), [(0.4, "2"), (0.05, "0"), (None, "0")])
def test_a_damaged_checkpoint_is_never_the_best(tmp_path, again, best):
    """That of epoch 2 was, and the epoch is trained again, to the end or not yet."""
    plan = sample_plan(tmp_path)
    first = [dataclasses.replace(sample_epoch(1, 0.1), time=1.0)]
    damaged, anew = (2, 0.5, 2.0, first), (2 if again else 1, again, 3.0, first)
    asyncio.run(report(plan, (1, 0.1, 1.0, []), damaged, anew))
    result = result_on_disk(plan, plan.trials[0])
    assert result.best.name.rpartition("-")[2] == best
    assert result.weights == str(result.best)


def test_none_if_all_are_damaged(trial):
    for folder in trial.glob("epoch-*"):
        truncate(folder)
    found, note = chosen(trial, last(trial))
    assert found is None
    assert note.count("is truncated") == 3
    assert "Went on after epoch 0, step 0 instead of epoch 5, step 54: the work" in note
