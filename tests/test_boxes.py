from __future__ import annotations

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from codetr import boxes as ours

SEEDS = st.integers(0, 2**32)


def random_boxes(*shape: int, seed: int = 0, extent: float = 100.0) -> Tensor:
    """(*shape, 4) xyxy boxes with sides of at least one pixel."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * extent
    sides = torch.rand(*shape, 2, generator=generator) * extent / 2 + 1
    return torch.cat((corner, corner + sides), dim=-1)


@given(SEEDS)
def test_formats_are_torchvisions(seed: int) -> None:
    boxes = random_boxes(7, seed=seed)
    centres = torchvision.ops.box_convert(boxes, "xyxy", "cxcywh")
    torch.testing.assert_close(ours.xyxy_to_cxcywh(boxes), centres)
    torch.testing.assert_close(ours.cxcywh_to_xyxy(centres), boxes, rtol=1e-5, atol=1e-4)


@given(SEEDS)
def test_normalised_boxes_are_fractions_of_width_and_height(seed: int) -> None:
    size = (40, 200)
    whole = torch.tensor([0.0, 0.0, 200.0, 40.0])
    torch.testing.assert_close(ours.normalise(whole, size), torch.tensor([0.5, 0.5, 1.0, 1.0]))
    boxes = random_boxes(5, seed=seed)
    back = ours.denormalise(ours.normalise(boxes, size), size)
    torch.testing.assert_close(back, boxes, rtol=1e-5, atol=1e-4)


def test_extents_repeat_width_and_height() -> None:
    extents = ours.extents([(3, 4), (5, 6)], torch.zeros(1))
    assert extents.tolist() == [[4, 3, 4, 3], [6, 5, 6, 5]]


@given(SEEDS)
def test_overlaps_are_torchvisions(seed: int) -> None:
    a, b = random_boxes(6, seed=seed), random_boxes(5, seed=seed + 1)
    torch.testing.assert_close(ours.pairwise_iou(a, b), torchvision.ops.box_iou(a, b))
    generalised = ours.generalised_iou(a[:, None], b)
    torch.testing.assert_close(generalised, torchvision.ops.generalized_box_iou(a, b))


def test_overlaps_broadcast_over_batches() -> None:
    a, b = random_boxes(2, 3, seed=1), random_boxes(2, 4, seed=2)
    both = ours.pairwise_iou(a, b)
    assert both.shape == (2, 3, 4)
    torch.testing.assert_close(both[1], torchvision.ops.box_iou(a[1], b[1]))


def test_empty_boxes_overlap_nothing() -> None:
    empty = torch.zeros(1, 4)
    assert ours.iou(empty, empty).item() == 0
    assert ours.generalised_iou(empty, empty).isfinite()


@given(SEEDS)
def test_deltas_are_torchvisions(seed: int) -> None:
    stds = (0.1, 0.1, 0.2, 0.2)
    coder = BoxCoder(tuple(1 / std for std in stds))
    anchors, boxes = random_boxes(8, seed=seed), random_boxes(8, seed=seed + 1)
    deltas = ours.encode_deltas(anchors, boxes, stds)
    torch.testing.assert_close(deltas, coder.encode_single(boxes, anchors), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        ours.decode_deltas(anchors, deltas, stds), boxes, rtol=1e-4, atol=1e-3
    )


def test_decoded_sides_are_bounded() -> None:
    anchor = torch.tensor([0.0, 0.0, 16.0, 16.0])
    wild = torch.tensor([[0.0, 0.0, 50.0, 50.0], [0.0, 0.0, -50.0, -50.0]])
    sides = ours.xyxy_to_cxcywh(ours.decode_deltas(anchor, wild))[:, 2:]
    torch.testing.assert_close(sides, torch.tensor([[1000.0, 1000.0], [0.256, 0.256]]))


def test_deltas_are_decoded_in_float32() -> None:
    anchors = random_boxes(3)
    assert (
        ours.decode_deltas(anchors, torch.ones(3, 4, dtype=torch.bfloat16)).dtype == torch.float32
    )


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_inverse_sigmoid_is_a_clamped_logit(eps: float) -> None:
    p = torch.tensor([0.0, 0.2, 0.5, 0.999, 1.0])
    logits = ours.inverse_sigmoid(p, eps)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1:3], torch.logit(p[1:3]))
    torch.testing.assert_close(logits[0], -logits[-1])
