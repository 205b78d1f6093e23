"""Single heads against torchvision's and closed forms; what an assignment must not depend on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_heads import CLASSES, SIZE, STRIDES, random_pyramid, random_targets, small_head
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou, generalized_box_iou_loss

from codetr.heads.fcos import FcosHead
from codetr.heads.gfl import GflHead
from codetr.heads.one_stage import OneStageHead, Prediction
from codetr.heads.paa import vote
from codetr.heads.retinanet import RetinaNetHead as OurRetinaNet
from codetr.structures import Detections, Targets

ONE_STAGE = ("atss", "retinanet", "fcos", "paa", "gfl")
SEEDS = st.integers(0, 2**32)


def one_stage(name: str) -> OneStageHead:
    head = small_head(name)
    assert isinstance(head, OneStageHead)
    return head


def random_prediction(head: OneStageHead, seed: int, images: int = 1) -> Prediction:
    """The head's, with other numbers: as after some training."""
    generator = torch.Generator().manual_seed(seed)
    prediction = head.predict(random_pyramid(images))

    def noise(like: Tensor, scale: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * scale

    return Prediction(
        prediction.anchors,
        noise(prediction.logits, 2.0),
        noise(prediction.deltas, 0.5),
        None if prediction.quality is None else noise(prediction.quality, 1.0),
    )


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_retinanet_is_torchvisions(seed: int) -> None:
    head = one_stage("retinanet")
    assert isinstance(head, OurRetinaNet)
    prediction, targets = random_prediction(head, seed), random_targets([4], seed)
    anchors, objects = prediction.anchors.boxes, targets[0].boxes
    assigned = head.assign(prediction, [SIZE], targets)
    ours = head._losses(prediction, assigned, targets)

    # Without the anchors that objects keep, which torchvision gives to others, they match alike.
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    overlaps = box_iou(objects, anchors)
    matched = matcher(overlaps)
    assert torch.equal(assigned[0] >= 0, matched >= 0)
    assert torch.equal(assigned[0][assigned[0] < 0], matched[matched < 0])
    kept = (overlaps == overlaps.amax(1, keepdim=True)).any(0)
    assert torch.equal(assigned[0][~kept], matched[~kept])

    theirs = RetinaNetHead(8, 9, CLASSES)
    theirs.regression_head._loss_type = "giou"
    losses = theirs.compute_loss(
        [{"boxes": objects, "labels": targets[0].labels}],
        {"cls_logits": prediction.logits, "bbox_regression": prediction.deltas},
        [anchors],
        [assigned[0]],
    )
    torch.testing.assert_close(ours["cls"], losses["classification"])
    torch.testing.assert_close(ours["giou"], losses["bbox_regression"], rtol=1e-4, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_fcos_losses_are_torchvisions(seed: int) -> None:
    head = one_stage("fcos")
    assert isinstance(head, FcosHead)
    prediction, targets = random_prediction(head, seed), random_targets([4], seed)
    anchors = prediction.anchors
    assigned = head.assign(prediction, [SIZE], targets)
    ours = head._losses(prediction, assigned, targets)
    half = anchors.strides[:, None] / 2
    cells = torch.cat((anchors.centres - half, anchors.centres + half), dim=1)
    assert prediction.quality is not None
    losses = FCOSHead(32, 1, CLASSES).compute_loss(
        [{"boxes": targets[0].boxes, "labels": targets[0].labels}],
        {
            "cls_logits": prediction.logits,
            "bbox_regression": prediction.deltas.relu(),
            "bbox_ctrness": prediction.quality[..., None],
        },
        [cells],
        [assigned[0].clamp(min=-1)],
    )
    torch.testing.assert_close(ours["cls"], losses["classification"])
    torch.testing.assert_close(ours["centerness"], losses["bbox_ctrness"])
    # torchvision weighs all boxes alike, the paper's later version by centerness.
    found = head.matched(prediction, assigned, targets)
    left, top = (found.centres - found.boxes[:, :2]).unbind(1)
    right, bottom = (found.boxes[:, 2:] - found.centres).unbind(1)
    weights = torch.sqrt(
        torch.minimum(left, right)
        / torch.maximum(left, right)
        * torch.minimum(top, bottom)
        / torch.maximum(top, bottom)
    )
    giou = generalized_box_iou_loss(found.predicted, found.boxes)
    if len(giou):
        torch.testing.assert_close(ours["giou"], (giou * weights).sum() / weights.sum())
        same = generalized_box_iou_loss(found.predicted, found.boxes, reduction="mean")
        torch.testing.assert_close(same, losses["bbox_regression"], rtol=1e-4, atol=1e-5)


def test_gfl_reads_distances_off_distributions() -> None:
    """All mass on two neighbouring bins gives the distance between them."""
    head = one_stage("gfl")
    assert isinstance(head, GflHead)
    deltas = torch.full((1, 4, 17), -1e4)
    for side, (low, share) in enumerate([(0, 0.25), (3, 0.5), (15, 0.75), (7, 0.0)]):
        deltas[0, side, low] = torch.tensor(1 - share).log()
        deltas[0, side, low + 1] = torch.tensor(share).log().clamp(min=-1e4)
    anchors = torch.tensor([[-16.0, -16.0, 48.0, 48.0]])  # centre 16, 16
    box = head.decode(anchors, torch.tensor([8.0]), deltas.flatten(1))
    expected = [16 - 8 * 0.25, 16 - 8 * 3.5, 16 + 8 * 15.75, 16 + 8 * 7.0]
    torch.testing.assert_close(box, torch.tensor([expected]))


def test_gfl_distances_beyond_the_last_bin_stay_below_it() -> None:
    head, targets = one_stage("gfl"), random_targets([2])
    targets[0].boxes[0] = torch.tensor([0.0, 0.0, 5000.0, 60.0])
    prediction = head.predict(random_pyramid(1))
    assigned = torch.zeros_like(prediction.logits[..., 0], dtype=torch.int64)
    assert all(v.isfinite() for v in head._losses(prediction, assigned, targets).values())


def test_votes() -> None:
    """A box moves to the mean of its class's boxes around it; one that nothing overlaps stays."""
    boxes = torch.tensor(
        [[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 9], [50, 50, 60, 60], [7, 7, 7, 9]]
    )
    voters = Detections(
        boxes, torch.tensor([0.8, 0.4, 0.9, 0.5, 0.2]), torch.tensor([1, 1, 2, 1, 1])
    )
    chosen = Detections(boxes[[0, 3, 4]], voters.scores[[0, 3, 4]], voters.labels[[0, 3, 4]])
    voted = vote(chosen, voters)
    weight = 0.4 * torch.tensor(-(0.2**2) / 0.025).exp() / 0.8
    torch.testing.assert_close(voted.boxes[0, 3], (10 + 8 * weight) / (1 + weight))
    assert torch.equal(voted.boxes[1:], boxes[3:])
    assert torch.equal(voted.scores, chosen.scores)


@pytest.mark.parametrize("name", ONE_STAGE)
@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_order_of_objects_does_not_matter(name: str, seed: int) -> None:
    """But for an anchor that several objects must keep as their best: the last of them does."""
    head, targets = one_stage(name), random_targets([4], seed)
    # Anchors that hold several objects would be the best of all of them.
    smaller = {"retinanet": {"octave_base_scale": 1}, "paa": {"anchor_scale": 1.5}}
    head.config = head.config.model_copy(update=smaller.get(name, {}))
    prediction = random_prediction(head, seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    objects = targets[0]
    shuffled = [Targets(objects.boxes[order], objects.labels[order])]
    ours, other = (head.assign(prediction, [SIZE], t)[0] for t in (targets, shuffled))
    overlaps = box_iou(objects.boxes, prediction.anchors.boxes)
    contested = (overlaps == overlaps.amax(1, keepdim=True)).sum(0) > 1
    assume(name not in ("retinanet", "paa") or not contested.any())
    assert torch.equal(ours, torch.where(other >= 0, order[other.clamp(min=0)], other))


@pytest.mark.parametrize("name", ONE_STAGE)
@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_horizontal_flip_flips_the_positives(name: str, seed: int) -> None:
    """A grid without offset is its own mirror image about its middle column, one with half a cell
    about the middle of the map. PAA's predictions are no mirror images: only its candidates are."""
    head = one_stage(name)
    head.strides = (8,)
    columns = 13
    mirror = 8 * (columns if name == "fcos" else columns - 1)
    pyramid = [torch.zeros(1, random_pyramid(1)[0].shape[1], 9, columns)]
    prediction = head.predict(pyramid)
    generator = torch.Generator().manual_seed(seed)
    # Larger than the smallest anchors: several that hold all of an object would overlap it alike.
    corner = torch.rand(3, 2, generator=generator) * torch.tensor([40.0, 20.0])
    boxes = torch.cat((corner, corner + 38 + 24 * torch.rand(3, 2, generator=generator)), 1)
    flipped = torch.stack((mirror - boxes[:, 2], boxes[:, 1], mirror - boxes[:, 0], boxes[:, 3]), 1)
    labels = torch.zeros(3, dtype=torch.int64)
    assign = head.candidates if name == "paa" else None  # type: ignore[attr-defined]

    def positive(boxes: Tensor) -> Tensor:
        targets, sizes = [Targets(boxes, labels)], [(200, 200)]
        if assign is not None:
            assigned = assign(prediction.anchors, sizes, targets)
        else:
            assigned = head.assign(prediction, sizes, targets)
        return (assigned[0] >= 0).view(9, columns, -1)

    assert torch.equal(positive(boxes), positive(flipped).flip(1))


def test_fcos_ranges_and_query_boxes_follow_the_strides() -> None:
    head = one_stage("fcos")
    assert isinstance(head, FcosHead)
    anchors = head.anchors(random_pyramid(1))
    ranges = head._ranges(anchors)
    first = [sum(anchors.counts[:level]) for level in range(len(STRIDES))]
    assert ranges[first].tolist() == [[-1, 64], [64, 128], [128, 256], [256, torch.inf]]
    sides = anchors.boxes[first, 2:] - anchors.boxes[first, :2]
    assert sides.tolist() == [[8.0 * s] * 2 for s in STRIDES]  # table 1
    assert anchors.centres[0].tolist() == [4, 4]
