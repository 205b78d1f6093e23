"""From image files to detections, and from detections to pictures."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F  # noqa: N812 - torchvision's own name
from torchvision.utils import draw_bounding_boxes

from codetr.config import DataConfig
from codetr.data import Classes, CocoDataset
from codetr.data.images import read_image
from codetr.data.loader import collate
from codetr.data.transforms import build_transform
from codetr.detector import CoDETR
from codetr.queries.selection import QUERY
from codetr.structures import Detections, ImageBatch, Size, Targets

READABLE_SIDE = 480
"""Smaller images are enlarged to so many pixels before names are written on them."""


@dataclass
class Prediction:
    """What was found in one image file.

    Attributes:
        path: the file.
        image: (3, H, W) uint8, its pixels.
        detections: in these pixels, best first.
    """

    path: Path
    image: Tensor
    detections: Detections


def detect(
    model: CoDETR, batch: ImageBatch, original_sizes: Sequence[Size], branch: str = QUERY
) -> list[Detections]:
    """Detections on the CPU, in pixels of the original images.

    Args:
        model: in evaluation mode, on any device.
        batch: B images as the data's transform made them.
        original_sizes: (height, width) of the B image files.
        branch: see :meth:`CoDETR.detect`.
    """
    device = next(model.parameters()).device
    return [
        detections.rescaled(size, original).to("cpu")
        for detections, size, original in zip(
            model.detect(batch.to(device), branch), batch.sizes, original_sizes, strict=True
        )
    ]


def predict(
    model: CoDETR,
    paths: Sequence[Path],
    data: DataConfig,
    *,
    batch_size: int = 1,
    branch: str = QUERY,
) -> Iterator[Prediction]:
    """Detect in image files of any kind, one batch after the other.

    Args:
        model: in evaluation mode.
        paths: the files.
        data: that the model was trained with; says how images are resized and normalised.
        batch_size: images that go through the model together.
        branch: see :meth:`CoDETR.detect`.

    Raises:
        DataError: a file is missing or is no image; names it.
    """
    transform = build_transform(data, training=False)
    for start in range(0, len(paths), batch_size):
        some = paths[start : start + batch_size]
        images = [torch.from_numpy(read_image(p).copy()).permute(2, 0, 1) for p in some]
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        inputs = [transform(tv_tensors.Image(image)).as_subclass(Tensor) for image in images]
        batch, _ = collate([(pixels, _NOTHING) for pixels in inputs])
        found = detect(model, batch, sizes, branch)
        yield from map(Prediction, some, images, found)


_NOTHING = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))


# ---------------------------------------------------------------------------------------- pictures


def draw(
    image: Tensor,
    objects: Detections | Targets,
    classes: Classes,
    *,
    min_score: float = 0.3,
    side: int | None = None,
) -> Image.Image:
    """A picture of an image with named boxes, and scores where they are detections.

    Args:
        image: (3, H, W) uint8.
        objects: in pixels of the image.
        classes: the names.
        min_score: detections below it are left out.
        side: longer side of the picture; default: the image's, but enough to read the names.
    """
    height, width = image.shape[1:]
    scale = (side or max(height, width, READABLE_SIDE)) / max(height, width)
    shown = list(range(len(objects)))
    captions = [classes.names[label] for label in objects.labels.tolist()]
    if isinstance(objects, Detections):
        scores = objects.scores.tolist()
        # The best is drawn last, above the others.
        shown = [i for i in reversed(shown) if scores[i] >= min_score]
        captions = [f"{name} {score:.2f}" for name, score in zip(captions, scores, strict=True)]

    picture = F.resize(
        image, [round(height * scale), round(width * scale)], F.InterpolationMode.BICUBIC
    )
    if shown:
        unit = max(picture.shape[1:])
        picture = draw_bounding_boxes(
            picture,
            objects.boxes[shown] * scale,
            labels=[captions[i] for i in shown],
            colors=[_colour(int(objects.labels[i])) for i in shown],
            width=max(2, unit // 250),
            font=_font_file(),
            font_size=max(11, unit // 45),
            fill_labels=True,
        )
    return F.to_pil_image(picture)


def comparison(
    dataset: CocoDataset,
    detections: Mapping[int, Detections],
    *,
    images: int = 8,
    pairs: int = 2,
    min_score: float = 0.3,
    side: int = 320,
) -> Image.Image:
    """Images of a data set, evenly spread over it, with ground truth beside detections.

    Args:
        dataset: the images and objects.
        detections: by image id, in pixels of the image files.
        images: how many at most.
        pairs: in each row.
        min_score: detections below it are left out.
        side: longer side of each image in the picture.
    """
    originals = copy(dataset)
    originals.transform = None
    cells = []
    for index in np.linspace(0, len(dataset) - 1, min(images, len(dataset))).round().astype(int):
        image, targets = originals[index]
        for objects in (targets, detections[targets.image_id]):
            cells.append(draw(image, objects, dataset.classes, min_score=min_score, side=side))
    titles = ["ground truth", f"detections (score ≥ {min_score:g})"] * pairs
    return _grid(cells, titles, side)


def _grid(cells: Sequence[Image.Image], titles: Sequence[str], side: int) -> Image.Image:
    """Cells row by row, one column for each title, in a white picture."""
    gap, head = side // 40, side // 10
    columns = [cells[i :: len(titles)] for i in range(len(titles))]
    rows = [cells[i : i + len(titles)] for i in range(0, len(cells), len(titles))]
    widths = [max(cell.width for cell in column) for column in columns if column]
    heights = [max(cell.height for cell in row) for row in rows]
    picture = Image.new(
        "RGB",
        (sum(widths) + gap * (len(widths) + 1), head + sum(heights) + gap * len(heights)),
        "white",
    )
    ink, font = ImageDraw.Draw(picture), ImageFont.truetype(_font_file(), head // 2)
    lefts = [gap + sum(widths[:i]) + gap * i for i in range(len(widths))]
    for left, title in zip(lefts, titles, strict=False):  # one image may not fill a row
        ink.text((left, head // 4), title, "black", font)
    top = head
    for row, height in zip(rows, heights, strict=True):
        for cell, left in zip(row, lefts, strict=False):
            picture.paste(cell, (left, top))
        top += height + gap
    return picture


def _font_file() -> str:
    """A font that is there on every machine: matplotlib brings it along."""
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")


def _colour(label: int) -> tuple[int, int, int]:
    """A bright colour for a class; steps of the golden angle keep neighbours apart."""
    channels = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.6, 1)
    red, green, blue = (round(255 * channel) for channel in channels)
    return red, green, blue
