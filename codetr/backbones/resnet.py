"""ResNets by timm, frozen as the original trains them (method.md 1)."""

from __future__ import annotations

from typing import Any

import timm
from torch import Tensor, nn

from codetr.backbones.backbone import Backbone
from codetr.backbones.pretrained import load_weights, pretrained_state
from codetr.config import ResNetConfig

# A ResNet for CPUs: one basic block for each stage behind a stem of three 3x3 convolutions. Its
# blocks do not start as identities (timm's default): a short training from scratch has no time.
TINY = {
    "zero_init_last": False,
    "layers": (1, 1, 1, 1),
    "channels": (24, 48, 64, 96),
    "stem_type": "deep",
    "stem_width": 8,
}


class ResNet(Backbone):
    """A timm ResNet; its stages' outputs, with stages and batch norm frozen as configured."""

    def __init__(self, config: ResNetConfig) -> None:
        state = pretrained_state(config)
        body = _build(config)
        super().__init__(body, body.feature_info.channels())
        if state is not None:
            load_weights(body, _without_classifier(state, body), config)
        stem = ["conv1", "bn1"] if config.frozen_stages >= 0 else []
        frozen = [*stem, *(f"layer{stage}" for stage in range(1, config.frozen_stages + 1))]
        self.freeze(*(part for name, part in body.named_children() if name in frozen))
        if config.frozen_norm:
            self.freeze(*(part for part in body.modules() if isinstance(part, nn.BatchNorm2d)))


def _build(config: ResNetConfig) -> Any:
    sizes = {} if config.name != "tiny" else TINY
    name = "resnet18" if config.name == "tiny" else config.name
    if config.width != 64:
        sizes = {"channels": tuple(config.width * 2**stage for stage in range(4)), **sizes}
    stride = 16 if config.dilated else 32
    body = timm.create_model(
        name, features_only=True, out_indices=config.stages, output_stride=stride, **sizes
    )
    if config.width != 64 and config.name != "tiny":
        _narrow_stem(body, config.width)
    return body


def _narrow_stem(body: Any, width: int) -> None:
    """timm scales the stages but always builds a stem of 64 channels: replace what touches it."""
    first = body.layer1[0]
    body.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    body.bn1 = nn.BatchNorm2d(width)
    first.conv1 = nn.Conv2d(
        width,
        first.conv1.out_channels,
        first.conv1.kernel_size,
        padding=first.conv1.padding,
        bias=False,
    )
    if first.downsample is None:
        return
    first.downsample[0] = nn.Conv2d(width, first.downsample[0].out_channels, 1, bias=False)


def _without_classifier(state: dict[str, Tensor], body: nn.Module) -> dict[str, Tensor]:
    """The state without the classifier and without stages that the body does not have."""
    parts = {name for name, _ in body.named_children()}
    absent = ("fc.", *(f"layer{n}." for n in range(1, 5) if f"layer{n}" not in parts))
    return {name: value for name, value in state.items() if not name.startswith(absent)}
