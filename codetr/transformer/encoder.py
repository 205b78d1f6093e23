"""The deformable encoder: from a feature pyramid to the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from codetr.config import TransformerConfig
from codetr.structures import ImageBatch, Memory, Size
from codetr.transformer.attention import DeformableAttention, SamplingFrame, feed_forward
from codetr.transformer.positions import encode_pixels


class EncoderLayer(nn.Module):
    """Post-norm deformable self-attention and perceptron."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        channels = config.embed_dim
        self.attention = DeformableAttention(
            channels, config.attention_heads, config.levels, config.sampling_points
        )
        self.ffn = feed_forward(channels, config.ffn_dim, config.activation)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))

    def forward(
        self, tokens: Tensor, position: Tensor, frame: SamplingFrame, memory: Memory
    ) -> Tensor:
        """(B, T, C) from ``tokens`` (B, T, C); ``memory`` gives the maps' layout."""
        source = replace(memory, tokens=tokens)
        tokens = self.norms[0](tokens + self.attention(tokens + position, frame, source))
        return self.norms[1](tokens + self.ffn(tokens))


class Encoder(nn.Module):
    """Lets every cell of every level look at all levels (Deformable DETR, section 4.1)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.level_embedding = nn.Parameter(torch.empty(config.levels, config.embed_dim))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        nn.init.normal_(self.level_embedding)

    def forward(self, pyramid: list[Tensor], batch: ImageBatch) -> Memory:
        """The memory of a pyramid of (B, C, h, w) maps, finest first.

        Positions are added to queries only, never to values; tokens in the padding are updated
        like all others, but nobody reads them (method.md 8, 9).
        """
        memory, positions = lay_out(pyramid, batch, self.config)
        position = torch.cat(
            [level + own for level, own in zip(positions, self.level_embedding, strict=True)], dim=1
        )
        frame = SamplingFrame.of_points(cell_centers(memory), memory)
        tokens = memory.tokens
        for layer in self.layers:
            if self.config.checkpoint_encoder and self.training:
                tokens = checkpoint(layer, tokens, position, frame, memory, use_reentrant=False)
            else:
                tokens = layer(tokens, position, frame, memory)
        return replace(memory, tokens=tokens)


def lay_out(
    pyramid: list[Tensor], batch: ImageBatch, config: TransformerConfig
) -> tuple[Memory, list[Tensor]]:
    """Flatten the maps into tokens (B, T, C); also, level by level, the sine encoding (B, t, C) of
    where its tokens are."""
    encoding = config.position_encoding
    shapes = [(level.shape[2], level.shape[3]) for level in pyramid]
    masks = padded_cells(batch, shapes)
    positions = [
        encode_pixels(mask, config.embed_dim, encoding.temperature, encoding.offset)
        .flatten(1, 2)
        .to(pyramid[0].dtype)
        for mask in masks
    ]
    memory = Memory(
        tokens=torch.cat([level.flatten(2).transpose(1, 2) for level in pyramid], dim=1),
        shapes=shapes,
        padding=torch.cat([mask.flatten(1) for mask in masks], dim=1),
        valid_ratios=torch.stack([_valid_ratio(mask) for mask in masks], dim=1),
    )
    return memory, positions


def padded_cells(batch: ImageBatch, shapes: Sequence[Size]) -> list[Tensor]:
    """(B, h, w) bool of each level, True where a cell lies in the padding of its image."""
    full = batch.padding_mask()[:, None].float()
    # Nearest interpolation, as the original: a coarse level may have no padded cell at all.
    return [functional.interpolate(full, size=shape)[:, 0].bool() for shape in shapes]


def _valid_ratio(mask: Tensor) -> Tensor:
    """(B, 2) share of a map's width and height that is no padding, from a (B, h, w) mask."""
    return torch.stack(
        [(~mask[:, 0, :]).float().mean(dim=1), (~mask[:, :, 0]).float().mean(dim=1)], dim=-1
    )


def cell_centers(memory: Memory) -> Tensor:
    """(B, T, 2): centre (x, y) of each token's cell, in fractions of the image's valid extent."""
    ratios = memory.valid_ratios
    centers = []
    for level, (height, width) in enumerate(memory.shapes):
        y = (torch.arange(height, device=ratios.device) + 0.5) / height
        x = (torch.arange(width, device=ratios.device) + 0.5) / width
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)
        centers.append(grid / ratios[:, None, level])
    return torch.cat(centers, dim=1)
