"""Named detectors, and official checkpoints in and out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from codetr.zoo.catalogue import Entry, detector_config, entries, entry, names

if TYPE_CHECKING:
    from codetr.zoo.conversion import Imported as Imported
    from codetr.zoo.conversion import from_official as from_official
    from codetr.zoo.conversion import import_official as import_official
    from codetr.zoo.official import from_official_names as from_official_names
    from codetr.zoo.official import to_official_names as to_official_names

__all__ = [
    "Entry",
    "Imported",
    "detector_config",
    "entries",
    "entry",
    "from_official",
    "from_official_names",
    "import_official",
    "names",
    "to_official_names",
]

_HOMES = {
    "Imported": "codetr.zoo.conversion",
    "from_official": "codetr.zoo.conversion",
    "import_official": "codetr.zoo.conversion",
    "from_official_names": "codetr.zoo.official",
    "to_official_names": "codetr.zoo.official",
}


def __getattr__(name: str) -> Any:
    # Names and configurations need no torch, which takes seconds to import.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'codetr.zoo' has no attribute '{name}'")
