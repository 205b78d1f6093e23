"""The zoo's detectors: each of them trained and used at small sizes, and how they are related."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_detector import images, objects
from tiny_training import FASTER_RCNN, merged

from codetr.config import DetectorConfig, parse
from codetr.detector import CoDETR
from codetr.zoo import detector_config, entries

RESNETS = [
    found.name
    for found in entries()
    if not found.unavailable and found.config.backbone.name == "resnet50"
]

SMALL: dict[str, Any] = {
    "num_classes": 3,
    "backbone": {"name": "tiny", "pretrained": False},
    "transformer": {
        "embed_dim": 32,
        "ffn_dim": 64,
        "attention_heads": 4,
        "sampling_points": 2,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "group_norm_groups": 8,
    },
    "queries": {"count": 12},
    "heads": ["atss", FASTER_RCNN],
}


@pytest.mark.parametrize("name", RESNETS)
def test_each_trains_and_detects_with_two_heads(name: str) -> None:
    """The zoo's own settings, with other sizes."""
    settings = merged(detector_config(name).model_dump(mode="json"), SMALL)
    if settings["one_to_many"]["groups"]:
        settings["one_to_many"]["queries"] = 12
    torch.manual_seed(0)
    model = CoDETR(parse(DetectorConfig, settings, name)).train()
    batch = images([(64, 96), (48, 64)])
    output = model(batch, [objects(3, (64, 96)), objects(0, (48, 64), 1)])
    output.total.backward()
    assert output.total.isfinite()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(len(found) > 0 for found in model.eval()(batch))


def test_deformable_detr_plus_plus_is_the_default() -> None:
    assert detector_config("deformable-detr++-r50") == DetectorConfig()


def test_dino_is_co_dino_without_heads() -> None:
    """But for Soft-NMS and the class loss, which is focal loss in DINO (method.md 34)."""
    co_dino, plain = detector_config("co-dino-5scale-r50"), DetectorConfig()
    assert co_dino.query_loss.classification == "quality_focal"
    focal = co_dino.query_loss.model_copy(update={"classification": "focal"})
    changes = {"heads": (), "soft_nms": plain.soft_nms, "query_loss": focal}
    assert detector_config("dino-5scale-r50") == co_dino.model_copy(update=changes)


@pytest.mark.parametrize("backbone", ["r50", "swin-l"])
def test_dino_with_heads_differs_from_dino_in_them_alone(backbone: str) -> None:
    """Table 3."""
    plain = detector_config(f"dino-5scale-{backbone}")
    for suffix, kinds in (("k1", ["atss"]), ("k2", ["faster_rcnn", "atss"])):
        config = detector_config(f"dino-5scale-{backbone}-{suffix}")
        assert [head.type for head in config.heads] == kinds
        assert config.model_copy(update={"heads": ()}) == plain


@pytest.mark.parametrize(
    ("with_groups", "without"),
    [
        ("h-deformable-detr-r50", "deformable-detr++-r50"),
        ("group-detr-r50", "deformable-detr++-r50"),
        ("group-detr-c5-r50", "conditional-detr-c5-r50"),
    ],
)
def test_further_groups_are_all_that_differs(with_groups: str, without: str) -> None:
    """So that inference is the same detector, with no parameter more."""
    one, other = detector_config(with_groups), detector_config(without)
    assert one.model_copy(update={"one_to_many": other.one_to_many}) == other
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in CoDETR(unpretrained(config)).inference_parameters())
            for config in (one, other)
        ]
    assert counts[0] == counts[1]


def unpretrained(config: DetectorConfig) -> DetectorConfig:
    backbone = config.backbone.model_copy(update={"pretrained": False})
    return config.model_copy(update={"backbone": backbone})
