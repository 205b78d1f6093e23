"""Augmentation and normalisation: torchvision's v2 transforms, as ``DataConfig`` asks for them."""

from __future__ import annotations

from typing import Any

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F  # noqa: N812 - torchvision's own name

from codetr.config import DataConfig

CROP_SHORT_SIDES = (400, 500, 600)
"""What DETR resizes to before it crops."""
CROP_SIDES = (384, 600)
"""Smallest and largest side of DETR's crop, in pixels."""


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


def _draw(low: int, high: int) -> int:
    """Uniform in [low, high]."""
    return int(torch.randint(low, high + 1, ()))


def build_transform(config: DataConfig, *, training: bool) -> v2.Transform:
    """From (image uint8, {boxes, labels}) to (image float normalised, {boxes, labels}); masks among
    them are transformed with the image.

    Training follows DETR (method.md, training recipe): a random short side; or, half of the time
    and with ``config.crop``, a resize, a crop and then the random short side. Evaluation resizes
    to the largest of the short sides. Objects of which a crop leaves less than a pixel are gone.
    """
    steps: list[v2.Transform] = []
    if training:
        steps += [v2.RandomHorizontalFlip(config.flip)] if config.flip else []
        steps += _resize(config)
    elif config.short_sides:
        steps.append(v2.Resize([max(config.short_sides)], max_size=config.max_side))
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize([*config.mean], [*config.std])]
    return v2.Compose(steps)


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
