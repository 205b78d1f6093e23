"""The queue on disk: against a plain list, through kills and full disks."""

from __future__ import annotations

import errno
import os
import threading
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import outbox as module
from orchestrator.outbox import Outbox

ITEMS = ["one", "zwei", "τρία", '{"four": 4}']


def drained(outbox):
    """Everything that is still in it, delivered."""
    items = []
    while len(outbox):
        items.append(outbox.head())
        outbox.pop()
    return items


@pytest.fixture
def path(tmp_path):
    return tmp_path / "box" / "store.jsonl"


def silent(text):
    raise AssertionError(text)


def test_the_next_process_finds_what_was_left(path):
    first = Outbox(path, silent)
    for item in ITEMS:
        first.put(item)
    assert first.head() == "one"
    first.pop()
    assert drained(Outbox(path, silent)) == ITEMS[1:]
    assert [*path.parent.iterdir()] == []
    assert len(Outbox(path, silent)) == 0


def test_a_line_that_was_cut_off_is_none(path):
    first = Outbox(path, silent)
    for item in ITEMS[:2]:
        first.put(item)
    with path.open("a") as file:
        file.write("half a li")
    second = Outbox(path, silent)
    second.put("three")
    assert drained(Outbox(path, silent)) == ["one", "zwei", "three"]


def test_a_lost_mark_delivers_again_and_loses_nothing(path):
    first = Outbox(path, silent)
    for item in ITEMS:
        first.put(item)
    first.head()
    first.pop()
    path.with_suffix(".delivered").unlink()
    assert drained(Outbox(path, silent)) == ITEMS


def test_a_mark_without_its_file_hides_nothing(path):
    path.parent.mkdir()
    path.with_suffix(".delivered").write_text("4")
    outbox = Outbox(path, silent)
    outbox.put("one")
    assert drained(Outbox(path, silent)) == ["one"]


def test_the_reader_waits_for_an_item_and_for_the_end(path):
    outbox, seen = Outbox(path, silent), []

    def read():
        while (item := outbox.head()) is not None:
            seen.append(item)
            outbox.pop()

    thread = threading.Thread(target=read)
    thread.start()
    for item in ITEMS:
        outbox.put(item)
    outbox.close()
    thread.join(10)
    assert seen == ITEMS


class Disk:
    """Takes nothing while it is full."""

    def __init__(self, monkeypatch):
        self.full = False
        write_whole = module.write_whole

        def write(path, text):
            self.require_room(path)
            return write_whole(path, text)

        append = Outbox._append

        def put(outbox, item):
            self.require_room(outbox.path)
            append(outbox, item)

        monkeypatch.setattr(module, "write_whole", write)
        monkeypatch.setattr(Outbox, "_append", put)

    def require_room(self, path):
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_full_disk_is_told_once_and_tried_again(path, monkeypatch):
    disk, said = Disk(monkeypatch), []
    outbox = Outbox(path, said.append)
    outbox.put("one")
    disk.full = True
    outbox.put("two")
    outbox.put("three")
    assert not outbox.is_on_disk
    assert said == [f"cannot write {path}: No space left on device: kept in memory"]
    assert drained(Outbox(path, silent)) == ["one"]  # all that a kill would leave
    disk.full = False
    outbox.put("four")
    assert outbox.is_on_disk
    assert drained(Outbox(path, silent)) == ["one", "two", "three", "four"]


@given(
    st.lists(
        st.one_of(
            st.text(st.characters(exclude_characters="\n\r", exclude_categories=["C", "Z"])),
            st.sampled_from(["pop", "kill", "kill in a line", "full", "room"]),
        ),
        max_size=40,
    )
)
def test_whatever_happens_order_stays_and_nothing_is_lost(tmp_path_factory, steps):
    """The queue does what a deque does, as long as no kill meets a full disk."""
    path = tmp_path_factory.mktemp("box") / "store.jsonl"
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = Disk(monkeypatch)
        outbox, model = Outbox(path, [].append), deque()
        for step in steps:
            if step == "pop":
                if model:
                    assert outbox.head() == model.popleft()
                    outbox.pop()
            elif step == "full":
                disk.full = True
            elif step == "room":
                disk.full = False
            elif step.startswith("kill"):
                if disk.full or not outbox.is_on_disk:
                    continue
                if step != "kill" and path.exists():
                    with path.open("a") as file:
                        file.write("half")
                before = [*model]
                outbox = Outbox(path, [].append)
                again = [*outbox._items]
                # What was delivered while the disk was full may come again, before the rest.
                assert again[len(again) - len(before) :] == before
                model = deque(again)
            else:
                outbox.put(step)
                model.append(step)
        assert drained(outbox) == [*model]
