"""Image files that are missing or cannot be used, as problems of their annotation file."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from codetr.data.annotations import Annotations
from codetr.data.errors import DataError, Problem
from codetr.data.images import read_image

Progress = Callable[[int, int], None]
"""Called with (images done, images in total)."""


def find_absent(table: Annotations, folder: Path) -> list[Problem]:
    """Images without a file. Lists the folders once: a look at each file would take minutes."""
    names: list[str] = table.names.tolist()
    present: set[str] = set()
    for parent in {name.rpartition("/")[0] for name in names}:
        prefix = f"{parent}/" if parent else ""
        try:
            with os.scandir(folder / parent) as entries:
                present.update(prefix + entry.name for entry in entries)
        except OSError:
            continue  # then each of its images is absent
    return [
        Problem(table.path, f"no file {folder / name}; add it, or remove the image", image_id)
        for name, image_id in zip(names, table.image_ids.tolist(), strict=True)
        if name not in present
    ]


def find_unreadable(
    table: Annotations, folder: Path, progress: Progress | None = None
) -> list[Problem]:
    """Images that cannot be decoded, or have another size than the annotations say.

    Decodes every file, on all cores.
    """

    def read(index: int) -> str | None:
        height, width = table.sizes[index].tolist()
        try:
            read_image(folder / str(table.names[index]), (height, width))
        except DataError as error:
            return str(error)
        return None

    problems = []
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        for index, what in enumerate(pool.map(read, range(len(table)))):
            if what is not None:
                problems.append(Problem(table.path, what, int(table.image_ids[index])))
            if progress is not None:
                progress(index + 1, len(table))
    return problems


def without(table: Annotations, problems: list[Problem]) -> Annotations:
    """Only the images that have no problem."""
    bad = [p.image_id for p in problems if p.image_id is not None]
    return table.select(np.flatnonzero(~np.isin(table.image_ids, bad)))
