"""The original implementation's record of its heads, and our heads with its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codetr.config import (
    AnyHeadConfig,
    AtssConfig,
    FasterRcnnConfig,
    PositiveQueryConfig,
    RcnnConfig,
    RpnConfig,
)
from codetr.heads import build_head
from codetr.heads.atss import AtssHead
from codetr.heads.faster_rcnn import FasterRcnnHead
from codetr.structures import Detections, Size, Targets

GOLDEN = Path(__file__).parents[1] / "golden"
EDGE_CASES = ("empty1", "allempty", "trunc")
STRIDES = (8, 16, 32, 64, 128)

FASTER_RCNN_NAMES = {
    "rpn_head.rpn_conv": "rpn.conv",
    "rpn_head.rpn_cls": "rpn.cls",
    "rpn_head.rpn_reg": "rpn.reg",
    "roi_head.0.bbox_head.shared_fcs.0": "rcnn.fc1",
    "roi_head.0.bbox_head.shared_fcs.1": "rcnn.fc2",
    "roi_head.0.bbox_head.fc_cls": "rcnn.cls",
    "roi_head.0.bbox_head.fc_reg": "rcnn.reg",
}
TOWER_NAMES = {
    "cls_convs.0.conv": "cls_tower.0.conv",
    "cls_convs.0.gn": "cls_tower.0.norm",
    "reg_convs.0.conv": "reg_tower.0.conv",
    "reg_convs.0.gn": "reg_tower.0.norm",
} | {f"scales.{level}.scale": f"scales.{level}" for level in range(5)}
ATSS_NAMES = {"atss_cls": "cls", "atss_reg": "reg", "atss_centerness": "quality"} | TOWER_NAMES


@dataclass
class Case:
    """One recorded forward pass; ``outputs`` has the names of the golden README."""

    outputs: dict[str, Tensor]
    targets: list[Targets]
    sizes: list[Size]
    config: dict[str, Any]
    gradient_norms: dict[str, float]


def load_case(name: str) -> Case:
    """``co_deformable``, or the name of an edge case, which has the same images and weights."""
    main = GOLDEN / "co_deformable"
    folder = main if name == "co_deformable" else GOLDEN / "co_deformable_edge" / name
    inputs = torch.load(folder / "inputs.pt", weights_only=True)
    same_for_all = torch.load(main / "outputs.pt", weights_only=True)
    shared = ("10_", "13_", "15_", "18_", "30_", "31_")
    outputs = {k: v for k, v in same_for_all.items() if k.startswith(shared)}
    return Case(
        outputs | torch.load(folder / "outputs.pt", weights_only=True),
        [
            Targets(boxes, labels)
            for boxes, labels in zip(inputs["gt_bboxes"], inputs["gt_labels"], strict=True)
        ],
        [(height, width) for height, width in inputs["img_shape"]],
        json.loads((folder / "config.json").read_text()),
        json.loads((folder / "grads.json").read_text())["grad_norms"],
    )


def pyramid_of(case: Case) -> list[Tensor]:
    return [case.outputs[f"10_memory_level.{level}"].clone() for level in range(5)]


def renamed(state: dict[str, Tensor], names: dict[str, str], prefix: str = "") -> dict[str, Tensor]:
    """The entries of ``state`` under ``prefix``, by our names."""
    result = {}
    for key, value in state.items():
        for theirs, ours in names.items():
            if key.removeprefix(prefix).startswith(theirs) and key.startswith(prefix):
                result[key.removeprefix(prefix).replace(theirs, ours)] = value
    return result


def faster_rcnn(case: Case) -> FasterRcnnHead:
    rpn = {k: v for k, v in case.config["rpn"].items() if k in RpnConfig.model_fields}
    rcnn = {k: v for k, v in case.config["rcnn"].items() if k in RcnnConfig.model_fields}
    config = FasterRcnnConfig(rpn=RpnConfig(**rpn), rcnn=RcnnConfig(**rcnn))
    head = _build(config, PositiveQueryConfig(official_defects=True))
    state = torch.load(GOLDEN / "co_deformable" / "model.pt", weights_only=True)
    head.load_state_dict(renamed(state, FASTER_RCNN_NAMES))
    return head


def atss(case: Case, official_defects: bool = True) -> AtssHead:
    fields = {k: v for k, v in case.config["atss"].items() if k in AtssConfig.model_fields}
    head = _build(AtssConfig(**fields), PositiveQueryConfig(official_defects=official_defects))
    state = torch.load(GOLDEN / "co_deformable" / "model.pt", weights_only=True)
    head.load_state_dict(renamed(state, ATSS_NAMES, "bbox_head.0."))
    return head


def _build(config: AnyHeadConfig, positives: PositiveQueryConfig) -> Any:
    return build_head(
        config,
        name=config.type,
        channels=32,
        num_classes=5,
        strides=STRIDES,
        positive_config=positives,
    )


def replay(
    monkeypatch: pytest.MonkeyPatch, outputs: dict[str, Tensor], *parts: str
) -> Callable[[], None]:
    """Make ``torch.randperm`` give the recorded draws of ``parts`` ("rpn", "rcnn") in order.

    Returns a function that checks that all of them were used.
    """
    keys = sorted(k for k in outputs if k.startswith("21_") and k.split(".")[2] in parts)
    draws: Iterator[Tensor] = iter([outputs[k].long() for k in keys])

    def recorded(n: int, generator: torch.Generator | None = None) -> Tensor:
        draw = next(draws)
        assert len(draw) == n, f"a draw of {n} where the original drew from {len(draw)}"
        return draw

    monkeypatch.setattr(torch, "randperm", recorded)

    def all_used() -> None:
        assert next(draws, None) is None, "fewer draws than the original made"

    return all_used


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """Equal to ``tolerance`` of the tensor's scale."""
    assert ours.shape == theirs.shape
    if theirs.numel():
        scale = theirs.float().abs().max().clamp(min=1e-6)
        assert (ours.float() - theirs.float()).abs().max() <= tolerance * scale


def assert_same_detections(ours: Detections, theirs: Detections, tolerance: float = 1e-3) -> None:
    """Equal as sets: every detection has its like on the other side, whatever the order."""
    assert len(ours) == len(theirs)
    for a, b in ((ours, theirs), (theirs, ours)):
        distance = (a.boxes[:, None] - b.boxes).abs().amax(-1)
        distance = distance + 100 * (a.scores[:, None] - b.scores).abs()
        distance = distance.masked_fill(a.labels[:, None] != b.labels, torch.inf)
        assert distance.amin(1).max() <= tolerance * 160


def recorded_detections(case: Case, branch: str, image: int) -> Detections:
    prefix = f"31_det.{branch}.rescale0.img{image}"
    boxes, scores, labels = (case.outputs[f"{prefix}.{x}"] for x in ("boxes", "scores", "labels"))
    return Detections(boxes, scores, labels.long())
