"""From pixels to a feature pyramid and from the memory to the heads' pyramid."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import timm
from torch import Tensor, nn

from codetr.config import BackboneConfig, ConfigError, TransformerConfig

# A ResNet for CPUs: one basic block for each stage behind a stem of three 3x3 convolutions. Its
# blocks do not start as identities (timm's default): a short training from scratch has no time.
TINY = {
    "zero_init_last": False,
    "layers": (1, 1, 1, 1),
    "channels": (24, 48, 64, 96),
    "stem_type": "deep",
    "stem_width": 8,
}


class Backbone(nn.Module):
    """A timm ResNet; its stages' outputs, with stages and batch norm frozen as configured."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.body = _build_resnet(config)
        self.channels: list[int] = self.body.feature_info.channels()
        self._freeze()

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(B, c, H / stride, W / stride) for each of ``config.stages``, from (B, 3, H, W)."""
        return list(self.body(pixels))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.body.modules():
            if isinstance(module, nn.BatchNorm2d) and (
                self.config.frozen_norm or not module.weight.requires_grad
            ):
                module.eval()
        return self

    def _freeze(self) -> None:
        frozen = [f"layer{stage}." for stage in range(1, self.config.frozen_stages + 1)]
        if self.config.frozen_stages >= 0:
            frozen += ["conv1", "bn1"]
        for name, parameter in self.body.named_parameters():
            if name.startswith(tuple(frozen)):
                parameter.requires_grad_(False)
        if self.config.frozen_norm:
            for module in self.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(False)


def _build_resnet(config: BackboneConfig) -> Any:
    sizes = {} if config.name != "tiny" else TINY
    name = "resnet18" if config.name == "tiny" else config.name
    if config.width != 64:
        sizes = {"channels": tuple(config.width * 2**stage for stage in range(4)), **sizes}
    if config.pretrained is True and sizes:
        raise ConfigError(
            f"backbone '{config.name}' of width {config.width} has no published weights: "
            "set backbone.pretrained=false or to a file"
        )
    try:
        body = timm.create_model(
            name,
            features_only=True,
            out_indices=config.stages,
            pretrained=config.pretrained is True,
            **sizes,
        )
    except Exception as error:  # timm and its hub raise whatever their transport raises
        if config.pretrained is not True:
            raise
        raise ConfigError(
            f"cannot download timm's weights of '{name}' ({type(error).__name__}): set "
            f"backbone.pretrained to a file that holds its state dict, or to false"
        ) from error
    if config.width != 64 and config.name != "tiny":
        _narrow_stem(body, config.width)
    if isinstance(config.pretrained, Path):
        _load_weights(body, config.pretrained)
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


def _load_weights(body: nn.Module, path: Path) -> None:
    """Load a ResNet state dict (``.pth`` or ``.safetensors``) without its classifier.

    Raises:
        ConfigError: the file is missing, unreadable, or holds another network's weights.
    """
    from timm.models import load_state_dict

    try:
        state = load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:  # whatever torch.load and safetensors raise
        raise ConfigError(f"backbone.pretrained: cannot read {path}: {error}") from error
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    try:
        body.load_state_dict(state)
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise ConfigError(f"backbone.pretrained: {path} does not fit: {lines[:300]}") from None


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
