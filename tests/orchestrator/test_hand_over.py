"""A donor's checkpoint becomes that of the trial which goes on from it."""

import filecmp

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from test_damaged_checkpoints import trial, truncate  # noqa: F401 - a fixture

from codetr.checkpoint import FILE_NAME, load_checkpoint
from orchestrator.storage import LEDGER, Storage, checkpoint_name, place_of
from orchestrator.worker import newest_sound


@pytest.fixture
def storage(trial):  # noqa: F811
    return Storage(LocalFileSystem(auto_mkdir=True), str(trial.parent))


def test_the_heir_goes_on_from_exactly_that_checkpoint(storage, trial, tmp_path):  # noqa: F811
    assert storage.hand_over("trial", (3, 30), "heir")
    (copy,) = (tmp_path / "heir").iterdir()
    assert place_of(str(copy)) == (3, 30)
    files = sorted(path.name for path in copy.iterdir())
    original = trial / copy.name
    assert files == sorted(path.name for path in original.iterdir())
    assert filecmp.cmpfiles(copy, original, files, shallow=False)[0] == files
    assert newest_sound(storage, "heir", None) == (str(copy), None)
    assert load_checkpoint(copy).epoch == 3


def test_half_a_copy_is_made_again_and_a_damaged_one_is_told(storage, trial, tmp_path):  # noqa: F811
    storage.hand_over("trial", (3, 30), "heir")
    (copy,) = (tmp_path / "heir").iterdir()
    truncate(copy)
    found, note = newest_sound(storage, "heir", None)
    assert found is None
    assert "after epoch 0, step 0 instead of epoch 3, step 30" in note
    assert storage.hand_over("trial", (3, 30), "heir")
    assert newest_sound(storage, "heir", None) == (str(copy), None)


def test_a_checkpoint_that_is_gone_is_no_error(storage):
    assert not storage.hand_over("trial", (4, 40), "heir")
    assert not storage.hand_over("trial", (5, 50), "heir")  # the fifth epoch's is within the sixth
    assert not storage.hand_over("nobody", (3, 30), "heir")
    assert storage.checkpoints("heir") == []


def test_in_an_object_store():
    memory = fsspec.filesystem("memory")
    storage = Storage(memory, "/lab/tiny/trials")
    name = checkpoint_name(2, 20, "abcdefgh")
    memory.pipe_file(f"/lab/tiny/trials/trial/{name}/{FILE_NAME}", b"weights")
    try:
        assert storage.hand_over("trial", (2, 20), "heir")
        assert storage.hand_over("trial", (2, 20), "heir")
        assert memory.cat_file(f"/lab/tiny/trials/heir/{name}/{FILE_NAME}") == b"weights"
    finally:
        memory.rm("/lab", recursive=True)


def test_a_whole_trial_is_copied_with_its_ledger_last(monkeypatch):
    """Done again after it was torn apart, it is the same: no folder within the folder."""
    memory = fsspec.filesystem("memory")
    here, there = (Storage(memory, f"/lab/{name}/trials") for name in ("new", "old"))
    names = [checkpoint_name(epoch, 10 * epoch, "abcdefgh") for epoch in (1, 2)]
    for name in names:
        memory.pipe_file(f"/lab/old/trials/trial/{name}/{FILE_NAME}", name.encode())
    memory.pipe_file(f"/lab/old/trials/trial/{LEDGER}", b"{}")
    copied, copy = [], memory.cp_file

    def cp_file(source, target):
        copied.append(target)
        if len(copied) == 2:
            raise TimeoutError
        copy(source, target)

    try:
        monkeypatch.setattr(memory, "cp_file", cp_file)
        with pytest.raises(TimeoutError):
            here.copy_trial(there, "trial", "trial")
        assert not memory.exists(f"/lab/new/trials/trial/{LEDGER}")
        here.copy_trial(there, "trial", "trial")
        assert copied[-1] == f"/lab/new/trials/trial/{LEDGER}"
        found = {path: memory.cat_file(path) for path in memory.find("/lab/new/trials")}
        expected = {f"/lab/new/trials/trial/{name}/{FILE_NAME}": name.encode() for name in names}
        assert found == {**expected, f"/lab/new/trials/trial/{LEDGER}": b"{}"}
    finally:
        memory.rm("/lab", recursive=True)


def test_what_was_handed_over_goes_once_the_heir_has_checkpoints_of_its_own(storage, monkeypatch):
    class Reported:
        def __init__(self, *paths):
            self.best_checkpoints = [(type("Checkpoint", (), {"path": p}), {}) for p in paths]

    storage.hand_over("trial", (3, 30), "heir")
    (copy,) = storage.checkpoints("heir")
    for known, is_left in ((None, True), (Reported(copy), True), (Reported("another"), False)):
        monkeypatch.setattr(Storage, "result", lambda *_, known=known: known)
        storage.forget("heir", (2, 20))
        storage.forget("heir", (3, 30))
        assert (storage.checkpoints("heir") == [copy]) == is_left
