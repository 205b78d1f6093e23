"""Assignment by intersection over union (Faster R-CNN, section 3.1.2; method.md 41, 43)."""

from __future__ import annotations

import torch
from torch import Tensor

from codetr.boxes import pairwise_iou

BACKGROUND = -1
"""Assigned to no object, and to be told so."""
IGNORED = -2
"""Neither positive nor negative: between the thresholds, or no candidate at all."""


def match_max_iou(
    overlaps: Tensor, *, positive: float, negative: float, low_quality: float | None = None
) -> Tensor:
    """Assign each candidate to the object that it overlaps most.

    Args:
        overlaps: (..., G, N) IoU of G >= 1 objects with N candidates. A column of -1 is no
            candidate: it is ignored. A row of zeros is a padding object.
        positive: least IoU of a positive.
        negative: candidates below this are background; those between are ignored.
        low_quality: also assign every candidate of an object's highest IoU to it, if that is at
            least this value and not zero, whatever else the candidate overlaps. Of several such
            objects the last one gets the candidate, as in the original.

    Returns:
        (..., N) int64: the number of an object, ``BACKGROUND`` or ``IGNORED``.
    """
    best, assigned = overlaps.max(dim=-2)
    assigned = assigned.masked_fill(best < positive, IGNORED)
    assigned = assigned.masked_fill((best >= 0) & (best < negative), BACKGROUND)
    if low_quality is None:
        return assigned
    highest = overlaps.amax(dim=-1, keepdim=True)
    closest = (overlaps == highest) & (highest >= low_quality) & (highest > 0)
    numbers = torch.arange(overlaps.shape[-2], device=overlaps.device)[:, None]
    last = torch.where(closest, numbers, BACKGROUND).amax(dim=-2)
    return torch.where(last >= 0, last, assigned)


def match_anchors(
    anchors: Tensor,
    valid: Tensor,
    objects: Tensor,
    *,
    positive: float,
    negative: float,
    low_quality: float | None = None,
) -> Tensor:
    """Assign anchors to the objects of each image by their IoU, as :func:`match_max_iou`.

    Args:
        anchors: (N, 4) xyxy.
        valid: (B, N) bool; only these anchors take part.
        objects: (B, G, 4) xyxy, G >= 1, zero where an image has fewer.
        positive, negative, low_quality: see :func:`match_max_iou`.

    Returns:
        (B, N) int64: the number of an object, ``BACKGROUND`` or ``IGNORED``.
    """
    assigned = []
    # Image by image: the IoU of a whole crowded batch with 200,000 anchors takes gigabytes.
    for boxes, usable in zip(objects, valid, strict=True):
        overlaps = pairwise_iou(boxes, anchors).masked_fill(~usable, -1.0)
        assigned.append(
            match_max_iou(overlaps, positive=positive, negative=negative, low_quality=low_quality)
        )
    return torch.stack(assigned)
