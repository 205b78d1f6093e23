"""Soft-NMS against mmcv's compiled kernel, a plain loop and plain NMS."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from codetr.soft_nms import soft_nms
from codetr.structures import Detections

KERNEL = torch.load(Path(__file__).parent / "golden" / "soft_nms_unit.pt", weights_only=True)


@pytest.mark.parametrize("case", KERNEL)
def test_is_the_original_kernel(case: str) -> None:
    """One class; every kept box in its order, every lowered score."""
    unit = KERNEL[case]
    labels = torch.zeros(len(unit["scores"]), dtype=torch.int64)
    given = Detections(unit["boxes"], unit["scores"], labels)
    found = soft_nms(given, iou=float(case.removeprefix("thr")), min_score=1e-3, keep=1000)
    assert torch.equal(found.boxes, unit["boxes"][unit["kept_index"].long()])
    torch.testing.assert_close(found.boxes, unit["dets"][:, :4])
    torch.testing.assert_close(found.scores, unit["dets"][:, 4], rtol=1e-5, atol=1e-6)
    assert (found.scores[1:] < unit["scores"][unit["kept_index"].long()][1:]).any()


def random_detections(count: int, classes: int, seed: int) -> Detections:
    draw = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=draw) * 50
    side = 5 + 40 * torch.rand(count, 2, generator=draw)
    return Detections(
        torch.cat((corner, corner + side), dim=1),
        torch.rand(count, generator=draw),
        torch.randint(classes, (count,), generator=draw),
    )


def overlap(a: Tensor, b: Tensor) -> float:
    return float(torchvision.ops.box_iou(a[None], b[None]))


def plain_loop(given: Detections, iou: float, min_score: float) -> list[tuple[int, float]]:
    """(index, lowered score) in the order of the paper's figure 3, pair by pair."""
    left = {i: float(score) for i, score in enumerate(given.scores)}
    found = []
    while left:
        best = max(left, key=lambda i: left[i])
        score = left.pop(best)
        if score < min_score:
            break
        found.append((best, score))
        for i in left:
            if given.labels[i] == given.labels[best]:
                shared = overlap(given.boxes[i], given.boxes[best])
                left[i] *= 1 - shared if shared >= iou else 1
    return found


@given(
    given=st.builds(
        random_detections, st.integers(0, 15), st.integers(1, 3), seed=st.integers(0, 1000)
    ),
    iou=st.floats(0.1, 0.9),
    min_score=st.sampled_from([0.0, 0.05, 0.4]),
    keep=st.sampled_from([1, 5, 100]),
)
def test_is_the_plain_loop(given: Detections, iou: float, min_score: float, keep: int) -> None:
    found = soft_nms(given, iou=iou, min_score=min_score, keep=keep)
    expected = plain_loop(given, iou, min_score)[:keep]
    index = [i for i, _ in expected]
    assert torch.equal(found.boxes, given.boxes[index])
    assert torch.equal(found.labels, given.labels[index])
    torch.testing.assert_close(found.scores, torch.tensor([score for _, score in expected]))


def test_without_overlaps_it_only_sorts_and_cuts() -> None:
    given = random_detections(40, 3, seed=1)
    found = soft_nms(given, iou=1.0, min_score=0.3, keep=100)
    expected = given.scores[given.scores >= 0.3].sort(descending=True).values
    assert torch.equal(found.scores, expected)


def test_input_is_left_alone_and_precision_kept() -> None:
    given = random_detections(20, 1, seed=2)
    given.scores = given.scores.bfloat16()
    before = given.scores.clone()
    found = soft_nms(given, iou=0.3, min_score=0.0, keep=20)
    assert torch.equal(given.scores, before)
    assert found.scores.dtype == torch.bfloat16
