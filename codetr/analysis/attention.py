"""Where the decoder's cross-attention looks, without a word in the decoder: by hooks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from codetr.analysis.maps import to_image, valid_maps
from codetr.hooks import Listener
from codetr.structures import Memory, Size
from codetr.transformer import Decoder
from codetr.transformer.attention import DeformableAttention, SamplingFrame
from codetr.transformer.conditional import ConditionalCrossAttention
from codetr.transformer.decoder import DecoderLayer


class CrossAttention(Listener):
    """While entered, keeps how much each forward pass of a decoder attends to each token.

    It looks at what goes into each layer's ``cross_attention``, deformable or dense, and computes
    the attention from it once more; the decoder itself computes what it always does.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.layers: list[Tensor] = []
        """(B, T) of each layer, in the order in which they ran."""

    def attach(self) -> list[RemovableHandle]:
        layers = [cast(DecoderLayer, layer) for layer in self.decoder.layers]
        return [
            layer.cross_attention.register_forward_pre_hook(self._note, with_kwargs=True)
            for layer in layers
        ]

    def mean(self) -> Tensor:
        """(B, T) over the layers."""
        return torch.stack(self.layers).mean(0)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            if isinstance(module, DeformableAttention):
                self.layers.append(sampled_attention(module, *args, **kwargs))
            else:
                dense = cast(ConditionalCrossAttention, module)
                self.layers.append(dense_attention(dense, *args, **kwargs))


def sampled_attention(
    module: DeformableAttention, query: Tensor, frame: SamplingFrame, memory: Memory
) -> Tensor:
    """(B, T): mean over queries and heads of how much deformable attention takes of each token.

    Args:
        module, query, frame, memory: as of :meth:`DeformableAttention.forward`.
    """
    locations, weights = sampling(module, query, frame)
    return splat(locations, weights, memory.shapes).masked_fill(memory.padding, 0.0)


def sampling(
    module: DeformableAttention, query: Tensor, frame: SamplingFrame
) -> tuple[Tensor, Tensor]:
    """Locations (B, Q, H, levels, P, 2) in fractions of the maps, and weights (B, Q, H, levels, P)
    of deformable attention's samples."""
    shape = (module.heads, module.levels, module.points)
    offsets = module.sampling_offsets(query).unflatten(-1, (*shape, 2))
    logits = module.attention_weights(query).unflatten(-1, (module.heads, -1))
    weights = logits.softmax(-1).unflatten(-1, shape[1:])
    centers, scales = frame.centers[:, :, None, :, None], frame.scales[..., None, :, None, :]
    return centers + offsets * scales, weights


def splat(locations: Tensor, weights: Tensor, shapes: Sequence[Size]) -> Tensor:
    """Each sample's weight on the four cells that it is interpolated between: (B, T).

    The mean over queries and heads: where all samples lie within the maps, a row sums to one. A
    sample beyond the border reads zeros there, and that part of its weight is on no cell.

    Args:
        locations: (B, Q, H, levels, P, 2) x, y in fractions of each map.
        weights: (B, Q, H, levels, P), which sum to one over levels and points.
        shapes: (height, width) of each level.
    """
    batch, queries, heads = weights.shape[:3]
    levels = []
    for level, (height, width) in enumerate(shapes):
        cells = locations.new_tensor([width, height])
        place = (locations[:, :, :, level] * cells - 0.5).flatten(1, 3).float()  # (B, n, 2)
        share = weights[:, :, :, level].flatten(1).float() / (queries * heads)
        first = place.floor()
        within = place - first
        grid = share.new_zeros(batch, height * width)
        for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
            x, y = (first + first.new_tensor([dx, dy])).long().unbind(-1)
            near_x = within[..., 0] if dx else 1 - within[..., 0]
            near_y = within[..., 1] if dy else 1 - within[..., 1]
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            cell = (y * width + x).where(inside, 0)
            grid.scatter_add_(1, cell, share * near_x * near_y * inside)
        levels.append(grid)
    return torch.cat(levels, dim=1)


def dense_attention(
    module: ConditionalCrossAttention,
    content: Tensor,
    position: Tensor,
    place: Tensor,
    memory: Memory,
) -> Tensor:
    """(B, T): mean over queries and heads of how much conditional attention takes of each token.

    Args:
        module, content, position, place, memory: as of :meth:`ConditionalCrossAttention.forward`.
    """
    query, key = (
        rows.unflatten(-1, (module.heads, -1)).transpose(1, 2).float()
        for rows in module.queries_and_keys(content, position, place, memory)
    )
    alike = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    return alike.masked_fill(memory.padding[:, None, None], -math.inf).softmax(-1).mean((1, 2))


def attention_maps(
    attention: Tensor, memory: Memory, sizes: Sequence[Size]
) -> list[tuple[Tensor, float]]:
    """For each image its attention as a map (H, W) that sums to one, and the share of it that fell
    beyond the image.

    A cell's attention is spread over the pixels that it stands for, bilinearly.

    Args:
        attention: (B, T), which sums to one with what fell beyond the maps.
        memory: gives the levels' shapes and the padding.
        sizes: valid (height, width) of each image in pixels.
    """
    found = []
    for levels, size in zip(valid_maps(attention, memory), sizes, strict=True):
        inside = float(sum(level.double().sum() for level in levels))
        # Resizing keeps the mean; to keep the sum, a coarse level's cell gives each of its many
        # pixels less.
        maps = [to_image(level, size) * level.numel() for level in levels]
        total = torch.stack(maps).sum(0)
        found.append((total / total.sum().clamp(min=torch.finfo(total.dtype).tiny), 1 - inside))
    return found
