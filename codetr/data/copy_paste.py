"""Copy-paste: objects of one image over another (Simple Copy-Paste is a Strong Data Augmentation
Method for Instance Segmentation, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

from codetr.config import CopyPasteConfig
from codetr.data.canvas import Canvas

Objects = dict[str, Tensor]
"""``boxes`` (n, 4) xyxy in pixels, ``labels`` (n,), and perhaps ``masks`` (n, h, w)."""
Sample = tuple[Tensor, Objects]
"""A transformed image (3, h, w), no larger than the canvas, and its objects."""

SETTINGS_ARE_FOR = 1024
"""Side of the canvas on which the settings' pixels are meant: the paper's."""


class CopyPaste:
    """Pastes a random choice of another image's objects at the places where they are.

    What is pasted hides what was there: masks lose these pixels, boxes shrink to what is left, and
    objects of which too little is left are gone, by the original implementation's two thresholds.
    """

    def __init__(self, config: CopyPasteConfig, canvas: Canvas) -> None:
        self.config, self.canvas = config, canvas
        unit = canvas.side / SETTINGS_ARE_FOR
        self.box_tolerance = config.box_tolerance * unit
        self.min_visible = config.min_visible * unit**2

    def __call__(self, onto: Sample, source: Sample) -> Sample:
        """``onto`` on the canvas, with objects of ``source`` pasted; draws from torch's generator.

        Returns:
            The canvas, and the objects, the pasted ones last. They have masks (n, side, side),
            unless boxes were pasted.
        """
        pixels, below = self._laid_out(onto)
        source_pixels, above = self._laid_out(source)
        above = _select(above, self._choice(len(above["labels"])))
        covered = above["masks"].any(0)
        objects = _joined(self._still_seen(below, covered), above)
        if self.config.shapes == "boxes":
            del objects["masks"]
        return torch.where(covered, source_pixels, pixels), objects

    def _laid_out(self, sample: Sample) -> Sample:
        image, objects = sample
        boxes = objects["boxes"].as_subclass(Tensor)
        if self.config.shapes == "boxes":
            masks = box_masks(boxes, self.canvas.side)
        else:
            masks = self.canvas.hold_masks(objects["masks"].as_subclass(Tensor).bool())
        laid_out = {"boxes": boxes, "labels": objects["labels"], "masks": masks}
        return self.canvas.hold(image.as_subclass(Tensor)), laid_out

    def _choice(self, count: int) -> Tensor:
        """Positions of the objects to paste: how many is uniform, and which."""
        most = min(count, self.config.max_objects)
        number = int(torch.randint(most + 1, ()))
        return torch.randperm(count)[:number]

    def _still_seen(self, objects: Objects, covered: Tensor) -> Objects:
        """The objects that are not hidden, with what is seen of them."""
        seen = objects["masks"] & ~covered
        before, left = (masks.flatten(1).sum(1) for masks in (objects["masks"], seen))
        boxes = objects["boxes"].clone()
        # A box that nothing was pasted over stays as it is, and need not be that of its mask.
        changed = (left < before) & (left > 0)
        boxes[changed] = pixel_boxes(seen[changed]).to(boxes.dtype)
        moved = (boxes - objects["boxes"]).abs().amax(1)
        kept = (left > 0) & ((moved <= self.box_tolerance) | (left > self.min_visible))
        return _select({"boxes": boxes, "labels": objects["labels"], "masks": seen}, kept)


def pixel_boxes(masks: Tensor) -> Tensor:
    """(n, 4) boxes xyxy around all pixels of (n, h, w) masks, none of which may be empty.

    torchvision gives the last pixel itself as the right and lower side, which here lie behind it.
    """
    return masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0])


def box_masks(boxes: Tensor, side: int) -> Tensor:
    """(n, side, side) bool, the pixels that (n, 4) boxes touch."""
    places = torch.arange(side)
    left, top = boxes[:, 0].floor(), boxes[:, 1].floor()
    right, bottom = boxes[:, 2].ceil(), boxes[:, 3].ceil()
    rows = (places >= top[:, None]) & (places < bottom[:, None])
    columns = (places >= left[:, None]) & (places < right[:, None])
    return rows[:, :, None] & columns[:, None, :]


def _select(objects: Objects, chosen: Tensor) -> Objects:
    return {name: values[chosen] for name, values in objects.items()}


def _joined(first: Objects, second: Objects) -> Objects:
    return {name: torch.cat((values, second[name])) for name, values in first.items()}
