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
        centres: (N, 2) x, y in pixels.
        counts: number of anchors of each level.
        levels: (N,) int64, the level of each anchor.
        strides: (N,) stride of that level in pixels.
        per_cell: number of anchors on each cell.
    """

    boxes: Tensor
    centres: Tensor
    counts: tuple[int, ...]
    levels: Tensor
    strides: Tensor
    per_cell: int

    def valid(self, sizes: Sequence[Size]) -> Tensor:
        """(B, N) bool: the centre is inside the image's valid size, not in the padding."""
        limits = extents(sizes, self.centres)[:, None, :2]
        return (self.centres < limits).all(-1)


def anchors_for(
    pyramid: Sequence[Tensor],
    strides: Sequence[int],
    scales: Sequence[float],
    ratios: Sequence[float] = (1.0,),
    offset: float = 0.0,
) -> Anchors:
    """Anchors on every cell of the maps, one for each ratio and scale (ratio-major).

    Args:
        pyramid: (B, C, h, w) maps.
        strides: of the maps in pixels.
        scales: sides of the square anchors in strides.
        ratios: height / width; the area stays that of the square.
        offset: cell i of a level is at (i + offset) * stride; the anchor-based heads of the
            original have no offset, FCOS half a cell.
    """
    shapes = tuple((level.shape[-2], level.shape[-1]) for level in pyramid)
    device = pyramid[0].device
    return _grid(shapes, tuple(strides), tuple(scales), tuple(ratios), offset, device=device)


def octave_scales(base: float, count: int) -> list[float]:
    """``count`` scales from ``base`` on, evenly spread over an octave (RetinaNet, section 4)."""
    return [base * 2 ** (i / count) for i in range(count)]


@lru_cache(maxsize=16)
def _grid(
    shapes: tuple[Size, ...],
    strides: tuple[int, ...],
    scales: tuple[float, ...],
    ratios: tuple[float, ...],
    offset: float,
    *,
    device: torch.device,
) -> Anchors:
    # Cached: evaluation must not leave inference tensors behind that training cannot use.
    with torch.inference_mode(False):
        centres, boxes = [], []
        for (height, width), stride in zip(shapes, strides, strict=True):
            y, x = torch.meshgrid(
                (torch.arange(height, device=device) + offset) * float(stride),
                (torch.arange(width, device=device) + offset) * float(stride),
                indexing="ij",
            )
            centre = torch.stack((x, y), -1).view(-1, 1, 2)
            corner = _half_sides(stride, scales, ratios).to(device)
            boxes.append(torch.cat((centre - corner, centre + corner), -1).view(-1, 4))
            centres.append(centre.expand(-1, len(corner), -1).reshape(-1, 2))
        counts = tuple(len(level) for level in boxes)
        levels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return Anchors(
            torch.cat(boxes),
            torch.cat(centres),
            counts,
            levels.to(device),
            torch.tensor(strides, dtype=torch.float32)[levels].to(device),
            len(scales) * len(ratios),
        )


def _half_sides(stride: int, scales: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """(ratios * scales, 2) half width and half height of the anchors of one cell, in pixels."""
    root = torch.tensor(ratios).sqrt()[:, None]
    side = stride * torch.tensor(scales)[None]
    return torch.stack((side / root, side * root), -1).view(-1, 2) / 2
