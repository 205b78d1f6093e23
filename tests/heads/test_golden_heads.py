"""The heads against the original implementation's record of every step."""

from __future__ import annotations

import pytest
import torch
from golden_heads import (
    ATSS_NAMES,
    EDGE_CASES,
    FASTER_RCNN_NAMES,
    Case,
    assert_close,
    assert_same_detections,
    atss,
    faster_rcnn,
    load_case,
    pyramid_of,
    recorded_detections,
    renamed,
    replay,
)
from torch import Tensor

from codetr.heads.head import Head
from codetr.structures import HeadOutput

LOSSES = {
    "rpn_cls": ("rpn", "cls_weight", "loss_rpn_cls"),
    "rpn_l1": ("rpn", "l1_weight", "loss_rpn_bbox"),
    "rcnn_cls": ("rcnn", "cls_weight", "loss_cls0"),
    "rcnn_giou": ("rcnn", "giou_weight", "loss_bbox0"),
    "cls": ("atss", "cls_weight", "loss_cls1"),
    "giou": ("atss", "giou_weight", "loss_bbox1"),
    "centerness": ("atss", "centerness_weight", "loss_centerness1"),
}


@pytest.fixture(scope="module", params=["co_deformable", *EDGE_CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return load_case(request.param)


def assert_losses(output: HeadOutput, case: Case) -> None:
    for name, value in output.losses.items():
        part, weight, recorded = LOSSES[name]
        expected = case.outputs[f"22_loss.{recorded}"]
        torch.testing.assert_close(
            value * case.config[part][weight], expected, rtol=1e-5, atol=1e-6
        )


def assert_gradients(
    head: Head, output: HeadOutput, case: Case, names: dict[str, str], prefix: str = ""
) -> None:
    """The parameters of a head get gradients from its own losses alone."""
    weights = {name: case.config[part][weight] for name, (part, weight, _) in LOSSES.items()}
    torch.stack([value * weights[name] for name, value in output.losses.items()]).sum().backward()
    norms = {k: torch.tensor(v) for k, v in case.gradient_norms.items()}
    expected = renamed(norms, names, prefix)
    parameters = dict(head.named_parameters())
    assert expected.keys() == parameters.keys()
    for name, norm in expected.items():
        gradient = parameters[name].grad
        assert gradient is not None
        assert gradient.norm().item() == pytest.approx(norm.item(), rel=5e-3, abs=1e-5)


def flat(maps: Tensor, values: int) -> Tensor:
    """(B, A * values, h, w) as the heads lay it out: (B, h * w * A, values)."""
    return maps.permute(0, 2, 3, 1).reshape(len(maps), -1, values)


def test_rpn_predictions_and_samples(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    rpn, outputs = faster_rcnn(case).rpn, case.outputs
    prediction = rpn(pyramid_of(case))
    anchors = prediction.anchors
    logits = prediction.logits[..., None].split(anchors.counts, dim=1)
    deltas = prediction.deltas.split(anchors.counts, dim=1)
    for level in range(5):
        assert_close(logits[level], flat(outputs[f"13_rpn.cls.{level}"], 1))
        if level > 0:  # the finest level's deltas were not recorded
            assert_close(deltas[level], flat(outputs[f"13_rpn.reg.{level}"], 4))

    all_used = replay(monkeypatch, outputs, "rpn")
    assigned = rpn.assign(anchors, case.sizes, case.targets)
    for image, (positive, negative) in enumerate(rpn.sample(assigned, case.targets)):
        expected = {
            k.rsplit(".")[-1]: v
            for k, v in outputs.items()
            if k.startswith(f"14_rpn_tgt.img{image}.")
        }
        assert len(anchors.boxes) == expected["num_anchors"]
        assert anchors.valid(case.sizes)[image].sum() == expected["num_valid"]
        assert torch.equal(positive, expected["pos_index"].long())
        assert torch.equal(negative, expected["neg_index"].long())
        assert torch.equal(assigned[image, positive], expected["pos_gt_index"])
        assert_close(anchors.boxes[positive], expected["pos_anchor_xyxy"], 1e-6)
    all_used()


@pytest.mark.parametrize(("per_level", "recorded"), [(4000, "15_rpn"), (1000, "30_test.rpn")])
def test_rpn_proposals(per_level: int, recorded: str) -> None:
    case = load_case("co_deformable")
    rpn = faster_rcnn(case).rpn
    proposals = rpn.propose(rpn(pyramid_of(case)), case.sizes, per_level)
    for image, boxes in enumerate(proposals):
        expected = case.outputs[f"{recorded}_proposals.img{image}"][:, :4]
        assert len(boxes) <= 1000
        distance = (boxes[: len(expected), None] - expected).abs().amax(-1)
        assert distance.amin(0).max() < 1e-2
        assert distance.amin(1).max() < 1e-2


def test_faster_rcnn(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    head, outputs = faster_rcnn(case), case.outputs
    proposals = [outputs[f"15_rpn_proposals.img{image}"][:, :4] for image in range(2)]
    monkeypatch.setattr(head.rpn, "propose", lambda *_: proposals)
    all_used = replay(monkeypatch, outputs, "rpn", "rcnn")
    output = head(pyramid_of(case), case.sizes, case.targets)
    all_used()
    assert set(output.losses) == set(head.config.loss_weights())
    assert_losses(output, case)
    assert_gradients(head, output, case, FASTER_RCNN_NAMES)
    for image, positives in enumerate(output.positives):
        prefix = f"16_rcnn_sample.img{image}"
        assert_close(positives.boxes, outputs[f"{prefix}.boxes_xyxy"], 1e-6)
        assert torch.equal(positives.labels, outputs[f"{prefix}.pos_gt_label"])
        assert torch.equal(positives.targets, outputs[f"{prefix}.pos_gt_box"])
        count = len(positives.labels)
        assert torch.equal(positives.positive, torch.arange(count))
        assert torch.equal(positives.negative, torch.arange(count, len(positives.boxes)))
        assert len(positives.negative) == outputs[f"20_aux0.img{image}.num_neg_candidates"]


def test_rcnn_features_and_predictions() -> None:
    case = load_case("co_deformable")
    rcnn, outputs = faster_rcnn(case).rcnn, case.outputs
    boxes = [outputs[f"16_rcnn_sample.img{image}.boxes_xyxy"] for image in range(2)]
    features = rcnn.roi_features(pyramid_of(case)[:-1], boxes)
    assert_close(features.cells[:4], outputs["17_rcnn.roi_feat_first4"])
    assert_close(features.means, outputs["17_rcnn.roi_feat_mean"])
    logits, deltas = rcnn.predict(features.cells)
    assert_close(logits, outputs["17_rcnn.cls_logits"])
    assert_close(deltas.flatten(1), outputs["17_rcnn.bbox_deltas"])


def test_atss(case: Case) -> None:
    head, outputs = atss(case), case.outputs
    prediction = head.predict(pyramid_of(case))
    for kind, values, width in (
        ("cls", prediction.logits, 5),
        ("reg", prediction.deltas, 4),
        ("ctr", prediction.quality[..., None], 1),
    ):
        for level, ours in enumerate(values.split(prediction.anchors.counts, dim=1)):
            assert_close(ours, flat(outputs[f"18_atss.{kind}.{level}"], width))
    valid = prediction.anchors.valid(case.sizes).sum(1)

    output = head(pyramid_of(case), case.sizes, case.targets)
    assert set(output.losses) == set(head.config.loss_weights())
    assert_losses(output, case)
    assert_gradients(head, output, case, ATSS_NAMES, "bbox_head.0.")
    for image, positives in enumerate(output.positives):
        prefix = f"19_atss_tgt.img{image}"
        assert valid[image] == outputs[f"{prefix}.num_with_weight"]
        assert torch.equal(positives.positive, outputs[f"{prefix}.pos_index"].long())
        assert torch.equal(positives.labels, outputs[f"{prefix}.pos_label"])
        assert torch.equal(positives.targets, outputs[f"{prefix}.pos_box_target_xyxy"])
        anchors = positives.boxes[positives.positive]
        assert_close(anchors, outputs[f"{prefix}.pos_anchor_xyxy"], 1e-6)


def test_padding_negatives_as_the_original_draws_them() -> None:
    """Image 1 of ``co_deformable`` is filled up from a recorded permutation of its negatives,
    among them anchors of the padding, with all-zero boxes (method.md 49)."""
    case = load_case("co_deformable")
    positives = atss(case)(pyramid_of(case), case.sizes, case.targets).positives[1]
    draw = case.outputs["21_randperm.06.aux1"].long()
    assert len(positives.negative) == len(draw)
    expected = case.outputs["20_aux1.coords_cxcywh"][1]
    chosen = positives.negative[draw[: len(expected) - len(positives.positive)]]
    boxes = positives.boxes[torch.cat((positives.positive, chosen))]
    height, width = case.sizes[1]
    corners = boxes / torch.tensor([width, height, width, height])
    centres = torch.cat(((corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]), 1)
    assert_close(centres, expected, 1e-6)
    features = positives.features[torch.cat((positives.positive, chosen))]
    assert_close(features, case.outputs["20_aux1.feats"][1])
    assert (boxes == 0).all(1).sum() == 12


def test_by_default_negatives_are_anchors_of_the_image() -> None:
    case = load_case("co_deformable")
    head = atss(case, official_defects=False)
    for image, positives in enumerate(head(pyramid_of(case), case.sizes, case.targets).positives):
        sides = positives.boxes[:, 2:] - positives.boxes[:, :2]
        assert (sides > 0).all()
        candidates = len(positives.positive) + len(positives.negative)
        assert candidates == case.outputs[f"19_atss_tgt.img{image}.num_with_weight"]


@pytest.mark.parametrize("branch", ["roi", "atss"])
def test_detections(branch: str) -> None:
    case = load_case("co_deformable")
    head = faster_rcnn(case) if branch == "roi" else atss(case)
    for image, detections in enumerate(head.detect(pyramid_of(case), case.sizes)):
        assert_same_detections(detections, recorded_detections(case, branch, image))
        assert (detections.scores.diff() <= 0).all()
