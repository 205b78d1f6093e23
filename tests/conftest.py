"""Settings for all tests."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# How long an example takes says how busy the machine is. The same examples on every run: a failure
# can be repeated, and a change cannot fail for the luck of the draw.
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")

# In the background of a shell it is ignored, and so by all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


QUIET = ("analysed_run", "load", "secrets", "storage", "token")
"""Files of tests/e2e in which nobody is stopped or killed at a certain moment: Ray may be slow."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts Ray comes first: see the scheduler."""
    items.sort(key=lambda item: not _starts_ray(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under ``pytest -n 2``, as `make test` runs them, tests that start Ray come one after the
    other, those that bear another Ray beside them in one process and the others in the other: they
    mostly wait for others to start. Whoever is through with them takes the rest, file by file."""
    from xdist.scheduler import LoadScopeScheduling

    class RayApart(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if not _starts_ray(file):
                return file
            return "quiet" if Path(file).stem.removeprefix("test_") in QUIET else "with Ray"

    return RayApart(config, log)


def _starts_ray(nodeid: str) -> bool:
    return nodeid.startswith(("tests/e2e/", "tests/faults/"))
