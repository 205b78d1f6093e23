"""Files that travel with the code: experiments and cluster files.

In a checkout they are folders beside the packages; in an installed wheel they lie under
``orchestrator/share/``.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def share(folder: str) -> Path:
    """Where the shipped folder ``experiments`` or ``cluster`` lies.

    Raises:
        FileNotFoundError: neither a checkout nor a complete wheel.
    """
    for candidate in (_PACKAGE / "share" / folder, _PACKAGE.parent / folder):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"codetr's own folder '{folder}' is missing: install codetr again")
