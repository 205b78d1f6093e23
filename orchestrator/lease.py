"""Who is training a trial: a file for each, so that no two invocations train the same at once.

A lease is ``OUTPUT/.leases/ID``: the trial's id alone, whatever name the invocation goes by. It
names its owner, who touches it every few seconds. It has lapsed when its owner ran on this machine
and is gone, or when it was not touched for :data:`LAPSE_SECONDS`. Ages are measured by the clock of
the file system, which all machines that share it have in common.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil
from filelock import FileLock

FOLDER = ".leases"
HEARTBEAT_SECONDS = 10.0
LAPSE_SECONDS = 120.0
"""Longer than a file server's hiccups; what a machine that died costs those who wait for it."""


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


@dataclass(frozen=True)
class Lease:
    """What a lease says.

    Attributes:
        name: of the experiment for which the trial is trained.
        since: seconds since 1970.
    """

    owner: Owner
    name: str
    since: float

    @classmethod
    def read(cls, path: Path) -> Lease | None:
        """The lease in a file; None: there is none, or it is being written just now."""
        try:
            values = json.loads(path.read_text())
            return cls(Owner(**values.pop("owner")), **values)
        except (OSError, ValueError, TypeError, KeyError):
            return None


class Leases:
    """The leases that this process holds; entered, it keeps them alive."""

    def __init__(self, output: Path, name: str, heartbeat: float = HEARTBEAT_SECONDS) -> None:
        self.folder, self.name = output / FOLDER, name
        self.owner = Owner.this()
        self._heartbeat = heartbeat
        self._held: set[str] = set()
        self._lost: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="leases", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for trial in [*self._held]:
            self.release(trial)

    @property
    def lost(self) -> frozenset[str]:
        """Trials whose lease was taken away, because this process slept for too long."""
        return frozenset(self._lost)

    def acquire(self, trial: str) -> Lease | None:
        """Take a trial's lease; returns the one that stands against it, None if it is ours."""
        path = self.folder / trial
        with self._alone():
            if path.exists() and not has_lapsed(path):
                return Lease.read(path) or Lease(Owner("unknown", 0, 0), "unknown", time.time())
            path.unlink(missing_ok=True)
            content = json.dumps(asdict(Lease(self.owner, self.name, time.time())))
            # Exclusive: also where a file system does not honour the lock above.
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            with os.fdopen(file, "w") as stream:
                stream.write(content)
        self._held.add(trial)
        return None

    def release(self, trial: str) -> None:
        """Give a lease back, unless another has taken it meanwhile."""
        self._held.discard(trial)
        with self._alone():
            if self._is_ours(trial):
                (self.folder / trial).unlink(missing_ok=True)

    def clear(self, trials: Iterable[str]) -> None:
        """Remove the leases of these trials that killed processes have left."""
        with self._alone():
            for path in (self.folder / trial for trial in trials):
                if path.exists() and has_lapsed(path):
                    path.unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else takes or gives back a lease meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock", timeout=60):
            yield

    def _is_ours(self, trial: str) -> bool:
        lease = Lease.read(self.folder / trial)
        return lease is not None and lease.owner == self.owner

    def _keep_alive(self) -> None:
        while not self._ended.wait(self._heartbeat):
            for trial in [*self._held]:
                if not self._is_ours(trial):
                    self._lose(trial)
                    continue
                with suppress(OSError):  # the file server is away: the next beat may reach it
                    os.utime(self.folder / trial)

    def _lose(self, trial: str) -> None:
        """Another trains it now: to go on would be to train it twice."""
        if (self.folder / trial).exists() and trial in self._held:
            self._held.discard(trial)
            self._lost.add(trial)
            os.kill(os.getpid(), signal.SIGTERM)


def has_lapsed(path: Path) -> bool:
    """Whether nobody keeps that lease alive."""
    lease = Lease.read(path)
    if lease is not None and lease.owner.is_local:
        return lease.owner.is_gone
    return age(path) > LAPSE_SECONDS


def age(path: Path) -> float:
    """Seconds since a file was touched, by its file system's clock."""
    clock = path.with_name(".clock")
    clock.touch()
    try:
        return clock.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def holder(output: Path, trial: str) -> Lease | None:
    """Who trains that trial just now."""
    path = output / FOLDER / trial
    return Lease.read(path) if path.exists() and not has_lapsed(path) else None
