"""What a plan must know of a data set: counted without torch, and without making anything."""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from pydantic import PositiveInt

from codetr.config import DataConfig, Strict
from codetr.data.errors import DataError

_IMAGE = re.compile(rb'"height"\s*:')
"""Every image has this key, and nothing else in a COCO or LVIS file has it."""
_MASK = re.compile(rb'"segmentation"\s*:\s*[\[{]')
"""How polygons or run lengths begin."""


class DataFacts(Strict):
    """Counts of a data set, and what identifies its content."""

    classes: PositiveInt
    train_images: PositiveInt
    """Before broken images are left out (``skip_bad``)."""
    val_images: PositiveInt
    fingerprint: str


def data_facts(config: DataConfig) -> DataFacts:
    """Counts and identity of the configured data.

    Raises:
        DataError: there is no such data set, or its annotations cannot be read.
    """
    if config.dataset == "coco":
        from codetr.data.sources import data_directory

        facts = _coco_facts(data_directory(config))
    else:
        facts = _digits_facts(lvis=config.dataset == "digits-lvis")
    return facts.model_copy(
        update={
            "train_images": min(facts.train_images, config.train_images or facts.train_images),
            "val_images": min(facts.val_images, config.val_images or facts.val_images),
        }
    )


@cache
def _coco_facts(directory: Path) -> DataFacts:
    from codetr.data.annotations import read_annotations
    from codetr.data.sources import find_split

    # COCO's training annotations are half a gigabyte, so their images are only counted; the small
    # validation file tells the classes. That both have the same is checked when they are opened.
    train, train_images = _digest_and_images(find_split(directory, "train").annotations)
    val = read_annotations(find_split(directory, "val").annotations)
    return DataFacts(
        classes=len(val.classes),
        train_images=train_images,
        val_images=len(val),
        fingerprint=hashlib.sha256(f"{train}\n{val.digest}".encode()).hexdigest()[:16],
    )


def _digest_and_images(path: Path) -> tuple[str, int]:
    with _mapped(path) as text:
        images = sum(1 for _ in _IMAGE.finditer(text))
        digest = hashlib.sha256(text).hexdigest()
    if not images:
        raise DataError(f"{path}: lists no image; a COCO annotation file needs 'images'")
    return digest, images


def require_masks(config: DataConfig) -> None:
    """See that there are masks among the training annotations, for what is trained on them. Whether
    every object has one is seen when the data is opened.

    Raises:
        DataError: there are none.
    """
    if config.dataset == "coco":
        from codetr.data.sources import data_directory

        _require_masks_in(data_directory(config))


@cache
def _require_masks_in(directory: Path) -> None:
    from codetr.data.masks import NEEDED
    from codetr.data.sources import find_split

    path = find_split(directory, "train").annotations
    with _mapped(path) as text:
        found = _MASK.search(text) is not None
    if not found:
        raise DataError(f"{path}: no object has a 'segmentation', {NEEDED}")


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """The bytes of a file, of which only what is looked at is in memory."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            yield text
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise DataError(f"{path}: cannot be read ({error})") from None


def _digits_facts(*, lvis: bool) -> DataFacts:
    from codetr.data.digits import embedded_recipe

    recipe = embedded_recipe(lvis=lvis)
    return DataFacts(
        classes=len(recipe.class_names),
        train_images=recipe.train_images,
        val_images=recipe.val_images,
        fingerprint=recipe.folder_name,
    )
