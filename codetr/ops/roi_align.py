"""RoIAlign: torchvision's, with a gradient that a CPU computes by matrix products."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor

_CHUNK = 64
"""Regions whose gradient is spread at a time: bounds the memory, and stays in the cache."""

_LARGEST_MAP = 4096
"""In cells. The products grow with the map, torchvision's loops with the regions alone: on maps of
some 8000 cells and more they are faster."""


def roi_align(feature: Tensor, regions: Tensor, size: int, scale: float) -> Tensor:
    """Averages of bilinear samples on a grid over each region (Mask R-CNN, section 3).

    On a CPU torchvision's own backward pass uses one core, and takes seven times as long as its
    forward pass: a tenth of a training step. There the gradient is computed here instead, unless
    the map is large.

    Args:
        feature: (B, C, h, w) float32.
        regions: (R, 5): number of the image, then xyxy in pixels.
        size: of the grid in cells.
        scale: cells of the map for each pixel.

    Returns:
        (R, C, size, size); aligned, and each cell of the grid has as many samples as it covers
        cells of the map (method.md 44).
    """
    cells = feature.shape[-2] * feature.shape[-1]
    if feature.device.type == "cpu" and feature.requires_grad and cells <= _LARGEST_MAP:
        result: Tensor = _RoiAlign.apply(feature, regions, size, scale)
        return result
    return _forward(feature, regions, size, scale)


def _forward(feature: Tensor, regions: Tensor, size: int, scale: float) -> Tensor:
    return torchvision.ops.roi_align(feature, regions, size, scale, -1, aligned=True)


class _RoiAlign(torch.autograd.Function):
    """A sample's weight is that of its row times that of its column, so the result for a region is
    ``rows @ feature @ columns.T``, and the gradient of the feature ``rows.T @ grad @ columns``."""

    @staticmethod
    def forward(ctx: Any, feature: Tensor, regions: Tensor, size: int, scale: float) -> Tensor:
        ctx.save_for_backward(regions)
        ctx.shape, ctx.size, ctx.scale = feature.shape, size, scale
        return _forward(feature, regions, size, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (regions,) = ctx.saved_tensors
        batch, channels, height, width = ctx.shape
        columns = _axis_weights(regions[:, 1], regions[:, 3], ctx.size, width, ctx.scale)
        rows = _axis_weights(regions[:, 2], regions[:, 4], ctx.size, height, ctx.scale)
        result = grad.new_zeros(batch, height, width * channels)
        for image in range(batch):
            for chunk in (regions[:, 0] == image).nonzero().squeeze(1).split(_CHUNK):
                cells = grad[chunk].permute(0, 2, 3, 1).flatten(0, 1).contiguous()
                across = columns[chunk].repeat_interleave(ctx.size, dim=0).transpose(1, 2)
                spread = torch.bmm(across, cells)  # (r * size, width, C)
                down = rows[chunk].flatten(0, 1).t()  # (height, r * size)
                result[image].addmm_(down, spread.flatten(1))
        maps = result.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return maps.contiguous(), None, None, None


def _axis_weights(low: Tensor, high: Tensor, size: int, cells: int, scale: float) -> Tensor:
    """(R, size, cells): share of each of the map's rows, or columns, in each of the grid's.

    Args:
        low: (R,) where the regions begin, in pixels.
        high: (R,) where they end.
    """
    start = low * scale - 0.5
    length = high * scale - 0.5 - start
    samples = (length / size).ceil().clamp(min=0)[:, None, None]  # none in an empty region
    number = torch.arange(int(samples.max()) if len(low) else 0, device=low.device)
    place = torch.arange(size, device=low.device)[:, None] + (number + 0.5) / samples.clamp(min=1)
    position = start[:, None, None] + place * (length / size)[:, None, None]
    # As torchvision: nothing beyond one cell outside; what is nearer reads the border.
    read = (number < samples) & (position >= -1) & (position <= cells)
    weight = read / samples.clamp(min=1)
    position = position.clamp(0, cells - 1)
    before = position.floor()
    result = low.new_zeros(len(low), size, cells)
    result.scatter_add_(2, before.long(), (1 - position + before) * weight)
    after = (before + 1).clamp(max=cells - 1)
    return result.scatter_add_(2, after.long(), (position - before) * weight)
