"""RoIAlign's gradient against torchvision's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align as of_torchvision

from codetr.ops.roi_align import roi_align


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    images=st.integers(1, 3),
    regions=st.integers(0, 150),
    map_size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    size=st.integers(1, 7),
)
def test_values_and_gradient_are_torchvisions(
    seed: int, images: int, regions: int, map_size: tuple[int, int], size: int
) -> None:
    """Regions of all sizes, some of them empty or inside out, some outside of the map."""
    draw = torch.Generator().manual_seed(seed)
    height, width = map_size
    feature = torch.randn(images, 3, height, width, generator=draw).requires_grad_()
    centre = (torch.rand(regions, 2, generator=draw) * 1.6 - 0.3) * torch.tensor([width, height])
    half = torch.rand(regions, 2, generator=draw) * 0.8 * max(map_size) - 0.1
    image = torch.randint(images, (regions, 1), generator=draw)
    rois = torch.cat((image, 8 * (centre - half), 8 * (centre + half)), 1)

    ours = roi_align(feature, rois, size, 1 / 8)
    theirs = of_torchvision(feature, rois, size, 1 / 8, -1, aligned=True)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn(ours.shape, generator=draw)
    torch.testing.assert_close(
        torch.autograd.grad(ours, feature, weight)[0],
        torch.autograd.grad(theirs, feature, weight)[0],
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("needed", [True, False])
def test_has_a_graph_only_where_a_gradient_is_wanted(needed: bool) -> None:
    feature = torch.rand(1, 2, 4, 4, requires_grad=needed)
    result = roi_align(feature, torch.tensor([[0.0, 0, 0, 16, 16]]), 2, 1 / 8)
    assert result.requires_grad == needed
