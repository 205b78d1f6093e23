"""Ctrl-C and SIGTERM: the first ends the run in order, the second at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

import psutil

SHOW_CURSOR = b"\x1b[?25h"
"""A live display hides it, and has no time to show it again."""


class Interrupted(BaseException):
    """Someone asked to stop; like KeyboardInterrupt it is not an Exception."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


class Interrupts:
    """While entered, the first signal raises :class:`Interrupted` in the main thread.

    A second one kills every process that this one has started, and then this one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._asking = threading.Lock()
        self._is_asked = False
        self._shielded = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        self._previous = self.install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def install(self) -> dict[int, object]:
        """Take the signals, also from a library that has taken them meanwhile; returns the
        handlers until now."""
        signals = (signal.SIGINT, signal.SIGTERM)
        return {signum: signal.signal(signum, self._on_signal) for signum in signals}

    @contextmanager
    def shield(self) -> Iterator[None]:
        """What must not be torn apart: a first signal is raised at its end."""
        before, self._shielded = self.received, True
        try:
            yield
        finally:
            self._shielded = False
        if self.received is not None and self.received is not before:
            raise Interrupted(self.received)

    def ask(self) -> None:
        """End the run in order, from any thread; never at once, however many ask."""
        with self._asking:
            if self.received is None and not self._is_asked:
                self._is_asked = True
                os.kill(os.getpid(), signal.SIGTERM)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            end_processes(descendants(), patience=0)
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), SHOW_CURSOR)
            os._exit(128 + signum)
        self.received = signum
        # Not print: the signal may have come in the middle of one.
        os.write(sys.stderr.fileno(), b"\nStopping; once more to force.\n")
        if not self._shielded:
            raise Interrupted(signum)


def descendants() -> list[psutil.Process]:
    """Every process that this one has started, and theirs."""
    return psutil.Process().children(recursive=True)


def end_processes(processes: list[psutil.Process], patience: float) -> None:
    """Wait for them to end by themselves; kill what is left after ``patience`` seconds."""
    _, alive = psutil.wait_procs(processes, timeout=patience)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=5)
