"""The kernels' arithmetic, run by Triton's interpreter on the CPU.

Whether kernels are interpreted is decided when they are defined: it takes a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_agree_with_the_definition() -> None:
    pytest.importorskip("triton")
    file = Path(__file__).with_name("test_kernels.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=file.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    # A run that skipped everything would succeed, too.
    assert re.search(r"^\d+ passed(?!.*skipped)", done.stdout, re.MULTILINE), done.stdout[-500:]
