"""What is in a data set, and everything that is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from codetr.data.annotations import Annotations, read_annotations
from codetr.data.errors import DataError, Problem
from codetr.data.files import Progress, find_absent, find_unreadable, without
from codetr.data.sources import SPLITS, Split, find_split

MEDIUM_AREA, LARGE_AREA = 32**2, 96**2
"""Square pixels from which COCO calls an object medium or large."""


@dataclass(frozen=True)
class SplitReport:
    """One split of a data set.

    Attributes:
        split: train or val.
        annotations: its file.
        lvis: whether it is in LVIS's format.
        images: how many images have no problem of their own.
        empty_images: how many of those have no annotation.
        objects: annotations that are not crowds.
        crowds: annotations of crowd regions.
        class_objects: number of objects by class name, in the order of the category ids.
        class_images: number of images with the class, by class name.
        sizes: number of objects that are small, medium and large by COCO's bounds.
        problems: everything that is wrong with single images and annotations.
    """

    split: Split
    annotations: Path
    lvis: bool
    images: int
    empty_images: int
    objects: int
    crowds: int
    class_objects: dict[str, int]
    class_images: dict[str, int]
    sizes: dict[str, int]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class DatasetReport:
    """A data set on disk.

    Attributes:
        directory: the data set.
        splits: those that could be read.
        failures: what concerns a split as a whole, one line each.
    """

    directory: Path
    splits: tuple[SplitReport, ...]
    failures: tuple[str, ...]

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong, one line each."""
        return [*self.failures, *(str(p) for split in self.splits for p in split.problems)]


def check_dataset(
    directory: Path, *, decode: bool = True, progress: Progress | None = None
) -> DatasetReport:
    """Look at everything that training would, and do not stop at the first problem.

    Args:
        directory: with ``annotations`` and the image folders.
        decode: also decode every image.
        progress: called after each decoded image, with its number within the split.
    """
    reports: list[SplitReport] = []
    failures: list[str] = []
    tables: list[Annotations] = []
    for split in SPLITS:
        try:
            files = find_split(directory, split)
            table = read_annotations(files.annotations)
        except DataError as error:
            failures.append(str(error))
            continue
        problems = [*table.problems, *find_absent(table, files.images)]
        if decode:
            problems += find_unreadable(without(table, problems), files.images, progress)
        reports.append(_report(split, table, problems))
        tables.append(table)
        if split == "train" and not reports[-1].objects:
            failures.append(f"{table.path}: no object to learn from")
    if len(tables) == 2:
        try:
            tables[0].classes.require_same(tables[1].classes, *(t.path.name for t in tables))
        except DataError as error:
            failures.append(f"{directory}: {error}")
    return DatasetReport(directory, tuple(reports), tuple(dict.fromkeys(failures)))


def _report(split: Split, table: Annotations, problems: list[Problem]) -> SplitReport:
    usable = without(table, problems)
    objects = ~usable.crowd
    labels, areas = usable.labels[objects], usable.areas[objects]
    classes = len(table.classes)
    bounds = np.digitize(areas, [MEDIUM_AREA, LARGE_AREA])
    names = table.classes.names
    return SplitReport(
        split=split,
        annotations=table.path,
        lvis=table.lvis is not None,
        images=len(usable),
        empty_images=int((np.diff(usable.starts) == 0).sum()),
        objects=int(objects.sum()),
        crowds=int(usable.crowd.sum()),
        class_objects=dict(zip(names, _counts(labels, classes), strict=True)),
        class_images=dict(zip(names, usable.class_images().tolist(), strict=True)),
        sizes=dict(zip(("small", "medium", "large"), _counts(bounds, 3), strict=True)),
        problems=tuple(problems),
    )


def _counts(numbers: np.ndarray, length: int) -> list[int]:
    return [int(n) for n in np.bincount(numbers, minlength=length)]
