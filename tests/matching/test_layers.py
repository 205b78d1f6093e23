"""What label assignment stands on."""

from __future__ import annotations

import subprocess
import sys


def test_assignment_knows_no_detector() -> None:
    """The detector assigns labels, and so do its heads: not the reverse."""
    program = (
        "import pkgutil, sys, codetr.matching as package\n"
        "for one in pkgutil.iter_modules(package.__path__, package.__name__ + '.'):\n"
        "    __import__(one.name)\n"
        "found = [m for m in sys.modules if m in ('codetr.detector', 'codetr.heads')]\n"
        "sys.exit(str(found) if found else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
