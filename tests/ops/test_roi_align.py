"""RoIAlign on a pyramid and its gradient against torchvision's."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import roi_align as of_torchvision

from codetr.ops.roi_align import _level_by_level, roi_align


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(0, 150),
    map_size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    size=st.integers(1, 7),
    largest=st.sampled_from([0, 40, 4096]),
)
def test_values_and_gradients_are_torchvisions(
    seed: int, count: int, map_size: tuple[int, int], size: int, largest: int
) -> None:
    """Regions of all sizes, some of them empty or inside out, some outside of the map; maps that
    are large and others."""
    draw = torch.Generator().manual_seed(seed)
    images = 1 + seed % 3
    height, width = map_size
    shapes = [(images, 3, height, width), (images, 3, height // 2 + 1, width // 2 + 1)]
    maps = [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]
    regions = random_regions(count, images, map_size, draw)
    levels = torch.randint(2, (count,), generator=draw)
    ours = roi_align(maps, regions, levels, size, (8, 16))
    cells = by_torchvision(maps, regions, levels, size)
    theirs = (cells, cells.mean((2, 3)))
    torch.testing.assert_close(tuple(ours), theirs)
    on_a_gpu = _level_by_level(maps, regions, levels, size, (8, 16))
    torch.testing.assert_close(tuple(on_a_gpu), theirs)

    weights = [torch.randn(of.shape, generator=draw) for of in theirs]
    with mock.patch("codetr.ops.roi_align._LARGEST_MAP", largest):
        for used in ([0], [1], [0, 1]):
            found, expected = (
                torch.autograd.grad(
                    [result[n] for n in used], maps, [weights[n] for n in used], retain_graph=True
                )
                for result in (ours, theirs)
            )
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def random_regions(
    count: int, images: int, map_size: tuple[int, int], draw: torch.Generator
) -> Tensor:
    """(count, 5) on images of eight times the map's size."""
    height, width = map_size
    centre = (torch.rand(count, 2, generator=draw) * 1.6 - 0.3) * torch.tensor([width, height])
    half = torch.rand(count, 2, generator=draw) * 0.8 * max(map_size) - 0.1
    image = torch.randint(images, (count, 1), generator=draw)
    return torch.cat((image, 8 * (centre - half), 8 * (centre + half)), 1)


def by_torchvision(maps: Sequence[Tensor], regions: Tensor, levels: Tensor, size: int) -> Tensor:
    """Region by region."""
    rows = [
        of_torchvision(maps[level], region[None], size, 1 / (8, 16)[level], -1, aligned=True)
        for region, level in zip(regions, levels.tolist(), strict=True)
    ]
    return torch.cat([*rows, *(of_torchvision(m, regions[:0], size) for m in maps)])


@pytest.mark.parametrize("needed", [True, False])
def test_has_a_graph_only_where_a_gradient_is_wanted(needed: bool) -> None:
    feature = torch.rand(1, 2, 4, 4, requires_grad=needed)
    region = torch.tensor([[0.0, 0, 0, 16, 16]])
    result = roi_align([feature], region, torch.tensor([0]), 2, (8,))
    assert result.cells.requires_grad == result.means.requires_grad == needed


def test_a_region_of_no_map_is_an_error() -> None:
    """An area that is no number gives a level that is none."""
    with pytest.raises(ValueError, match="maps 0 to 0"):
        roi_align(
            [torch.rand(1, 2, 4, 4)], torch.zeros(1, 5), torch.tensor([float("nan")]), 2, (8,)
        )
