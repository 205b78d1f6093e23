"""A queue that outlives its process: what a server that is away shall have later, in order.

A line of text for each item, appended to a file before anybody tries to deliver it. How much of
the file is delivered stands in another one beside it, and both go when the queue is empty. Whoever
opens the queue next finds at its head what was left. After a kill in the wrong moment that may
include what has just been delivered: to deliver twice must do no harm.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from orchestrator.files import write_whole


class Outbox:
    """Items in the order in which they came; safe between threads.

    On a disk that takes nothing the queue goes on in memory, which is said once, and tries the disk
    again with each new item.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        """Open a queue with what was left in it.

        Args:
            path: its file; there need not be one. One process at a time may have it open.
            say: tells the user.
        """
        self.path = path
        self._say = say
        self._mark = path.with_suffix(".delivered")
        self._changed = threading.Condition()
        self._closed = False
        self._delivered = _number(self._mark)
        self._items = deque(self._left())
        self._on_disk = True

    def _left(self) -> list[str]:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            self._mark.unlink(missing_ok=True)
            self._delivered = 0
            return []
        # The last line is not whole where its writer was killed.
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return whole[self._delivered :].decode().splitlines()

    def __len__(self) -> int:
        return len(self._items)

    @property
    def is_on_disk(self) -> bool:
        """Whether all of it would survive this process."""
        return self._on_disk

    def put(self, item: str) -> None:
        """Append a line."""
        with self._changed:
            self._items.append(item)
            try:
                self._append(item)
                self._on_disk = True
            except OSError as error:
                if self._on_disk:
                    self._say(f"cannot write {self.path}: {error.strerror}: kept in memory")
                self._on_disk = False
            self._changed.notify()

    def _append(self, item: str) -> None:
        if not self._on_disk:  # what was kept in memory comes before it
            self._mark.unlink(missing_ok=True)
            self._delivered = 0
            write_whole(self.path, "".join(f"{line}\n" for line in self._items))
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(f"{item}\n")

    def head(self) -> str | None:
        """The first item, once there is one; None: the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed)
            return self._items[0] if self._items else None

    def pop(self) -> None:
        """The first item has been delivered."""
        with self._changed:
            self._delivered += len(self._items.popleft().encode()) + 1
            with suppress(OSError):  # it would be delivered again, and do no harm
                if self._items:
                    write_whole(self._mark, str(self._delivered))
                else:
                    self._delivered = 0
                    self._mark.unlink(missing_ok=True)  # first: alone it would hide new items
                    self.path.unlink(missing_ok=True)
            self._changed.notify()

    def close(self) -> None:
        """No more will come."""
        with self._changed:
            self._closed = True
            self._changed.notify()


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
