"""What is written whole: by us, and by Ray Train through our file system."""

from __future__ import annotations

import errno
import os
import pickle

import pytest
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import LocalFileSystem as ArrowLocal
from pyarrow.fs import PyFileSystem, copy_files

from orchestrator.files import as_far_as_possible, is_left, write_whole
from orchestrator.storage import WholeFiles


@pytest.fixture
def disk():
    return pickle.loads(pickle.dumps(PyFileSystem(WholeFiles(LocalFileSystem()))))


def test_a_copied_folder_is_the_same(disk, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "large").write_bytes(os.urandom(3_000_000))
    (source / "empty").touch()
    copy_files(
        str(source), str(tmp_path / "copy"),
        source_filesystem=ArrowLocal(), destination_filesystem=disk, chunk_size=2**20,
    )  # fmt: skip
    copied = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    assert copied == {path.name: path.read_bytes() for path in source.iterdir()}


def test_nothing_has_the_name_before_all_is_there(disk, tmp_path):
    path = tmp_path / "ledger.json"
    path.write_text("old")
    with disk.open_output_stream(str(path)) as file:
        file.write(b"half of it")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "half of it"
    assert [*tmp_path.iterdir()] == [path]


def test_what_could_not_be_written_leaves_what_was_there(disk, tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "ledger.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"), disk.open_output_stream(str(path)) as file:
        file.write(b"new")
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_a_text_that_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "table.csv"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \udc80")
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_a_disk_that_takes_nothing_is_told(tmp_path):
    said: list[str] = []
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "table.csv"
    assert as_far_as_possible(said.append, lambda: [write_whole(target, "a")]) == []
    assert said == [f"cannot write {target.with_name('.table.csv.draft')}: Not a directory"]
    assert as_far_as_possible(said.append, lambda: [tmp_path]) == [tmp_path]


def test_a_file_server_that_is_away_has_left_nothing(tmp_path, monkeypatch):
    def away(_path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    (tmp_path / "stop").touch()
    assert is_left(tmp_path / "stop")
    assert not is_left(tmp_path / "another")
    monkeypatch.setattr("pathlib.Path.exists", away)
    assert not is_left(tmp_path / "stop")
