"""Augmentation and normalisation: torchvision's v2 transforms, as ``DataConfig`` asks for them."""

from __future__ import annotations

from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F  # noqa: N812 - torchvision's own name

from codetr.config import DataConfig, JitterConfig
from codetr.data.canvas import Canvas
from codetr.data.copy_paste import pixel_boxes

CROP_SHORT_SIDES = (400, 500, 600)
"""What DETR resizes to before it crops."""
CROP_SIDES = (384, 600)
"""Smallest and largest side of DETR's crop, in pixels."""
MIN_JITTERED_SIDE = 0.01
"""Pixels: where large-scale jitter leaves no wider box, the object is gone, as in the original."""


class RandomSizeCrop(v2.Transform):  # type: ignore[misc]
    """Crop to a height and a width drawn from [smallest, largest], at most the image's own."""

    def __init__(self, smallest: int, largest: int) -> None:
        super().__init__()
        self.smallest = smallest
        self.largest = largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        image_height, image_width = v2.query_size(flat_inputs)
        height, width = (
            _draw(min(self.smallest, side), min(self.largest, side))
            for side in (image_height, image_width)
        )
        top, left = _draw(0, image_height - height), _draw(0, image_width - width)
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.crop, inpt, **params)


class ScaleJitter(v2.ScaleJitter):  # type: ignore[misc]
    """torchvision's, which makes nothing of what is much longer than wide."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = super().make_params(flat_inputs)["size"]
        return {"size": (max(1, height), max(1, width))}


def what_is_left(image: Any, objects: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The objects of which there is still something, after a crop that has cut boxes and masks.

    Where there are masks, boxes become theirs: less may be left of an object than of its box.
    """
    boxes = objects["boxes"].as_subclass(torch.Tensor)
    if "masks" in objects:
        masks = objects["masks"].as_subclass(torch.Tensor).bool()
        seen = masks.flatten(1).any(1)
        boxes = torch.zeros_like(boxes)
        boxes[seen] = pixel_boxes(masks[seen]).to(boxes.dtype)
    kept = (boxes[:, 2:] - boxes[:, :2] > MIN_JITTERED_SIDE).all(1)
    return image, {name: values[kept] for name, values in {**objects, "boxes": boxes}.items()}


def _draw(low: int, high: int) -> int:
    """Uniform in [low, high]."""
    return int(torch.randint(low, high + 1, ()))


def build_transform(config: DataConfig, *, training: bool) -> v2.Transform:
    """From (image uint8, {boxes, labels}) to (image float normalised, {boxes, labels}); masks among
    them are transformed with the image.

    Training follows DETR (method.md, training recipe): a random short side; or, half of the time
    and with ``config.crop``, a resize, a crop and then the random short side. Evaluation resizes
    to the largest of the short sides. Objects of which a crop leaves less than a pixel are gone.

    With ``config.jitter`` training resizes to a random multiple of what fits the canvas, and crops
    what reaches beyond; evaluation fits to the canvas. The result is no larger than the canvas; to
    lay it there is left to what makes batches.
    """
    steps: list[Any] = []
    if training:
        steps += [v2.RandomHorizontalFlip(config.flip)] if config.flip else []
        steps += _jitter(config.jitter) if config.jitter.enabled else _resize(config)
    elif config.jitter.enabled:
        steps.append(v2.Resize(None, max_size=config.jitter.canvas))
    elif config.short_sides:
        steps.append(_resize_for_evaluation(max(config.short_sides), config.max_side))
    return v2.Compose([*steps, *_normalisation(config)])


def build_canvas(config: DataConfig) -> Canvas | None:
    """What images are laid on; None where batches are as large as their largest image."""
    jitter = config.jitter
    if not jitter.enabled:
        return None
    grey = tv_tensors.Image(torch.full((3, 1, 1), jitter.fill, dtype=torch.uint8))
    colour = v2.Compose(_normalisation(config))(grey).as_subclass(torch.Tensor)[:, 0, 0]
    return Canvas(jitter.canvas, colour, masked=jitter.padding_mask)


def _normalisation(config: DataConfig) -> list[v2.Transform]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize([*config.mean], [*config.std])]


def _jitter(config: JitterConfig) -> list[Any]:
    side = config.canvas
    return [
        ScaleJitter((side, side), config.scale),
        RandomSizeCrop(side, side),
        what_is_left,
    ]


def _resize_for_evaluation(short_side: int, max_side: int) -> v2.Transform:
    if short_side >= max_side:  # then the long side alone decides; torchvision wants it said so
        return v2.Resize(None, max_size=max_side)
    return v2.Resize([short_side], max_size=max_side)


def _resize(config: DataConfig) -> list[v2.Transform]:
    if not config.short_sides:
        return []
    resize = v2.RandomShortestSize([*config.short_sides], max_size=config.max_side)
    if not config.crop:
        return [resize]
    crop = v2.Compose(
        [
            v2.RandomShortestSize([*CROP_SHORT_SIDES]),
            RandomSizeCrop(*CROP_SIDES),
            v2.SanitizeBoundingBoxes(),
            resize,
        ]
    )
    return [v2.RandomChoice([resize, crop])]
