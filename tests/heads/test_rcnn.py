from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_heads import CHANNELS, CLASSES, random_pyramid, random_targets
from torch import Tensor
from torchvision.ops import box_iou

from codetr.config import RcnnConfig
from codetr.heads.rcnn import Rcnn

STRIDES = (8, 16, 32)


def rcnn(**config: float) -> Rcnn:
    return Rcnn(
        RcnnConfig(**{"fc_dim": 8, "finest_scale": 28} | config), CHANNELS, CLASSES, STRIDES
    )


def test_a_region_reads_the_level_of_its_size() -> None:
    """Sides below 56 read level 0, below 112 level 1, and all larger ones level 2."""
    maps = [torch.full((1, CHANNELS, 40, 40), float(level)) for level in range(3)]
    sides = [4.0, 55.0, 57.0, 110.0, 113.0, 300.0]
    boxes = torch.tensor([[1.0, 1.0, 1 + s, 1 + s] for s in sides])
    features = rcnn().roi_features(maps, [boxes]).cells
    assert features.shape == (6, CHANNELS, 7, 7)
    assert features[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_features_are_the_maps_averages_in_the_right_order(seed: int) -> None:
    """On a linear map RoIAlign gives the value at the centre of each bin, whatever the level."""
    generator = torch.Generator().manual_seed(seed)
    size, slope = 7, torch.tensor([0.3, -0.7])

    def ramp(stride: int) -> Tensor:
        position = (torch.arange(320 // stride) + 0.5) * stride
        plane = slope[0] * position + slope[1] * position[:, None]
        image = torch.tensor([0.0, 1000.0])[:, None, None, None]
        return plane.expand(2, CHANNELS, -1, -1) + image

    boxes = []
    for count in (5, 4):
        corner = 30 + torch.rand(count, 2, generator=generator) * 60
        sides = 8 + torch.rand(count, 2, generator=generator) * 140
        boxes.append(torch.cat((corner, corner + sides), -1))
    features = rcnn().roi_features([ramp(s) for s in STRIDES], boxes).cells
    fraction = (torch.arange(size) + 0.5) / size
    for number, (x1, y1, x2, y2) in enumerate(torch.cat(boxes)):
        x, y = x1 + fraction * (x2 - x1), y1 + fraction * (y2 - y1)
        expected = slope[0] * x + slope[1] * y[:, None] + 1000 * (number >= 5)
        torch.testing.assert_close(features[number, 0], expected, rtol=1e-4, atol=1e-2)


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(0, 4), st.integers(0, 40))
def test_samples(seed: int, objects: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets = random_targets([objects], seed=seed)
    jitter = torch.randn(count, 4, generator=generator) * 4
    base = targets[0].boxes if objects else torch.tensor([[10.0, 10.0, 40.0, 40.0]])
    proposals = base[torch.arange(count) % len(base)] + jitter
    proposals[:, 2:] = proposals[:, 2:].maximum(proposals[:, :2] + 1)
    head = rcnn(samples=16)
    (samples,) = head.sample([proposals], targets)
    positives = len(samples.labels)
    assert len(samples.boxes) <= 16
    assert positives <= 4
    # A far-away box stands for images without objects.
    everything = torch.cat((targets[0].boxes, torch.tensor([[9e3, 9e3, 9e3 + 1, 9e3 + 1]])))
    best = box_iou(samples.boxes, everything).amax(1)
    assert (best[:positives] >= 0.5).all()
    assert (best[positives:] < 0.5).all()
    matched = box_iou(samples.boxes[:positives], samples.targets).diagonal()
    torch.testing.assert_close(matched, best[:positives])
    assert positives >= min(objects, 4)  # the objects themselves are candidates


@pytest.mark.parametrize("counts", [[0, 0], [2, 0]])
def test_without_any_proposal(counts: list[int]) -> None:
    """All proposals may be empty boxes; the loss stays finite and connected."""
    head, targets = rcnn(), random_targets(counts)
    pyramid = [level.requires_grad_() for level in random_pyramid(2)[:-1]]
    output = head(pyramid, [torch.zeros(0, 4)] * 2, targets)
    torch.stack([*output.losses.values()]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert [len(p.labels) for p in output.positives] == counts
    found = head.detect(pyramid, [torch.zeros(0, 4)] * 2, [(64, 96)] * 2)
    assert [len(d) for d in found] == [0, 0]
