"""A contender in a process of its own, so that its memory and processor time are its alone."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from frame import Sample, peak_resident_mib

Actions = Mapping[str, Callable[[], Any]]


class Elsewhere:
    """Does things in another process, which stays idle in between.

    Args:
        build: makes the things that can be done, by name, in that process; a function of a module.
        arguments: of ``build``.

    Attributes:
        built_mib: the most memory the process held until all was built, libraries included.
    """

    def __init__(self, build: Callable[..., Actions], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, build, arguments), daemon=True)
        self._process.start()
        other.close()
        self.built_mib = self._receive()[1]["peak_mib"]

    def do(self, action: str) -> tuple[Any, Sample]:
        """What the action returns, and what it took; the memory is the process' peak so far.

        Raises:
            RuntimeError: the action failed there; holds its traceback.
        """
        self._connection.send(action)
        return self._receive()

    def measure(self, action: str) -> Callable[[], Sample]:
        """The action as something to measure."""
        return lambda: self.do(action)[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self) -> tuple[Any, Sample]:
        try:
            failure, value, sample = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process ended with {self._process.exitcode}") from None
        if failure:
            raise RuntimeError(failure)
        return value, sample


def _serve(connection: Connection, build: Callable[..., Actions], arguments: tuple[Any]) -> None:
    try:
        actions = build(*arguments)
        connection.send((None, None, {"peak_mib": peak_resident_mib()}))
        while True:
            action = actions[connection.recv()]
            seconds, cpu_seconds = time.perf_counter(), time.process_time()
            value = action()
            sample = {
                "seconds": time.perf_counter() - seconds,
                "cpu_seconds": time.process_time() - cpu_seconds,
                "peak_mib": peak_resident_mib(),
            }
            connection.send((None, value, sample))
    except EOFError:
        pass  # nothing more to do
    except BaseException:
        connection.send((traceback.format_exc(), None, None))
