"""Points to objects by place and size (FCOS, section 3.1, and its centre sampling)."""

from __future__ import annotations

import torch
from torch import Tensor

from codetr.boxes import areas, encode_distances
from codetr.matching.max_iou import BACKGROUND, IGNORED


def match_fcos(
    points: Tensor,
    strides: Tensor,
    ranges: Tensor,
    valid: Tensor,
    objects: Tensor,
    *,
    radius: float = 1.5,
) -> Tensor:
    """Assign each point to the smallest object that it is near the centre of.

    The point lies within ``radius`` strides of the object's centre along both axes, within the
    object, and its longest distance to a side of it is within the range of the point's level.

    Args:
        points: (N, 2) x, y in pixels.
        strides: (N,) of the points' levels in pixels.
        ranges: (N, 2) least and largest longest distance of each point, both included.
        valid: (B, N) bool; only these points are background where nothing fits.
        objects: (B, G, 4) xyxy, G >= 1, zero where an image has fewer.
        radius: in strides.

    Returns:
        (B, N) int64: the number of an object, ``BACKGROUND``, or ``IGNORED`` where not valid.
    """
    assigned = torch.stack([_match_image(points, strides, ranges, o, radius) for o in objects])
    return assigned.masked_fill((assigned < 0) & ~valid, IGNORED)


def _match_image(
    points: Tensor, strides: Tensor, ranges: Tensor, objects: Tensor, radius: float
) -> Tensor:
    low, high = objects[:, None].split(2, dim=-1)  # (G, 1, 2)
    centre, reach = (low + high) / 2, strides[:, None] * radius
    middle = torch.cat((torch.max(centre - reach, low), torch.min(centre + reach, high)), -1)
    longest = encode_distances(points, objects[:, None]).amax(-1)
    fits = encode_distances(points, middle).amin(-1) > 0
    fits &= (longest >= ranges[:, 0]) & (longest <= ranges[:, 1])
    smallest, number = areas(objects)[:, None].where(fits, torch.inf).min(dim=0)
    return number.masked_fill(smallest == torch.inf, BACKGROUND)
