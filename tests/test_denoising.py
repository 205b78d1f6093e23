"""Contrastive denoising: how many groups, how much noise, which targets, who sees whom."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from codetr.boxes import cxcywh_to_xyxy, normalise
from codetr.config import DenoisingConfig
from codetr.queries.denoising import DenoisingQueries, Noise, draw_noise, noise_groups
from codetr.structures import QueryGroup, Targets

CLASSES = 4
SIZES = [(80, 120), (60, 40)]


def some_objects(count: int, size: tuple[int, int], seed: int) -> Targets:
    """Boxes that far copies do not push beyond the image."""
    draw = torch.Generator().manual_seed(seed)
    corner = 0.35 + 0.1 * torch.rand(count, 2, generator=draw)
    boxes = torch.cat((corner, corner + 0.05 + 0.1 * torch.rand(count, 2, generator=draw)), dim=1)
    boxes = boxes * torch.tensor([size[1], size[0]] * 2)
    return Targets(boxes, torch.randint(CLASSES, (count,), generator=draw), seed=seed)


def make(counts: list[int], **settings: float) -> tuple[QueryGroup, list[Targets]]:
    targets = [some_objects(n, s, i) for i, (n, s) in enumerate(zip(counts, SIZES, strict=False))]
    torch.manual_seed(0)
    config = DenoisingConfig(enabled=True, **{"queries": 12, **settings})  # type: ignore[arg-type]
    module = DenoisingQueries(config, channels=8, num_classes=CLASSES, logit_eps=1e-3)
    return module(SIZES[: len(counts)], targets), targets


@given(st.integers(1, 300), st.integers(0, 400))
def test_as_many_groups_as_fit_and_at_least_one(queries: int, objects: int) -> None:
    groups = noise_groups(queries, objects)
    assert groups == 1 or groups * objects <= queries
    if objects:
        assert (groups + 1) * objects > queries
    else:
        assert groups == 1


@pytest.mark.parametrize(
    ("counts", "groups"), [([4, 2], 3), ([5, 12], 1), ([13, 1], 1), ([1, 0], 12)]
)
def test_layout(counts: list[int], groups: int) -> None:
    """Near and far slots by turns, each as wide as the image with most objects."""
    group, targets = make(counts)
    most = max(counts)
    assert (group.parts, group.count) == (groups, 2 * groups * most)
    assert group.sees == ("query",)
    assert group.position is group.valid is None
    assert group.targets is not None
    for image, objects in enumerate(targets):
        slots = group.targets.labels[image].view(groups, 2, most)
        boxes = group.targets.boxes[image].view(groups, 2, most, 4)
        n = len(objects)
        assert (slots[:, 0, :n] == objects.labels).all()
        assert (slots[:, 1] == CLASSES).all()
        assert (slots[:, :, n:] == CLASSES).all()
        wanted = normalise(objects.boxes, SIZES[image]).expand(groups, n, 4)
        torch.testing.assert_close(boxes[:, 0, :n], wanted)
        assert (boxes[:, 1] == 0).all()
        assert (boxes[:, :, n:] == 0).all()
        content = group.content[image].view(groups, 2, most, -1)
        reference = group.reference[image].view(groups, 2, most, 4)
        assert (content[:, :, n:] == 0).all()
        assert (reference[:, :, n:] == 0.5).all()
        assert (content[:, :, :n].abs().sum(-1) > 0).all()
    assert (group.targets.label_weights == 1).all()


@given(seed=st.integers(0, 500), box_noise=st.floats(0, 1))
def test_corners_of_near_and_far_copies_move_within_their_bounds(
    seed: int, box_noise: float
) -> None:
    """Near: less than half a side times the noise. Far: from there to twice as much."""
    objects = some_objects(3, (100, 100), seed)
    module = DenoisingQueries(DenoisingConfig(box_noise=box_noise), 8, CLASSES, 1e-3)
    noise = draw_noise(4, 3, CLASSES, torch.Generator().manual_seed(seed))
    batched = Noise(*[getattr(noise, name)[None] for name in ("flip", "label", "sign", "shift")])
    boxes = (objects.boxes / 100)[None, None]
    far = torch.tensor([False, True, False, True])
    moved = cxcywh_to_xyxy(module._moved(boxes, batched, far))[0]
    sides = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 1, 2)[0]
    shares = (moved - boxes[0]).abs() / (sides / 2)
    assert (shares[~far] <= box_noise + 1e-4).all()
    assert (shares[far] >= box_noise - 1e-4).all()
    assert (shares[far] <= 2 * box_noise + 1e-4).all()


def test_boxes_stay_within_the_image() -> None:
    module = DenoisingQueries(DenoisingConfig(), 8, CLASSES, 1e-3)
    targets = [Targets(torch.tensor([[0.0, 0.0, 100.0, 100.0]] * 6), torch.zeros(6).long())]
    corners = cxcywh_to_xyxy(module([(100, 100)], targets).reference)
    assert (corners >= -1e-3).all()
    assert (corners <= 1 + 1e-3).all()


def embedded_labels(group: QueryGroup, table: Tensor) -> Tensor:
    """The labels whose embeddings the contents are."""
    return (group.content[..., None, :] - table).abs().sum(-1).argmin(-1)


@pytest.mark.parametrize("label_noise", [0.0, 0.5, 1.0])
def test_labels_are_replaced_where_the_draw_says_so(label_noise: float) -> None:
    targets = [some_objects(5, SIZES[0], 3)]
    config = DenoisingConfig(queries=400, label_noise=label_noise)
    module = DenoisingQueries(config, 8, CLASSES, 1e-3)
    group = module(SIZES[:1], targets)
    labels = embedded_labels(group, module.label_embedding.weight)[0].view(-1, 5)
    changed = (labels != targets[0].labels).float().mean().item()
    # A replaced label is the old one by chance: half the noise times 3 of 4 classes.
    assert changed == pytest.approx(label_noise / 2 * 3 / 4, abs=0.06)
    assert (changed == 0) == (label_noise == 0)


def test_no_noise_is_the_objects_themselves() -> None:
    group, targets = make([3], label_noise=0.0, box_noise=0.0)
    wanted = normalise(targets[0].boxes, SIZES[0]).repeat(8, 1)
    torch.testing.assert_close(group.reference[0], wanted)


def test_without_objects_there_are_no_queries_but_gradients() -> None:
    group, _ = make([0, 0])
    assert (group.count, group.parts) == (0, 1)
    assert group.content.shape == (2, 0, 8)
    assert group.reference.shape == (2, 0, 4)
    assert group.content.requires_grad


def test_noise_belongs_to_the_image() -> None:
    """Beside whichever other image, as long as there are as many groups."""
    alone, _ = make([4])
    beside, _ = make([4, 1])
    torch.testing.assert_close(alone.reference[0], beside.reference[0])
    torch.testing.assert_close(alone.content[0], beside.content[0])
    again, targets = make([4])
    assert torch.equal(alone.reference, again.reference)
    targets[0].seed = 99
    module = DenoisingQueries(DenoisingConfig(queries=12), 8, CLASSES, 1e-3)
    assert not torch.equal(module(SIZES[:1], targets).reference, alone.reference)
