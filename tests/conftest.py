"""Settings for all tests."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes says how busy the machine is. The same examples on every run: a failure
# can be repeated, and a change cannot fail for the luck of the draw.
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")
