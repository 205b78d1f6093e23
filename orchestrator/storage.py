"""Where the trials' checkpoints lie: a folder, or any place that fsspec knows by its URL.

Ray Train writes there, and keeps beside a trial's checkpoints its ledger of them. On a disk every
file is written whole or not at all: the ledger is what a trial goes on from, and Ray would write
over it in its place, so that a full disk or a killed process left half of it.

Imported by Ray Train's controllers too, one for each trial: keep the detector out of it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pyarrow import PythonFile
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

from codetr.config import ConfigError
from orchestrator.plan import Plan
from orchestrator.wording import one_line, without_secrets

LEDGER = "checkpoint_manager_snapshot.json"
"""Ray Train's name for it."""

RETRY_PAUSES = (1.0, 2.0, 4.0)
"""Seconds between the attempts to reach a storage."""

T = TypeVar("T")


def patiently(read: Callable[[], T]) -> T:
    """What ``read`` returns, or in the end raises. A disk or a server that does not answer says
    nothing of what lies there: it is asked a few times more."""
    for pause in RETRY_PAUSES:
        try:
            return read()
        except Exception:  # each file system raises its own
            time.sleep(pause)
    return read()


class Patience:
    """Asks patiently until something has not answered, and what comes after that only once: each
    would be waited for as long, and most likely in vain."""

    def __init__(self) -> None:
        self.is_lost = False

    def __call__(self, read: Callable[[], T]) -> T:
        try:
            return read() if self.is_lost else patiently(read)
        except Exception:
            self.is_lost = True
            raise


@dataclass(frozen=True)
class Storage:
    """A place for trials: each has a folder of its own below ``root``.

    Attributes:
        filesystem: fsspec's.
        root: within it.
    """

    filesystem: fsspec.AbstractFileSystem
    root: str

    @classmethod
    def of(cls, plan: Plan) -> Storage:
        """The plan's.

        Raises:
            ConfigError: nothing here can reach such a place.
        """
        if plan.storage is None:
            return cls(LocalFileSystem(auto_mkdir=True), str(plan.store))
        try:
            # Others write there: what was once listed is soon out of date.
            filesystem, root = fsspec.core.url_to_fs(plan.storage, use_listings_cache=False)
        except Exception as error:  # each file system raises its own
            raise _refused(plan.storage, "cannot be used", error) from None
        return cls(filesystem, f"{root.rstrip('/')}/{plan.name}/{plan.store.name}")

    def require_writable(self, plan: Plan) -> None:
        """Try it out, before anything is trained.

        Raises:
            ConfigError: nothing can be written there.
        """
        probe = f"{self.root}/.probe"
        try:
            self.filesystem.makedirs(self.root, exist_ok=True)
            self.filesystem.pipe_file(probe, b"codetr")
            self.filesystem.rm_file(probe)
        except Exception as error:  # each file system raises its own
            raise _refused(plan.storage, "cannot be written", error) from None

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    @property
    def for_ray(self) -> FileSystem:
        """The same file system as Ray wants it."""
        handler = WholeFiles if self.is_local else FSSpecHandler
        return PyFileSystem(handler(self.filesystem))

    def result(self, trial: str) -> Any:
        """What Ray Train knows of a trial's last job, a ``ray.train.Result``; None if it knows
        nothing, or its ledger is damaged.

        Raises:
            Exception: the file system's own, where it cannot be reached.
        """
        import ray.train
        from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError

        if not self._is_there(f"{self.root}/{trial}/{LEDGER}"):
            return None
        try:
            return ray.train.Result.from_path(f"{self.root}/{trial}", self.for_ray)
        # The latter where its text is no UTF-8, or lacks what it refers to.
        except (CheckpointManagerInitializationError, ValueError, LookupError, AssertionError):
            return None

    def make_ready(self, trial: str) -> None:
        """Clear the way for the trial's next job.

        With a ledger that cannot be read no job would start: it is set aside, and the job finds the
        checkpoints without it. With a sound one, what was not reported before the job ended, and
        may not be all there, is removed: it would be done again beside it.
        """
        ledger = f"{self.root}/{trial}/{LEDGER}"
        if not self._is_there(ledger):
            return
        stored = self.result(trial)
        if stored is None:
            self.filesystem.mv(ledger, f"{ledger}.damaged")
            return
        reported = _reported(stored)
        last = max(map(place_of, reported), default=(0, 0))
        for checkpoint in self.checkpoints(trial):
            if checkpoint not in reported and place_of(checkpoint) >= last:
                self.filesystem.rm(checkpoint, recursive=True)

    def address(self, path: str) -> str:
        """A path within the file system as a user would give it."""
        return path if self.is_local else str(self.filesystem.unstrip_protocol(path))

    def fetch(self, checkpoint: str, into: Path) -> Path:
        """The checkpoint's folder on this machine: its own, or a copy below ``into``."""
        if self.is_local:
            return Path(checkpoint)
        return self._copy(self.filesystem.ls(checkpoint, detail=False), into / _name(checkpoint))

    def notes(self, checkpoint: str, into: Path) -> Path:
        """As :meth:`fetch`, of a copy only the small files: everything but the weights."""
        if self.is_local:
            return Path(checkpoint)
        files = self.filesystem.ls(checkpoint, detail=False)
        notes = [file for file in files if file.endswith(".json")]
        return self._copy(notes, into / _name(checkpoint))

    def _copy(self, files: list[str], folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            if not (target := folder / _name(file)).exists():
                draft = target.with_name(f".{target.name}.draft")
                self.filesystem.get_file(file, str(draft))
                draft.replace(target)
        return folder

    def move(self, trial: str, to: str) -> None:
        """Move a trial's checkpoints to ``to``, beside the root; there may be none."""
        if self.checkpoints(trial):
            target = PurePosixPath(self.root).parent / to
            self.filesystem.mv(f"{self.root}/{trial}", str(target), recursive=True)

    def hand_over(self, donor: str, place: tuple[int, int], heir: str) -> bool:
        """Copy a trial's checkpoint to another trial, which goes on from it.

        Args:
            place: epoch and step of the checkpoint.

        Returns:
            False if the donor has none: it is not kept for ever.
        """
        wanted = [c for c in self.checkpoints(donor) if place_of(c) == place]
        if not wanted:
            return False
        self._copy_checkpoint(wanted[-1], heir)
        return True

    def copy_trial(self, source: Storage, trial: str, to: str) -> None:
        """Copy all of a trial's checkpoints from another place of the same file system; the ledger
        comes last, so that it names nothing that is not there."""
        for checkpoint in source.checkpoints(trial):
            self._copy_checkpoint(checkpoint, to)
        ledger = f"{source.root}/{trial}/{LEDGER}"
        if self._is_there(ledger):
            self.filesystem.cp_file(ledger, f"{self.root}/{to}/{LEDGER}")

    def _copy_checkpoint(self, checkpoint: str, trial: str) -> None:
        target = f"{self.root}/{trial}/{_name(checkpoint)}"
        self.filesystem.makedirs(target, exist_ok=True)
        for file in self.filesystem.ls(checkpoint, detail=False):
            copy = f"{target}/{_name(file)}"
            # Half a copy, of a process that was killed, is made again.
            if not self._is_as_long(copy, self.filesystem.size(file)):
                self.filesystem.cp_file(file, copy)

    def forget(self, trial: str, place: tuple[int, int]) -> None:
        """Remove the checkpoint that was handed over to the trial, once it has others of its own.

        Args:
            place: epoch and step of the checkpoint.
        """
        own = _reported(self.result(trial))
        for checkpoint in self.checkpoints(trial):
            if own and place_of(checkpoint) == place and checkpoint not in own:
                self.filesystem.rm(checkpoint, recursive=True)

    def _is_as_long(self, file: str, size: int) -> bool:
        return bool(self.filesystem.exists(file) and self.filesystem.size(file) == size)

    def of_experiment(self, name: str) -> Storage:
        """Where another experiment has its trials, if it has them in the same place."""
        root = PurePosixPath(self.root)
        return replace(self, root=str(root.parents[1] / name / root.name))

    def checkpoints(self, trial: str) -> list[str]:
        """Every folder of the trial's checkpoints, also those that were never reported.

        Raises:
            Exception: the file system's own, where it cannot be reached.
        """
        try:  # not glob: what cannot be listed is empty to it
            there = self.filesystem.ls(f"{self.root}/{trial}", detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(path) for path in there if _name(path).startswith("epoch-"))

    def _is_there(self, path: str) -> bool:
        """As fsspec's ``exists``, to which a place that cannot be reached has nothing."""
        try:
            self.filesystem.info(path)
        except FileNotFoundError:
            return False
        return True


def checkpoint_name(epoch: int, step: int, suffix: str) -> str:
    """A checkpoint's folder: sorted by name, the last is the newest.

    Args:
        epoch, step: finished.
        suffix: tells it from another attempt's.
    """
    return f"epoch-{epoch:04d}-step-{step:08d}-{suffix}"


def place_of(checkpoint: str | None) -> tuple[int, int]:
    """The epoch and the step in a checkpoint's name; the beginning for none."""
    found = re.search(r"/epoch-(\d+)-step-(\d+)-[^/]*$", checkpoint or "")
    return (int(found[1]), int(found[2])) if found else (0, 0)


@contextmanager
def local_checkpoint(place: str) -> Iterator[Path]:
    """A checkpoint as a file or folder of this machine, for as long as it is needed.

    Args:
        place: of the file, or of its folder; a path, or any URL of fsspec.

    Raises:
        ConfigError: it cannot be fetched.
    """
    if "://" not in place:
        yield Path(place).expanduser()
        return
    from codetr.checkpoint import FILE_NAME

    named = place.endswith((FILE_NAME, ".safetensors"))
    url = place if named else f"{place.rstrip('/')}/{FILE_NAME}"
    with TemporaryDirectory() as folder:
        copy = Path(folder) / _name(url)
        try:
            filesystem, path = fsspec.core.url_to_fs(url)
            filesystem.get_file(path, str(copy))
        except Exception as error:  # each file system raises its own
            raise ConfigError(f"{without_secrets(url)}: {one_line(error, url)}") from None
        yield copy


def _refused(storage: str | None, why: str, error: Exception) -> ConfigError:
    """What to tell the user of an address, without its secrets."""
    shown = without_secrets(storage or "")
    return ConfigError(f"--storage {shown}: {why}: {one_line(error, storage)}")


def _reported(result: Any) -> set[str]:
    """The checkpoints that Ray Train's ledger knows."""
    known = (result and result.best_checkpoints) or []
    return {checkpoint.path for checkpoint, _ in known}


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


class WholeFiles(FSSpecHandler):  # type: ignore[misc]
    """A disk on which a file takes its name when all of it is there."""

    def open_output_stream(self, path: str, metadata: Any) -> PythonFile:  # noqa: ARG002
        return PythonFile(_Draft(Path(path)), mode="w")


class _Draft:
    """A file that is being written; after an error it leaves nothing, and what bore its name."""

    def __init__(self, target: Path) -> None:
        self._target, self._draft = target, target.with_name(f".{target.name}.draft")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._draft.open("wb")
        self._failed = False

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, data: bytes) -> int:
        try:
            written = self._file.write(data)
            self._file.flush()
        except BaseException:
            self._failed = True
            raise
        return written

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        if self.closed:
            return
        try:
            if not self._failed:
                os.fsync(self._file.fileno())
                self._draft.replace(self._target)
        finally:
            self._draft.unlink(missing_ok=True)
            self._file.close()
