"""A COCO or LVIS annotation file as compact arrays, validated when it is read.

Python objects for the 860,000 annotations of COCO train2017 would take a gigabyte in every loader
process; the arrays take 60 MB, and forked processes share them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codetr.data.errors import DataError, Problem
from codetr.data.masks import Masks, compacted, encoded_all

Entry = dict[str, Any]

_LARGEST_ID = 2**53
"""Results hold ids as 64-bit floats."""
_LARGEST_SIDE = 2**31 - 1

_ANNOTATION = np.dtype(
    [
        ("id", np.int64),
        ("image_id", np.int64),
        ("category_id", np.int64),
        ("box", np.float64, (4,)),
        ("area", np.float64),
        ("crowd", np.bool_),
    ]
)


SPELLINGS = {"speaker_(stero_equipment)": "speaker_(stereo_equipment)"}
"""Names of one class that published files spell differently, and how it is right: LVIS's own
annotations have the former, MMDetection's list, and with it official checkpoints, the latter."""


def same_name(one: str, other: str) -> bool:
    """Do both name the same class? They are equal, but for ``SPELLINGS``."""
    return SPELLINGS.get(one, one) == SPELLINGS.get(other, other)


@dataclass(frozen=True)
class Classes:
    """The classes of a data set; a class's number is its position in these tuples.

    Attributes:
        names: in the order of the category ids.
        category_ids: the annotation file's ids, ascending, gaps allowed.
        frequency: LVIS's ``r``, ``c`` or ``f`` for each class; None in COCO.
    """

    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    frequency: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def require_same(self, other: Classes, here: str, there: str) -> None:
        """Refuse to mix data sets or checkpoints with other classes: ids must be equal, and names
        the :func:`same_name`.

        Raises:
            DataError: shows the first class that differs; ``here`` and ``there`` say where the
                two sets of classes come from.
        """
        ours, others = (dict(zip(c.category_ids, c.names, strict=True)) for c in (self, other))

        def alike(mine: dict[int, str], theirs: dict[int, str], identity: int) -> bool:
            return identity in theirs and same_name(mine[identity], theirs[identity])

        if len(ours) == len(others) and all(alike(ours, others, i) for i in ours):
            return

        def only(mine: dict[int, str], theirs: dict[int, str]) -> str:
            own = [f"{i} {name!r}" for i, name in mine.items() if not alike(mine, theirs, i)]
            return f"{len(mine)}, of which only there: {', '.join(own[:3]) or 'none'}" + (
                f" and {len(own) - 3} more" if len(own) > 3 else ""
            )

        raise DataError(
            f"classes differ: {here} has {only(ours, others)}; {there} has {only(others, ours)}; "
            "use data with the same categories"
        )


@dataclass(frozen=True)
class LvisImages:
    """What LVIS says of each image about the classes that were not annotated exhaustively.

    Attributes:
        negative: category ids known to be absent.
        not_exhaustive: category ids of which further instances may be present.
    """

    negative: tuple[tuple[int, ...], ...]
    not_exhaustive: tuple[tuple[int, ...], ...]

    def select(self, images: Sequence[int]) -> LvisImages:
        negative, not_exhaustive = self.negative, self.not_exhaustive
        return LvisImages(
            tuple(negative[i] for i in images), tuple(not_exhaustive[i] for i in images)
        )


@dataclass(frozen=True)
class Annotations:
    """The usable content of an annotation file: I images, A annotations, sorted by image.

    Attributes:
        path: the file.
        digest: hash of its bytes.
        classes: see :class:`Classes`.
        image_ids: (I,) int64, in the file's order.
        names: (I,) str, each image's file below the image folder.
        sizes: (I, 2) int32, (height, width) in pixels.
        starts: (I + 1,) int64; image i's annotations are rows ``starts[i]:starts[i + 1]``.
        ids: (A,) int64.
        labels: (A,) int32 class numbers.
        boxes: (A, 4) float64, x, y, width, height in pixels as the file has them, not clipped.
        areas: (A,) float64, the segment's area in square pixels, or the box's.
        crowd: (A,) bool.
        lvis: None in COCO.
        masks: of the A annotations but crowds; None unless they were asked for.
        problems: everything wrong with single images and annotations; those are not in the arrays.
    """

    path: Path
    digest: str
    classes: Classes
    image_ids: NDArray[np.int64]
    names: NDArray[np.str_]
    sizes: NDArray[np.int32]
    starts: NDArray[np.int64]
    ids: NDArray[np.int64]
    labels: NDArray[np.int32]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    lvis: LvisImages | None
    masks: Masks | None = field(repr=False)
    problems: tuple[Problem, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.image_ids)

    def of(self, image: int) -> slice:
        """The rows of the annotations of the image at this position."""
        return slice(int(self.starts[image]), int(self.starts[image + 1]))

    def owners(self) -> NDArray[np.int64]:
        """(A,) position of the image that each annotation belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def class_occurrences(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions of images, and the classes that each has an object of, without crowds: each
        pair once."""
        objects, classes = ~self.crowd, len(self.classes)
        pairs = np.unique(self.owners()[objects] * classes + self.labels[objects])
        return pairs // classes, pairs % classes

    def class_images(self) -> NDArray[np.int64]:
        """(classes,) in how many images there is an object of each class."""
        return np.bincount(self.class_occurrences()[1], minlength=len(self.classes))

    def clipped(self, image: int) -> NDArray[np.float32]:
        """(n, 4) the boxes of the image at this position, xyxy in pixels, clipped to it."""
        return _clipped(self.boxes[self.of(image)], self.sizes[image][None])

    def select(self, images: NDArray[np.intp]) -> Annotations:
        """Only the images at these positions, in this order."""
        counts = np.diff(self.starts)[images]
        ranges = [np.arange(self.starts[i], self.starts[i + 1]) for i in images]
        rows = np.concatenate(ranges) if ranges else np.zeros(0, np.int64)
        return replace(
            self,
            image_ids=self.image_ids[images],
            names=self.names[images],
            sizes=self.sizes[images],
            starts=np.concatenate([[0], np.cumsum(counts)]),
            ids=self.ids[rows],
            labels=self.labels[rows],
            boxes=self.boxes[rows],
            areas=self.areas[rows],
            crowd=self.crowd[rows],
            lvis=self.lvis and self.lvis.select(images.tolist()),
            masks=self.masks and self.masks.select(rows),
        )


def read_annotations(path: Path, *, masks: bool = False) -> Annotations:
    """Read and validate a COCO or LVIS annotation file.

    Args:
        path: the file.
        masks: read the objects' masks, too; an object without one is a problem.

    Raises:
        DataError: the file as a whole cannot be used: it is missing, not JSON, its categories are
            broken, or ``masks`` are asked for and it has none. Problems of single images and
            annotations are listed in the result.
    """
    content, digest = _load(path, masks)
    problems: list[Problem] = []
    classes = _classes(path, content["categories"])
    image_rows = _image_rows(path, content["images"], problems)
    image_ids = np.array([row[0] for row in image_rows], np.int64)
    sizes = np.array([row[2] for row in image_rows], np.int32).reshape(-1, 2)

    broken = {problem.image_id for problem in problems}.difference(image_ids.tolist())
    rows, entries = _annotation_rows(path, content["annotations"], problems, broken)
    owner = _positions(image_ids, rows["image_id"])
    label = _positions(np.array(classes.category_ids, np.int64), rows["category_id"])
    wrong = _wrong_annotations(rows, owner, label, sizes)
    runs = encoded_all(path, entries, sizes[owner], rows["crowd"], wrong) if masks else []
    problems += [
        Problem(path, what, int(rows["image_id"][row]), int(rows["id"][row]))
        for row, what in wrong.items()
    ]

    # Stable: annotations of one image keep the file's order.
    order = np.delete(np.arange(len(rows)), list(wrong))
    order = order[np.argsort(owner[order], kind="stable")]
    counts = np.bincount(owner[order], minlength=len(image_ids))
    return Annotations(
        path=path,
        digest=digest,
        classes=classes,
        image_ids=image_ids,
        names=np.array([row[1] for row in image_rows], np.str_),
        sizes=sizes,
        starts=np.concatenate([[0], np.cumsum(counts)]),
        ids=rows["id"][order],
        labels=label[order].astype(np.int32),
        boxes=rows["box"][order],
        areas=rows["area"][order],
        crowd=rows["crowd"][order],
        lvis=_lvis(classes, image_rows),
        masks=Masks.of([runs[row] for row in order]) if masks else None,
        problems=tuple(problems),
    )


def _load(path: Path, masks: bool) -> tuple[Entry, str]:
    """The parsed file, with or without segmentations, and the hash of its bytes."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    try:
        # Polygons are most of such a file; dropping them at once keeps the peak of memory low.
        hook = _with_compact_segmentation if masks else _without_segmentation
        content = json.loads(text, object_hook=hook)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not valid JSON ({error}); it may be truncated: copy or download it again"
        ) from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path}: has no list '{key}'; a COCO annotation file needs one")
    return content, hashlib.sha256(text).hexdigest()


def _without_segmentation(entry: Entry) -> Entry:
    entry.pop("segmentation", None)
    return entry


def _with_compact_segmentation(entry: Entry) -> Entry:
    if "segmentation" in entry:
        entry["segmentation"] = compacted(entry["segmentation"])
    return entry


def _classes(path: Path, categories: list[Any]) -> Classes:
    for position, entry in enumerate(categories):
        if not isinstance(entry, dict) or not (
            type(entry.get("id")) is int
            and abs(entry["id"]) <= _LARGEST_ID
            and isinstance(entry.get("name"), str)
        ):
            raise DataError(
                f"{path}: categories[{position}] needs an integer 'id' and a 'name', has {entry!r}"
            )
    if not categories:
        raise DataError(f"{path}: 'categories' is empty; list every class with its id and name")
    for key in ("id", "name"):
        value, count = Counter(entry[key] for entry in categories).most_common(1)[0]
        if count > 1:
            raise DataError(f"{path}: {count} categories have the {key} {value!r}; keep one")
    ordered = sorted(categories, key=lambda entry: entry["id"])
    frequency = tuple(str(entry.get("frequency")) for entry in ordered)
    return Classes(
        names=tuple(entry["name"] for entry in ordered),
        category_ids=tuple(entry["id"] for entry in ordered),
        frequency=frequency if set(frequency) <= {"r", "c", "f"} else None,
    )


def _integer(entry: Entry, key: str, largest: int = _LARGEST_ID) -> int:
    value = entry[key]
    if type(value) is not int or abs(value) > largest:
        raise ValueError(f"'{key}' is {value!r} and must be an integer up to {largest}")
    return value


_Federated = tuple[tuple[int, ...], tuple[int, ...]]
_ImageRow = tuple[int, str, tuple[int, int], _Federated | None]
"""Id, file name, (height, width), LVIS's (negative, not exhaustive) category ids."""


def _image_row(entry: Entry) -> _ImageRow:
    height, width = (_integer(entry, key, _LARGEST_SIDE) for key in ("height", "width"))
    if height < 1 or width < 1:
        raise ValueError(f"'width' and 'height' are {width} and {height}; write the file's size")
    name = entry.get("file_name")
    if name is None:  # LVIS: http://images.cocodataset.org/train2017/000000391895.jpg
        name = "/".join(entry["coco_url" if "coco_url" in entry else "file_name"].split("/")[-2:])
    if not isinstance(name, str) or not name:
        raise ValueError(f"'file_name' is {name!r} and must be a text")
    federated = None
    if "neg_category_ids" in entry:
        federated = (
            tuple(map(int, entry["neg_category_ids"])),
            tuple(map(int, entry.get("not_exhaustive_category_ids", ()))),
        )
    return _integer(entry, "id"), name, (height, width), federated


def _lvis(classes: Classes, rows: list[_ImageRow]) -> LvisImages | None:
    """An LVIS file tells each class's frequency, and what is known to be absent from images."""
    federated = [row[3] for row in rows]
    if classes.frequency is None or not any(federated):
        return None
    pairs = [pair or ((), ()) for pair in federated]
    return LvisImages(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))


def _image_rows(path: Path, entries: list[Any], problems: list[Problem]) -> list[_ImageRow]:
    """One row for each sound image."""
    rows: dict[int, _ImageRow] = {}
    for position, entry in enumerate(entries):
        try:
            row = _image_row(entry)
            if row[0] in rows:
                raise ValueError(f"images[{position}] has this id too; give each image its own")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what, image_id = _describe(error, entry, f"images[{position}]")
            problems.append(Problem(path, what, image_id))
        else:
            rows[row[0]] = row
    return list(rows.values())


def _annotation_row(entry: Entry) -> tuple[Any, ...]:
    box = tuple(float(value) for value in entry["bbox"])
    if len(box) != 4:
        raise ValueError(f"'bbox' is {entry['bbox']!r} and must be [x, y, width, height]")
    area = entry.get("area")
    return (
        _integer(entry, "id"),
        _integer(entry, "image_id"),
        _integer(entry, "category_id"),
        box,
        box[2] * box[3] if area is None else float(area),
        bool(entry.get("iscrowd", 0)),
    )


def _annotation_rows(
    path: Path, entries: list[Any], problems: list[Problem], broken_images: set[int | None]
) -> tuple[NDArray[Any], list[Entry]]:
    """(A,) of ``_ANNOTATION`` for all annotations whose fields have the right types, and these.

    Annotations of broken images are left out in silence: what is wrong there is known.
    """
    rows, sound = [], []
    for position, entry in enumerate(entries):
        try:
            row = _annotation_row(entry)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            what, annotation_id = _describe(error, entry, f"annotations[{position}]")
            image_id = entry.get("image_id") if isinstance(entry, dict) else None
            image_id = image_id if type(image_id) is int else None
            problems.append(Problem(path, what, image_id, annotation_id))
        else:
            if row[1] not in broken_images:
                rows.append(row)
                sound.append(entry)
    return np.array(rows, _ANNOTATION), sound


def _describe(error: Exception, entry: Any, place: str) -> tuple[str, int | None]:
    """What is wrong with an entry, and its id; without one the text names its place."""
    what = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
    if not isinstance(entry, dict):
        return f"{place} is {entry!r} and must be an object", None
    identity = entry.get("id")
    return (what, identity) if type(identity) is int else (f"{place}: {what}", None)


def _positions(values: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position in ``values``, which are distinct, of each of ``wanted``; -1 if absent."""
    if not len(values):
        return np.full(len(wanted), -1, np.int64)
    order = np.argsort(values)
    found = np.searchsorted(values, wanted, sorter=order).clip(max=len(values) - 1)
    positions = order[found]
    return np.where(values[positions] == wanted, positions, -1)


def _clipped(boxes: NDArray[np.float64], sizes: NDArray[np.int32]) -> NDArray[np.float32]:
    """(n, 4) xywh to xyxy, clipped to sizes (n or 1, 2) of (height, width)."""
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    limits = np.tile(sizes[:, ::-1], 2)
    return corners.clip(0, limits).astype(np.float32)


def _wrong_annotations(
    rows: NDArray[Any],
    owner: NDArray[np.int64],
    label: NDArray[np.int64],
    sizes: NDArray[np.int32],
) -> dict[int, str]:
    """Rows that cannot be used, and what is wrong with each."""
    boxes, areas = rows["box"], rows["area"]
    # Owner -1 finds the last row: an annotation without image fails the first test anyway.
    size = np.concatenate([sizes, np.ones((1, 2), np.int32)])[owner]
    corners = _clipped(np.nan_to_num(boxes), size)
    _, first = np.unique(rows["id"], return_index=True)
    repeated = np.ones(len(rows), np.bool_)
    repeated[first] = False
    tests: list[tuple[NDArray[np.bool_], str]] = [
        (owner < 0, "'images' has no such image; add it, or remove the annotation"),
        (label < 0, "unknown category id {category}; add it to 'categories'"),
        (repeated, "another annotation has this id; give each its own"),
        (~np.isfinite(boxes).all(1), "{box} is not finite; correct it"),
        (np.any(boxes[:, 2:] <= 0, axis=1), "{box} has no area; correct or remove it"),
        (
            np.any(corners[:, 2:] <= corners[:, :2], axis=1),
            "{box} lies outside its image of {width}×{height} pixels; correct or remove it",
        ),
        (~(np.isfinite(areas) & (areas >= 0)), "area {area} is no area; correct or remove it"),
    ]
    wrong: dict[int, str] = {}
    for failed, what in tests:
        for row in np.flatnonzero(failed).tolist():
            wrong.setdefault(
                row,
                what.format(
                    category=rows["category_id"][row],
                    box=f"box [x, y, width, height] = {boxes[row].tolist()}",
                    width=size[row, 1],
                    height=size[row, 0],
                    area=areas[row],
                ),
            )
    return wrong
