"""What all benchmarks share: the machine's description, and dated results.

Needs nothing but Python, for it also serves machines that have the detector's dependencies alone.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def environment(libraries: Iterable[str]) -> dict[str, Any]:
    """The commit, the processor, and the versions of Python and these libraries."""
    return {
        "commit": _commit(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{library: _version(library) for library in libraries},
    }


def write_result(name: str, report: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``NAME-DATE.json``, with the date first."""
    now = datetime.now(UTC)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{now:%Y-%m-%d-%H%M}.json"
    content = {"date": now.isoformat(timespec="seconds"), **report}
    file.write_text(json.dumps(content, indent=1) + "\n")
    return file


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
