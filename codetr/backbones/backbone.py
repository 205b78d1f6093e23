"""What all backbones have in common: their output, and parts that are not trained."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn


class Backbone(nn.Module):
    """A body made of timm's parts; some of it may be frozen.

    Attributes:
        body: gives the stages' maps.
        channels: of each of them.
        divisor: images are padded to multiples of so many pixels.
    """

    divisor = 1

    def __init__(self, body: nn.Module, channels: list[int]) -> None:
        super().__init__()
        self.body = body
        self.channels = channels
        self._frozen: list[nn.Module] = []

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(B, c, H / stride, W / stride), rounded up, for each output, from (B, 3, H, W)."""
        return list(self.body(pixels))

    def freeze(self, *parts: nn.Module) -> None:
        """Train these no more, and leave them in evaluation mode: norm, drop path."""
        for part in parts:
            part.requires_grad_(False)
        self._frozen += parts

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self


def drop_path_rates(last: float, blocks: int) -> list[float]:
    """How often training skips each block: never the first, growing evenly to ``last``."""
    return [last * block / max(1, blocks - 1) for block in range(blocks)]


def init_linears(body: nn.Module) -> None:
    """Weights of all linear layers from a truncated normal of deviation 0.02, biases zero: as Swin
    and EVA-02 start."""
    for module in body.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
