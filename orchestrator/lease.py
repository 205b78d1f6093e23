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
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from filelock import FileLock

from orchestrator.owner import Owner

FOLDER = ".leases"
HEARTBEAT_SECONDS = 10.0
LAPSE_SECONDS = 120.0
"""Longer than a file server's hiccups; what a machine that died costs those who wait for it."""


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
        """The lease in a file; None: there is none, or it is being written just now.

        Raises:
            OSError: the file server is away, which says nothing of who owns it.
        """
        try:
            values = json.loads(path.read_text())
            return cls(Owner(**values.pop("owner")), **values)
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None


def terminate() -> None:
    """Have this process end as by ``kill``."""
    os.kill(os.getpid(), signal.SIGTERM)


class Leases:
    """The leases that this process holds; entered, it keeps them alive.

    Attributes:
        lost: who has taken a trial's lease away, because this process slept for too long.
    """

    def __init__(
        self,
        output: Path,
        name: str,
        *,
        heartbeat: float = HEARTBEAT_SECONDS,
        on_loss: Callable[[], None] = terminate,
    ) -> None:
        """
        Args:
            on_loss: ends what this process trains, once another has taken a lease of it. Called
                once, from a thread; where it raises an OSError, once more at the next heartbeat.
        """
        self.folder, self.name = output / FOLDER, name
        self.owner = Owner.this()
        self.lost: dict[str, Lease] = {}
        self._heartbeat, self._on_loss = heartbeat, on_loss
        self._held: set[str] = set()
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

    def acquire(self, trial: str) -> Lease | None:
        """Take a trial's lease; returns the one that stands against it, None if it is ours."""
        path = self.folder / trial
        with self._alone():
            if path.exists() and not has_lapsed(path):
                return Lease.read(path) or Lease(Owner("unknown", 0, 0), "unknown", time.time())
            path.unlink(missing_ok=True)
            self._write(path)
        self._held.add(trial)
        return None

    def _write(self, path: Path) -> None:
        content = json.dumps(asdict(Lease(self.owner, self.name, time.time())))
        # Exclusive: also where a file system does not honour the lock of _alone.
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            with os.fdopen(file, "w") as stream:
                stream.write(content)
        except BaseException:  # half of it, on a full disk, would be nobody's to give back
            path.unlink(missing_ok=True)
            raise

    def release(self, trial: str) -> None:
        """Give a lease back, unless another has taken it meanwhile."""
        self._held.discard(trial)
        # Where the file server is away it lapses by itself: no reason to lose a trial's result.
        with suppress(OSError), self._alone():
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
                with suppress(OSError):  # the file server is away: the next beat may reach it
                    self._beat(trial)

    def _beat(self, trial: str) -> None:
        """Touch the lease, unless another has taken it: to go on would be to train it twice."""
        lease = Lease.read(self.folder / trial) or self._take_again(trial)
        if lease is None or trial not in self._held:  # being written, or given back meanwhile
            return
        if lease.owner == self.owner:
            os.utime(self.folder / trial)
            return
        if not self.lost:
            self._on_loss()
        self.lost[trial] = lease
        self._held.discard(trial)

    def _take_again(self, trial: str) -> Lease | None:
        """Write the lease where it is gone; returns the one that is there then, whosever it is.

        It lapsed while this process slept, and another has removed it, or trained and given it
        back. To go on costs no more than to train it twice; without a lease others would join in.
        """
        path = self.folder / trial
        if self.folder.is_dir():  # else the file server is away, and says nothing of the lease
            with self._alone():
                if trial in self._held and not path.exists():
                    self._write(path)
        return Lease.read(path)


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
