"""The operator against nested loops, and its gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codetr.ops import deformable_attention
from codetr.structures import Size


def read(level: Tensor, x: float, y: float) -> Tensor:
    """Bilinear sample of an (h, w, D) map at cell coordinates, zero outside."""
    height, width, _ = level.shape
    value = torch.zeros_like(level[0, 0])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                value = value + level[row, column] * (1 - abs(x - column)) * (1 - abs(y - row))
    return value


def by_loops(value: Tensor, shapes: list[Size], locations: Tensor, weights: Tensor) -> Tensor:
    batch, queries, heads, levels, points, _ = locations.shape
    result = value.new_zeros(batch, queries, heads, value.shape[-1])
    maps = value.split([h * w for h, w in shapes], dim=1)
    for b, q, h, i, p in torch.cartesian_prod(
        *(torch.arange(n) for n in (batch, queries, heads, levels, points))
    ).tolist():
        height, width = shapes[i]
        x, y = locations[b, q, h, i, p].tolist()
        level = maps[i][b, :, h].unflatten(0, (height, width))
        result[b, q, h] += weights[b, q, h, i, p] * read(level, x * width - 0.5, y * height - 0.5)
    return result.flatten(2)


def example(
    shapes: list[Size], *, heads: int, points: int, channels: int, seed: int = 0, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    tokens = sum(h * w for h, w in shapes)
    value = torch.randn(batch, tokens, heads, channels, generator=draw, dtype=torch.float64)
    locations = torch.rand(
        batch, 3, heads, len(shapes), points, 2, generator=draw, dtype=torch.float64
    )
    locations = locations * 1.6 - 0.3  # some of them outside
    weights = torch.rand(batch, 3, heads, len(shapes) * points, generator=draw, dtype=torch.float64)
    weights = weights.softmax(-1).unflatten(-1, (len(shapes), points))
    return value, locations, weights


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    points=st.integers(1, 3),
    channels=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_is_the_sum_of_bilinear_samples(
    shapes: list[Size], heads: int, points: int, channels: int, seed: int
) -> None:
    value, locations, weights = example(
        shapes, heads=heads, points=points, channels=channels, seed=seed
    )
    actual = deformable_attention(value, shapes, locations, weights)
    torch.testing.assert_close(actual, by_loops(value, shapes, locations, weights))


def test_gradients() -> None:
    shapes = [(3, 4), (2, 1)]
    value, locations, weights = example(shapes, heads=2, points=2, channels=2, batch=1)
    inputs = [t.clone().requires_grad_() for t in (value, locations, weights)]
    assert torch.autograd.gradcheck(
        lambda v, at, w: deformable_attention(v, shapes, at, w), inputs, atol=1e-5
    )


@pytest.mark.parametrize("queries", [0, 1])
def test_no_queries(queries: int) -> None:
    value, locations, weights = example([(2, 2)], heads=1, points=1, channels=3)
    result = deformable_attention(value, [(2, 2)], locations[:, :queries], weights[:, :queries])
    assert result.shape == (2, queries, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_samples_at_exact_locations(dtype: torch.dtype) -> None:
    """On a map of 300 columns bf16 locations would be wrong by whole cells."""
    shapes = [(1, 300)]
    value = torch.arange(300.0).div(300).to(dtype).view(1, 300, 1, 1)
    x = (torch.arange(300) + 0.5) / 300
    locations = torch.stack((x, torch.full_like(x, 0.5)), -1).view(1, 300, 1, 1, 1, 2)
    result = deformable_attention(value, shapes, locations, torch.ones(1, 300, 1, 1, 1).to(dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result.flatten(), value.flatten())
