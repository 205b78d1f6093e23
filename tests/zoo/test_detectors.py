"""The zoo's detectors: their settings, and each of them trained and used at small sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_detector import images, objects
from tiny_training import FASTER_RCNN, merged

import codetr.zoo
from codetr.config import DetectorConfig, parse, read_yaml
from codetr.detector import CoDETR

FILES = sorted(Path(codetr.zoo.__file__).parent.glob("*.yaml"))
every = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)

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


def zoo(name: str) -> DetectorConfig:
    (file,) = [file for file in FILES if file.stem == name]
    return parse(DetectorConfig, read_yaml(file), name)


@every
def test_each_says_what_it_is_and_is_valid(file: Path) -> None:
    config = parse(DetectorConfig, read_yaml(file), file.name)
    assert file.read_text().startswith("# ")
    assert config.backbone.name == "resnet50"
    assert config.k == (2 if file.stem.startswith("co-") else 0)


@every
def test_each_trains_and_detects_with_two_heads(file: Path) -> None:
    """The zoo's own settings, with other sizes."""
    settings = merged(read_yaml(file), SMALL)
    if "one_to_many" in settings:
        settings["one_to_many"]["queries"] = 12
    torch.manual_seed(0)
    model = CoDETR(parse(DetectorConfig, settings, file.name)).train()
    batch = images([(64, 96), (48, 64)])
    output = model(batch, [objects(3, (64, 96)), objects(0, (48, 64), 1)])
    output.total.backward()
    assert output.total.isfinite()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(len(found) > 0 for found in model.eval()(batch))


def test_deformable_detr_plus_plus_is_the_default() -> None:
    assert zoo("deformable-detr++-r50") == DetectorConfig()


def test_dino_is_co_dino_without_heads() -> None:
    """But for Soft-NMS and what only heads read."""
    changes = {"heads": (), "positive_queries": DetectorConfig().positive_queries}
    changes["soft_nms"] = DetectorConfig().soft_nms
    assert zoo("dino-5scale-r50") == zoo("co-dino-5scale-r50").model_copy(update=changes)


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
    one, other = zoo(with_groups), zoo(without)
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
