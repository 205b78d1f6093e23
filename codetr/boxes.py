"""Box arithmetic. Every function names the format it expects.

``xyxy``: left, top, right, bottom. ``cxcywh``: centre and size. *Normalised* boxes are divided by
the valid (width, height) of their own image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from codetr.structures import Size
from codetr.transfer import tensor_on

EPS = 1e-6
"""Smallest area that an overlap is divided by (the original's value)."""

MAX_LOG_RATIO = math.log(1000 / 16)
"""A decoded side is between 16/1000 and 1000/16 of its anchor's."""


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) cxcywh to xyxy, in whatever unit."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat((centre - size / 2, centre + size / 2), -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) xyxy to cxcywh, in whatever unit."""
    low, high = boxes.split(2, dim=-1)
    return torch.cat(((low + high) / 2, high - low), -1)


def extents(sizes: Sequence[Size], like: Tensor) -> Tensor:
    """(B, 4) width, height, width, height of B images, by which normalised boxes are scaled."""
    sides = [(width, height, width, height) for height, width in sizes]
    return tensor_on(like.device, sides, like.dtype)


def normalise(boxes: Tensor, size: Size) -> Tensor:
    """(..., 4) xyxy pixels to normalised cxcywh, for one image of ``size`` (height, width)."""
    return xyxy_to_cxcywh(boxes) / extents([size], boxes)[0]


def denormalise(boxes: Tensor, size: Size) -> Tensor:
    """(..., 4) normalised cxcywh to xyxy pixels, for one image of ``size`` (height, width)."""
    return cxcywh_to_xyxy(boxes) * extents([size], boxes)[0]


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of probabilities, finite for 0 and 1: both odds are at least ``eps``."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def areas(boxes: Tensor) -> Tensor:
    """(...) areas of (..., 4) xyxy boxes."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    corner = torch.max(a[..., :2], b[..., :2])
    sides = (torch.min(a[..., 2:], b[..., 2:]) - corner).clamp(min=0)
    intersection = sides[..., 0] * sides[..., 1]
    union = (areas(a) + areas(b) - intersection).clamp(min=EPS)
    return intersection, union


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of xyxy boxes whose leading dimensions broadcast.

    Unlike torchvision's, it takes batches and is 0, not NaN, for two empty boxes.

    Args:
        a: (..., 4).
        b: (..., 4).

    Returns:
        (...) in [0, 1].
    """
    intersection, union = _intersection_and_union(a, b)
    return intersection / union


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """(..., n, m) IoU of every (..., n, 4) box with every (..., m, 4) box, xyxy."""
    return iou(a[..., :, None, :], b[..., None, :, :])


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of xyxy boxes whose leading dimensions broadcast, (...) in [-1, 1].

    torchvision's loss adds its eps to the areas and synchronises with the device; here an area is
    at least ``EPS``, as in the original (method.md 33).
    """
    intersection, union = _intersection_and_union(a, b)
    sides = torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])
    hull = (sides[..., 0] * sides[..., 1]).clamp(min=EPS)
    return intersection / union - (hull - union) / hull


def encode_deltas(anchors: Tensor, boxes: Tensor, stds: Sequence[float] = (1, 1, 1, 1)) -> Tensor:
    """What a head must predict at ``anchors`` to give ``boxes`` (Fast R-CNN, section 3.1).

    Args:
        anchors: (..., 4) xyxy.
        boxes: (..., 4) xyxy, in the same unit, of positive size.
        stds: by which the four deltas are divided.
    """
    anchors, boxes = xyxy_to_cxcywh(anchors), xyxy_to_cxcywh(boxes)
    shift = (boxes[..., :2] - anchors[..., :2]) / anchors[..., 2:]
    stretch = torch.log(boxes[..., 2:] / anchors[..., 2:])
    return torch.cat((shift, stretch), -1) / tensor_on(shift.device, stds, shift.dtype)


def decode_deltas(anchors: Tensor, deltas: Tensor, stds: Sequence[float] = (1, 1, 1, 1)) -> Tensor:
    """The inverse of :func:`encode_deltas`: xyxy boxes from (..., 4) deltas at (..., 4) anchors."""
    anchors = xyxy_to_cxcywh(anchors)
    deltas = deltas.float() * tensor_on(deltas.device, stds, torch.float32)
    centres = anchors[..., :2] + anchors[..., 2:] * deltas[..., :2]
    stretch = deltas[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    half = anchors[..., 2:] * stretch.exp() * 0.5
    return torch.cat((centres - half, centres + half), -1)


def decode_distances(points: Tensor, distances: Tensor) -> Tensor:
    """xyxy boxes whose left, top, right and bottom are (..., 4) distances from (..., 2) points."""
    before, after = distances.float().split(2, dim=-1)
    return torch.cat((points - before, points + after), -1)


def encode_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """The inverse of :func:`decode_distances`; negative where a point is outside its box."""
    return torch.cat((points - boxes[..., :2], boxes[..., 2:] - points), -1)
