"""Settings for all tests."""

from __future__ import annotations

import pytest
from hypothesis import settings

# How long an example takes says how busy the machine is. The same examples on every run: a failure
# can be repeated, and a change cannot fail for the luck of the draw.
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under ``pytest -n 2 --dist loadgroup``, as `make test` runs them: what starts Ray comes first
    and one after the other in one process, while the other goes through all the rest, file by
    file. The former mostly waits for processes to start."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)
    for item in items:
        with_ray = item.get_closest_marker("e2e") or item.get_closest_marker("faults")
        item.add_marker(pytest.mark.xdist_group("with Ray" if with_ray else item.path.name))
