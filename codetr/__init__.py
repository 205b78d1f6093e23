"""Co-DETR in plain PyTorch: DETRs with collaborative hybrid assignments training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codetr.detector import CoDETR as CoDETR
    from codetr.structures import Detections as Detections

__version__ = "0.1.0"

_HOMES = {"CoDETR": "codetr.detector", "Detections": "codetr.structures"}
__all__ = ["CoDETR", "Detections", "__version__"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; configuration and the command line must not wait for it.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'codetr' has no attribute '{name}'")
