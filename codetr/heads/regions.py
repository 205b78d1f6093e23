"""Features of regions of the pyramid (Faster R-CNN with a feature pyramid; method.md 44)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from codetr.boxes import areas
from codetr.ops.roi_align import RegionFeatures, roi_align


def region_features(
    pyramid: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Sequence[Tensor],
    *,
    size: int,
    finest_scale: float,
) -> RegionFeatures:
    """What is read in the R regions of all images, each from the level of its size.

    Args:
        pyramid: (B, C, h, w) maps, finest first.
        strides: of the maps in pixels.
        boxes: (n, 4) xyxy pixels of each image.
        size: of the features, in cells.
        finest_scale: regions whose side is below twice this many pixels read the finest level.
    """
    image = torch.cat([b.new_full((len(b), 1), i) for i, b in enumerate(boxes)])
    regions = torch.cat((image, torch.cat(list(boxes))), dim=1)
    side = areas(regions[:, 1:]).sqrt()
    level = (side / finest_scale + 1e-6).log2().floor()
    level = level.clamp(0, len(strides) - 1)
    maps = [feature.float() for feature in pyramid]
    return roi_align(maps, regions, level, size, strides)
