"""The operator against nested loops, and its gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from codetr.ops import deformable_attention, deformable_attention_fused
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
    shapes: list[Size],
    *,
    heads: int,
    points: int,
    channels: int,
    seed: int = 0,
    batch: int = 2,
    queries: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    tokens = sum(h * w for h, w in shapes)
    value = torch.randn(batch, tokens, heads, channels, generator=draw, dtype=torch.float64)
    locations = torch.rand(
        batch, queries, heads, len(shapes), points, 2, generator=draw, dtype=torch.float64
    )
    locations = locations * 1.6 - 0.3  # some of them outside
    weights = torch.rand(
        batch, queries, heads, len(shapes) * points, generator=draw, dtype=torch.float64
    )
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


def by_grid_sample(value: Tensor, shapes: list[Size], locations: Tensor, weights: Tensor) -> Tensor:
    """The formula of the original's fallback for CPUs, one level after the other."""
    heads = value.shape[2]
    result: Tensor | float = 0.0
    for level, cells in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        maps = cells.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, shapes[level])
        grids = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        sampled = functional.grid_sample(maps, grids, align_corners=False)  # (B H, D, Q, P)
        shares = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
        result = result + (sampled * shares).sum(-1)
    return result.unflatten(0, (-1, heads)).permute(0, 3, 1, 2).flatten(2)


def test_gradients_of_many_samples() -> None:
    """Levels that grow and shrink, so that each borders on larger and on smaller ones."""
    shapes = [(6, 9), (12, 17), (3, 2), (1, 1), (7, 20)]
    inputs = [
        t.requires_grad_() for t in example(shapes, heads=3, points=5, channels=6, queries=40)
    ]
    results = []
    for function in (deformable_attention, by_grid_sample):
        result = function(inputs[0], shapes, *inputs[1:])
        results.append([result, *torch.autograd.grad(result.square().sum(), inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("frame_of_all", [True, False])
def test_fused_is_softmax_and_locations_before_it(frame_of_all: bool) -> None:
    shapes = [(3, 4), (2, 1)]
    value, _, _ = example(shapes, heads=2, points=3, channels=2)
    draw = torch.Generator().manual_seed(1)
    centers = torch.rand(2, 3, 2, 2, generator=draw).double()
    scales = torch.rand(2, 2, generator=draw).double().expand(2, 3, 2, 2)
    scales = scales[0, 0] if frame_of_all else scales * centers
    offsets = torch.randn(2, 3, 2, 2, 3, 2, generator=draw).double()
    logits = torch.randn(2, 3, 2, 2, 3, generator=draw).double()
    locations = (
        centers[:, :, None, :, None] + offsets * scales.expand(2, 3, 2, 2)[:, :, None, :, None]
    )
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    expected = by_loops(value, shapes, locations, weights)
    inputs = [t.clone().requires_grad_() for t in (value, centers, scales, offsets, logits)]

    def function(value: Tensor, *others: Tensor) -> Tensor:
        return deformable_attention_fused(value, shapes, *others)

    torch.testing.assert_close(function(*inputs), expected)
    assert torch.autograd.gradcheck(function, inputs, atol=1e-5)


def test_infinity_is_outside() -> None:
    shapes = [(2, 3), (1, 1)]
    value, locations, weights = example(shapes, heads=1, points=2, channels=3)
    expected_at = locations.clone()
    for index, far in enumerate((math.inf, -math.inf, 1e300)):
        locations[0, index, 0, 0, 0, index % 2] = far
        expected_at[0, index, 0, 0, 0] = 9.0
    locations.requires_grad_()
    result = deformable_attention(value, shapes, locations, weights)
    torch.testing.assert_close(result, by_loops(value, shapes, expected_at, weights))
    (gradient,) = torch.autograd.grad(result.sum(), locations)
    assert (gradient[0, :, 0, 0, 0] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("axes", [[0], [1], [0, 1]])
def test_nan_shows_where_it_is_and_nowhere_else(axes: list[int]) -> None:
    """The guard against a loss that is not finite must see it; other queries must not."""
    shapes = [(2, 3), (1, 1)]
    value, locations, weights = example(shapes, heads=2, points=2, channels=3)
    expected = by_loops(value, shapes, locations, weights)
    locations[1, 2, 0, 1, 0, axes] = math.nan
    value.requires_grad_()
    result = deformable_attention(value, shapes, locations, weights)
    assert result[1, 2, :3].isnan().all()
    result = torch.where(result.isnan(), expected, result)
    torch.testing.assert_close(result, expected)
    (gradient,) = torch.autograd.grad(result.sum(), value)
    assert gradient.isfinite().all()


def test_what_is_outside_reads_no_value() -> None:
    """Not even times zero: a NaN in the map stays with those who look at it."""
    shapes = [(2, 2), (3, 1)]
    value, locations, weights = example(shapes, heads=1, points=2, channels=2)
    value[:] = math.nan
    for position in (-5.0, -0.6, 1.6, 5.0):
        away = torch.full_like(locations, position)
        assert (deformable_attention(value, shapes, away, weights) == 0).all()
        away[..., 0] = 0.5
        assert (deformable_attention(value, shapes, away, weights) == 0).all()


def test_many_small_terms_add_up_in_low_precision() -> None:
    """256 terms of 1/256 each make one; summed in bf16 they would stop at a half."""
    value = torch.ones(1, 1, 1, 2, dtype=torch.bfloat16)
    locations = torch.full((1, 1, 1, 1, 256, 2), 0.5)
    weights = torch.full((1, 1, 1, 1, 256), 1 / 256, dtype=torch.bfloat16)
    result = deformable_attention(value, [(1, 1)], locations, weights)
    assert result.flatten().tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": [(2, 3)]}, r"T = 6"),
        ({"locations": torch.zeros(2, 3, 2, 2, 1, 2)}, r"\(B, Q, H, levels, P, 2\)"),
        ({"locations": torch.zeros(2, 3, 1, 1, 1, 2)}, r"\(B, Q, H, levels, P, 2\)"),
        ({"weights": torch.zeros(2, 3, 1, 2, 2)}, r"one for each"),
    ],
)
def test_sizes_that_contradict(change: dict, message: str) -> None:
    shapes = [(2, 3), (1, 1)]
    value, locations, weights = example(shapes, heads=1, points=1, channels=2)
    inputs = {"value": value, "shapes": shapes, "locations": locations, "weights": weights}
    with pytest.raises(ValueError, match=message):
        deformable_attention(**{**inputs, **change})


def test_empty_batch() -> None:
    value, locations, weights = example([(2, 2)], heads=1, points=1, channels=3)
    inputs = [t[:0].clone().requires_grad_() for t in (value, locations, weights)]
    result = deformable_attention(inputs[0], [(2, 2)], *inputs[1:])
    assert result.shape == (0, 3, 3)
    result.sum().backward()
    assert [t.grad.shape for t in inputs] == [t.shape for t in inputs]


def test_no_channels() -> None:
    value, locations, weights = example([(2, 2)], heads=1, points=1, channels=0)
    inputs = [t.clone().requires_grad_() for t in (value, locations, weights)]
    result = deformable_attention(inputs[0], [(2, 2)], *inputs[1:])
    assert result.shape == (2, 3, 0)
    result.sum().backward()
    assert not any(t.grad.any() for t in inputs)


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
