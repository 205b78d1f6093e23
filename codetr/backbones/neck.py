"""From a backbone's maps to the encoder's levels, and from the memory to the heads' pyramid."""

from __future__ import annotations

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from codetr.config import TransformerConfig


class ChannelMapper(nn.Module):
    """The neck: every level gets the transformer's channels (method.md 2)."""

    def __init__(self, in_channels: list[int], config: TransformerConfig) -> None:
        super().__init__()
        channels, groups = config.embed_dim, config.group_norm_groups
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, channels, 1, bias=False), nn.GroupNorm(groups, channels))
            for c in in_channels
        )
        # The first extra level reads the backbone's last stage, not the neck's last output.
        extra_inputs = [in_channels[-1], *[channels] * config.levels]
        self.extra = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c, channels, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(groups, channels),
            )
            for c in extra_inputs[: config.levels - len(in_channels)]
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """``config.levels`` maps (B, C, h, w), finest first, from the backbone's maps."""
        pyramid = [layer(feature) for layer, feature in zip(self.lateral, features, strict=True)]
        coarsest = features[-1]
        for layer in self.extra:
            coarsest = layer(coarsest)
            pyramid.append(coarsest)
        return pyramid


class SimpleFeaturePyramid(nn.Module):
    """The neck of a plain ViT: every level is made of its one map, of stride 16 (ViTDet,
    section 3), the finer ones by nearest upsampling and convolution, as the original."""

    def __init__(self, in_channels: int, channels: int, levels: int) -> None:
        super().__init__()
        c, half, quarter = in_channels, in_channels // 2, in_channels // 4

        def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
            layer = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
            return [layer, LayerNorm2d(outputs, eps=1e-6)]

        def finish(inputs: int) -> list[nn.Module]:
            return [*conv(inputs, channels, 1), nn.GELU(), *conv(channels, channels, 3)]

        def up(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Upsample(scale_factor=2), *conv(inputs, outputs, 3), nn.GELU()]

        down = nn.MaxPool2d(3, stride=2, padding=1)
        of_strides = [
            [*up(c, half), *up(half, quarter), *finish(quarter)],
            [*up(c, half), *finish(half)],
            finish(c),
            [down, *finish(c)],
            [down, *conv(c, c, 3, stride=2), nn.GELU(), *finish(c)],
        ]
        self.levels = nn.ModuleList(nn.Sequential(*parts) for parts in of_strides[-levels:])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """(B, C, h, w) of strides 4 to 64, or 8 to 64 for four levels, from the ViT's map."""
        (feature,) = features
        return [level(feature) for level in self.levels]


class MultiScaleAdapter(nn.Module):
    """From the memory's maps to the pyramid of the auxiliary heads: one coarser level more
    (section 3.2; method.md 38)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        channels = config.embed_dim
        self.downsample = nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.GroupNorm(config.group_norm_groups, channels),
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """The (B, C, h, w) maps and a last one of half the resolution of the coarsest."""
        return [*maps, self.downsample(maps[-1])]
