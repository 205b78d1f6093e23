from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou

from codetr.heads.anchors import Anchors, anchors_for
from codetr.matching.atss import match_atss
from codetr.matching.max_iou import BACKGROUND, IGNORED

STRIDES = (8, 16, 32)


def grid(width: int = 96, height: int = 64) -> Anchors:
    maps = [torch.zeros(1, 1, -(-height // s), -(-width // s)) for s in STRIDES]
    return anchors_for(maps, STRIDES, [8])


def random_objects(seed: int, count: int, extent: tuple[int, int] = (96, 64)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    limits = torch.tensor(extent, dtype=torch.float32)
    corner = torch.rand(count, 2, generator=generator) * limits * 0.7
    sides = 6 + torch.rand(count, 2, generator=generator) * limits * 0.5
    return torch.cat((corner, corner + sides), dim=-1)


def paper_algorithm(anchors: Anchors, objects: Tensor, valid: Tensor, topk: int) -> Tensor:
    """Algorithm 1 of the ATSS paper, object by object and level by level."""
    centres = (anchors.boxes[:, :2] + anchors.boxes[:, 2:]) / 2
    best = torch.zeros(len(centres))
    assigned = torch.where(valid, BACKGROUND, IGNORED)
    for number, box in enumerate(objects):
        middle = (box[:2] + box[2:]) / 2
        candidates: list[int] = []
        for level in range(len(anchors.counts)):
            members = ((anchors.levels == level) & valid).nonzero().squeeze(1)
            distance = (centres[members] - middle).norm(dim=1)
            candidates += members[distance.argsort()[:topk]].tolist()
        iou = box_iou(anchors.boxes[candidates], box[None]).squeeze(1)
        threshold = iou.mean() + iou.std()
        for anchor, overlap in zip(candidates, iou, strict=True):
            x, y = centres[anchor]
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if overlap >= threshold and inside and overlap > best[anchor]:
                best[anchor], assigned[anchor] = overlap, number
    return assigned


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(0, 5), st.integers(0, 5), st.sampled_from([1, 4, 9]))
def test_is_the_papers_algorithm(seed: int, n: int, m: int, topk: int) -> None:
    anchors = grid()
    sizes = [(64, 96), (40, 56)]
    valid = anchors.valid(sizes)
    objects = torch.zeros(2, 5, 4)
    objects[0, :n] = random_objects(seed, n)
    objects[1, :m] = random_objects(seed + 1, m, (56, 40))
    ours = match_atss(anchors.boxes, anchors.counts, valid, objects, topk)
    for image, count in enumerate((n, m)):
        expected = paper_algorithm(anchors, objects[image, :count], valid[image], topk)
        assert torch.equal(ours[image], expected)


@given(st.integers(0, 2**32))
def test_order_of_objects_does_not_matter(seed: int) -> None:
    anchors, objects = grid(), random_objects(seed, 6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    valid = anchors.valid([(64, 96)])
    ours = match_atss(anchors.boxes, anchors.counts, valid, objects[None])
    shuffled = match_atss(anchors.boxes, anchors.counts, valid, objects[order][None])
    back = torch.where(shuffled >= 0, order[shuffled.clamp(min=0)], shuffled)
    assert torch.equal(ours, back)


@given(st.integers(0, 2**32))
def test_horizontal_flip_flips_the_assignment(seed: int) -> None:
    """Cells are at multiples of the stride, so grids that end in the same column are their own
    mirror images."""
    shapes, mirror = [(7, 9), (4, 5)], 64
    anchors = anchors_for([torch.zeros(1, 1, *shape) for shape in shapes], [8, 16], [4])
    valid = torch.ones(1, len(anchors.boxes), dtype=torch.bool)
    objects = random_objects(seed, 4, (mirror, 48))
    flipped = torch.stack(
        (mirror - objects[:, 2], objects[:, 1], mirror - objects[:, 0], objects[:, 3]), -1
    )
    ours = match_atss(anchors.boxes, anchors.counts, valid, objects[None])[0]
    other = match_atss(anchors.boxes, anchors.counts, valid, flipped[None])[0]
    for a, b, shape in zip(
        ours.split(anchors.counts), other.split(anchors.counts), shapes, strict=True
    ):
        assert torch.equal(a.view(shape), b.view(shape).flip(1))


@pytest.mark.parametrize("objects", [torch.zeros(1, 1, 4), torch.zeros(1, 3, 4)])
def test_padding_objects_get_nothing(objects: Tensor) -> None:
    anchors = grid()
    valid = anchors.valid([(40, 96)])
    ours = match_atss(anchors.boxes, anchors.counts, valid, objects)
    assert torch.equal(ours, torch.where(valid, BACKGROUND, IGNORED))
