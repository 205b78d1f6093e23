"""From image files to detections, and from detections to pictures."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms.v2 import functional as F  # noqa: N812 - torchvision's own name
from torchvision.utils import draw_bounding_boxes

from codetr.config import DataConfig
from codetr.data import Classes, CocoDataset, DataError
from codetr.data.images import read_image, rgb_pixels
from codetr.data.loader import collate
from codetr.data.transforms import build_canvas, build_transform
from codetr.detector import CoDETR
from codetr.queries.selection import QUERY
from codetr.structures import Detections, ImageBatch, Size, Targets
from codetr.tta import TTA, merged

T = TypeVar("T")
ImageLike = Image.Image | Path | str | NDArray[np.uint8] | Tensor
Precision = Literal["fp32", "bf16"]

AHEAD = 4
"""Batches of images that are read before the first goes through the model."""

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
    found = model.detect(batch.to(device), branch)
    sizes = batch.sizes if batch.contents is None else batch.contents
    results = []
    for detections, size, original in zip(found, sizes, original_sizes, strict=True):
        result = detections.rescaled(size, original).to("cpu")
        if batch.contents is not None:  # what reaches out of the image onto its canvas
            result = replace(result, boxes=clip_boxes_to_image(result.boxes, original))
        results.append(result)
    return results


def predict(
    model: CoDETR,
    paths: Sequence[Path],
    data: DataConfig,
    *,
    batch_size: int = 1,
    branch: str = QUERY,
    precision: Precision = "fp32",
    tta: TTA | None = None,
) -> Iterator[Prediction]:
    """Detect in image files of any kind, in their order.

    Args:
        model: in evaluation mode.
        paths: the files.
        data: that the model was trained with; says how images are resized and normalised.
        batch_size: images that go through the model together, if it sees them at the same size.
        branch: see :meth:`CoDETR.detect`.
        precision: see :meth:`CoDETR.predict`.
        tta: see :meth:`CoDETR.predict`.

    Raises:
        DataError: a file is missing or is no image; names it.
    """
    for some in _windows(paths, batch_size):
        images = [pixels_of(path) for path in some]
        found = _detect_each(
            model, images, data, batch_size=batch_size, branch=branch, precision=precision, tta=tta
        )
        yield from map(Prediction, some, images, found)


def detect_all(
    model: CoDETR,
    images: Iterable[ImageLike],
    *,
    batch_size: int = 8,
    branch: str = QUERY,
    precision: Precision = "fp32",
    tta: TTA | None = None,
) -> list[Detections]:
    """See :meth:`CoDETR.predict`."""
    if isinstance(images, str | Path | Image.Image | np.ndarray | Tensor):
        raise TypeError("predict takes a list of images: write model.predict([image])")
    was_training = model.training
    model.eval()
    try:
        found: list[Detections] = []
        for some in _windows(images, batch_size):
            pixels = [pixels_of(image) for image in some]
            found += _detect_each(
                model,
                pixels,
                model.data,
                batch_size=batch_size,
                branch=branch,
                precision=precision,
                tta=tta,
            )
        return found
    finally:
        model.train(was_training)


def pixels_of(image: ImageLike) -> Tensor:
    """(3, H, W) uint8, red, green, blue, of any kind of image.

    Raises:
        DataError: a file is missing or is no image; an array or tensor has another shape or type.
    """
    if isinstance(image, str | Path):
        return torch.from_numpy(read_image(Path(image)).copy()).permute(2, 0, 1)
    if isinstance(image, Image.Image):
        return torch.from_numpy(rgb_pixels(image)).permute(2, 0, 1)
    if isinstance(image, np.ndarray):
        return _of_array(image)
    if not isinstance(image, Tensor):
        raise DataError(f"an image is a {type(image).__name__}: give a PIL image, path or array")
    if image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3:
        kind = f"{tuple(image.shape)} of {image.dtype}"
        raise DataError(f"a tensor is {kind}: it must be (3, H, W) of uint8, red, green, blue")
    return _not_empty(image)


def _of_array(image: NDArray[np.uint8]) -> Tensor:
    grey = image.ndim == 2
    if image.dtype != np.uint8 or not (grey or (image.ndim == 3 and image.shape[2] == 3)):
        kind = f"{image.shape} of {image.dtype}"
        raise DataError(
            f"an array is {kind}: it must be (H, W, 3) or (H, W) of uint8, red, green, blue"
        )
    array = np.repeat(image[..., None], 3, axis=-1) if grey else image
    return _not_empty(torch.from_numpy(np.array(array)).permute(2, 0, 1))


def _not_empty(pixels: Tensor) -> Tensor:
    if 0 in pixels.shape:
        raise DataError(f"an image is {pixels.shape[1]}×{pixels.shape[2]} pixels: it is empty")
    return pixels


def _windows(images: Iterable[T], batch_size: int) -> Iterator[list[T]]:
    """So many at a time that batches fill up where sizes differ, and memory does not."""
    ahead = iter(images)
    while some := list(islice(ahead, AHEAD * batch_size)):
        yield some


def detect_in(
    model: CoDETR,
    dataset: CocoDataset,
    data: DataConfig,
    *,
    batch_size: int = 8,
    branch: str = QUERY,
    precision: Precision = "fp32",
    tta: TTA | None = None,
) -> dict[int, Detections]:
    """Detections in every image of a data set by its id, in pixels of its file, as
    :func:`codetr.metrics.evaluate` takes them: just those of :meth:`CoDETR.predict`.

    Args:
        model: in evaluation mode.
        dataset: the images; its transform is not used.
        data: says how images are resized and normalised.
        batch_size, branch, precision, tta: see :func:`predict`.
    """
    originals = copy(dataset)
    originals.transform = None
    found: dict[int, Detections] = {}
    for some in _windows(range(len(originals)), batch_size):
        images, targets = zip(*(originals[index] for index in some), strict=True)
        detections = _detect_each(
            model, images, data, batch_size=batch_size, branch=branch, precision=precision, tta=tta
        )
        found |= {t.image_id: each for t, each in zip(targets, detections, strict=True)}
    return found


def _detect_each(
    model: CoDETR,
    images: Sequence[Tensor],
    data: DataConfig,
    *,
    batch_size: int,
    branch: str,
    precision: Precision,
    tta: TTA | None,
) -> list[Detections]:
    """Detections of each (3, H, W) uint8 image, merged of all views that ``tta`` asks for."""
    options: dict[str, Any] = {"batch_size": batch_size, "branch": branch, "precision": precision}
    if tta is None:
        return _detect_once(model, images, data, **options)
    found: list[list[Detections]] = [[] for _ in images]
    for view in tta.views(data):
        shown = [view.show(image) for image in images]
        seen = _detect_once(model, shown, view.resizing, **options)
        for views, detections, inside, image in zip(found, seen, shown, images, strict=True):
            views.append(view.in_image(detections, _size(inside), _size(image)))
    keep = model.config.max_detections
    return [merged(views, iou=tta.iou, keep=keep) for views in found]


def _size(image: Tensor) -> Size:
    return (image.shape[1], image.shape[2])


def _detect_once(
    model: CoDETR,
    images: Sequence[Tensor],
    data: DataConfig,
    *,
    batch_size: int,
    branch: str,
    precision: Precision,
) -> list[Detections]:
    """Detections of each (3, H, W) uint8 image; those that the model sees at the same size share
    batches, so that there is no padding."""
    transform, canvas = build_transform(data, training=False), build_canvas(data)
    inputs = [transform(tv_tensors.Image(image)).as_subclass(Tensor) for image in images]
    of_size: dict[Size, list[int]] = {}
    for index, pixels in enumerate(inputs):
        of_size.setdefault(_size(pixels), []).append(index)
    device = next(model.parameters()).device
    found: dict[int, Detections] = {}
    for together in of_size.values():
        for start in range(0, len(together), batch_size):
            chosen = together[start : start + batch_size]
            batch, _ = collate([(inputs[index], _NOTHING) for index in chosen], canvas)
            sizes = [_size(images[index]) for index in chosen]
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                found |= zip(chosen, detect(model, batch, sizes, branch), strict=True)
    return [found[index] for index in range(len(images))]


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
