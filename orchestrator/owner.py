"""Which process something belongs to, and whether it still runs."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Owner:
    """A process: host, number, and starting time, for numbers come again."""

    host: str
    pid: int
    started: float

    @classmethod
    def this(cls) -> Owner:
        process = psutil.Process()
        return cls(socket.gethostname(), process.pid, process.create_time())

    @classmethod
    def of_tag(cls, tag: str) -> Owner:
        """The one that :attr:`tag` told of."""
        host, pid, started = tag.rsplit(" ", 2)
        return cls(host, int(pid), float(started))

    @property
    def tag(self) -> str:
        """In one word for each, as MLflow keeps it."""
        return f"{self.host} {self.pid} {self.started:.0f}"

    @property
    def is_local(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def is_gone(self) -> bool:
        """Whether it ran on this machine and does no longer."""
        if not self.is_local:
            return False
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 2
            return not same or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}"
