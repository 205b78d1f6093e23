"""From tokens of the memory to maps over the image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from codetr.structures import Memory, Size


def valid_maps(values: Tensor, memory: Memory) -> list[list[Tensor]]:
    """(h, w, …) of each level of each image, without the cells that lie in its padding.

    Args:
        values: (B, T, …), one for each token.
        memory: gives the levels' shapes and the padding.
    """
    counts = [height * width for height, width in memory.shapes]
    levels = zip(values.split(counts, 1), memory.padding.split(counts, 1), strict=True)
    cut: list[list[Tensor]] = [[] for _ in range(len(values))]
    for (level, padding), shape in zip(levels, memory.shapes, strict=True):
        used = ~padding.unflatten(1, shape)
        # Images lie at the top left: the first row and the first column tell their size.
        heights, widths = used[:, :, 0].sum(1).tolist(), used[:, 0].sum(1).tolist()
        grid = level.unflatten(1, shape)
        for image, (height, width) in enumerate(zip(heights, widths, strict=True)):
            cut[image].append(grid[image, :height, :width])
    return cut


def to_image(level: Tensor, size: Size) -> Tensor:
    """(H, W): a level's map (h, w), bilinearly resized to the image."""
    resized = functional.interpolate(
        level[None, None].float(), size, mode="bilinear", align_corners=False
    )
    return resized[0, 0]


def foreground(boxes: Tensor, size: Size) -> Tensor:
    """(H, W) bool: the pixel's centre lies in one of the (n, 4) xyxy boxes in pixels."""
    height, width = size
    y = torch.arange(height, device=boxes.device) + 0.5
    x = torch.arange(width, device=boxes.device) + 0.5
    left, top, right, bottom = boxes[:, :, None].unbind(1)
    rows, columns = (top <= y) & (y < bottom), (left <= x) & (x < right)
    return (rows[:, :, None] & columns[:, None, :]).any(0)


def as_share(map_: Tensor) -> Tensor:
    """The non-negative map divided by its sum; zero where it is zero everywhere."""
    total = map_.sum()
    return map_ / torch.where(total > 0, total, torch.ones_like(total))


def as_fraction(map_: Tensor) -> Tensor:
    """The non-negative map divided by its maximum; zero where it is zero everywhere."""
    most = map_.max()
    return (map_ / torch.where(most > 0, most, torch.ones_like(most))).clamp(max=1)
