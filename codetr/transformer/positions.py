"""Sine encodings of pixel positions and of boxes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _sine(values: Tensor, features: int, temperature: float) -> Tensor:
    """(..., features): sine and cosine of ``values``, interleaved, at growing wavelengths."""
    half = torch.arange(features // 2, dtype=torch.float32, device=values.device)
    angles = values[..., None].float() / temperature ** (2 * half / features)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def encode_pixels(mask: Tensor, channels: int, temperature: float, offset: float) -> Tensor:
    """Sine encoding of each cell's position within the valid part of its image.

    Args:
        mask: (B, h, w) bool, True where a cell is padding.
        channels: half of them encode y, the other half x.
        offset: added to the cell's ordinal number before it is normalised (method.md 7).

    Returns:
        (B, h, w, channels) float32.
    """
    valid = (~mask).float()
    encoded = []
    for axis in (1, 2):
        ordinal = valid.cumsum(axis)
        last = ordinal.narrow(axis, -1, 1)
        position = (ordinal + offset) / (last + 1e-6) * 2 * math.pi
        encoded.append(_sine(position, channels // 2, temperature))
    return torch.cat(encoded, dim=-1)


def encode_boxes(boxes: Tensor, features: int, temperature: float = 10000) -> Tensor:
    """Sine encoding of boxes, one coordinate after the other (equation 4's PE).

    Args:
        boxes: (..., 4) normalised, in [0, 1].
        features: numbers for each coordinate.

    Returns:
        (..., 4 * features) float32.
    """
    return _sine(boxes * 2 * math.pi, features, temperature).flatten(-2)
