from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection.fcos import FCOS

from codetr.config import FcosConfig
from codetr.heads.anchors import Anchors, anchors_for
from codetr.heads.fcos import FcosHead
from codetr.heads.head import HeadContext
from codetr.matching.fcos import match_fcos
from codetr.matching.max_iou import BACKGROUND, IGNORED

STRIDES = (8, 16, 32)
WIDTH, HEIGHT = 192, 128
HEAD = FcosHead(FcosConfig(), HeadContext("fcos", 8, 3, STRIDES, groups=4))


def grid() -> Anchors:
    maps = [torch.zeros(1, 1, HEIGHT // s, WIDTH // s) for s in STRIDES]
    return anchors_for(maps, STRIDES, [8], offset=0.5)


def random_objects(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    limits = torch.tensor([WIDTH, HEIGHT], dtype=torch.float32)
    corner = torch.rand(count, 2, generator=generator) * limits * 0.7
    sides = 6 + torch.rand(count, 2, generator=generator) * limits
    return torch.cat((corner, (corner + sides).minimum(limits)), dim=-1)


def match(objects: Tensor, sizes: list[tuple[int, int]] | None = None) -> Tensor:
    anchors = grid()
    valid = anchors.valid(sizes or [(HEIGHT, WIDTH)] * len(objects))
    return match_fcos(anchors.centres, anchors.strides, HEAD._ranges(anchors), valid, objects)


def papers_rule(objects: Tensor, radius: float = 1.5) -> Tensor:
    """Point by point and object by object."""
    anchors, assigned = grid(), []
    for (x, y), level in zip(anchors.centres.tolist(), anchors.levels.tolist(), strict=True):
        stride, best = STRIDES[level], (torch.inf, BACKGROUND)
        low = -1 if level == 0 else 8 * STRIDES[level - 1]
        high = torch.inf if level == len(STRIDES) - 1 else 8 * stride
        for number, (x1, y1, x2, y2) in enumerate(objects.tolist()):
            near = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) < radius * stride
            sides = (x - x1, y - y1, x2 - x, y2 - y)
            if near and min(sides) > 0 and low <= max(sides) <= high:
                best = min(best, ((x2 - x1) * (y2 - y1), number))
        assigned.append(best[1])
    return torch.tensor(assigned)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(0, 5))
def test_is_the_papers_rule(seed: int, n: int, m: int) -> None:
    objects = torch.zeros(2, 5, 4)
    objects[0, :n] = random_objects(seed, n)
    objects[1, :m] = random_objects(seed + 1, m)
    ours = match(objects)
    assert torch.equal(ours[0], papers_rule(objects[0, :n]))
    assert torch.equal(ours[1], papers_rule(objects[1, :m]))


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.integers(1, 8))
def test_is_torchvisions(seed: int, count: int) -> None:
    """torchvision starts each level's range at half its end, as strides that double do."""
    anchors, objects = grid(), random_objects(seed, count)
    cells = torch.cat(
        (
            anchors.centres - anchors.strides[:, None] / 2,
            anchors.centres + anchors.strides[:, None] / 2,
        ),
        dim=1,
    )
    found: list = []
    model = SimpleNamespace(
        center_sampling_radius=1.5,
        head=SimpleNamespace(compute_loss=lambda *arguments: found.extend(arguments[-1])),
    )
    FCOS.compute_loss(model, [{"boxes": objects}], {}, [cells], list(anchors.counts))
    assert torch.equal(match(objects[None])[0], found[0])


@given(st.integers(0, 2**32))
def test_order_of_objects_does_not_matter(seed: int) -> None:
    objects = random_objects(seed, 6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    ours, shuffled = match(objects[None]), match(objects[order][None])
    assert torch.equal(ours, torch.where(shuffled >= 0, order[shuffled.clamp(min=0)], shuffled))


@given(st.integers(0, 2**32))
def test_horizontal_flip_flips_the_assignment(seed: int) -> None:
    objects = random_objects(seed, 4).round()  # so that mirroring rounds nothing
    flipped = torch.stack(
        (WIDTH - objects[:, 2], objects[:, 1], WIDTH - objects[:, 0], objects[:, 3]), -1
    )
    counts = grid().counts
    ours, other = match(objects[None])[0].split(counts), match(flipped[None])[0].split(counts)
    for stride, a, b in zip(STRIDES, ours, other, strict=True):
        assert torch.equal(a.view(-1, WIDTH // stride), b.view(-1, WIDTH // stride).flip(1))


def test_points_in_the_padding_are_ignored_and_padding_objects_get_nothing() -> None:
    ours = match(torch.zeros(1, 2, 4), [(64, WIDTH)])
    inside = grid().centres[:, 1] < 64
    assert torch.equal(ours[0], torch.where(inside, BACKGROUND, IGNORED))
