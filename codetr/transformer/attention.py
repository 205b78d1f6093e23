"""Deformable attention as a layer, and the frame that its offsets are measured in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codetr.ops import deformable_attention_fused
from codetr.structures import Memory
from codetr.transfer import tensor_on


@dataclass
class SamplingFrame:
    """Where queries look, in fractions of each level's padded map.

    Attributes:
        centers: (B, Q, levels, 2) reference points (x, y).
        scales: (B, Q, levels, 2), or broadcastable to it: what an offset of one moves.
    """

    centers: Tensor
    scales: Tensor

    @staticmethod
    def of_points(points: Tensor, memory: Memory) -> SamplingFrame:
        """Offsets in cells of each map, around ``points`` (B, Q, 2) in fractions of the image."""
        return SamplingFrame(points[:, :, None] * memory.valid_ratios[:, None], _cell(memory))

    @staticmethod
    def of_boxes(
        boxes: Tensor, is_point: Tensor | None, memory: Memory, points: int
    ) -> SamplingFrame:
        """Offsets in fractions of half a box, shared between ``points`` sampling points.

        Args:
            boxes: (B, Q, 4) cxcywh in fractions of the image.
            is_point: (Q,) bool, True where only the centre is known and offsets are in cells;
                None: nowhere.
        """
        ratios = memory.valid_ratios[:, None]  # (B, 1, levels, 2)
        centers = boxes[:, :, None, :2] * ratios
        scales = boxes[:, :, None, 2:] * ratios * (0.5 / points)
        if is_point is not None:
            scales = torch.where(is_point[:, None, None], _cell(memory), scales)
        return SamplingFrame(centers, scales)


def _cell(memory: Memory) -> Tensor:
    """(levels, 2): width and height of one cell in fractions of its map."""
    sizes = [(1 / width, 1 / height) for height, width in memory.shapes]
    return tensor_on(memory.valid_ratios.device, sizes, memory.valid_ratios.dtype)


class DeformableAttention(nn.Module):
    """Each query samples a few points of every level (Deformable DETR, section 4.1)."""

    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Point p of head h starts p + 1 steps away, in a direction of the head's own."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        star = torch.stack((angle.cos(), angle.sin()), dim=-1)
        star = star / star.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)[None, None, :, None]
        star = (star[:, None, None] * steps).expand(-1, self.levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.weight.zero_()
            self.sampling_offsets.bias.copy_(star.flatten())
            for parameter in self.attention_weights.parameters():
                parameter.zero_()
            for layer in (self.value_proj, self.output_proj):
                nn.init.xavier_uniform_(layer.weight)
                layer.bias.zero_()

    def forward(self, query: Tensor, frame: SamplingFrame, memory: Memory) -> Tensor:
        """(B, Q, C) from queries (B, Q, C), positions added. Padded tokens have value zero."""
        shape = (self.heads, self.levels, self.points)
        value = self.value_proj(memory.tokens).masked_fill_(memory.padding[..., None], 0.0)
        attended = deformable_attention_fused(
            value.unflatten(-1, (self.heads, -1)),
            memory.shapes,
            frame.centers,
            frame.scales,
            self.sampling_offsets(query).unflatten(-1, (*shape, 2)),
            self.attention_weights(query).unflatten(-1, shape),
        )
        return self.output_proj(attended)


def feed_forward(channels: int, hidden: int, activation: str = "relu") -> nn.Sequential:
    """The transformer's two-layer perceptron; ``activation`` is ``relu`` or ``prelu``."""
    between = nn.ReLU() if activation == "relu" else nn.PReLU()
    return nn.Sequential(nn.Linear(channels, hidden), between, nn.Linear(hidden, channels))


def perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two linear layers, Xavier-uniform, with a ReLU between them."""
    first, last = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
    for layer in (first, last):
        nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(first, nn.ReLU(), last)
