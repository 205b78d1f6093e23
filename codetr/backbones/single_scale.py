"""Around a single-scale encoder: from the backbone's last map, and to the heads' pyramid."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from codetr.config import TransformerConfig


class Projection(nn.Module):
    """The neck of single-scale DETRs: one 1x1 convolution, no norm (DETR, section 3.2)."""

    def __init__(self, in_channels: Sequence[int], config: TransformerConfig) -> None:
        super().__init__()
        (channels,) = in_channels
        self.conv = nn.Conv2d(channels, config.embed_dim, 1)
        nn.init.xavier_uniform_(self.conv.weight)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """One map (B, C, h, w) from the backbone's one map."""
        (feature,) = features
        return [self.conv(feature)]


class SingleScaleAdapter(nn.Module):
    """From the memory's one map to the pyramid of the auxiliary heads (section 3.2): step by step,
    3x3 convolutions of stride 2 downwards, bilinear interpolation and a 3x3 convolution upwards."""

    def __init__(self, stride: int, strides: Sequence[int], config: TransformerConfig) -> None:
        """``stride`` of the map in pixels, one of those of the pyramid, ``strides``."""
        super().__init__()
        index = tuple(strides).index(stride)
        self.upwards = nn.ModuleList(_step(config, stride=1) for _ in range(index))
        self.downwards = nn.ModuleList(
            _step(config, stride=2) for _ in range(len(strides) - index - 1)
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """(B, C, h, w) maps, finest first, from a single one. A finer map has exactly twice the
        cells of the coarser; those that this puts beyond the image are padding."""
        (own,) = maps
        pyramid = [own]
        for step in self.upwards:
            finer = functional.interpolate(
                pyramid[0], scale_factor=2, mode="bilinear", align_corners=False
            )
            pyramid.insert(0, step(finer))
        for step in self.downwards:
            pyramid.append(step(pyramid[-1]))
        return pyramid


def _step(config: TransformerConfig, stride: int) -> nn.Sequential:
    channels = config.embed_dim
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride=stride, padding=1),
        nn.GroupNorm(config.group_norm_groups, channels),
    )
