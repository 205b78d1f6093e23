"""Objects' masks as COCO and LVIS write them: polygons or run lengths. They stay run-length encoded
until their image is read."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from codetr.data.errors import DataError

NEEDED = (
    "which mask heads and copy-paste need; add it, or take the head out of 'heads' and set "
    "data.copy_paste.enabled=false or data.copy_paste.shapes=boxes"
)


@dataclass(frozen=True)
class Masks:
    """Masks of A annotations; empty ones for annotations that need none.

    Attributes:
        runs: (bytes,) uint8, COCO's compressed run lengths of all masks, laid end to end.
        spans: (A, 2) int64, where each annotation's begin and end.
    """

    runs: NDArray[np.uint8]
    spans: NDArray[np.int64]

    @classmethod
    def of(cls, runs: Sequence[bytes]) -> Self:
        ends = np.cumsum([0, *map(len, runs)])
        return cls(np.frombuffer(b"".join(runs), np.uint8), np.stack([ends[:-1], ends[1:]], axis=1))

    def select(self, rows: NDArray[np.int64]) -> Masks:
        """Only the annotations at these positions, in this order."""
        return replace(self, spans=self.spans[rows])

    def decode(self, rows: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.uint8]:
        """(n, height, width) the masks at these positions, of an image of ``size``."""
        from pycocotools import mask as coco_mask  # a GPU machine for benchmarks has none

        if not len(rows):
            return np.zeros((0, *size), np.uint8)
        runs = [self.runs[start:end].tobytes() for start, end in self.spans[rows]]
        decoded = coco_mask.decode([{"size": [*size], "counts": counts} for counts in runs])
        return np.ascontiguousarray(np.moveaxis(decoded, 2, 0))


def compacted(segmentation: Any) -> Any:
    """The same with polygons as arrays, a quarter of the memory; what is none stays as it is."""
    if not isinstance(segmentation, list):
        return segmentation
    try:
        return [array("d", polygon) for polygon in segmentation]
    except (TypeError, OverflowError):
        return segmentation


def encoded_all(
    path: Path,
    entries: list[dict[str, Any]],
    sizes: NDArray[np.int32],
    crowd: NDArray[np.bool_],
    wrong: dict[int, str],
) -> list[bytes]:
    """Compressed run lengths of each annotation's mask.

    Args:
        path: the annotation file.
        entries: A annotations, with segmentations that are :func:`compacted`.
        sizes: (A, 2) of (height, width) of their images.
        crowd: (A,) which are crowds and need none.
        wrong: what is wrong with annotations, by their position; those without a mask are added.

    Raises:
        DataError: there is no mask at all.
    """
    if all(entry.get("segmentation") is None for entry in entries):
        raise DataError(f"{path}: no object has a 'segmentation', {NEEDED}")
    runs = [b""] * len(entries)
    for row, entry in enumerate(entries):
        if row in wrong or crowd[row]:
            continue
        try:
            runs[row] = encoded(entry.get("segmentation"), (int(sizes[row, 0]), int(sizes[row, 1])))
        except ValueError as error:
            wrong[row] = str(error)
    return runs


def encoded(segmentation: Any, size: tuple[int, int]) -> bytes:
    """Compressed run lengths of an annotation's ``segmentation``.

    Args:
        segmentation: polygons, or run lengths, compressed or not.
        size: (height, width) of the image.

    Raises:
        ValueError: it is neither; says what is wrong with it.
    """
    if segmentation is None:
        raise ValueError(f"has no 'segmentation', {NEEDED}")
    if isinstance(segmentation, dict):
        return _encoded_runs(segmentation, size)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("'segmentation' must be a list of polygons or an object of run lengths")
    for polygon in segmentation:
        if (
            not isinstance(polygon, array)
            or len(polygon) < 6
            or len(polygon) % 2
            or not np.isfinite(polygon).all()
        ):
            raise ValueError(
                "'segmentation' has a polygon that is no list of three or more points x, y"
            )
    from pycocotools import mask as coco_mask

    merged = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    counts: bytes = merged["counts"]
    return counts


def _encoded_runs(segmentation: dict[str, Any], size: tuple[int, int]) -> bytes:
    counts = segmentation.get("counts")
    if segmentation.get("size") != [*size]:
        raise ValueError(
            f"'segmentation' has the size {segmentation.get('size')}, its image {[*size]} "
            "(height, width)"
        )
    # pycocotools reads and writes beyond the image where they are wrong.
    runs = decompressed(counts) if isinstance(counts, str) else counts
    if (
        not isinstance(runs, list)
        or not all(type(n) is int and n >= 0 for n in runs)
        or sum(runs) != size[0] * size[1]
    ):
        raise ValueError("'segmentation' has run lengths that do not add up to its image")
    from pycocotools import mask as coco_mask

    result: bytes = coco_mask.frPyObjects({"size": [*size], "counts": runs}, *size)["counts"]
    return result


def decompressed(counts: str) -> list[int] | None:
    """The run lengths that COCO's text stands for; None where it is none.

    Each number has five bits in a character, lowest first, and a sixth where more follow. From the
    fourth on it is the difference from the one two before.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs
