"""Images and objects of a COCO or LVIS annotation file, as tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from codetr.data.annotations import Classes, read_annotations
from codetr.data.canvas import Canvas
from codetr.data.copy_paste import CopyPaste
from codetr.data.errors import DataError, refuse
from codetr.data.files import find_absent, find_unreadable, without
from codetr.data.images import read_image
from codetr.data.repeats import repeat_factors
from codetr.structures import Targets

Transform = Callable[[tv_tensors.Image, dict[str, Any]], tuple[Tensor, dict[str, Any]]]


Item = int | tuple[int, int]
"""Position of an image; or that, and which of its repeats in the epoch it is, counted from 0."""


def stable_seed(*parts: int | str) -> int:
    """63 bits that depend on ``parts`` alone: not on the process, platform or Python's hash."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torchvision's transforms draw from torch's CPU generator: give them a seed of their own."""
    state = torch.get_rng_state()
    # torch.manual_seed would also reseed the GPU, which belongs to the model.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class CocoDataset(Dataset[tuple[Tensor, Targets]]):
    """A split of a data set.

    An item is an image as ``transform`` leaves it, and its :class:`Targets`, boxes in pixels of
    that image. It is a function of ``seed``, epoch, image and repeat alone, whoever loads it.

    Attributes:
        annotations: the annotation file.
        table: the annotations of the images that are used.
        classes: names and ids, see :class:`Classes`.
        problems: what was found wrong, with ``skip_bad``.
        skipped: how many images were left out because of that.
        fingerprint: stable hash of the annotation file and of the images used.
        factors: (I,) float64, how often an epoch has each image; None: each once.
        canvas: what batches lay the images on; None: they are as large as their largest image.
    """

    def __init__(
        self,
        annotations: Path,
        images: Path,
        transform: Transform | None = None,
        *,
        training: bool,
        skip_bad: bool = False,
        limit: int | None = None,
        seed: int = 0,
        masks: bool = False,
        canvas: Canvas | None = None,
        copy_paste: CopyPaste | None = None,
        repeat_threshold: float = 0.0,
    ) -> None:
        """Open a split.

        Args:
            annotations: the annotation file.
            images: the folder that its file names are relative to.
            transform: from (image (3, H, W) uint8, {boxes, labels, and perhaps masks}) to the same.
            training: crowd regions are no targets, and there must be objects.
            skip_bad: leave out images with problems; every image is decoded once to find out.
            limit: use only the first so many images.
            seed: of the random transforms.
            masks: the targets have masks; each object must have one.
            canvas: see above.
            copy_paste: pastes objects of other images, after ``transform``, which must be given.
            repeat_threshold: see :func:`repeat_factors`; 0: each image once in an epoch.

        Raises:
            DataError: names the first problem, or there is nothing to train on.
        """
        self.annotations = annotations
        self.images = images
        self.transform = transform
        self.training = training
        self.seed = seed
        self.epoch = 0
        self.masks, self.canvas, self.copy_paste = masks, canvas, copy_paste
        pastes_masks = copy_paste is not None and copy_paste.config.needs_masks
        table = read_annotations(annotations, masks=masks or pastes_masks)
        problems = [*table.problems, *find_absent(table, images)]
        if not skip_bad:
            refuse(problems)
        usable = without(table, problems)
        if skip_bad:
            problems += find_unreadable(usable, images)
            usable = without(usable, problems)
        self.problems = tuple(problems)
        self.skipped = len(table) - len(usable)
        self.table = usable.select(np.arange(len(usable))[:limit])
        self._require_content()
        self.factors: Tensor | None = None
        if repeat_threshold:
            self.factors = torch.from_numpy(repeat_factors(self.table, repeat_threshold))

    @property
    def classes(self) -> Classes:
        return self.table.classes

    @property
    def is_lvis(self) -> bool:
        return self.table.lvis is not None

    @property
    def fingerprint(self) -> str:
        used = list(zip(self.table.image_ids.tolist(), self.table.names.tolist(), strict=True))
        return hashlib.sha256(f"{self.table.digest}\n{used}".encode()).hexdigest()[:16]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's random transforms."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, item: Item) -> tuple[Tensor, Targets]:
        index, repeat = item if isinstance(item, tuple) else (item, 0)
        image_id = int(self.table.image_ids[index])
        height, width = map(int, self.table.sizes[index])
        stream = (self.seed, self.epoch, image_id, *([repeat] if repeat else []))
        image, objects = self._read(index)
        if self.transform is not None:
            with seeded(stable_seed("transform", *stream)):
                image, objects = self.transform(image, objects)
                if self.copy_paste is not None:
                    source = self.transform(*self._read(self._other()))
                    image, objects = self.copy_paste((image, objects), source)
        masks = objects["masks"].as_subclass(Tensor).bool() if self.masks else None
        return image.as_subclass(Tensor), Targets(
            boxes=objects["boxes"].as_subclass(Tensor),
            labels=objects["labels"],
            image_id=image_id,
            original_size=(height, width),
            seed=stable_seed("draws", *stream),
            masks=masks,
        )

    def _read(self, index: int) -> tuple[tv_tensors.Image, dict[str, Tensor]]:
        """The image at this position and its objects, without crowds, as they are stored."""
        table = self.table
        height, width = map(int, table.sizes[index])
        rows = table.of(index)
        kept = ~table.crowd[rows]
        pixels = read_image(self.images / str(table.names[index]), (height, width))
        image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
        objects: dict[str, Tensor] = {
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(table.clipped(index)[kept]),
                format="XYXY",
                canvas_size=(height, width),
            ),
            "labels": torch.from_numpy(table.labels[rows][kept].astype(np.int64)),
        }
        if table.masks is not None:
            numbers = np.arange(rows.start, rows.stop)[kept]
            masks = table.masks.decode(numbers, (height, width))
            objects["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        return image, objects

    def _other(self) -> int:
        """A random image to paste from, drawn as often as an epoch has it."""
        if self.factors is not None:
            return int(torch.multinomial(self.factors, 1))
        return int(torch.randint(len(self), ()))

    def _require_content(self) -> None:
        skipped = f" ({self.skipped} were left out as broken)" if self.skipped else ""
        if not len(self):
            raise DataError(f"{self.annotations}: has no usable image{skipped}")
        if self.training and self.table.crowd.all():
            raise DataError(
                f"{self.annotations}: no object to learn from in {len(self)} images{skipped}; "
                "'codetr data check' shows what is there"
            )
