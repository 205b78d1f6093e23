"""From pixels to a feature pyramid, and from the memory to the heads' pyramid."""

from __future__ import annotations

from torch import nn

from codetr.backbones.backbone import Backbone
from codetr.backbones.neck import ChannelMapper, MultiScaleAdapter, SimpleFeaturePyramid
from codetr.backbones.resnet import ResNet
from codetr.backbones.swin import Swin
from codetr.backbones.vit import Vit
from codetr.config import DetectorConfig, ResNetConfig, SwinConfig, VitConfig

__all__ = [
    "Backbone",
    "ChannelMapper",
    "MultiScaleAdapter",
    "ResNet",
    "SimpleFeaturePyramid",
    "Swin",
    "Vit",
    "build_backbone",
    "build_neck",
]


def build_backbone(config: ResNetConfig | SwinConfig | VitConfig) -> Backbone:
    """The backbone, with pretrained weights if so configured.

    Raises:
        ConfigError: the weights cannot be had, or do not fit.
    """
    if isinstance(config, SwinConfig):
        return Swin(config)
    if isinstance(config, VitConfig):
        return Vit(config)
    return ResNet(config)


def build_neck(channels: list[int], config: DetectorConfig) -> nn.Module:
    """What makes ``transformer.levels`` maps of ``transformer.embed_dim`` channels of the
    backbone's maps, which have ``channels``."""
    if isinstance(config.backbone, VitConfig):
        transformer = config.transformer
        return SimpleFeaturePyramid(channels[0], transformer.embed_dim, transformer.levels)
    return ChannelMapper(channels, config.transformer)
