"""What becomes of an experiment, on its way to MLflow: nobody waits for it.

Each thing to tell is an :data:`Operation`, complete in itself, that waits in an
:class:`~orchestrator.outbox.Outbox` on disk until the store has taken it. A store that is away for
a minute gets everything when it is back, one that stays away from the next invocation.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from codetr.config import Strict
from orchestrator.board import Epoch, History
from orchestrator.files import as_far_as_possible, write_whole
from orchestrator.outbox import Outbox
from orchestrator.plan import Plan, Trial
from orchestrator.tracking import Status, Tracker, is_permanent
from orchestrator.wording import one_line

FOLDER = ".outbox"
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 10.0
"""Seconds between two attempts to deliver; they double."""


class _Told(Strict):
    """What every operation says: beneath which invocation's run, and when it came about, in seconds
    since 1970."""

    model_config = ConfigDict(allow_inf_nan=True)  # measurements, not settings

    parent: str
    at: float


class Start(_Told):
    """The invocation itself has begun, while the store was away."""

    do: Literal["start"] = "start"
    tags: dict[str, str]


class Begin(_Told):
    do: Literal["begin"] = "begin"
    trial: Trial


class Adopt(_Told):
    do: Literal["adopt"] = "adopt"
    trial: Trial


class Discard(_Told):
    do: Literal["discard"] = "discard"
    trial: Trial


class Record(_Told):
    do: Literal["record"] = "record"
    trial: Trial
    epochs: list[Epoch]
    notes: list[str]


class Describe(_Told):
    do: Literal["describe"] = "describe"
    trial: Trial | None
    tags: dict[str, str]


class Attach(_Told):
    do: Literal["attach"] = "attach"
    trial: Trial
    files: list[Path]


class Measure(_Told):
    do: Literal["measure"] = "measure"
    trial: Trial
    values: dict[str, float]
    step: int


class End(_Told):
    do: Literal["end"] = "end"
    trial: Trial
    status: Status
    reason: str | None


class Close(_Told):
    do: Literal["close"] = "close"
    status: Status
    files: list[Path]


Operation = Start | Begin | Adopt | Discard | Record | Describe | Attach | Measure | End | Close
_FROM_TEXT: TypeAdapter[Operation] = TypeAdapter(Annotated[Operation, Field(discriminator="do")])


def perform(operation: Operation, tracker: Tracker) -> None:
    """Write an operation into the store."""
    if isinstance(operation, Start):
        tracker.start(operation.parent, operation.tags, operation.at)
    else:
        _perform(operation, tracker.beneath(operation.parent))


def _perform(operation: Operation, tracker: Tracker) -> None:
    match operation:
        case Begin(trial=trial):
            tracker.begin(trial)
        case Adopt(trial=trial):
            tracker.adopt(trial)
        case Discard(trial=trial, at=at):
            tracker.discard(trial, before=at)
        case Record(trial=trial, epochs=epochs, notes=notes, at=at):
            tracker.record(trial, epochs, at, notes)
        case Describe(trial=some, tags=tags):
            tracker.describe(some, tags)
        case Attach(trial=trial, files=files):
            tracker.attach(trial, files)
        case Measure(trial=trial, values=values, step=step, at=at):
            tracker.measure(trial, values, step, at)
        case End(trial=trial, status=status, reason=reason, at=at):
            tracker.end(trial, status, reason, at)
        case Close(status=status, files=files, at=at):
            tracker.close(status, files, at)


def outbox_path(plan: Plan) -> Path:
    """Of what waits for the plan's store; named by its hash, for an address may hold a password."""
    digest = hashlib.sha256(plan.tracking_uri.encode()).hexdigest()[:10]
    return plan.folder / FOLDER / f"{digest}.jsonl"


def _write_known(path: Path, parent: str) -> list[Path]:
    """Keep that the store was there once: it is no mistake in the address if it is away later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return [write_whole(path, parent)]


class Recorder:
    """Tells MLflow what an invocation does, in order, from a thread of its own.

    It begins with what earlier invocations could not deliver. What fails because the store is away
    is tried again; what comes behind it waits.
    """

    def __init__(self, tracker: Tracker, outbox: Outbox, say: Callable[[str], None]) -> None:
        self.tracker, self.outbox = tracker, outbox
        self._say = say
        self._handed_on: dict[str, int] = {}
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        if len(outbox):
            say(f"MLflow: {len(outbox)} operation(s) of an earlier run wait: delivering them")
        self._thread.start()

    @classmethod
    def open(cls, plan: Plan, say: Callable[[str], None]) -> Recorder:
        """For a plan, beneath a new run of its own.

        A store that has taken something of the experiment before may be away now: it is told later.

        Raises:
            TrackingError: the store cannot be reached for the first time, its address makes no
                sense, or the experiment was deleted there.
        """
        path = outbox_path(plan)
        known = path.with_suffix(".known")
        tracker = Tracker(plan, may_wait=known.exists())
        recorder = cls(tracker, Outbox(path, say), say)
        if tracker.away is None:
            as_far_as_possible(say, _write_known, known, tracker.parent)
        else:
            say(f"MLflow: {tracker.away}; going on: what it misses waits in {path}")
            recorder._put(Start(tags=tracker.invocation_tags, **recorder._now))
        return recorder

    # -------------------------------------------------------------------------------- what to tell

    def begin(self, trial: Trial) -> None:
        """The trial's training begins or goes on."""
        self._put(Begin(trial=trial, **self._now))

    def adopt(self, trial: Trial) -> None:
        """The trial is part of this invocation, in whatever state it is."""
        self._put(Adopt(trial=trial, **self._now))

    def discard(self, trial: Trial) -> None:
        """What the trial was until now counts no more."""
        self._handed_on.pop(trial.id, None)
        self._put(Discard(trial=trial, **self._now))

    def record(self, trial: Trial, history: History) -> None:
        """The trial's history is this now."""
        known = self._handed_on.get(trial.id, 0)
        epochs = [epoch for epoch in history if epoch.epoch > known]
        if epochs:
            self._handed_on[trial.id] = epochs[-1].epoch
            notes = [f"epoch {epoch.epoch}: {note}" for epoch in history for note in epoch.notes]
            self._put(Record(trial=trial, epochs=epochs, notes=notes, **self._now))

    def describe(self, trial: Trial | None, tags: dict[str, str]) -> None:
        """Tags of the trial's run, or of the invocation's."""
        self._put(Describe(trial=trial, tags=tags, **self._now))

    def attach(self, trial: Trial, files: list[Path]) -> None:
        """Files for the trial's artifacts."""
        if files:
            self._put(Attach(trial=trial, files=files, **self._now))

    def measure(self, trial: Trial, values: dict[str, float], step: int) -> None:
        """What was found in the trial's detector after the epoch ``step``."""
        self._put(Measure(trial=trial, values=values, step=step, **self._now))

    def end(self, trial: Trial, status: Status, reason: str | None = None) -> None:
        """The trial has ended so."""
        self._put(End(trial=trial, status=status, reason=reason, **self._now))

    def close(self, status: Status, files: list[Path], patience: float) -> None:
        """The invocation ends so, with tables and pictures of the whole. Waits until everything is
        delivered, for at most ``patience`` seconds."""
        self._put(Close(status=status, files=files, **self._now))
        self.outbox.close()
        self._thread.join(patience)
        self._given_up.set()  # the outbox may soon be another process's
        if left := len(self.outbox):
            where = f"wait in {self.outbox.path}" if self.outbox.is_on_disk else "are in no file"
            self._say(
                f"MLflow has not taken {left} operation(s), which {where}: the same command run "
                "again delivers what it lacks"
            )

    @property
    def _now(self) -> dict[str, object]:
        return {"parent": self.tracker.parent, "at": time.time()}

    def _put(self, operation: Operation) -> None:
        self.outbox.put(operation.model_dump_json())

    # ------------------------------------------------------------------------------------ delivery

    def _deliver(self) -> None:
        while (item := self.outbox.head()) is not None:
            pause = _FIRST_PAUSE
            while not self._attempt(item, is_first=pause == _FIRST_PAUSE):
                if self._given_up.wait(pause):
                    return
                pause = min(2 * pause, _LONGEST_PAUSE)
            if self._given_up.is_set():
                return
            self.outbox.pop()

    def _attempt(self, item: str, *, is_first: bool) -> bool:
        """True if done, or if it never can be."""
        try:
            perform(_FROM_TEXT.validate_json(item), self.tracker)
        except ValidationError as error:
            self._say(f"{self.outbox.path}: left out what makes no sense: {one_line(error)}")
        except Exception as error:  # a store's failure must never be the training's
            text = one_line(error)
            # What keeps us from connecting is no fault of this operation.
            if self.tracker.is_connected and is_permanent(error):
                self._say(f"MLflow: {text}")
                return True
            if is_first:
                self._say(f"MLflow: {text}; trying again")
            return False
        return True
