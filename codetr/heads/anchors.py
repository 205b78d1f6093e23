"""Anchor grids (method.md 40)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from codetr.boxes import extents
from codetr.structures import Size


@dataclass(frozen=True)
class Anchors:
    """Anchors of all levels, in the order level, row, column, shape.

    Attributes:
        boxes: (N, 4) xyxy pixels; they may reach outside the image.
        centres: (N, 2) x, y in pixels. Cell i of a level is at i * stride: no half-cell offset.
        counts: number of anchors of each level.
        levels: (N,) int64, the level of each anchor.
    """

    boxes: Tensor
    centres: Tensor
    counts: tuple[int, ...]
    levels: Tensor

    def valid(self, sizes: Sequence[Size]) -> Tensor:
        """(B, N) bool: the centre is inside the image's valid size, not in the padding."""
        limits = extents(sizes, self.centres)[:, None, :2]
        return (self.centres < limits).all(-1)


def anchors_for(
    pyramid: Sequence[Tensor],
    strides: Sequence[int],
    scales: Sequence[float],
    ratios: Sequence[float] = (1.0,),
) -> Anchors:
    """Anchors on every cell of the maps, one for each ratio and scale (ratio-major).

    Args:
        pyramid: (B, C, h, w) maps.
        strides: of the maps in pixels.
        scales: sides of the square anchors in strides.
        ratios: height / width; the area stays that of the square.
    """
    shapes = tuple((level.shape[-2], level.shape[-1]) for level in pyramid)
    return _grid(shapes, tuple(strides), tuple(scales), tuple(ratios), pyramid[0].device)


@lru_cache(maxsize=8)
def _grid(
    shapes: tuple[Size, ...],
    strides: tuple[int, ...],
    scales: tuple[float, ...],
    ratios: tuple[float, ...],
    device: torch.device,
) -> Anchors:
    # Cached: evaluation must not leave inference tensors behind that training cannot use.
    with torch.inference_mode(False):
        centres, boxes = [], []
        for (height, width), stride in zip(shapes, strides, strict=True):
            y, x = torch.meshgrid(
                torch.arange(height, device=device) * float(stride),
                torch.arange(width, device=device) * float(stride),
                indexing="ij",
            )
            centre = torch.stack((x, y), -1).view(-1, 1, 2)
            corner = _half_sides(stride, scales, ratios).to(device)
            boxes.append(torch.cat((centre - corner, centre + corner), -1).view(-1, 4))
            centres.append(centre.expand(-1, len(corner), -1).reshape(-1, 2))
        counts = tuple(len(level) for level in boxes)
        levels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return Anchors(torch.cat(boxes), torch.cat(centres), counts, levels.to(device))


def _half_sides(stride: int, scales: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """(ratios * scales, 2) half width and half height of the anchors of one cell, in pixels."""
    root = torch.tensor(ratios).sqrt()[:, None]
    side = stride * torch.tensor(scales)[None]
    return torch.stack((side / root, side * root), -1).view(-1, 2) / 2
