"""Non-maximum suppression of proposals beside torchvision's over all boxes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import batched_nms

from codetr.heads import rpn
from codetr.heads.rpn import leading_nms


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(0, 120), st.integers(1, 30), st.sampled_from([0.2, 0.7]))
def test_the_best_of_all_boxes_are_found_among_the_best(seed, count, keep, iou) -> None:
    """Whole numbers, so that every overlap is exact; some scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 12, (count, 2), generator=generator)
    sides = torch.randint(1, 12, (count, 2), generator=generator)
    boxes = torch.cat((corner, corner + sides), 1).float()
    scores = torch.randint(0, 40, (count,), generator=generator) / 40
    levels = torch.randint(0, 3, (count,), generator=generator)
    kept = leading_nms(boxes, scores, levels, iou=iou, keep=keep)
    expected = batched_nms(boxes, scores, levels, iou)[:keep]
    assert kept.tolist() == expected.tolist()


@pytest.mark.parametrize(("apart", "entered"), [(True, [20]), (False, [20, 40, 80, 100])])
def test_more_boxes_enter_only_where_too_few_stay(apart, entered, monkeypatch) -> None:
    counts = []

    def counting(boxes, *others):
        counts.append(len(boxes))
        return batched_nms(boxes, *others)

    monkeypatch.setattr(rpn, "batched_nms", counting)
    left = torch.arange(100.0) * (20 if apart else 0)
    boxes = torch.stack((left, left * 0, left + 10, left * 0 + 10), 1)
    scores, levels = torch.linspace(0, 1, 100), torch.zeros(100)
    kept = leading_nms(boxes, scores, levels, iou=0.5, keep=10)
    assert counts == entered
    assert kept.tolist() == ([*range(99, 89, -1)] if apart else [99])
