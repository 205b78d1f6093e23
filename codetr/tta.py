"""Test-time augmentation: an image is shown to the detector in several sizes and mirrored, and what
is found in all these views is merged.

The authors of Co-DETR tested "multi-scale + box voting" (Sense-X/Co-DETR, issue 166) and published
no code for it. Sizes and the overlap are mmdetection's and Detectron's usual ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.ops import batched_nms
from torchvision.transforms.v2 import functional as F  # noqa: N812 - torchvision's own name

from codetr.boxes import pairwise_iou
from codetr.config import ConfigError, DataConfig
from codetr.structures import Detections, Size


@dataclass(frozen=True)
class TTA:
    """Which views of an image there are, and how what is found in them is merged.

    Attributes:
        scales: sizes, as multiples of that at which images are evaluated.
        flip: each size also mirrored; None: if training has mirrored images.
        iou: from this overlap on two detections of a class are of one object.
    """

    scales: tuple[float, ...] = (0.75, 1.0, 1.25)
    flip: bool | None = None
    iou: float = 0.65

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ConfigError(f"tta: scales {self.scales}: give positive factors, as 0.75,1,1.25")
        if len(set(self.scales)) < len(self.scales):
            raise ConfigError(f"tta: scales {self.scales}: one is there twice")
        if not 0 < self.iou <= 1:
            raise ConfigError(f"tta: iou {self.iou:g} is not in (0, 1]")

    def views(self, data: DataConfig) -> Iterator[View]:
        """All views, for images that are resized as ``data`` has it."""
        flips = data.flip > 0 if self.flip is None else self.flip
        for scale in self.scales:
            for mirrored in (False, True) if flips else (False,):
                yield View(scale, mirrored, data)


@dataclass(frozen=True)
class View:
    """One way to show images.

    Attributes:
        scale: multiple of the size at which they are evaluated.
        mirrored: left and right are exchanged.
        data: how they are resized at scale 1.
    """

    scale: float
    mirrored: bool
    data: DataConfig

    @property
    def resizing(self) -> DataConfig:
        """How the images that :meth:`show` returns are to be resized."""
        jitter = self.data.jitter
        if self.scale == 1:
            return self.data
        if jitter.enabled:  # images are fitted to its canvas, in evaluation too
            other = jitter.model_copy(update={"canvas": self._scaled(jitter.canvas)})
            return self.data.model_copy(update={"jitter": other})
        if not self.data.short_sides:
            return self.data
        short, long = max(self.data.short_sides), self.data.max_side
        sides = {"short_sides": (self._scaled(short),), "max_side": self._scaled(long)}
        return self.data.model_copy(update=sides)

    def show(self, image: Tensor) -> Tensor:
        """(3, h, w) uint8 of (3, H, W): of another size where the data has none of its own."""
        if self.scale != 1 and not (self.data.short_sides or self.data.jitter.enabled):
            sides = [self._scaled(side) for side in image.shape[1:]]
            image = F.resize(image, sides, antialias=True)
        return image.flip(-1) if self.mirrored else image

    def in_image(self, found: Detections, shown: Size, size: Size) -> Detections:
        """Detections in an image of ``size`` that was shown in the size ``shown``."""
        if self.mirrored:
            x1, y1, x2, y2 = found.boxes.unbind(-1)
            boxes = torch.stack((shown[1] - x2, y1, shown[1] - x1, y2), dim=-1)
            found = replace(found, boxes=boxes)
        return found if shown == size else found.rescaled(shown, size)

    def _scaled(self, side: int) -> int:
        return max(1, round(side * self.scale))


def merged(found: Sequence[Detections], *, iou: float, keep: int) -> Detections:
    """What was found in the views of one image, as if found once; of a single view, just that.

    Non-maximum suppression within each class, then box voting (Gidaris and Komodakis, 2015, section
    6): a box that is kept becomes the mean, weighted by scores, of all those that overlap it.

    Args:
        found: in pixels of the same image.
        iou: from this overlap on a worse detection of the class is suppressed, and votes.
        keep: at most this many are returned.
    """
    if len(found) == 1:
        return found[0]
    boxes, scores, labels = (
        torch.cat([getattr(each, name) for each in found]) for name in ("boxes", "scores", "labels")
    )
    kept = batched_nms(boxes, scores, labels, iou)[:keep]
    alike = (pairwise_iou(boxes[kept], boxes) >= iou) & (labels[kept, None] == labels)
    weights = alike * scores.clamp(min=torch.finfo(scores.dtype).tiny)
    voted = weights @ boxes / weights.sum(dim=1, keepdim=True)
    # A box without an area overlaps nothing, not even itself.
    voted = torch.where(alike.any(dim=1, keepdim=True), voted, boxes[kept])
    return Detections(voted, scores[kept], labels[kept])
