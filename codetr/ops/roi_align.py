"""RoIAlign on a pyramid: torchvision's, with a gradient that a CPU computes by matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor

_CHUNK = 64
"""Regions that are computed at a time: bounds the memory, and stays in the cache."""

_LARGEST_MAP = 4096
"""In cells. The products grow with the map, torchvision's loops with the regions alone: on maps of
some 8000 cells and more they are faster."""


class RegionFeatures(NamedTuple):
    """What is read in the regions of all images.

    Attributes:
        cells: (R, C, size, size).
        means: (R, C) over the cells of each region.
    """

    cells: Tensor
    means: Tensor


def roi_align(
    maps: Sequence[Tensor], regions: Tensor, levels: Tensor, size: int, strides: Sequence[int]
) -> RegionFeatures:
    """Averages of bilinear samples on a grid over each region (Mask R-CNN, section 3).

    On a CPU torchvision's own backward pass uses one core, and takes seven times as long as its
    forward pass: a tenth of a training step. There the gradient is computed here instead, but for
    large maps; and the regions of all levels are written where they belong, for a copy of them
    all takes as long as reading them.

    Args:
        maps: (B, C, h, w) float32.
        regions: (R, 5): number of the image, then xyxy in pixels.
        levels: (R,) the map that each region reads.
        size: of the grid in cells.
        strides: of the maps in pixels.

    Returns:
        Aligned, and each cell of the grid has as many samples as it covers cells of the map
        (method.md 44).

    Raises:
        ValueError: a region reads a map that is none.
    """
    align = _with_our_gradient if regions.device.type == "cpu" else _level_by_level
    return align(maps, regions, levels, size, strides)


def _with_our_gradient(
    maps: Sequence[Tensor], regions: Tensor, levels: Tensor, size: int, strides: Sequence[int]
) -> RegionFeatures:
    return RegionFeatures(*_RoiAlign.apply(regions, levels, size, strides, *maps))


def _level_by_level(
    maps: Sequence[Tensor], regions: Tensor, levels: Tensor, size: int, strides: Sequence[int]
) -> RegionFeatures:
    readers = _readers(levels, len(maps))
    of_maps = [
        _of_torchvision(feature, _Read(regions[index], size, 1 / stride))
        for feature, index, stride in zip(maps, readers, strides, strict=True)
    ]
    cells = torch.cat(of_maps)[torch.cat(readers).argsort()]
    return RegionFeatures(cells, cells.mean((2, 3)))


def _readers(levels: Tensor, count: int) -> list[Tensor]:
    """The numbers of the regions that read each of ``count`` maps."""
    readers = []
    for level in range(count):
        readers.append((levels == level).nonzero().squeeze(1))
    if sum(map(len, readers)) < len(levels):
        raise ValueError(f"regions read maps 0 to {count - 1}, not {levels.unique().tolist()}")
    return readers


class _Read(NamedTuple):
    """The (R, 5) regions of one map, the cells along each side, and the map's cells for a pixel."""

    regions: Tensor
    size: int
    scale: float


def _of_torchvision(feature: Tensor, read: _Read) -> Tensor:
    return torchvision.ops.roi_align(feature, *read, -1, aligned=True)


class _RoiAlign(torch.autograd.Function):
    """On a CPU: no copy of all cells, forward or backward, but the result itself."""

    @staticmethod
    def forward(
        ctx: Any, regions: Tensor, levels: Tensor, size: int, strides: Sequence[int], *maps: Tensor
    ) -> tuple[Tensor, Tensor]:
        readers = _readers(levels, len(maps))
        ctx.save_for_backward(regions, *readers)
        ctx.shapes, ctx.size, ctx.strides = [m.shape for m in maps], size, strides
        cells = maps[0].new_empty(len(regions), maps[0].shape[1], size, size)
        for feature, index, stride in zip(maps, readers, strides, strict=True):
            for chunk in index.split(_CHUNK):
                read = _Read(regions[chunk], size, 1 / stride)
                cells[chunk] = _of_torchvision(feature, read)
        return cells, cells.mean((2, 3))

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, of_cells: Tensor, of_means: Tensor) -> tuple[Tensor | None, ...]:
        regions, *readers = ctx.saved_tensors
        of_maps: list[Tensor | None] = [None] * len(readers)
        for level, (shape, index) in enumerate(zip(ctx.shapes, readers, strict=True)):
            if ctx.needs_input_grad[4 + level]:
                spread = _spread if shape[2] * shape[3] <= _LARGEST_MAP else _spread_by_torchvision
                read = _Read(regions[index], ctx.size, 1 / ctx.strides[level])
                of_maps[level] = spread(partial(_grad, of_cells, of_means, index), read, shape)
        return None, None, None, None, *of_maps


def _grad(of_cells: Tensor, of_means: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """(r, C, size, size): of the cells of regions ``index[rows]``, with what their means add."""
    chosen = index[rows]
    cells = of_cells[chosen]
    return cells + (of_means[chosen] / (cells.shape[2] * cells.shape[3]))[..., None, None]


_GradOf = Callable[[Tensor], Tensor]
"""From rows (r,) of these regions to the gradient (r, C, size, size) of their cells."""


def _spread(grad_of: _GradOf, read: _Read, shape: torch.Size) -> Tensor:
    """(B, C, h, w): the gradient of the map that the regions read.

    A sample's weight is that of its row times that of its column, so the result for a region is
    ``rows @ feature @ columns.T``, and the gradient of the feature ``rows.T @ grad @ columns``.
    """
    batch, channels, height, width = shape
    image, *box = read.regions.unbind(1)
    result = read.regions.new_zeros(batch, height, width * channels)
    for number in range(batch):
        for chunk in (image == number).nonzero().squeeze(1).split(_CHUNK):
            left, top, right, bottom = (side[chunk] for side in box)
            columns = _axis_weights(left, right, read.size, width, read.scale)
            rows = _axis_weights(top, bottom, read.size, height, read.scale)
            cells = grad_of(chunk).permute(0, 2, 3, 1).flatten(0, 1).contiguous()
            across = columns.repeat_interleave(read.size, dim=0).transpose(1, 2)
            spread = torch.bmm(across, cells)  # (r * size, width, C)
            down = rows.flatten(0, 1).t()  # (height, r * size)
            result[number].addmm_(down, spread.flatten(1))
    return result.view(batch, height, width, channels).permute(0, 3, 1, 2).contiguous()


def _spread_by_torchvision(grad_of: _GradOf, read: _Read, shape: torch.Size) -> Tensor:
    """The same. RoIAlign is linear: its gradient is that at any map."""
    feature = read.regions.new_zeros(shape).requires_grad_()
    everything = torch.arange(len(read.regions))
    with torch.enable_grad():
        cells = _of_torchvision(feature, read)
    (result,) = torch.autograd.grad(cells, feature, grad_of(everything))
    return result


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
