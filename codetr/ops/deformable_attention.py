"""Multi-scale deformable attention: the definition, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from codetr.structures import Size


def deformable_attention(
    value: Tensor, shapes: list[Size], locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples of ``value`` (Deformable DETR, equation 3).

    Samples outside a map read zeros, as beyond an edge padded with zeros; a location of (0, 0) is
    the outer corner of the first cell and (1, 1) that of the last.

    Args:
        value: (B, T, H, D), the maps of all levels flattened and laid end to end; H heads.
        shapes: (height, width) in cells of each of the levels; their areas add up to T.
        locations: (B, Q, H, levels, P, 2), (x, y) in fractions of each map.
        weights: (B, Q, H, levels, P), which sum to one over levels and points.

    Returns:
        (B, Q, H * D) of ``value``'s dtype; sampled and added up in float32 at least.
    """
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    # bf16 cannot tell neighbouring cells of a large map apart: sample and add up in float32.
    exact = torch.promote_types(value.dtype, torch.float32)
    # Queries innermost: there are many, and few points; what runs over long rows vectorises.
    maps = value.to(exact).permute(0, 2, 3, 1).flatten(0, 1)  # (B H, D, T)
    grids = (2 * locations.to(exact) - 1).permute(0, 2, 3, 4, 1, 5).flatten(0, 1)
    shares = weights.to(exact).permute(0, 2, 3, 4, 1).flatten(0, 1)[:, None]  # (B H, 1, L, P, Q)

    result = maps.new_zeros(batch * heads, channels, queries)
    for level, level_map in enumerate(maps.split([h * w for h, w in shapes], dim=2)):
        sampled = functional.grid_sample(
            level_map.unflatten(2, shapes[level]),
            grids[:, level],  # (B H, P, Q, 2)
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )  # (B H, D, P, Q)
        result = result + (sampled * shares[:, :, level]).sum(2)
    result = result.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)
    return result.to(value.dtype)
