from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import Matcher

from codetr.matching.max_iou import BACKGROUND, IGNORED, match_anchors, match_max_iou
from codetr.matching.objects import pad_objects
from codetr.structures import Targets


def overlaps(seed: int, objects: int, candidates: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(objects, candidates, generator=generator)


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 40))
def test_thresholds_are_torchvisions(seed: int, objects: int, candidates: int) -> None:
    iou = overlaps(seed, objects, candidates)
    assert Matcher.BELOW_LOW_THRESHOLD == BACKGROUND
    assert Matcher.BETWEEN_THRESHOLDS == IGNORED
    for low, high in ((0.3, 0.7), (0.5, 0.5)):
        expected = Matcher(high, low, allow_low_quality_matches=False)(iou)
        assert torch.equal(match_max_iou(iou, positive=high, negative=low), expected)


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 40))
def test_low_quality_positives_are_torchvisions(seed: int, objects: int, candidates: int) -> None:
    """The same candidates are positive; torchvision gives them to the object they overlap most,
    the original to the one whose best they are."""
    iou = overlaps(seed, objects, candidates)
    ours = match_max_iou(iou, positive=0.7, negative=0.3, low_quality=0.0)
    expected = Matcher(0.7, 0.3, allow_low_quality_matches=True)(iou)
    assert torch.equal(ours >= 0, expected >= 0)
    assert torch.equal(ours[ours < 0], expected[ours < 0])
    best = iou.argmax(1)
    assert all(int(ours[b]) == max(i for i in range(objects) if best[i] == b) for b in best)


def test_low_quality_keeps_all_ties_and_needs_its_least_overlap() -> None:
    iou = torch.tensor([[0.4, 0.4, 0.1], [0.2, 0.0, 0.25]])
    ours = match_max_iou(iou, positive=0.7, negative=0.3, low_quality=0.3)
    assert ours.tolist() == [0, 0, BACKGROUND]


@given(st.integers(0, 2**32), st.booleans())
def test_order_of_objects_does_not_matter(seed: int, low_quality: bool) -> None:
    iou = overlaps(seed, 5, 200)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    least = 0.3 if low_quality else None
    ours = match_max_iou(iou, positive=0.7, negative=0.3, low_quality=least)
    shuffled = match_max_iou(iou[order], positive=0.7, negative=0.3, low_quality=least)
    back = torch.where(shuffled >= 0, order[shuffled.clamp(min=0)], shuffled)
    contested = torch.zeros_like(ours, dtype=torch.bool)
    contested[iou.argmax(1)] = low_quality  # the last of several objects wins
    assert torch.equal(ours[~contested], back[~contested])
    assert torch.equal(ours >= 0, back >= 0)


def test_no_candidate_is_ignored_and_padding_gets_nothing() -> None:
    iou = torch.tensor([[[0.8, -1.0, 0.1], [0.0, -1.0, 0.0]]])
    ours = match_max_iou(iou, positive=0.7, negative=0.3, low_quality=0.3)
    assert ours.tolist() == [[0, IGNORED, BACKGROUND]]


def test_images_without_objects_have_background_only() -> None:
    nothing = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    boxes, labels = pad_objects([nothing, nothing])
    assert boxes.tolist() == [[[0.0] * 4]] * 2
    assert labels.shape == (2, 1)
    iou = torch.zeros(2, 1, 5)
    assigned = match_max_iou(iou, positive=0.5, negative=0.5, low_quality=0.3)
    assert (assigned == BACKGROUND).all()


def test_pad_objects_fills_with_empty_boxes() -> None:
    one = Targets(torch.ones(1, 4), torch.tensor([3]))
    two = Targets(torch.full((2, 4), 2.0), torch.tensor([1, 2]))
    boxes, labels = pad_objects([one, two])
    assert boxes[0].tolist() == [[1.0] * 4, [0.0] * 4]
    assert labels.tolist() == [[3, 0], [1, 2]]


@given(st.integers(0, 2**32), st.sampled_from([(0.7, 0.3, 0.3), (0.5, 0.5, None)]))
def test_horizontal_flip_flips_the_assignment(
    seed: int, thresholds: tuple[float, float, float | None]
) -> None:
    """Of an RPN's anchors, which are their own mirror images about their middle column, and of a
    second stage's proposals, which are mirrored with the objects."""
    positive, negative, low_quality = thresholds
    generator = torch.Generator().manual_seed(seed)
    middle = 8 * torch.cartesian_prod(torch.arange(7), torch.arange(9)).flip(1).float()
    # Sides that hold no object whole: several anchors that do would overlap it alike.
    sides = torch.tensor([[16.0, 32.0], [24.0, 24.0], [32.0, 16.0]]) / 2
    anchors = torch.cat((middle[:, None] - sides, middle[:, None] + sides), 2).flatten(0, 1)
    corner = torch.rand(3, 2, generator=generator) * 24
    objects = torch.cat((corner, corner + 25 + 12 * torch.rand(3, 2, generator=generator)), 1)

    def mirrored(boxes: Tensor) -> Tensor:
        return torch.stack((64 - boxes[:, 2], boxes[:, 1], 64 - boxes[:, 0], boxes[:, 3]), 1)

    def assigned(objects: Tensor, candidates: Tensor) -> Tensor:
        valid = torch.ones(1, len(candidates), dtype=torch.bool)
        found = match_anchors(
            candidates,
            valid,
            objects[None],
            positive=positive,
            negative=negative,
            low_quality=low_quality,
        )
        return found[0]

    ours = assigned(objects, anchors)
    flipped = assigned(mirrored(objects), anchors).view(7, 9, 3).flip(1).flatten()
    assert torch.equal(ours, flipped)
    proposals = objects[torch.arange(60) % 3] + 8 * torch.randn(60, 4, generator=generator)
    assert torch.equal(
        assigned(objects, proposals), assigned(mirrored(objects), mirrored(proposals))
    )
