"""The one-stage heads against the original's, alone, with weights and maps of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from golden_heads import (
    ATSS_NAMES,
    GOLDEN,
    STRIDES,
    TOWER_NAMES,
    assert_close,
    assert_same_detections,
    renamed,
)
from torch import Tensor

from codetr.boxes import encode_distances
from codetr.config import HEAD_CONFIGS, PositiveQueryConfig
from codetr.heads import build_head
from codetr.heads.dense import flatten_maps
from codetr.heads.one_stage import OneStageHead
from codetr.structures import Detections, Targets

NAMES = {
    "atss": ATSS_NAMES,
    "retinanet": TOWER_NAMES | {"retina_cls": "cls", "retina_reg": "reg"},
    "fcos": TOWER_NAMES | {"conv_cls": "cls", "conv_reg": "reg", "conv_centerness": "quality"},
    "paa": ATSS_NAMES,
    "gfl": TOWER_NAMES | {"gfl_cls": "cls", "gfl_reg": "reg"},
}
LOSSES = {"cls": "cls", "giou": "bbox", "centerness": "centerness", "iou": "iou", "dfl": "dfl"}


@dataclass
class Run:
    name: str
    head: OneStageHead
    features: list[Tensor]
    targets: list[Targets]
    sizes: list[tuple[int, int]]
    outputs: dict[str, Any]


@pytest.fixture(scope="module", params=NAMES)
def run(request: pytest.FixtureRequest) -> Run:
    name = request.param
    record = torch.load(GOLDEN / "heads" / f"{name}.pt", weights_only=True)
    head = build_head(
        HEAD_CONFIGS[name](),
        name=name,
        channels=32,
        num_classes=5,
        strides=STRIDES,
        positive_config=PositiveQueryConfig(),
    )
    head.load_state_dict(renamed(record["state_dict"], NAMES[name]))
    assert isinstance(head, OneStageHead)
    targets = [
        Targets(boxes, labels)
        for boxes, labels in zip(record["gt_bboxes"], record["gt_labels"], strict=True)
    ]
    sizes = [(height, width) for height, width in record["img_shape"]]
    features = [f.requires_grad_() for f in record["feats"]]
    return Run(name, head, features, targets, sizes, record["outputs"])


def test_raw_outputs(run: Run) -> None:
    prediction, raw = run.head.predict(run.features), run.outputs["raw"]
    deltas = prediction.deltas
    if run.name == "fcos":
        deltas = deltas.relu()  # ours is part of decoding
    assert_close(prediction.logits, flatten_maps(raw["cls"], 5))
    assert_close(deltas, flatten_maps(raw["reg"], run.head.values))
    assert (prediction.quality is not None) == ("ctr" in raw)
    if prediction.quality is not None:
        assert_close(prediction.quality, flatten_maps(raw["ctr"], 1).squeeze(-1))


def test_losses_and_gradients(run: Run) -> None:
    output = run.head(run.features, run.sizes, run.targets)
    weights = run.head.config.loss_weights()
    assert output.losses.keys() == weights.keys()
    for term, value in output.losses.items():
        expected = run.outputs[f"loss.loss_{LOSSES[term]}"]
        torch.testing.assert_close(value * weights[term], expected, rtol=1e-5, atol=1e-6)
    total = torch.stack([weights[term] * value for term, value in output.losses.items()]).sum()
    torch.testing.assert_close(total, torch.as_tensor(run.outputs["total"]))
    gradients = torch.autograd.grad(total, [*run.head.parameters(), *run.features])
    names = [name for name, _ in run.head.named_parameters()]
    ours = {name: g.norm() for name, g in zip(names, gradients, strict=False)}
    recorded = renamed(run.outputs["grad_norm"], NAMES[run.name])
    assert ours.keys() == recorded.keys()
    for name, norm in recorded.items():
        assert ours[name].item() == pytest.approx(float(norm), rel=1e-4, abs=1e-6), name
    norms = torch.stack([g.norm() for g in gradients[len(names) :]])
    torch.testing.assert_close(norms, run.outputs["grad_feats_norm"], rtol=1e-4, atol=1e-6)


def test_labels(run: Run) -> None:
    prediction = run.head.predict(run.features)
    assigned = run.head.assign(prediction, run.sizes, run.targets)
    found = run.head.matched(prediction, assigned, run.targets)
    if run.name == "fcos":  # points of both images, level by level
        expected = torch.cat([x.view(2, -1) for x in run.outputs["labels_per_level"]], dim=1)
        sides = [x.view(2, -1, 4) for x in run.outputs["ltrb_targets_per_level"]]
        distances = encode_distances(found.centres, found.boxes) / found.strides[:, None]
        assert_close(distances, torch.cat(sides, dim=1)[found.image, found.anchor], 1e-6)
    elif run.name == "paa":
        expected = torch.stack(run.outputs["reassign_labels"])
        assert (assigned >= 0).sum(1).tolist() == [int(n) for n in run.outputs["reassign_num_pos"]]
    else:
        expected = torch.cat(run.outputs["labels_per_level"], dim=1)
    assert torch.equal(found.labels, expected.long())


def test_detections(run: Run) -> None:
    found = run.head.detect(run.features, run.sizes)
    for ours, (boxes, scores, labels) in zip(found, run.outputs["detections"], strict=True):
        theirs = Detections(boxes[:, :4], scores, labels)
        if run.name == "paa":
            assert_same_detections(*with_area(ours, theirs))
        else:
            assert_same_detections(ours, theirs)


def with_area(ours: Detections, theirs: Detections) -> tuple[Detections, Detections]:
    """Without boxes that clipping left no area: nothing votes for them, not even they themselves.

    The original then divides zero by zero; ours stay where they are.
    """
    assert len(ours) == len(theirs)
    assert ours.boxes.isfinite().all()
    sides = ours.boxes[:, 2:] - ours.boxes[:, :2]
    area, finite = (sides > 0).all(1), theirs.boxes.isfinite().all(1)
    assert area.sum() == finite.sum() > len(ours) / 2
    return tuple(
        Detections(d.boxes[keep], d.scores[keep], d.labels[keep])
        for d, keep in ((ours, area), (theirs, finite))
    )
