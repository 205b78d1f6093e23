"""COCO and LVIS data sets on disk, the embedded digits, transforms and the loader."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from codetr.data.annotations import Classes
from codetr.data.errors import DataError, Problem

if TYPE_CHECKING:
    from codetr.data.coco import CocoDataset as CocoDataset
    from codetr.data.loader import build_loader as build_loader
    from codetr.data.sources import open_dataset as open_dataset

__all__ = ["Classes", "CocoDataset", "DataError", "Problem", "build_loader", "open_dataset"]

_HOMES = {
    "CocoDataset": "codetr.data.coco",
    "build_loader": "codetr.data.loader",
    "open_dataset": "codetr.data.sources",
}


def __getattr__(name: str) -> Any:
    # Annotations, checks and the digits need no torch, which takes seconds to import.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'codetr.data' has no attribute '{name}'")
